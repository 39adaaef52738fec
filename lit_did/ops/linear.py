"""linear_token_statistics, linear_sequence_statistics: the statistics from hidden states and output-layer weights.

They return what `token_statistics` returns for logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) of
both models, without the logits: neither the forward nor the backward holds a [tokens, V] tensor that is larger than
`max_extra_bytes`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from lit_did.ops import reference, tiles
from lit_did.ops.agreement import agree_on_slices, refusals_shared
from lit_did.ops.checks import (
    check_cu_seqlens,
    check_labels,
    check_linear_arguments,
    check_memory,
    check_options,
    on_host,
)
from lit_did.ops.extension import Backend, check_backend, choose_backend, is_transformed
from lit_did.ops.partials import NO_LABEL
from lit_did.ops.sequence_statistics import sequence_reduction
from lit_did.ops.statistics import SequenceStatistics, TokenStatistics
from lit_did.ops.tiles import Layer

_REFERENCE_TENSORS = 32  # of the logits' size, in the reference's forward and backward of a chunk


def linear_token_statistics(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor,
    *,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    softcap: float | tuple[float | None, float | None] | None = None,
    scale: float | tuple[float, float] = 1.0,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    chunk_tokens: int | Literal["auto"] = "auto",
    max_extra_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> TokenStatistics:
    """What `token_statistics` returns, from hidden states and output layers, without logits in memory.

    For a causal language model of transformers these are `model.base_model(input_ids).last_hidden_state` and
    `model.get_output_embeddings().weight`. `LitDPO` finds them itself.

    Args:
        policy_hidden: [..., H] float32, bfloat16, float16 or float64: the last hidden states.
        policy_weight: [V, H] of the same dtype: the output layer's weight, as `torch.nn.Linear` has it.
        reference_hidden: [..., H'] of the reference, whose hidden size and dtype may differ.
        reference_weight: [V, H'].
        labels: [...] integers: labels[t] is the token that position t predicts, so callers shift.
        policy_bias: [V] of the policy's dtype, or None.
        reference_bias: [V] of the reference's dtype, or None.
        softcap: Logits become softcap * tanh(logits / softcap), as in Gemma 2. None: no softcap. If the models differ,
            a (policy, reference) tuple.
        scale: Logits, bias included, are multiplied by it before that, as in Cohere and Granite; or such a tuple.
        ignore_index: Tokens with this label return 0 and get a gradient of 0, even if their hidden states are NaN. On
            the CPU they are dropped before anything is computed. On a GPU their number is unknown until the device has
            computed it, so they take part in the matrix products. To save that time, pass the tokens that count alone
            (`hidden[labels != ignore_index]`). None: every label counts.
        temperature: Both logits are divided by it.
        chunk_tokens: The largest number of tokens at a time. "auto": all, unless the blocks of the vocabulary would
            become too narrow.
        max_extra_bytes: Bound of the memory for logits and their gradients, forward to backward. The backward does not
            compute again what fits in the bound. The least is one token and 512 entries of both models' logits, in
            bfloat16 2 KiB. None: 1 GiB on CUDA, 256 MiB elsewhere. These come on top: the gradients of the arguments,
            with float32 sums of those of hidden states in half precision; partial sums, up to 1.2 KB a token, or on
            CUDA up to 1% of the bound if that is more; tensors of the size of `labels`; and a copy of both hidden
            states without the ignored tokens (on CUDA with zeros in their place, and always unless `ignore_index` is
            None). If tokens are cut, also the gradient of one block of the weight in float32.
        process_group: The processes that each hold a slice of the vocabulary. See below.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device. Under
            `torch.func`'s transforms and forward-mode differentiation only the reference works, and it holds the logits
            of all tokens.

    Returns:
        TokenStatistics: nine tensors [...], in nats, float32. If any input is float64, everything is computed and
        returned in float64. Differentiable once (any number of times with the reference) in hidden states, weights and
        biases. Inputs that need no gradient cost nothing: a frozen weight needs no matrix product, and a frozen
        reference needs no backward at all with a loss of log-probabilities alone.

    Logits have the dtype of the hidden states, or of `torch.autocast` as it would be for `torch.nn.functional.linear`.
    Statistics, and sums over tiles of the gradients, are float32. Under `torch.compile` the function runs uncompiled,
    between two graphs. On CUDA the host never waits for the device.

    With a `process_group` each process passes its slice [V_r, H] of both weights (and biases), in the order of the
    group's ranks and with the same slices for both models. Hidden states and labels (counted over the whole vocabulary)
    are the same on all processes. All processes return the same statistics. A hidden state's gradient is summed over
    the processes, a weight's belongs to the slice. The forward costs one message of six integers between the hosts and
    one gather of a few numbers a token; the backward one sum of the hidden states' size. Only the fused backend works.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or vocabularies do not fit, a label is out of range (checked on the CPU and by the
            reference), an option is out of its range, or `max_extra_bytes` is too small for one token. With
            `process_group`: the two models' slices differ on any process, the labels differ, any process raised for its
            own arguments, or the backend is the reference.
        RuntimeError: `backend="fused"` does not support the device, or a transform.

    Example:
        >>> import torch
        >>> from lit_did import linear_token_statistics
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> statistics = linear_token_statistics(hidden, weight, hidden, torch.zeros(3, 2), torch.tensor([2, -100]))
        >>> statistics.log_ratio
        tensor([0.6910, 0.0000])
        >>> statistics.token_did_entropy
        tensor([0.8324, 0.0000])
    """
    # Buffers that are written in place, and branches on values: nothing that a compiler could gain from.
    run = torch.compiler.disable(_token_statistics) if torch.compiler.is_compiling() else _token_statistics
    layers = {
        "policy": Layer(policy_hidden, policy_weight, policy_bias),
        "reference": Layer(reference_hidden, reference_weight, reference_bias),
    }
    return run(
        layers,
        labels,
        _pair(softcap),
        _pair(scale),
        ignore_index,
        temperature,
        chunk_tokens,
        max_extra_bytes,
        process_group,
        backend,
    )


def linear_sequence_statistics(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    softcap: float | tuple[float | None, float | None] | None = None,
    scale: float | tuple[float, float] = 1.0,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    chunk_tokens: int | Literal["auto"] = "auto",
    max_extra_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> SequenceStatistics:
    """What `sequence_statistics` returns, from hidden states and output layers, without logits in memory.

    `linear_token_statistics` describes memory, dtypes and `process_group` in more detail.

    Args:
        policy_hidden: [..., T, H], or [tokens, H] with `cu_seqlens`: the last hidden states.
        policy_weight: [V, H] of the same dtype: the output layer's weight.
        reference_hidden: [..., T, H'], or [tokens, H'] with `cu_seqlens`.
        reference_weight: [V, H'].
        labels: [..., T], or [tokens]: the token that each position predicts.
        cu_seqlens: [sequences + 1] int32 or int64: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1]. Without
            it the last dimension of `labels` is one sequence.
        policy_bias: [V] of the policy's dtype, or None.
        reference_bias: [V] of the reference's dtype, or None.
        softcap: Logits become softcap * tanh(logits / softcap). None: no softcap. If the models differ, a (policy,
            reference) tuple.
        scale: Logits, bias included, are multiplied by it before that; or such a tuple.
        ignore_index: Tokens with this label do not count. None: every label counts.
        temperature: Both logits are divided by it.
        chunk_tokens: The largest number of tokens at a time, or "auto".
        max_extra_bytes: Bound of the memory for logits and their gradients. None: 1 GiB on CUDA, 256 MiB elsewhere.
        process_group: The processes that each hold a slice of the vocabulary.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.

    Returns:
        SequenceStatistics: tensors [...] (or [sequences]) of sums and means over labelled tokens, in nats.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, vocabularies or values do not fit, `cu_seqlens` does not rise from 0 to the number
            of tokens (checked on the CPU), or `labels` has no dimension to sum over. With `process_group` as in
            `linear_token_statistics`.
        RuntimeError: `backend="fused"` does not support the device, or a transform.

    Example:
        >>> import torch
        >>> from lit_did import linear_sequence_statistics
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> packed = linear_sequence_statistics(
        ...     hidden, weight, hidden, torch.zeros(3, 2), torch.tensor([2, 0]), cu_seqlens=torch.tensor([0, 2]))
        >>> packed.log_ratio
        tensor([0.6910])
        >>> packed.num_tokens
        tensor([2])
    """
    with refusals_shared(process_group):
        if cu_seqlens is not None and isinstance(policy_hidden, Tensor):  # else what follows raises
            check_cu_seqlens(cu_seqlens, policy_hidden, "policy_hidden", "[tokens, H]")
        elif isinstance(labels, Tensor) and labels.dim() < 1:
            raise ValueError("Expected `labels` to have shape [..., T], but got ().")
    tokens = linear_token_statistics(
        policy_hidden,
        policy_weight,
        reference_hidden,
        reference_weight,
        labels,
        policy_bias=policy_bias,
        reference_bias=reference_bias,
        softcap=softcap,
        scale=scale,
        ignore_index=ignore_index,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        max_extra_bytes=max_extra_bytes,
        process_group=process_group,
        backend=backend,
    )
    ignored = NO_LABEL if ignore_index is None else ignore_index
    return sequence_reduction(tokens, labels, cu_seqlens=cu_seqlens, ignore_index=ignored, backend=backend)


def _pair(value: Any) -> tuple[Any, Any]:
    """(policy's, reference's) of an option that may be given once for both."""
    return value if isinstance(value, tuple) and len(value) == 2 else (value, value)


def _token_statistics(
    layers: dict[str, Layer],
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    ignore_index: int | None,
    temperature: float,
    chunk_tokens: int | Literal["auto"],
    max_extra_bytes: int | None,
    process_group: ProcessGroup | None,
    backend: Backend,
) -> TokenStatistics:
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"Expected `process_group` to be a ProcessGroup or None, but got {process_group!r}.")
    with refusals_shared(process_group):
        ignored = NO_LABEL if ignore_index is None else ignore_index
        check_options(ignored, temperature)
        check_memory(chunk_tokens, max_extra_bytes)
        check_backend(backend)
        if isinstance(labels, Tensor) and torch.is_autocast_enabled(labels.device.type):
            dtype = torch.get_autocast_dtype(labels.device.type)
            # Once each, by identity: what is no tensor is refused below, and need not be hashable.
            values: dict[int, Any] = {id(value): value for layer in layers.values() for value in layer}
            cast: dict[int, Any] = {key: _as_autocast(value, dtype) for key, value in values.items()}
            layers = {side: Layer(*(cast[id(value)] for value in layer)) for side, layer in layers.items()}
        check_linear_arguments(layers, labels, softcap, scale)
        tensors = [labels, *layers["policy"], *layers["reference"]]
        chosen = choose_backend(backend, labels.device, tensors)
        if process_group is not None and chosen == "reference":
            raise ValueError("Expected `backend` to be fused with `process_group`, but the reference is used here.")
        if chosen == "reference" and is_transformed(tensors):
            return _transformed_statistics(layers, labels.long(), softcap, scale, ignored, temperature)
        extra_bytes = tiles.tiling_on(labels.device).extra_bytes if max_extra_bytes is None else max_extra_bytes
        shape, labels = labels.shape, labels.flatten().long()
        # On a device the number of tokens that count is unknown until it has been waited for.
        kept = masked = None
        if ignore_index is not None and (chosen == "reference" or on_host(labels)):
            kept = (labels != ignore_index).nonzero()[:, 0]
        elif ignore_index is not None:
            masked = (labels == ignore_index)[:, None]
        kept_labels = labels if kept is None else labels[kept]
        double = any(layer.hidden.dtype == torch.float64 for layer in layers.values())
        policy, referenced = (_of_rows(layer, kept, masked, len(labels), double) for layer in layers.values())
        plan = None
        if chosen == "fused" and len(kept_labels) > 0:  # without a token the reference keeps the graph whole
            plan = tiles.plan_of(policy, referenced, chunk_tokens, extra_bytes)
    first_entry, vocabulary = agree_on_slices(len(policy.weight), len(referenced.weight), kept_labels, process_group)
    if chosen == "reference" or on_host(labels):
        check_labels(labels, vocabulary, ignored)

    if plan is not None:
        statistics = tiles.linear_token_statistics(
            policy, referenced, kept_labels, softcap, scale, ignored, temperature, plan, process_group, first_entry
        )
    else:
        statistics = _reference_statistics(
            policy, referenced, kept_labels, softcap, scale, temperature, chunk_tokens, extra_bytes
        )

    def at_all_rows(value: Tensor) -> Tensor:
        if kept is not None and len(kept) < len(labels):
            value = value.new_zeros(len(labels)).index_copy(0, kept, value)
        return value.view(shape)

    return TokenStatistics(*map(at_all_rows, statistics))


def _as_autocast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As `F.linear` would cast it."""
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.to(dtype)
    return value


def _of_rows(layer: Layer, kept: Tensor | None, masked: Tensor | None, rows: int, double: bool) -> Layer:
    """The layer with hidden states [kept, H], or [rows, H] with zeros where `masked`; as float64 if `double`."""
    hidden = layer.hidden.reshape(rows, layer.hidden.shape[-1])
    if kept is not None and len(kept) < rows:
        hidden = hidden.index_select(0, kept)
    if masked is not None:
        hidden = hidden.masked_fill(masked, 0)  # not multiplied: NaN times a gradient of 0 would be NaN
    layer = layer._replace(hidden=hidden)
    return layer.double() if double else layer


def _reference_statistics(
    policy: Layer,
    referenced: Layer,
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    temperature: float,
    chunk_tokens: int | Literal["auto"],
    max_extra_bytes: int,
) -> TokenStatistics:
    """The specification in plain torch, a chunk of tokens at a time."""

    def of_chunk(rows: slice) -> TokenStatistics:
        z, r = (
            _logits(layer._replace(hidden=layer.hidden[rows]), cap, by)
            for layer, cap, by in zip((policy, referenced), softcap, scale, strict=True)
        )
        return reference.token_statistics(z, r, labels[rows], NO_LABEL, temperature)

    rows = max(1, max_extra_bytes // (_REFERENCE_TENSORS * 4 * policy.weight.shape[0]))
    if chunk_tokens != "auto":
        rows = min(rows, chunk_tokens)
    chunks = [
        checkpoint(of_chunk, slice(begin, begin + rows), use_reentrant=False, preserve_rng_state=False)
        for begin in range(0, max(1, len(labels)), rows)
    ]
    return TokenStatistics(*(torch.cat(values) for values in zip(*chunks, strict=True)))


def _transformed_statistics(
    layers: dict[str, Layer],
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    ignore_index: int,
    temperature: float,
) -> TokenStatistics:
    """The specification with all logits at once: transforms have neither checkpoints nor the values of labels."""
    policy_entries, reference_entries = (layer.weight.shape[0] for layer in layers.values())
    check_labels(labels, agree_on_slices(policy_entries, reference_entries, labels, None)[1], ignore_index)
    ignored = (labels == ignore_index)[..., None]
    double = any(layer.hidden.dtype == torch.float64 for layer in layers.values())
    logits = []
    for layer, cap, by in zip(layers.values(), softcap, scale, strict=True):
        layer = layer._replace(hidden=layer.hidden.masked_fill(ignored, 0))
        logits.append(_logits(layer.double() if double else layer, cap, by))
    z, r = logits
    return reference.token_statistics(z, r, labels, ignore_index, temperature)


def _logits(layer: Layer, softcap: float | None, scale: float) -> Tensor:
    """[rows, V] float32, or float64: with the rounding of the layer's dtype, as models compute them."""
    logits = F.linear(*layer) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits if logits.dtype == torch.float64 else logits.float()
