"""Finds the fastest layout of a batch in which a model gives right results, by a trial of the model.

Some models let packed sequences see each other. Some depend on the position in the row, some on the longest sequence of
the batch. So each model is tried on sequences as long as the batch's, made of the batch's own tokens. The truth is the
unchanged model on one sequence at a time: its logits, and its gradients if it is trained. The first layout that agrees
with the truth is used, in this order:

    packed, with the beginning that a pair shares in the row only once
    packed
    padded
    alone: one sequence at a time

On CUDA, packed rows need a kernel that attends to all sequences in one call, and agrees too: flash attention
(`lit_did.models.varlen`), or else flex attention (`lit_did.models.flex`). Without one, sequences are padded.

One warning reports that a slower layout is used than was asked for. A model in which a later token changes an earlier
logit is refused.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.layout import SHORTEST_SHARED, Kind, Layout, Packing, packed_layout, padded_layout
from lit_did.batches.sequences import Sequences
from lit_did.models import attention, flex, varlen
from lit_did.models.context_parallel import own_tokens
from lit_did.models.forward import (
    Outputs,
    adds_auxiliary_loss,
    completion_hidden,
    completion_logits,
    completion_outputs,
    find_body,
    input_embeddings,
    num_embeddings,
    num_positions,
    output_layer,
    text_config,
)
from lit_did.models.quantisation import computes_in_half
from lit_did.models.quiet import eval_mode, random_numbers_kept
from lit_did.models.sharding import device_of, is_sharded
from lit_did.models.wrappers import inner

LEAST_LENGTH = 32  # tokens: trials are at least this long, so that not every short batch needs a trial of its own
MOST_ROOM = 8192  # tokens: up to here, rows are tried with more tokens than the batch needs
COMPARED = 32  # tokens of a sequence whose logits are compared: [32, V] is small beside the logits of a step
# Far above rounding, and far below the effect of another sequence's tokens.
TOLERANCE = 1e-4  # of the largest logit
CAUSAL_TOLERANCE = 1e-5
HALF_TOLERANCE = 0.1  # of the logits' norm, in bfloat16 and float16
DISTINCT = 8  # a trial has at least this many different tokens, if the vocabulary has
SHORT = SHORTEST_SHARED + 5  # tokens of the short sequence beside the long one
MAX_GRADIENT_ELEMENTS = 2**24  # of the parameters whose gradients are compared, the smallest first: 64 MiB


class Found(NamedTuple):
    """The fastest layout in which a model was right, for sequences of up to `length` and rows of up to `row` tokens."""

    key: tuple
    """What else it depends on: whether packing was tried, the weights' dtype, autocast's dtype, the attention, whether
    processes share rows."""
    length: int
    row: int
    gradients: bool
    """Whether gradients were compared too."""
    kind: Kind
    packing: Packing | None
    share: bool
    """Whether the beginning that a pair shares may be in the row only once."""
    forgets: bool
    """Whether the model keeps state from one forward pass to the next, until it is given one token."""
    kernel: str | None = None
    """What attends to all segments of a packed row in one call, see `lit_did.models.attention`. None: nothing."""


class _Model:
    """What earlier trials of one model have found."""

    def __init__(self) -> None:
        self.body: nn.Module | None = None
        self.body_tried: set[bool] = set()  # without and with gradients
        self.found: list[Found] = []
        self.warned: set[str] = set()
        self.shares: set[int] = set()  # numbers of processes that may share a row
        self.raised = ""  # by the last layout that the model does not take


_known: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()


@torch.compiler.disable
def layout_of(
    model: nn.Module,
    sequences: Sequences,
    *,
    padding_free: bool = True,
    share: bool = True,
    batch: Sequences | None = None,
    group: ProcessGroup | None = None,
) -> Layout:
    """The sequences in the fastest layout in which `model` gives right results, on its device.

    Args:
        model: A causal language model.
        sequences: The sequences. With `share`, the chosen ones first, then the rejected ones in the same order.
        padding_free: Whether to try the sequences end to end in one row.
        share: Whether to try the beginning that a pair shares in the row only once.
        batch: All sequences of the batch, if `sequences` are a micro-batch. All micro-batches get one kind of layout.
        group: The processes that share the row, see `lit_did.models.context_parallel`. This one gets its slice. All of
            them call this function, with the same sequences.

    Raises:
        TypeError: The model is not a causal language model.
        ValueError: The sequences are longer than the model has positions, or the model cannot share a row.
    """
    device = device_of(model)
    if adds_auxiliary_loss(model):  # tokens after the last label count
        sequences, batch = sequences.whole(), None if batch is None else batch.whole()
    tried = sequences if batch is None else batch
    found = find(model, tried, padding_free=padding_free, processes=1 if group is None else group.size())
    if group is not None:
        _check_sharing(model, tried, found, share and found.share, group)
        return _packed(sequences, device, "segments", share and found.share, found.kernel, group)
    if found.packing == "positions" and not tried.positions_count_from_zero:  # so they do not mark the sequences
        found = find(model, tried, padding_free=False)
    if found.packing is not None:
        return _packed(sequences, device, found.packing, share and found.share, found.kernel)
    if found.kind == "alone":  # tokens after the last label may count
        sequences = sequences.whole()
        _check_positions(model, int(np.diff(sequences.cu_seqlens).max(initial=1)))
    return padded_layout(sequences, device)._replace(kind=found.kind, forgets=found.forgets)


@torch.compiler.disable
def outputs_of(model: nn.Module, layout: Layout) -> Outputs:
    """The outputs of `model` at the completion tokens of `layout`, which `layout_of` returned for this model."""
    outputs = completion_outputs(model, layout, _known[model].body)
    refused = attention.refused(layout.inputs["attention_mask"]) if layout.packing == "segments" else None
    if refused is not None:
        _warn_of_turns(model, _known[model], refused)
    return outputs


def attention_used(model: nn.Module) -> str:
    """The attention of `model` in its last layout, in words, for logs. `layout_of` has to be called before."""
    found = _known[model].found[-1]
    own = f"attention {attention.implementation(inner(model))!r}"
    if found.packing != "segments":
        return f"{own}, {found.kind}"
    return f"{own}, one segment at a time" if found.kernel is None else f"{found.kernel}, one call a layer"


def share_trials(model: nn.Module, copy: nn.Module) -> None:
    """Lets `copy` use what trials of `model` have found, and the other way round. Trials of long batches take a while.

    Args:
        model: A causal language model.
        copy: A model of the same architecture, with the same adapters.
    """
    known = _known.setdefault(model, _Model())
    own = _known[copy] = _Model()
    own.body = None if known.body is None else find_body(copy)
    own.body_tried, own.found, own.warned = known.body_tried, known.found, known.warned


def assume_right(model: nn.Module) -> bool:
    """Lets a model have the fastest layout from now on, without a trial.

    For models of fake tensors, which have shapes, but no values to compare. Their weights and attention must not change
    any more.

    Returns:
        Whether it is a layout without padding. Otherwise `layout_of` needs `padding_free=False`.
    """
    known, base = _known.setdefault(model, _Model()), inner(model)
    known.body = find_body(model)
    known.body_tried = {False, True}
    packs = _takes_positions(model) and not adds_auxiliary_loss(model)
    packing = attention.packings(base)[0] if packs else None
    kind: Kind = "packed" if packs else "padded"
    share = packing == "segments"
    kernel = next(iter(_kernels(model)), None) if packing == "segments" else None
    known.found = [
        Found(_key(model, packs, autocast, shared), sys.maxsize, sys.maxsize, True, kind, packing, share, False, kernel)
        for autocast in (None, torch.bfloat16, torch.float16)
        for shared in (False, True)
    ]
    return packs


def find(model: nn.Module, sequences: Sequences, *, padding_free: bool = True, processes: int = 1) -> Found:
    """The fastest layout of such sequences in which `model` is right. If it is not known yet, a trial finds it.

    If several processes share a row, the trial's sequences have the length of one process's share, because a trial runs
    them whole on each process.
    """
    known, sharded = _known.setdefault(model, _Model()), is_sharded(model)
    gradients = not sharded and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    lengths = np.diff(sequences.cu_seqlens)
    _check_positions(model, int(lengths.max(initial=1)))
    length, row = (-(-int(number) // processes) for number in (lengths.max(initial=1), lengths.sum()))
    autocast = _autocast(device_of(model).type)
    key = _key(model, padding_free, autocast, processes > 1)
    tried = [found for found in known.found if found.key == key and found.gradients >= gradients]
    # A layout that is right for longer sequences is right for these. One that is wrong for longer ones may be right.
    for found in tried:
        fastest = found.kind == ("packed" if padding_free else "padded") and not found.forgets
        if found.length >= length and found.row >= row and fastest:
            return found
    wanted = _bounds(model, length, row)
    # A layout that was wrong for a shorter row is wrong for a longer one. The other layouts have no long rows.
    failed = [found for found in tried if found.kind != "packed" and found.length <= wanted[0] and found.row <= row]
    for found in tried:
        if (found.length, found.row) == wanted or (found in failed and found.length == wanted[0]):
            return found
    if sharded and tried:  # a trial is a forward pass, which needs all processes at the same time
        _warn(
            known,
            "longer",
            f"The results for this batch have not been checked and may be wrong. {_name(model)} is sharded, so it was "
            f"checked only once that batches give the results of single sequences, with up to {tried[0].length} tokens "
            f"a sequence and {tried[0].row} in all. This batch has up to {length} tokens a sequence and {row} in all. "
            "Put a batch with the longest sequences first.",
        )
        return tried[0]
    if sharded:
        wanted, sequences = _agreed(model, wanted, sequences)
    with _untouched(model):
        found = _try(model, known, sequences, *wanted, gradients=gradients, padding_free=padding_free and not failed)
        if found.packing == "segments" and found.kernel is None and device_of(model).type in varlen.DEVICES:
            found = _with_kernel(model, known, sequences, found, autocast, pads=processes == 1)
    found = found._replace(key=key)
    _warn_of(model, known, found, padding_free)
    known.found.append(found)
    return found


def _key(model: nn.Module, padding_free: bool, autocast: torch.dtype | None, shared: bool) -> tuple:
    """What a layout depends on beside lengths. `autocast`: its dtype, if it is on. `shared`: by several processes."""
    counts = _keeps_autocast(model) or device_of(model).type in varlen.DEVICES
    name = attention.implementation(inner(model))
    return (padding_free, next(model.parameters()).dtype, autocast if counts else None, name, shared)


def _autocast(device: str) -> torch.dtype | None:
    """The dtype of autocast. None: it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_positions(model: nn.Module, length: int) -> None:
    """Raises ValueError if the model has learned fewer positions than a sequence has tokens."""
    limit = num_positions(model)
    if length <= limit:
        return
    tokens = input_embeddings(model)
    # Some tables begin with a few rows that stand for no position.
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    if any(limit <= table.num_embeddings <= limit + 8 for table in tables):
        raise ValueError(
            f"Expected sequences of at most {limit} tokens, for which {_name(model)} has positions, but got {length}. "
            "Lower `max_length`."
        )


def _bounds(model: nn.Module, length: int, row: int) -> tuple[int, int]:
    """The number of tokens of the trial's longest sequence and of its row: more than needed, so that trials are few.

    Sequences get the next power of two. Rows, which cost only a forward pass without gradients, get twice that.
    """
    limit = num_positions(model)
    longest = max(LEAST_LENGTH, 2 ** (length - 1).bit_length())
    longest = int(limit) if length <= limit < longest else longest
    deep = 2 ** (row - 1).bit_length()
    return longest, max(longest + SHORT, 2 * deep if 2 * deep <= min(limit, MOST_ROOM) else deep)


def _agreed(model: nn.Module, wanted: tuple[int, int], batch: Sequences) -> tuple[tuple[int, int], Sequences]:
    """The largest bounds of all processes, doubled, and the sequences of the first process.

    There is only one trial, and later batches may be longer. All processes try the same tokens, so that all make the
    same number of forward passes.
    """
    length, row = wanted
    if torch.distributed.is_initialized():
        bounds = torch.tensor(wanted, device=device_of(model))
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
        length, row = bounds.tolist()
        shared = [batch]
        torch.distributed.broadcast_object_list(shared, src=0)
        (batch,) = shared
    longest = int(max(length, min(2 * length, num_positions(model))))
    return (longest, max(2 * row, longest + SHORT)), batch


def _check_sharing(model: nn.Module, batch: Sequences, found: Found, share: bool, group: ProcessGroup) -> None:
    """Raises ValueError unless processes that share a row get one process's results. This is tried once a model."""
    known, device, size = _known[model], device_of(model), group.size()
    but = f"but got {size} with {_name(model)} and attention {attention.implementation(inner(model))!r}"
    if found.packing != "segments":
        raise ValueError(
            "Expected `context_parallel_size` to be 1 with a model that does not take packed batches with attention "
            f"'sdpa', 'eager', flash or flex attention, or that has an auxiliary loss, {but}. With another attention, "
            'pass `model_kwargs={"attn_implementation": "sdpa"}`.'
        )
    if size in known.shares:
        return
    rope = str(getattr(text_config(model), "rope_parameters", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        raise ValueError(
            "Expected `context_parallel_size` to be 1 with position embeddings that depend on the longest sequence, "
            f"because each process has other tokens, {but} and {rope}."
        )
    pairs = _trial_sequences(batch, LEAST_LENGTH, 2 * LEAST_LENGTH, num_embeddings(model) or 1)
    sums, half = [], False
    with _untouched(model):
        for processes in (None, group):
            layout = _packed(pairs, device, "segments", share, found.kernel, processes)
            try:
                logits, _, half = _answer(model, known.body, layout, None)
            except RuntimeError as error:  # such as one of shapes, because attention has a parameter for each head
                raise ValueError(f"Expected `context_parallel_size` to be 1, {but}, which raised: {error}") from error
            numbers = layout.cu_labels.diff()
            of_sequence = torch.repeat_interleave(torch.arange(len(numbers), device=device), numbers)
            sums.append(logits.new_zeros(len(numbers), logits.shape[1]).index_add(0, of_sequence, logits))
    torch.distributed.all_reduce(sums[1], group=group)
    if not _close(sums[1], sums[0], half):
        raise ValueError(
            "Expected `context_parallel_size` to be 1 with a model in which other layers than attention mix tokens, "
            f"{but}. A check found that {size} processes that share a row get other results than one."
        )
    known.shares.add(size)


def _all_agree(model: nn.Module, right: bool) -> bool:
    """Whether `right` holds on all processes that take part in the forward passes of a sharded model."""
    if not is_sharded(model) or not torch.distributed.is_initialized():
        return right
    verdict = torch.tensor(int(right), device=device_of(model))
    torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN)
    return bool(verdict)


# ---------------------------------------------------------------------------------------------------------------
# The trial
# ---------------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    logits: Tensor
    """[compared tokens, V]"""
    gradients: list[Tensor] | None
    half: bool
    """Whether they were computed in half precision, at least in part."""


def _try(
    model: nn.Module, known: _Model, batch: Sequences, longest: int, row: int, *, gradients: bool, padding_free: bool
) -> Found:
    device, name = device_of(model), _name(model)
    deep, shallow = _deep_and_shallow(model, batch, longest, row)
    compared = shallow.select([1, 3])  # the last pair in the row, long and short
    parameters = _some_parameters(model) if gradients else None
    alone = padded_layout(compared.whole(), device)._replace(kind="alone")

    forgets = not _all_agree(model, not _check_forward(model, compared, device, name))
    alone = alone._replace(forgets=forgets)
    try:
        truth = _answer(model, None, alone, parameters)
    except AssertionError as error:
        raise TypeError(f"Expected a model that has gradients in eval mode, but {name} raised: {error}") from error
    if gradients not in known.body_tried:
        known.body = find_body(model) if known.body is not None or not known.body_tried else None
        known.body_tried.add(gradients)
        if known.body is not None:
            try:
                agrees = _agree(_answer(model, known.body, alone, parameters), truth)
            except TypeError:  # FSDP has freed the weight of the output layer after the forward pass
                agrees = False
            known.body = known.body if _all_agree(model, agrees) else None
        if known.body is None and not adds_auxiliary_loss(model):
            _warn(
                known,
                "body",
                f"{name} does not expose last hidden states followed by a plain nn.Linear, so the logits of all "
                "completion tokens are kept in memory. Results are right, but training takes more memory. If memory "
                "runs out, use smaller batches. `lit-did docs performance` lists the causes, such as LoRA on "
                "`lm_head`.",
            )

    def right(values: list[Layout], of_gradients: Layout) -> bool:
        return _is_right(model, known, truth, values, of_gradients, parameters)

    found = Found((), longest, row, gradients, "alone", None, False, forgets)
    if _kept_tokens(model) < longest:
        return found
    tried = attention.packings(inner(model)) if padding_free and not forgets and not adds_auxiliary_loss(model) else ()
    for packing in tried:
        kernel = attention.own_kernel(inner(model)) if packing == "segments" else None
        for share in (True, False) if packing != "positions" else (False,):
            if _takes_positions(model) and right(*_to_try(deep, shallow, device, packing, share, kernel)):
                return found._replace(kind="packed", packing=packing, share=share, kernel=kernel)
    padded = padded_layout(compared.whole() if adds_auxiliary_loss(model) else compared, device)
    return found._replace(kind="padded") if not forgets and right([padded], padded) else found


def _to_try(
    deep: Sequences, shallow: Sequences, device: torch.device, packing: Packing, share: bool, kernel: str | None
) -> tuple[list[Layout], Layout]:
    """The layouts whose logits are compared, and that whose gradients are."""
    # With shared beginnings, the plain layout has to be right too, because `share_prompts=False` uses it.
    kinds = [(deep, share), (shallow, False)] if share else [(deep, False)]
    values = [_packed(some, device, packing, shared, kernel) for some, shared in kinds]
    return values, _packed(shallow, device, packing, share, kernel)


def _is_right(
    model: nn.Module,
    known: _Model,
    truth: _Answer,
    values: list[Layout],
    of_gradients: Layout,
    parameters: list[Tensor] | None,
) -> bool:
    """Whether logits agree in some layouts, which may be long, and gradients in one, which is short."""
    try:
        answers = (_answer(model, known.body, value, None) for value in values)
        agrees = all(_close(answer.logits, truth.logits, truth.half) for answer in answers) and (
            parameters is None or _agree(_answer(model, known.body, of_gradients, parameters), truth)
        )
    except Exception as error:  # the model does not know this layout, or it does not fit into memory
        known.raised = f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:200]}"
        agrees = False
    return _all_agree(model, agrees)


def _with_kernel(
    model: nn.Module, known: _Model, batch: Sequences, found: Found, autocast: torch.dtype | None, pads: bool
) -> Found:
    """`found` with the first kernel that gives right results. Without one, padded rows, if they are right.

    One warning names the reason if the kernel is not flash attention.

    Args:
        pads: Whether rows may be padded. Processes cannot share padded rows.
    """
    kernel, reason = _try_kernels(model, known, batch, found, autocast)
    if kernel == flex.FLEX:
        _warn(
            known,
            "flex",
            f"{_name(model)} uses flex attention, which takes all sequences of a batch in one call a layer. Its "
            "kernels are compiled in the first step, which takes longer therefore. Flash attention, which needs no "
            f"compilation, is not used: {reason}",
        )
    if kernel is not None:
        return found._replace(kernel=kernel)
    if pads:
        padded = _try(model, known, batch, found.length, found.row, gradients=found.gradients, padding_free=False)
        if padded.kind == "padded":
            _warn(
                known,
                "padded",
                f"{_name(model)} gets padded batches, because no kernel takes all sequences of a row without padding "
                f"in one call: {reason} Results are right, but training is slower. `padding_free=False` silences this "
                "warning.",
            )
            return padded
    _warn_of_turns(model, known, reason)
    return found


def _try_kernels(
    model: nn.Module, known: _Model, batch: Sequences, found: Found, autocast: torch.dtype | None
) -> tuple[str | None, str]:
    """The first kernel that gives right results in place of the attention of `model`, in the precision of a step.

    Also why the kernels before it are not used, and what to do.
    """
    device = device_of(model)
    deep, shallow = _deep_and_shallow(model, batch, found.length, found.row)
    parameters = _some_parameters(model) if found.gradients else None
    alone = padded_layout(shallow.select([1, 3]).whole(), device)._replace(kind="alone", forgets=found.forgets)
    reason, kernels = attention.without_flash(inner(model), device), _kernels(model)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        truth = _answer(model, known.body, alone, parameters)
        for kernel in kernels:
            known.raised = ""
            values, of_gradients = _to_try(deep, shallow, device, "segments", found.share, kernel)
            right = _is_right(model, known, truth, values, of_gradients, parameters)
            refused = next(filter(None, (attention.refused(v.inputs["attention_mask"]) for v in values)), None)
            if right and refused is None:
                return kernel, reason
            but = f" ({known.raised})" if known.raised else ""
            failed = refused or f"a check found other results with {kernel}{but}."
            if kernel == flex.FLEX:
                reason += f" And {failed}"
            else:
                reason = refused or f"{failed} Another version of torch or flash-attn may help."
    return None, reason


def _kernels(model: nn.Module) -> tuple[str, ...]:
    """The kernels that attend to all segments of a row in one call, the fastest first."""
    own = attention.own_kernel(inner(model))
    return attention.kernels(inner(model), device_of(model)) if own is None else (own,)


def _warn_of_turns(model: nn.Module, known: _Model, reason: str) -> None:
    """Warns once that attention takes one segment at a time, on a device where every call costs a launch."""
    _warn(
        known,
        "turns",
        f"{_name(model)} attends to one sequence of a batch at a time, with a call or more for each in every layer. "
        f"No kernel takes all sequences in one call: {reason} Results are right, but training is slower.",
    )


def _warn_of(model: nn.Module, known: _Model, found: Found, padding_free: bool) -> None:
    """Warns once if the model does not get the fastest layout that was asked for."""
    name, kept = _name(model), _kept_tokens(model)
    effect = "Results are right, but training is slower."
    raised = f" (it raised {known.raised})" if known.raised else ""
    if found.kind == "packed" or adds_auxiliary_loss(model):
        return
    if kept < found.length:
        _warn(
            known,
            "alone",
            f"{name} attends to the {kept} tokens with the highest scores. Between equal scores the place in the row "
            "decides, so batches could give other results. Batches with longer sequences run one sequence at a time. "
            f"{effect} A `max_length` of at most {int(kept) // 2} avoids this.",
        )
    elif found.kind == "alone":
        _warn(
            known,
            "alone",
            f"{name} does not support batches with sequences of {found.length} tokens: a check found other results "
            f"than for each sequence alone{raised}. So they run one sequence at a time. {effect}",
        )
    elif padding_free:
        _warn(
            known,
            "padded",
            f"{name} does not support packed batches with attention {attention.implementation(inner(model))!r}"
            f"{raised}, so they are padded instead. {effect} `padding_free=False` silences this warning.",
        )


def _kept_tokens(model: nn.Module) -> float:
    """The number of tokens that attention selects by their scores. Infinity: it attends to all."""
    config = text_config(model)
    kept = [getattr(config, name, None) for name in ("index_topk", "keep_window_size", "indexer_budget")]
    return min((k for k in kept if isinstance(k, int)), default=float("inf"))


def _check_forward(model: nn.Module, compared: Sequences, device: torch.device, name: str) -> bool:
    """Whether the model keeps state between sequences, which a pass over one token removes.

    Raises:
        TypeError: A later token changes an earlier logit, or the logits are not of the vocabulary.
        ValueError: The model keeps state, and a pass over one token does not remove it.
    """
    long, short = compared.select([0]), compared.select([1])
    half = len(long.input_ids) // 2
    other = long.input_ids.copy()
    # One token repeated: the same tokens in another order hardly change the result of weak attention.
    others = np.unique(long.input_ids)
    other[half:] = others[others != long.input_ids[half]][:1] if len(others) > 1 else short.input_ids[0]
    # The last positions before the change, which a window would show, and some of all positions.
    places = np.unique(
        np.concatenate([np.linspace(0, half - 1, COMPARED), np.arange(half - COMPARED, half)]).astype(int)
    )
    early = np.full(len(other), IGNORE_INDEX)
    early[places[places >= 0]] = 0
    # Three quarters as long: a model that stretches its positions for a long sequence may keep that for shorter ones.
    size = max(len(short.input_ids), 3 * len(long.input_ids) // 4)
    ids = long.input_ids[:size]
    last = np.where(np.arange(size) == size - 1, ids, IGNORE_INDEX)
    middle = Sequences(ids, long.position_ids[:size], last, np.array([0, size]))

    def logits(sequences: Sequences, forgets: bool = False) -> Tensor:
        layout = padded_layout(sequences, device)._replace(kind="alone", forgets=forgets)
        with torch.no_grad():
            return completion_logits(model, layout)[0]

    first = logits(middle, forgets=True)
    half = _is_half(first) or torch.is_autocast_enabled(device.type) or computes_in_half(model)
    if first.shape[1] <= int(compared.input_ids.max(initial=0)):
        raise TypeError(
            f"Expected a causal language model, but the logits of {name} have {first.shape[1]} classes, fewer than "
            "the tokens of the batch need."
        )
    if len(other) > 3:
        expected = logits(long._replace(labels=early))
        # The shapes are the same, so only a kernel that groups tokens, such as experts', may round differently.
        if not _close(logits(long._replace(input_ids=other, labels=early)), expected, half, CAUSAL_TOLERANCE):
            raise TypeError(
                f"Expected a causal language model, but in {name} a later token changes an earlier logit. It would "
                "see the tokens that it has to predict. Pass a decoder. Some encoders become one with "
                "`is_decoder=True` in their configuration."
            )
    logits(long)
    if _close(logits(middle), first, half):
        return False
    logits(long)
    if not _close(logits(middle, forgets=True), first, half):
        raise ValueError(
            f"Expected a model whose outputs depend on its arguments only, but {name} returned different logits for "
            "the same sequence after another one."
        )
    return True


def _deep_and_shallow(model: nn.Module, batch: Sequences, longest: int, row: int) -> tuple[Sequences, Sequences]:
    """Sequences of a trial: with the compared ones deep in a row, and with few others."""
    size = num_embeddings(model) or 1
    return _trial_sequences(batch, longest, row, size), _trial_sequences(batch, longest, 0, size)


def _trial_sequences(batch: Sequences, longest: int, row: int, vocabulary: int) -> Sequences:
    """Pairs made of the batch's tokens. The last pair, a long and a short sequence, has a common beginning and labels.

    The pairs before it fill the row, so that the last pair lies deep in it.
    """
    tokens = batch.input_ids
    if len(np.unique(tokens)) < DISTINCT:  # attention over equal values does not depend on what it attends to
        tokens = np.concatenate([tokens[:DISTINCT], np.arange(min(vocabulary, 2 * DISTINCT))])
    tokens = np.resize(tokens, 2 * longest + SHORT)
    long = tokens[:longest]
    # Its continuation differs from the long one's.
    short = np.concatenate([long[:SHORTEST_SHARED], long[SHORTEST_SHARED : SHORT + 1][::-1][: SHORT - SHORTEST_SHARED]])
    fill = max(0, row - (longest - 1) - (SHORT - 1))
    # At most `row` tokens in all, because some models have no positions for more.
    lengths = [longest] * (fill // longest) + [fill % longest] * (fill % longest > 0)
    if len(lengths) % 2:  # a pair each
        last = lengths.pop()
        lengths += [last - last // 2, last // 2] if last > 1 else []
    # Each starts at another of the tokens, so that they have no common beginning.
    fillers = [np.roll(tokens, -1 - i)[:length] for i, length in enumerate(lengths or [SHORT, SHORT])]
    half = len(fillers) // 2
    ids = [*fillers[:half], long, *fillers[half:], short]
    # The last token of the last pair's sequences is predicted, but it is no input. Models whose outputs depend on the
    # number of tokens get it anyway.
    rests = [np.empty((2, 0), dtype=np.int64)] * len(ids)
    for at in (half, 2 * half + 1):
        if len(ids[at]) > 1:
            rests[at] = np.array([ids[at][-1:], [len(ids[at]) - 1]])
            ids[at] = ids[at][:-1]
    labels = [np.full(len(i), IGNORE_INDEX) for i in ids]
    for at in (half, 2 * half + 1):
        # Any token can be the label, so it is the input token. Places are spread over the whole sequence.
        places = np.unique(np.linspace(0, len(ids[at]) - 1, min(COMPARED, len(ids[at]))).astype(int))
        labels[at][places] = ids[at][places]
    cu_seqlens = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    positions = np.concatenate([np.arange(len(i)) for i in ids])
    return Sequences(np.concatenate(ids), positions, np.concatenate(labels), cu_seqlens, tuple(rests))


def _answer(model: nn.Module, body: nn.Module | None, layout: Layout, parameters: list[Tensor] | None) -> _Answer:
    with torch.set_grad_enabled(parameters is not None):
        if body is None:
            logits = completion_logits(model, layout)[0]
        else:
            logits = output_layer(model).logits(completion_hidden(model, layout, body))
        half = _is_half(logits) or torch.is_autocast_enabled(logits.device.type) or computes_in_half(model)
        if parameters is None:
            return _Answer(logits, None, half)
        objective = logits.float().log_softmax(-1).gather(1, layout.labels[:, None]).mean()
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
    return _Answer(logits.detach(), list(gradients), half)


def _agree(answer: _Answer, truth: _Answer) -> bool:
    if not _close(answer.logits, truth.logits, truth.half):
        return False
    if truth.gradients is None:
        return True
    assert answer.gradients is not None
    tolerance = 2 * HALF_TOLERANCE if truth.half or _is_half(truth.gradients[0]) else 1e-3
    # A gradient near 0, such as that of a bias that the softmax cancels, is rounding. It is compared with the others.
    norms = [gradient.float().norm() for gradient in truth.gradients]
    least = 1e-2 * torch.stack(norms).norm()
    return all(
        bool((one.float() - other.float()).norm() <= tolerance * (norm + least)) or not bool(norm.isfinite())
        for one, other, norm in zip(answer.gradients, truth.gradients, norms, strict=True)
    )


def _close(logits: Tensor, expected: Tensor, half: bool, tolerance: float = TOLERANCE) -> bool:
    """Whether they differ by rounding only. NaN equals NaN, so that broken weights do not change the layout."""
    logits, expected = logits.float(), expected.float()
    if half:  # compared as a whole, because single logits may differ a lot in deep models
        same = torch.isfinite(logits) == torch.isfinite(expected)
        logits, expected = (x.nan_to_num(0, 0, 0) for x in (logits, expected))
        centred = expected - expected.mean(-1, keepdim=True)  # what the softmax sees
        return bool(same.all()) and bool((logits - expected).norm() <= HALF_TOLERANCE * centred.norm())
    scale = expected.abs().nan_to_num(0, posinf=0).max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def _is_wrapped(model: nn.Module) -> bool:
    """Whether another function has replaced the forward method of the model's class."""
    return any("forward" in vars(part) for part in (model, inner(model)))


def _keeps_autocast(model: nn.Module) -> bool:
    """Whether a trial of `model` runs under autocast, if training does."""
    return _is_wrapped(model) or attention.own_kernel(inner(model)) in varlen.FLASH


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _some_parameters(model: nn.Module) -> list[Tensor]:
    """The smallest trained parameters. They are in every layer, and their gradients depend on all layers above."""
    chosen: list[Tensor] = []
    left = MAX_GRADIENT_ELEMENTS
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=Tensor.numel):
        if chosen and parameter.numel() > left:
            break
        chosen.append(parameter)
        left -= parameter.numel()
    return chosen


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Runs `model` in eval mode, with its own attention, without autocast or compilation. Restores random numbers."""
    with (
        eval_mode(model),
        random_numbers_kept(device_of(model)),
        attention.packed_attention(inner(model), packed=False),
        # In the precision of the weights. A replaced forward method, such as accelerate's, may bring its own autocast,
        # and flash attention has none but half precision.
        nullcontext() if _keeps_autocast(model) else torch.autocast(device_of(model).type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def _packed(
    sequences: Sequences,
    device: torch.device,
    packing: Packing,
    share: bool,
    kernel: str | None = None,
    group: ProcessGroup | None = None,
) -> Layout:
    if group is None:
        layout = packed_layout(sequences, device, share=share)._replace(packing=packing)
    else:
        layout = own_tokens(packed_layout(sequences, torch.device("cpu"), share=share), group, device)
    segments = layout.inputs["attention_mask"]
    if kernel is not None:
        attention.prepare(segments, device, kernel)
    return layout if packing == "segments" else layout._replace(inputs={**layout.inputs, "attention_mask": None})


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(inner(model).forward).parameters


def _name(model: nn.Module) -> str:
    return type(inner(model)).__name__


def _warn(known: _Model, what: str, message: str) -> None:
    if what not in known.warned:
        known.warned.add(what)
        warnings.warn(message, stacklevel=6)
