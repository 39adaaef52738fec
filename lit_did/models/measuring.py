"""The statistics of completions under a policy and its reference: in training, and measured without any side effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lit_did.arguments import check_integer
from lit_did.batches import IGNORE_INDEX
from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models.forward import Outputs, text_config
from lit_did.models.quiet import adapter_off, evaluating, random_numbers_kept
from lit_did.models.trial import layout_of, outputs_of
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.ops import SequenceStatistics, linear_sequence_statistics, sequence_statistics

MAX_LOGITS_BYTES = 2**30


def completion_statistics(
    policy: Outputs,
    reference: Outputs,
    labels: Tensor,
    cu_labels: Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> SequenceStatistics:
    """The statistics of every completion, [sequences].

    Args:
        policy, reference: Of the same completion tokens.
        labels, cu_labels: Those tokens, and where each sequence's begin and end, as in `Layout`.
        temperature, backend: As in `lit_did.linear_sequence_statistics`.
    """
    options = {"cu_seqlens": cu_labels, "temperature": temperature, "backend": backend}
    if policy.hidden is None or reference.hidden is None:
        return sequence_statistics(*(_logits(outputs) for outputs in (policy, reference)), labels, **options)
    layers = policy.layer, reference.layer
    return linear_sequence_statistics(
        policy.hidden,
        policy.layer.weight,
        reference.hidden,
        reference.layer.weight,
        labels,
        policy_bias=policy.layer.bias,
        reference_bias=reference.layer.bias,
        softcap=tuple(layer.softcap for layer in layers),
        scale=tuple(layer.scale for layer in layers),
        ignore_index=None,  # a layout has the labels of completion tokens alone
        **options,
    )


def _logits(outputs: Outputs) -> Tensor:
    return outputs.logits if outputs.hidden is None else outputs.layer.logits(outputs.hidden)


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
        reference: Another; None: the policy, a PeftModel, without its adapter; the policy: its own statistics.
        batch: `input_ids`, `attention_mask` and shifted `labels` [sequences, T], as `read_batch` returns.
        adapter: With `reference` None: the policy's adapter that is the reference, instead of none.
        temperature, backend: As in `lit_did.sequence_statistics`.
        max_logits_bytes: What the logits of all completion tokens at a time would take at the most, about: sequences
            take turns, at least one each. Logits are held only of models whose output layer is no plain linear one.

    Raises:
        ValueError: `reference` is None and the policy is no PeftModel.
    """
    # What wraps a model scatters its inputs, synchronises it or compiles it: no part of a measurement.
    policy, reference = unwrapped(policy), None if reference is None else unwrapped(reference)
    if reference is None and not is_peft(policy):
        raise ValueError("Expected `reference`, or a PeftModel as `policy` (whose base model it is), but got neither.")
    device = batch["labels"].device
    other = policy if reference is None else reference
    parts = []
    with random_numbers_kept(device), evaluating(policy):
        for sequences in _portions(read_sequences(batch), policy, max_logits_bytes):
            layout = layout_of(policy, sequences)
            policy_outputs = outputs_of(policy, layout)
            if reference is policy:
                reference_outputs = policy_outputs
            else:
                with adapter_off(policy, adapter) if reference is None else evaluating(reference):
                    reference_outputs = outputs_of(other, layout_of(other, sequences))
            parts.append(
                completion_statistics(
                    policy_outputs,
                    reference_outputs.to(layout.labels.device),
                    layout.labels,
                    layout.cu_labels,
                    temperature=temperature,
                    backend=backend,
                )
            )
    return SequenceStatistics(*(torch.cat(values).to(device) for values in zip(*parts, strict=True)))


def _portions(sequences: Sequences, policy: nn.Module, max_logits_bytes: int) -> Iterator[Sequences]:
    config = text_config(policy)
    token = 2 * 4 * getattr(config, "vocab_size", 1)  # two models, float32 at the most
    limit = max_logits_bytes // token
    portion, tokens = [], 0
    for index in range(sequences.num_sequences):
        completion = int((sequences.labels[sequences.slice(index)] != IGNORE_INDEX).sum())
        if portion and tokens + completion > limit:
            yield sequences.select(portion)
            portion, tokens = [], 0
        portion.append(index)
        tokens += completion
    yield sequences.select(portion)


def check_every_n_steps(every_n_steps: int | None) -> None:
    """Raises TypeError or ValueError unless it is None or an integer of at least 0."""
    if every_n_steps is not None:
        check_integer("every_n_steps", every_n_steps, 0)
