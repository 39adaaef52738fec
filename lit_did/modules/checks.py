"""What LitDPO checks of its arguments and its models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_did.arguments import check_choice, check_integer
from lit_did.batches.sequences import Sequences
from lit_did.models.adapters import ADAPTER
from lit_did.models.dropout import active_dropout, random_modules
from lit_did.models.loading import lora_config
from lit_did.models.quantisation import computes_in_half, plain_config
from lit_did.modules.micro_batches import MicroBatches
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend
from lit_did.reference_cache.precompute import CacheKind


def check_micro_batch_tokens(micro_batch_tokens: int | str | None) -> None:
    """Raises TypeError or ValueError unless it is what LitDPO documents."""
    if micro_batch_tokens is not None and micro_batch_tokens != "auto":
        check_integer("micro_batch_tokens", micro_batch_tokens, 1, ", 'auto' or None")


def check_context_parallel_size(size: int, padding_free: bool) -> None:
    """Raises TypeError or ValueError unless it is what LitDPO documents."""
    check_integer("context_parallel_size", size, 1)
    if size > 1 and not padding_free:
        raise ValueError(
            f"Expected `padding_free` to be True with `context_parallel_size={size}`, because processes share rows "
            "without padding, but got False. Leave it out."
        )


def check_training_step(micro_batches: MicroBatches | None) -> MicroBatches:
    """Returns the `micro_batches`. Raises RuntimeError if LitDPO's `training_step`, which makes them, did not run."""
    if micro_batches is None:
        raise RuntimeError(
            "Expected an overridden `training_step` to call `super().training_step(batch, batch_idx)`, which adds the "
            "batch to the metrics, but it was not called. Pass a function as `loss` to minimise another loss."
        )
    return micro_batches


def check_loading(lora: Any, model_kwargs: Any, backend: Any) -> Mapping[str, Any] | None:
    """Raises TypeError or ValueError unless they are what LitDPO documents. Returns `model_kwargs` for checkpoints."""
    check_choice("backend", backend, Backend)
    # A PeftConfig is recognised without importing peft.
    if isinstance(lora, Mapping):
        lora_config(lora)
    elif lora is not None and not hasattr(lora, "peft_type"):
        raise TypeError(f"Expected `lora` to be a peft.LoraConfig, its arguments as a dict or None, but got {lora!r}.")
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"Expected `model_kwargs` to be a dict or None, but got {model_kwargs!r}.")
    return plain_config(model_kwargs)


def cache_folder(cache_reference: Any) -> str | None:
    """`cache_reference` as a string.

    Raises:
        TypeError: It is not a path.
        ValueError: It is empty, which would be the working directory.
    """
    if cache_reference is None:
        return None
    if not isinstance(cache_reference, str | os.PathLike):
        raise TypeError(f"Expected `cache_reference` to be a folder's path or None, but got {cache_reference!r}.")
    if not str(cache_reference):
        raise ValueError("Expected `cache_reference` to be a folder's path, but got an empty one.")
    return os.fspath(cache_reference)


def check_cache_kind(cache_kind: Any, cache_reference: str | None, token_did_entropy_weight: float) -> None:
    """Raises TypeError or ValueError unless the kind of a cache is known, there is a cache, and it suits training."""
    check_choice("cache_kind", cache_kind, CacheKind)
    if cache_kind != "logprobs":
        return
    if cache_reference is None:
        raise ValueError(
            'Expected `cache_reference` to be a folder with `cache_kind="logprobs"`, but got None. Name one, or leave '
            "`cache_kind` out."
        )
    if token_did_entropy_weight:
        raise ValueError(
            'Expected `token_did_entropy_weight` to be 0 with `cache_kind="logprobs"`, because a DID needs whole '
            f"distributions of the reference, but got {token_did_entropy_weight}. Leave `cache_kind` out."
        )


def check_loss_of_logprobs(losses: torch.Tensor, chosen: SequenceStatistics) -> None:
    """Raises ValueError if a loss is NaN because it needs whole distributions of the reference."""
    if losses.isnan().any() and chosen.log_ratio.isfinite().all():
        raise ValueError(
            "Expected `loss` to be a function of log-probabilities, log-ratios, the policy's entropy and numbers of "
            'tokens with `cache_kind="logprobs"`, because all other statistics are NaN, but it returned NaN. Leave '
            "`cache_kind` out."
        )


def check_models(
    policy: str | nn.Module,
    reference: str | nn.Module | None,
    cache_reference: str | None,
    reference_free: bool,
    loss: Any,
) -> tuple[str | nn.Module, str | nn.Module | None]:
    """The policy and the reference, paths as strings.

    Raises:
        TypeError, ValueError: The arguments cannot be a policy and its reference with this loss.
    """
    policy, reference = _path_as_name(policy), _path_as_name(reference)
    for name, model in (("policy", policy), ("reference", reference)):
        if not isinstance(model, str | nn.Module) and not (name == "reference" and model is None):
            raise TypeError(f"Expected `{name}` to be a model or its name, but got {type(model).__name__}.")
    if reference is policy and isinstance(policy, nn.Module):
        raise ValueError(
            "Expected `reference` to be another module than `policy`, because training would change both. Leave it "
            "out to get a frozen copy of `policy`, or load a second model."
        )
    if not reference_free:
        return policy, reference
    named = reference if reference is None or isinstance(reference, str) else type(reference).__name__
    for name, value in (("cache_reference", cache_reference), ("reference", named)):
        if value is not None:
            raise ValueError(
                f"Expected `{name}` to be None with `loss={loss!r}`, which needs no reference, but got {value}."
            )
    return policy, reference


def _path_as_name(model: Any) -> Any:
    """A path as a string, which is not `ADAPTER`, because that is never a path. Anything else is returned as it is."""
    if not isinstance(model, os.PathLike):
        return model
    name = os.fspath(model)
    return os.path.join(os.curdir, name) if name == ADAPTER else name


def keep_noise_out(policy: nn.Module, sequences: Sequences) -> None:
    """Warns if the policy draws random numbers in training mode although dropout is switched off.

    The modules that draw them, such as routers that try experts at random, stay in eval mode if that stops them.
    """
    input_ids = torch.from_numpy(sequences.input_ids)[None].to(next(policy.parameters()).device)
    noisy = random_modules(policy, input_ids)
    if not noisy:
        return
    modules = dict(policy.named_modules())
    named = f"{noisy[0] or 'the model'} ({type(modules[noisy[0]]).__name__})"
    training = [module for module in policy.modules() if module.training]
    silenced: list[str] = []
    while noisy and not set(noisy) & set(silenced):  # the innermost modules first, then those around them
        for name in noisy:
            modules[name].eval()
        silenced += noisy
        noisy = random_modules(policy, input_ids)
    if not noisy:
        warnings.warn(
            f"Some modules of the policy ({len(silenced)}, such as {named}) draw random numbers in training mode, "
            "although all dropout probabilities are 0. LitDPO keeps them in eval mode, so results contain no noise and "
            "you need to do nothing. Pass `disable_dropout=False` if you want the noise.",
            stacklevel=4,
        )
        return
    for module in training:
        module.training = True
    warnings.warn(
        f"Some modules of the policy ({len(noisy)}, such as {named}) return different outputs for the same input in "
        "training mode, also with `disable_dropout=True`. So losses and log-ratios contain noise. Set the modules' "
        "probability to 0. If you want the noise, `disable_dropout=False` silences this warning.",
        stacklevel=4,
    )


def warn_unless_policy_is_reference(policy: nn.Module, adapter: bool, statistics: SequenceStatistics) -> None:
    """Warns, with cause and remedy, if the policy differs from its reference when training starts.

    Args:
        policy: The policy, in the mode in which it is trained.
        adapter: Whether the reference is the policy with its adapter switched off.
        statistics: Of the sequences of the first batch, [sequences].
    """
    log_ratio = statistics.log_ratio.detach()
    parameter = next(policy.parameters())
    autocast = torch.is_autocast_enabled(parameter.device.type)
    full = parameter.dtype == torch.float32 and not autocast and not computes_in_half(policy)
    # Rounding grows with length. A token's log-probability is exact to 1e-5 in float32, to 1e-2 in half precision.
    tolerance = (1e-4 if full else 1e-2) * statistics.num_tokens
    largest = log_ratio.abs().max()
    if not ((log_ratio.abs() > tolerance).any() or largest.isnan()):
        return
    dropping = active_dropout(policy)
    if largest.isnan():
        cause = "the logits of the policy or the reference hold NaN"
        remedy = "Stop, because no result of this run is right. Check the weights, and the Trainer's `precision`."
    elif dropping:
        cause = f"dropout is active in {len(dropping)} modules of the policy. The first is {dropping[0]}"
        remedy = (
            "Log-ratios contain its noise. `disable_dropout=True`, the default, removes it. Ignore this if you want it."
        )
    elif adapter:
        cause = "the adapter does not start at zero, because it was trained before or is not initialised to zero"
        remedy = (
            "The reference is the model without the adapter. To make the policy's start the reference, such as an SFT "
            'adapter, pass `reference="adapter"`. If you want the model without it, ignore this.'
        )
    else:
        cause = "the reference has other weights than the policy, or it computes in another precision"
        remedy = (
            "If you passed another reference on purpose, ignore this: results are right. Otherwise leave `reference` "
            "out, which makes the reference a copy of the policy, or load both from one checkpoint in one dtype."
        )
    warnings.warn(
        "At the first step the policy should equal its reference, so that every log-ratio is 0, but the largest "
        f"|log-ratio| is {largest:.4g} nats. Cause: {cause}. {remedy}",
        stacklevel=3,
    )
