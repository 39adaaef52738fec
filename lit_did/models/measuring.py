"""Forward passes of a policy and its reference: as the reference, at completion tokens, and without any side effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lit_did.models.loading import is_peft
from lit_did.ops import SequenceStatistics, sequence_statistics

MAX_LOGITS_BYTES = 2**30


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, without gradients.

    Every submodule has its own mode back afterwards: some may be in eval mode on purpose.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapter_off(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """`model`, a PeftModel, as its own reference: without its adapter, in eval mode, without gradients.

    Args:
        adapter: The name of an adapter that is put in its place, such as a frozen copy of its start.
    """
    # peft makes every parameter of an adapter trainable when it puts it back.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    try:
        with evaluating(model):
            if adapter is None:
                with model.disable_adapter():
                    yield
            else:
                try:
                    model.set_adapter(adapter)
                    yield
                finally:
                    model.set_adapter(active)
    finally:
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever random numbers are drawn, those after it are the same as without."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def completion_logits(model: nn.Module, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """The logits [sequences, positions, V] that `model` gives at `positions` [positions] of every sequence.

    Models that can, compute no others: the output layer is skipped for prompt tokens.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    bare = unwrapped(model)
    parameters = inspect.signature((bare.get_base_model() if is_peft(bare) else bare).forward).parameters
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    if "logits_to_keep" in parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what distributes or compiles it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def measure(
    policy: nn.Module,
    reference: nn.Module | None,
    batch: Mapping[str, Tensor],
    *,
    adapter: str | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> SequenceStatistics:
    """The statistics of every completion, [sequences]; both models, and torch's random numbers, stay as they were.

    Args:
        policy: A causal language model.
        reference: Another; None: the policy, a PeftModel, without its adapter.
        batch: `input_ids`, `attention_mask` and shifted `labels` [sequences, T], as `read_batch` returns.
        adapter: With `reference` None: the policy's adapter that is the reference, instead of none.
        temperature, backend: As in `lit_did.sequence_statistics`.
        max_logits_bytes: So many bytes of logits are held at once, about: sequences take turns, at least one each.

    Raises:
        ValueError: `reference` is None and the policy is no PeftModel.
    """
    if reference is None and not is_peft(unwrapped(policy)):
        raise ValueError("Expected `reference`, or a PeftModel as `policy` (whose base model it is), but got neither.")
    policy_as_reference: Callable = lambda: adapter_off(unwrapped(policy), adapter)  # noqa: E731
    labels = batch["labels"]
    rows = _rows_at_once(policy, labels, max_logits_bytes)
    parts = []
    with random_numbers_kept(labels.device), evaluating(policy), evaluating(reference) if reference else nullcontext():
        for start in range(0, labels.shape[0], rows):
            part = {name: value[start : start + rows] for name, value in batch.items()}
            positions = (part["labels"] != -100).any(0).nonzero()[:, 0]
            policy_logits = completion_logits(policy, part, positions)
            with nullcontext() if reference else policy_as_reference():
                reference_logits = completion_logits(reference or policy, part, positions)
            parts.append(
                sequence_statistics(
                    policy_logits,
                    reference_logits.to(policy_logits.device),
                    part["labels"][:, positions],
                    temperature=temperature,
                    backend=backend,
                )
            )
    return SequenceStatistics(*map(torch.cat, zip(*parts, strict=True)))


def _rows_at_once(policy: nn.Module, labels: Tensor, max_logits_bytes: int) -> int:
    config = getattr(unwrapped(policy), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        return max(1, labels.shape[0])
    positions = int((labels != -100).any(0).sum())
    return max(1, max_logits_bytes // max(1, 2 * 4 * positions * vocabulary))  # two models, float32 at the most
