"""Language models, and functions of prefixes, that read token by token and keep what they have read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor, nn

from lit_did.functional.enumeration import NextToken
from lit_did.models.loading import (
    check_adapter_is_all_that_trains,
    check_positions_are_kept,
    check_same_vocabulary,
    check_separate,
    is_peft,
)
from lit_did.models.measuring import unwrapped
from lit_did.models.quiet import adapter_off, evaluating
from lit_did.ops.reference import LARGEST_LOGIT

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unmasked(logits: Tensor) -> Tensor:
    """`logits` with -inf in place of what masks such as -1e9 and finfo.min mean, as the operators have it."""
    return logits.masked_fill(logits < -LARGEST_LOGIT, -torch.inf)


class CachedModel:
    """A transformers causal language model with its keys and values, in eval mode, without gradients.

    A model that returns no `past_key_values` reads everything again at every step: slower, and just as right.

    Args:
        model: A causal language model; its own mode is put back after every read.
        without_adapter: Reads with `model`, a PeftModel, without its adapter.

    Raises:
        TypeError: `model` is no module.
        ValueError: `without_adapter`, and `model` is no PeftModel; or its adapter is made of virtual tokens.
    """

    def __init__(self, model: nn.Module, *, without_adapter: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a causal language model, but got {type(model).__name__}.")
        self._model = unwrapped(model)
        if without_adapter and not is_peft(self._model):
            raise ValueError(f"Expected a PeftModel with `without_adapter`, but got {type(self._model).__name__}.")
        if is_peft(self._model):
            check_positions_are_kept(self._model)
        self._without_adapter = without_adapter
        inner = self._model.get_base_model() if is_peft(self._model) else self._model
        self._accepts = inspect.signature(inner.forward).parameters
        self._cache = None
        self._input_ids: Tensor | None = None  # [n, t], all that was read
        self._mask: Tensor | None = None  # [n, t]

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [n, V] of the token that follows, once `input_ids` [n, t], t >= 1, are read too.

        Args:
            input_ids: int64, on any device.
            attention_mask: [n, t], 0 where a token is padding; without it none is.
        """
        device = next(self._model.parameters()).device
        input_ids = input_ids.to(device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device).long()
        first = self._input_ids is None
        self._input_ids = input_ids if first else torch.cat([self._input_ids, input_ids], 1)
        self._mask = mask if first else torch.cat([self._mask, mask], 1)
        unread = input_ids if self._cache is not None else self._input_ids
        inputs = {"input_ids": unread, "attention_mask": self._mask}
        if "position_ids" in self._accepts:  # padding on the left takes no position
            inputs["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -unread.shape[1] :]
        if "past_key_values" in self._accepts:
            inputs |= {"past_key_values": self._cache, "use_cache": True}
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        with adapter_off(self._model) if self._without_adapter else evaluating(self._model):
            outputs = self._model(**inputs)
        self._cache = getattr(outputs, "past_key_values", None)
        return outputs.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` [m] int64 of what was read, in their order; a row may come several times."""
        rows = rows.to(self._input_ids.device)
        self._input_ids, self._mask = self._input_ids[rows], self._mask[rows]
        if self._cache is not None:
            self._cache.reorder_cache(rows)


class CachedFunction:
    """A function from prefixes [n, t] to logits [n, V], read like a `CachedModel`; it begins with one empty prefix."""

    def __init__(self, function: NextToken, name: str) -> None:
        self._function, self._name = function, name
        self._prefixes = torch.zeros(1, 0, dtype=torch.long)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] once `tokens` [n, t] are read too."""
        self._prefixes = torch.cat([self._prefixes, tokens], 1)
        logits = self._function(self._prefixes)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[:-1] != tokens.shape[:1]:
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Expected `{self._name}` to return floats [{len(tokens)}, V] of {len(tokens)} prefixes, but got {got}."
            )
        return logits

    def select(self, rows: Tensor) -> None:
        """Goes on with the prefixes `rows` [m] int64."""
        self._prefixes = self._prefixes[rows]


def as_readers(
    policy: nn.Module | NextToken, reference: nn.Module | NextToken | None, prompt: Tensor | Sequence[int] | None
) -> tuple[CachedModel, CachedModel, Tensor] | tuple[CachedFunction, CachedFunction, Tensor]:
    """Both models ready to read, and the prompt [1, t] to read first. Raises what `sample_did` says."""
    if not isinstance(policy, nn.Module):
        for name, model in (("policy", policy), ("reference", reference)):
            if not callable(model) or isinstance(model, nn.Module):
                raise TypeError(
                    f"Expected `{name}` to be a function of prefixes, or both to be language models, "
                    f"but got {type(model).__name__}."
                )
        if prompt is not None:
            raise ValueError("Expected `prompt` to be None with functions, which know theirs, but got one.")
        return CachedFunction(policy, "policy"), CachedFunction(reference, "reference"), torch.zeros(1, 0).long()
    if reference is None:
        if not is_peft(unwrapped(policy)):
            raise ValueError("Expected `reference`, or a PeftModel as `policy`, but got neither.")
        check_adapter_is_all_that_trains(unwrapped(policy))
        second = CachedModel(policy, without_adapter=True)
    elif not isinstance(reference, nn.Module):
        raise TypeError(f"Expected `reference` to be a language model, but got {type(reference).__name__}.")
    else:
        check_separate(unwrapped(policy), unwrapped(reference))
        check_same_vocabulary(unwrapped(policy), unwrapped(reference))
        second = CachedModel(reference)
    if prompt is None:
        raise ValueError("Expected `prompt`, the token ids that completions follow, but got None.")
    if not isinstance(prompt, Tensor | list | tuple):
        raise TypeError(
            "Expected `prompt` to be token ids, a tensor or a list (of a BatchEncoding its `input_ids`), "
            f"but got {type(prompt).__name__}."
        )
    prompt = torch.as_tensor(prompt)
    prompt = prompt[None] if prompt.dim() == 1 else prompt
    if prompt.dim() != 2 or len(prompt) != 1 or not prompt.shape[1] or prompt.dtype not in INTEGERS:
        raise ValueError(
            f"Expected `prompt` to be integers of shape [t] or [1, t], t >= 1, but got {prompt.dtype} "
            f"{tuple(prompt.shape)}."
        )
    return CachedModel(policy), second, prompt.long()


def ends_of(policy: nn.Module | NextToken, eos: int | Sequence[int] | str | None) -> list[int]:
    """The tokens that end a completion: `eos`, or with "auto" those of the policy's `generation_config`.

    Raises:
        TypeError: `eos` is something else.
    """
    ends = eos
    if isinstance(eos, str) and eos == "auto":
        config = getattr(unwrapped(policy), "generation_config", None) if isinstance(policy, nn.Module) else None
        ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    try:
        return sorted({index(token) for token in ([ends] if hasattr(ends, "__index__") or ends == "" else ends)})
    except TypeError:
        raise TypeError(f'Expected `eos` to be a token id, several, None or "auto", but got {eos!r}.') from None
