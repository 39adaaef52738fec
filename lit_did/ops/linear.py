"""linear_token_statistics, linear_sequence_statistics: the statistics from hidden states and output-layer weights.

What `token_statistics` says of logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), for both models,
without the logits: neither the forward nor the backward holds a [tokens, V] tensor that is larger than
`max_extra_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_did.ops import reference, tiles
from lit_did.ops.checks import check_cu_seqlens, check_labels, check_linear_arguments, check_memory, check_options
from lit_did.ops.extension import check_backend, choose_backend, is_transformed
from lit_did.ops.partials import NO_LABEL
from lit_did.ops.sequence_statistics import sequence_reduction
from lit_did.ops.statistics import SequenceStatistics, TokenStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Layer = tuple[Tensor, Tensor, Tensor | None]  # hidden, weight, bias

_REFUSED = -1  # in the place of sizes: a process that raises for its arguments
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
    ignore_index: int = -100,
    temperature: float = 1.0,
    chunk_tokens: int | str = "auto",
    max_extra_bytes: int = 2**28,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TokenStatistics:
    """What `token_statistics` returns, from hidden states and output layers, without logits in memory.

    Of a causal language model of transformers these are `model.base_model(input_ids).last_hidden_state` and
    `model.get_output_embeddings().weight`; `LitDPO` sees to that itself.

    Args:
        policy_hidden: [..., H] float32, bfloat16, float16 or float64: the last hidden states.
        policy_weight: [V, H] of the same dtype: the output layer's weight, as `torch.nn.Linear` has it.
        reference_hidden: [..., H'] of the reference, whose hidden size and dtype may differ.
        reference_weight: [V, H'].
        labels: [...] integers: labels[t] is the token that position t predicts, so callers shift.
        policy_bias, reference_bias: [V] of the layer's dtype, or None.
        softcap: Logits become softcap * tanh(logits / softcap), as in Gemma 2; None: they do not. For models that
            differ, a (policy, reference) tuple.
        scale: Logits, bias included, are multiplied by it before that, as in Cohere and Granite; or such a tuple.
        ignore_index: Tokens with this label are dropped before anything is computed; they return 0 and get a gradient
            of 0, whatever their hidden states hold.
        temperature: Both logits are divided by it.
        chunk_tokens: At most so many tokens at a time; "auto": all, unless the vocabulary then gets too narrow blocks.
        max_extra_bytes: Bound of the memory for logits and their gradients, forward to backward. The gradients of the
            arguments themselves, and what is of the size of `labels`, come on top. What fits in the bound is not
            computed again by the backward.
        process_group: The processes that each hold a slice of the vocabulary. See below.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused where it serves, else the reference.
            Under `torch.func`'s transforms and forward-mode differentiation the reference alone serves, and holds the
            logits of all tokens.

    Returns:
        TokenStatistics: nine tensors [...], in nats, float32 (float64 if anything is float64, all then computed so),
        differentiable once (any number of times with the reference) in hidden states, weights and biases. What needs no
        gradient costs nothing: a frozen weight no product, a frozen reference with a loss of log-probabilities alone
        nothing in the backward.

    Logits have the dtype of the hidden states, or of `torch.autocast` as it would be for `torch.nn.functional.linear`;
    statistics, and sums over tiles of the gradients, are float32. Under `torch.compile` the function runs as it is,
    between two graphs.

    With a `process_group` each process passes its slice [V_r, H] of both weights (and biases), the vocabulary's slices
    in the order of the group's ranks and the same for both models, with the same hidden states and labels (counted over
    the whole vocabulary) everywhere. All processes return the same statistics; a hidden state's gradient is summed over
    the processes, a weight's belongs to the slice. The forward costs two small collectives, the backward one of the
    hidden states' size. Only the fused backend serves.

    Raises:
        TypeError: An argument has a type or dtype that is not served.
        ValueError: Shapes, devices or vocabularies do not fit, a label is out of range (checked on the CPU and by the
            reference), an option is out of its range, or `max_extra_bytes` is too small for one token.
            With `process_group`: the two models' slices differ on any process, the labels are seen to differ, a process
            raised for its own arguments (all raised by all), or the backend is the reference.
        RuntimeError: `backend="fused"` where it does not serve the device, or under a transform.

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
        "policy": (policy_hidden, policy_weight, policy_bias),
        "reference": (reference_hidden, reference_weight, reference_bias),
    }
    return run(
        layers,
        labels,
        *(value if isinstance(value, tuple) and len(value) == 2 else (value, value) for value in (softcap, scale)),
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
    ignore_index: int = -100,
    temperature: float = 1.0,
    chunk_tokens: int | str = "auto",
    max_extra_bytes: int = 2**28,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> SequenceStatistics:
    """What `sequence_statistics` returns, from hidden states and output layers, without logits in memory.

    Args:
        policy_hidden: [..., T, H], or [tokens, H] with `cu_seqlens`. Dtypes as in `linear_token_statistics`.
        policy_weight: [V, H].
        reference_hidden: [..., T, H'], or [tokens, H'] with `cu_seqlens`.
        reference_weight: [V, H'].
        labels: [..., T], or [tokens]: the token that each position predicts.
        cu_seqlens: [sequences + 1] int32 or int64: sequence i holds tokens cu_seqlens[i] to cu_seqlens[i + 1]. Without
            it the last dimension of `labels` is one sequence.
        policy_bias, reference_bias, softcap, scale, ignore_index, temperature, chunk_tokens, max_extra_bytes,
            process_group, backend: As in `linear_token_statistics`.

    Returns:
        SequenceStatistics: tensors [...] (or [sequences]) of sums and means over labelled tokens, in nats.

    Raises:
        TypeError, ValueError, RuntimeError: As `linear_token_statistics`; also where `cu_seqlens` does not rise from 0
            to the number of tokens (checked on the CPU), or `labels` has no dimension to sum over.

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
    with _refusals_told((policy_weight, reference_weight, policy_hidden, reference_hidden, labels), process_group):
        if cu_seqlens is not None and isinstance(policy_hidden, Tensor):  # else what follows says so
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
    return sequence_reduction(tokens, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index, backend=backend)


def _token_statistics(
    layers: dict[str, Layer],
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    ignore_index: int,
    temperature: float,
    chunk_tokens: int | str,
    max_extra_bytes: int,
    process_group: ProcessGroup | None,
    backend: str,
) -> TokenStatistics:
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"Expected `process_group` to be a ProcessGroup or None, but got {process_group!r}.")
    given = (*(layer[1] for layer in layers.values()), *(layer[0] for layer in layers.values()), labels)
    with _refusals_told(given, process_group):
        check_options(ignore_index, temperature)
        check_memory(chunk_tokens, max_extra_bytes)
        check_backend(backend)
        if isinstance(labels, Tensor) and torch.is_autocast_enabled(labels.device.type):
            dtype = torch.get_autocast_dtype(labels.device.type)
            cast = {id(value): _as_autocast(value, dtype) for layer in layers.values() for value in layer}  # once each
            layers = {side: tuple(cast[id(value)] for value in layer) for side, layer in layers.items()}
        check_linear_arguments(layers, labels, softcap, scale)
        tensors = [labels, *layers["policy"], *layers["reference"]]
        chosen = choose_backend(backend, labels.device, tensors)
        if process_group is not None and chosen == "reference":
            raise ValueError("Expected `backend` to be fused with `process_group`, but the reference serves here.")
        if chosen == "reference" and is_transformed(tensors):
            return _transformed_statistics(layers, labels.long(), softcap, scale, ignore_index, temperature)
        shape, labels = labels.shape, labels.flatten().long()
        kept = (labels != ignore_index).nonzero()[:, 0]
        double = any(layer[0].dtype == torch.float64 for layer in layers.values())
        policy, referenced = (_of_rows(layer, kept, len(labels), double) for layer in layers.values())
        fused = chosen == "fused" and len(kept) > 0  # without a token there is a graph to keep whole, and no more
        plan = tiles.plan_of(policy, referenced, softcap, chunk_tokens, max_extra_bytes) if fused else None
    kept_labels = labels[kept]
    first_entry, vocabulary = _vocabulary(layers, kept_labels, process_group)
    if chosen == "reference" or labels.device.type == "cpu":
        check_labels(labels, vocabulary, ignore_index)

    arguments = policy, referenced, kept_labels, softcap, scale, temperature
    if fused:
        statistics = tiles.linear_token_statistics(*arguments, plan, process_group, first_entry)
    else:
        statistics = _reference_statistics(*arguments, chunk_tokens, max_extra_bytes)
    if len(kept) < len(labels):
        statistics = (value.new_zeros(len(labels)).index_copy(0, kept, value) for value in statistics)
    return TokenStatistics(*(value.view(shape) for value in statistics))


def _as_autocast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As `F.linear` would cast it."""
    served = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return value.to(dtype) if served else value


@contextmanager
def _refusals_told(given: tuple[Any, ...], process_group: ProcessGroup | None) -> Iterator[None]:
    """Tells the others where this process raises for its arguments: they would wait for it for ever.

    `given`: the arguments; the first tensor is taken to be where the group exchanges tensors.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if process_group is not None and isinstance(process_group, dist.ProcessGroup):
            device = next((value.device for value in given if isinstance(value, Tensor)), None)
            with suppress(Exception):  # where it is not there, this process's own error is what can be told
                _gathered([_REFUSED] * 5, device, process_group)
        raise


def _gathered(numbers: list[int], device: torch.device | None, process_group: ProcessGroup) -> list[list[int]]:
    """Every process's numbers."""
    own = torch.tensor(numbers, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, own, group=process_group)
    return torch.stack(gathered).tolist()


def _vocabulary(layers: dict[str, Layer], labels: Tensor, process_group: ProcessGroup | None) -> tuple[int, int]:
    """The first entry of this process's slice, and the size of the whole vocabulary; `labels`: those that count."""
    sizes = [[weight.shape[0] for _, weight, _ in layers.values()]]
    rank = 0
    if process_group is not None:
        rank = dist.get_rank(process_group)
        ends = labels.aminmax() if len(labels) else (0, 0)
        sizes = _gathered([*sizes[0], len(labels), *map(int, ends)], labels.device, process_group)
    refused = [number for number, (policy_entries, *_) in enumerate(sizes) if policy_entries == _REFUSED]
    if refused:
        raise ValueError(
            "Expected all processes of `process_group` to pass arguments that are served, but rank "
            f"{refused[0]} of the group refused its own: see the error there."
        )
    of_policy, of_reference, *of_labels = zip(*sizes, strict=True)
    if any(len(set(of_processes)) > 1 for of_processes in of_labels):
        count, least, largest = (", ".join(map(str, of_processes)) for of_processes in of_labels)
        raise ValueError(
            f"Expected `labels` to be the same on all processes of `process_group`, but got {count} tokens that are "
            f"not ignored, the least {least}, the largest {largest}."
        )
    if of_policy != of_reference:
        if process_group is None:
            expected, got = f"the vocabulary of `policy_weight`, {of_policy[0]} entries", f"{of_reference[0]}"
        else:
            expected = f"the slices of `policy_weight`, of {', '.join(map(str, of_policy))} entries a process"
            got = ", ".join(map(str, of_reference))
        raise ValueError(f"Expected `reference_weight` to have {expected}, but got {got}.")
    return sum(of_policy[:rank]), sum(of_policy)


def _of_rows(layer: Layer, kept: Tensor, rows: int, double: bool) -> Layer:
    """The layer with hidden states [kept, H]; as float64 if `double`."""
    hidden, weight, bias = layer
    hidden = hidden.reshape(rows, hidden.shape[-1])
    if len(kept) < rows:
        hidden = hidden.index_select(0, kept)
    return tuple(value.double() if double and value is not None else value for value in (hidden, weight, bias))


def _reference_statistics(
    policy: Layer,
    referenced: Layer,
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    temperature: float,
    chunk_tokens: int | str,
    max_extra_bytes: int,
) -> TokenStatistics:
    """The specification in plain torch, so many tokens at a time."""

    def of_chunk(rows: slice) -> TokenStatistics:
        logits = (
            _logits((layer[0][rows], *layer[1:]), cap, by)
            for layer, cap, by in zip((policy, referenced), softcap, scale, strict=True)
        )
        return reference.token_statistics(*logits, labels[rows], NO_LABEL, temperature)

    rows = max(1, max_extra_bytes // (_REFERENCE_TENSORS * 4 * policy[1].shape[0]))
    rows = rows if chunk_tokens == "auto" else min(rows, chunk_tokens)
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
    check_labels(labels, _vocabulary(layers, labels, None)[1], ignore_index)
    ignored = (labels == ignore_index)[..., None]
    double = any(layer[0].dtype == torch.float64 for layer in layers.values())
    logits = []
    for (hidden, *layer), cap, by in zip(layers.values(), softcap, scale, strict=True):
        layer = hidden.masked_fill(ignored, 0), *layer
        logits.append(_logits([v.double() if double and v is not None else v for v in layer], cap, by))
    return reference.token_statistics(*logits, labels, ignore_index, temperature)


def _logits(layer: Layer, softcap: float | None, scale: float) -> Tensor:
    """[rows, V] float32, or float64: with the rounding of the layer's dtype, as models compute them."""
    logits = F.linear(*layer) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits if logits.dtype == torch.float64 else logits.float()
