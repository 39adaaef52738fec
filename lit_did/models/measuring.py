"""Forward passes of a policy and its reference: as the reference, at completion tokens, and without any side effect."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_did.models.batches import IGNORE_INDEX
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
    parameters = inspect.signature((model.get_base_model() if is_peft(model) else model).forward).parameters
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
    # What wraps a model scatters its inputs, synchronises it or compiles it: no part of a measurement.
    policy, reference = unwrapped(policy), None if reference is None else unwrapped(reference)
    if reference is None and not is_peft(policy):
        raise ValueError("Expected `reference`, or a PeftModel as `policy` (whose base model it is), but got neither.")
    labels = batch["labels"]
    rows = _rows_at_once(policy, labels, max_logits_bytes)
    parts = []
    with random_numbers_kept(labels.device), evaluating(policy):
        for start in range(0, labels.shape[0], rows):
            part = {name: value[start : start + rows] for name, value in batch.items()}
            positions = (part["labels"] != IGNORE_INDEX).any(0).nonzero()[:, 0]
            policy_logits = completion_logits(policy, part, positions)
            with adapter_off(policy, adapter) if reference is None else evaluating(reference):
                reference_logits = completion_logits(policy if reference is None else reference, part, positions)
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
    config = getattr(policy, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        return max(1, labels.shape[0])
    positions = int((labels != IGNORE_INDEX).any(0).sum())
    return max(1, max_logits_bytes // max(1, 2 * 4 * positions * vocabulary))  # two models, float32 at the most


def check_every_n_steps(every_n_steps: int | None) -> None:
    """Raises ValueError unless it is None or an integer of at least 0."""
    if every_n_steps is not None and (
        isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 0
    ):
        raise ValueError(f"Expected `every_n_steps` to be an integer of at least 0, but got {every_n_steps!r}.")
