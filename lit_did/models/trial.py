"""What layout of a batch a model takes, found by comparing it with the untouched model.

A model gives the same answers however its sequences lie, or it does not: some let packed sequences see each other, some
depend on the position in the row, some on the longest sequence beside them. So each model is tried on sequences as long
as the batch's, made of the batch's own tokens. The truth is the model as it is, given one sequence at a time: its
logits, and where it is trained its gradients. The first layout that agrees is used, in this order:

    packed, with the beginning that a pair shares laid down once
    packed
    padded
    alone: one sequence at a time

Where the fastest one that was asked for does not agree, one warning says so. A model in which a later token changes an
earlier logit is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.layout import SHORTEST_SHARED, Layout, packed_layout, padded_layout
from lit_did.batches.sequences import Sequences
from lit_did.models import attention
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
from lit_did.models.loading import is_sharded
from lit_did.models.quiet import random_numbers_kept
from lit_did.models.wrappers import inner

LEAST_LENGTH = 32  # tokens of the shortest trial: shorter batches are common, and not worth a trial each
MOST_ROOM = 8192  # tokens of the rows that are tried beyond what a batch needs
COMPARED = 32  # tokens of a sequence whose logits are compared: [32, V] is small beside a step's
# Far above rounding, and below what another sequence's tokens change.
TOLERANCE = 1e-4  # of the largest logit
CAUSAL_TOLERANCE = 1e-5
HALF_TOLERANCE = 0.1  # of the logits' norm, in bfloat16 and float16
DISTINCT = 8  # different tokens that a trial has at least, where the vocabulary has as many
SHORT = SHORTEST_SHARED + 5  # tokens of the short sequence beside the long one
MAX_GRADIENT_ELEMENTS = 2**24  # of the parameters whose gradients are compared, the smallest first: 64 MiB


class Found(NamedTuple):
    """What a model takes, tried on sequences of up to `length` tokens and rows of up to `row` tokens."""

    key: tuple
    """what else it depends on: whether packing was tried, the weights' dtype, autocast, the attention"""
    length: int
    row: int
    gradients: bool
    """whether they were compared too"""
    kind: str
    """"packed", "padded" or "alone": see `Layout`"""
    packing: str | None
    share: bool
    """whether what pairs begin with in common may be laid down once"""
    forgets: bool
    """whether the model keeps something of one forward pass for the next, until it is given one token"""


class _Model:
    """What is known of one model."""

    def __init__(self) -> None:
        self.body: Callable | None = None
        self.body_tried: set[bool] = set()  # without and with gradients
        self.found: list[Found] = []
        self.warned: set[str] = set()
        self.raised = ""  # by the last layout that it does not take


_known: WeakKeyDictionary[nn.Module, _Model] = WeakKeyDictionary()


@torch.compiler.disable
def layout_of(
    model: nn.Module,
    sequences: Sequences,
    *,
    padding_free: bool = True,
    share: bool = True,
    batch: Sequences | None = None,
) -> Layout:
    """The sequences in the fastest layout in which `model` is right, on its device.

    Args:
        padding_free: End to end in one row, if the model is right then.
        share: What pairs begin with in common once, if the model is right then.
        batch: All sequences of which these are some, if all parts are to have one kind of layout.

    Raises:
        TypeError: The model is no causal language model.
        ValueError: The sequences are longer than the model has positions.
    """
    device = next(model.parameters()).device
    if adds_auxiliary_loss(model):  # what follows the last label counts
        sequences, batch = sequences.whole(), None if batch is None else batch.whole()
    tried = sequences if batch is None else batch
    found = find(model, tried, padding_free=padding_free)
    if found.packing == "positions" and not tried.positions_count_from_zero:  # they do not restart in every sequence
        found = find(model, tried, padding_free=False)
    if found.kind == "packed":
        return _packed(sequences, device, found.packing, share and found.share)
    if found.kind == "alone":  # what follows the last label may count
        sequences = sequences.whole()
        _check_positions(model, int(np.diff(sequences.cu_seqlens).max(initial=1)))
    return padded_layout(sequences, device)._replace(kind=found.kind, forgets=found.forgets)


@torch.compiler.disable
def outputs_of(model: nn.Module, layout: Layout) -> Outputs:
    """What `model` says at the completion tokens of `layout`, which `layout_of` made for it."""
    return completion_outputs(model, layout, _known[model].body)


def find(model: nn.Module, sequences: Sequences, *, padding_free: bool = True) -> Found:
    """What `model` takes of sequences such as these; tried where that is not known yet."""
    known, sharded = _known.setdefault(model, _Model()), is_sharded(model)
    gradients = not sharded and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    lengths = np.diff(sequences.cu_seqlens)
    length, row = int(lengths.max(initial=1)), int(lengths.sum())
    parameter = next(model.parameters())
    autocast = _is_wrapped(model) and torch.is_autocast_enabled(parameter.device.type)
    key = (padding_free, parameter.dtype, autocast, attention.implementation(inner(model)))
    tried = [found for found in known.found if found.key == key and found.gradients >= gradients]
    # What is right of longer ones is right of shorter ones. What is wrong of longer ones may be right of these.
    for found in tried:
        fastest = found.kind == ("packed" if padding_free else "padded") and not found.forgets
        if found.length >= length and found.row >= row and fastest:
            return found
    _check_positions(model, length)
    wanted = _bounds(model, length, row)
    # What was wrong of a shorter row is wrong of a longer one, and the others take no rows.
    failed = [found for found in tried if found.kind != "packed" and found.length <= wanted[0] and found.row <= row]
    for found in tried:
        if (found.length, found.row) == wanted or (found in failed and found.length == wanted[0]):
            return found
    if sharded and tried:  # a trial is a forward pass, which needs all processes at the same time
        _warn(known, "longer", f"{_name(model)} is sharded and was tried on shorter sequences than {length} tokens.")
        return tried[0]
    if sharded:
        wanted, sequences = _agreed(model, wanted, sequences)
    with _untouched(model):
        found = _try(model, known, sequences, *wanted, gradients=gradients, padding_free=padding_free and not failed)
    found = found._replace(key=key)
    _warn_of(model, known, found, padding_free)
    known.found.append(found)
    return found


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
            f"Expected sequences of at most {limit} tokens, which {_name(model)} has positions for, but got {length}. "
            "Lower `max_length`."
        )


def _bounds(model: nn.Module, length: int, row: int) -> tuple[int, int]:
    """Tokens of the trial's longest sequence and of its row, so that trials are few.

    Up to the next power of two; rows, whose depth takes a forward pass without gradients only, up to the one after it.
    """
    limit = num_positions(model)
    longest = max(LEAST_LENGTH, 2 ** (length - 1).bit_length())
    longest = int(limit) if length <= limit < longest else longest
    deep = 2 ** (row - 1).bit_length()
    return longest, max(longest + SHORT, 2 * deep if 2 * deep <= min(limit, MOST_ROOM) else deep)


def _agreed(model: nn.Module, wanted: tuple[int, int], batch: Sequences) -> tuple[tuple[int, int], Sequences]:
    """The largest bounds of all processes, doubled, and the first one's sequences.

    Later batches may be longer, and there is one trial only. All processes try the same tokens, so that none stops
    making forward passes while another goes on.
    """
    length, row = wanted
    if torch.distributed.is_initialized():
        bounds = torch.tensor(wanted, device=next(model.parameters()).device)
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
        length, row = bounds.tolist()
        shared = [batch]
        torch.distributed.broadcast_object_list(shared, src=0)
        (batch,) = shared
    longest = int(max(length, min(2 * length, num_positions(model))))
    return (longest, max(2 * row, longest + SHORT)), batch


def _all_agree(model: nn.Module, right: bool) -> bool:
    """Whether it is so on all processes that a sharded model's forward passes need."""
    if not is_sharded(model) or not torch.distributed.is_initialized():
        return right
    verdict = torch.tensor(int(right), device=next(model.parameters()).device)
    torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN)
    return bool(verdict)


# ---------------------------------------------------------------------------------------------------------------
# The trial
# ---------------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    logits: Tensor
    """[compared tokens, V]"""
    gradients: list[Tensor] | None


def _try(
    model: nn.Module, known: _Model, batch: Sequences, longest: int, row: int, *, gradients: bool, padding_free: bool
) -> Found:
    device, name = next(model.parameters()).device, _name(model)
    size = num_embeddings(model) or 1
    deep, shallow = _trial_sequences(batch, longest, row, size), _trial_sequences(batch, longest, 0, size)
    compared = shallow.select([1, 3])  # the last pair in the row, long and short
    parameters = _some_parameters(model) if gradients else None
    alone = padded_layout(compared.whole(), device)._replace(kind="alone")

    forgets = not _all_agree(model, not _check_forward(model, compared, device, name))
    alone = alone._replace(forgets=forgets)
    try:
        truth = _answer(model, None, alone, parameters)
    except AssertionError as error:
        raise TypeError(f"Expected a model that gives gradients in eval mode, but {name} raised: {error}") from error
    if gradients not in known.body_tried:
        known.body = find_body(model) if known.body is not None or not known.body_tried else None
        known.body_tried.add(gradients)
        if known.body is not None:
            agrees = _agree(_answer(model, known.body, alone, parameters), truth)
            known.body = known.body if _all_agree(model, agrees) else None
        if known.body is None and not adds_auxiliary_loss(model):
            _warn(
                known,
                "body",
                f"{name} does not expose last hidden states followed by a plain nn.Linear, so the logits of all "
                "completion tokens are kept in memory.",
            )

    def right(values: list[Layout], of_gradients: Layout) -> bool:
        """Whether logits agree in some layouts, which may be long, and gradients in one, which is not."""
        try:
            agrees = all(_close(_answer(model, known.body, v, None).logits, truth.logits) for v in values) and (
                parameters is None or _agree(_answer(model, known.body, of_gradients, parameters), truth)
            )
        except Exception as error:  # of a model that was given what it does not know, or more than fits
            known.raised = f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:200]}"
            agrees = False
        return _all_agree(model, agrees)

    found = Found((), longest, row, gradients, "alone", None, False, forgets)
    if _kept_tokens(model) < longest:
        return found
    tried = attention.packings(inner(model)) if padding_free and not forgets and not adds_auxiliary_loss(model) else ()
    for packing in tried:
        for share in (True, False) if packing != "positions" else (False,):
            if not _takes_positions(model):
                continue
            # Where beginnings are shared, the plain kind has to be right too: `share_prompts=False` takes it.
            kinds = [(deep, share), (shallow, False)] if share else [(deep, False)]
            values = [_packed(some, device, packing, shared) for some, shared in kinds]
            if right(values, _packed(shallow, device, packing, share)):
                return found._replace(kind="packed", packing=packing, share=share)
    padded = padded_layout(compared.whole() if adds_auxiliary_loss(model) else compared, device)
    return found._replace(kind="padded") if not forgets and right([padded], padded) else found


def _warn_of(model: nn.Module, known: _Model, found: Found, padding_free: bool) -> None:
    """Warns once where a model is not given the fastest layout that was asked for."""
    name, kept = _name(model), _kept_tokens(model)
    effect = "Results are right, but training is slower."
    raised = f" (it raised {known.raised})" if known.raised else ""
    if found.kind == "packed" or adds_auxiliary_loss(model):
        return
    if kept < found.length:
        _warn(
            known,
            "alone",
            f"{name} attends to the {kept} tokens of the highest scores. Equal scores, such as those of tokens that "
            "come again, are ordered by their place in the row. So batches with longer sequences are given to it one "
            f"sequence at a time. {effect}",
        )
    elif found.kind == "alone":
        _warn(
            known,
            "alone",
            f"{name} gives other results when sequences of {found.length} tokens and of {SHORT} are padded to one "
            f"length, or when tokens after the last label are left out{raised}. So batches with sequences this long "
            f"are given to it one sequence at a time. {effect}",
        )
    elif padding_free:
        _warn(
            known,
            "padded",
            f"{name} gives other results when sequences lie end to end in one row (attention "
            f"{attention.implementation(inner(model))!r}){raised}, so they are padded instead. {effect}",
        )


def _kept_tokens(model: nn.Module) -> float:
    """How many tokens attention selects by their scores; infinity: it selects none."""
    config = text_config(model)
    kept = [getattr(config, name, None) for name in ("index_topk", "keep_window_size", "indexer_budget")]
    return min((k for k in kept if isinstance(k, int)), default=float("inf"))


def _check_forward(model: nn.Module, compared: Sequences, device: torch.device, name: str) -> bool:
    """Whether the model must be made to forget between sequences.

    Raises:
        TypeError: A later token changes an earlier logit.
        ValueError: What one forward pass leaves for the next cannot be undone.
    """
    long, short = compared.select([0]), compared.select([1])
    half = len(long.input_ids) // 2
    other = long.input_ids.copy()
    # One token again and again: what is merely put in another order hardly changes what weak attention sees.
    others = np.unique(long.input_ids)
    other[half:] = others[others != long.input_ids[half]][:1] if len(others) > 1 else short.input_ids[0]
    # The last positions before it, which a window would show it, and some of all.
    places = np.unique(
        np.concatenate([np.linspace(0, half - 1, COMPARED), np.arange(half - COMPARED, half)]).astype(int)
    )
    early = np.full(len(other), IGNORE_INDEX)
    early[places[places >= 0]] = 0
    # Three quarters as long: what stretches its positions for the longest sequence may keep that for shorter ones.
    size = max(len(short.input_ids), 3 * len(long.input_ids) // 4)
    middle = Sequences(*(array[:size] for array in long[:3]), np.array([0, size]))
    middle = middle._replace(labels=np.where(np.arange(size) == size - 1, middle.input_ids, IGNORE_INDEX))

    def logits(sequences: Sequences, forgets: bool = False) -> Tensor:
        layout = padded_layout(sequences, device)._replace(kind="alone", forgets=forgets)
        with torch.no_grad():
            return completion_logits(model, layout)[0]

    first = logits(middle, forgets=True)
    if first.shape[1] <= int(compared.input_ids.max(initial=0)):
        raise TypeError(
            f"Expected a causal language model, but the logits of {name} are of {first.shape[1]} classes, fewer than "
            "its input has tokens."
        )
    if len(other) > 3:
        expected = logits(long._replace(labels=early))
        # The same shapes: only a kernel that groups tokens, such as experts', may round otherwise.
        if not _close(logits(long._replace(input_ids=other, labels=early)), expected, CAUSAL_TOLERANCE):
            raise TypeError(
                f"Expected a causal language model, but in {name} a later token changes an earlier logit, so it would "
                "see the tokens that it is to predict. Pass a decoder; some encoders become one with `is_decoder=True` "
                "in their configuration."
            )
    logits(long)
    if _close(logits(middle), first):
        return False
    logits(long)
    if not _close(logits(middle, forgets=True), first):
        raise ValueError(
            f"Expected a model whose forward pass depends on its arguments alone, but {name} answered differently "
            "after another sequence."
        )
    return True


def _trial_sequences(batch: Sequences, longest: int, row: int, vocabulary: int) -> Sequences:
    """Pairs with a beginning in common, of the batch's tokens; of the last pair, a long and a short one, some labelled.

    The pairs before it fill the row, so that the last one lies deep in it.
    """
    tokens = batch.input_ids
    if len(np.unique(tokens)) < DISTINCT:  # attention over equal values is the same whatever it attends to
        tokens = np.concatenate([tokens[:DISTINCT], np.arange(min(vocabulary, 2 * DISTINCT))])
    tokens = np.resize(tokens, 2 * longest + SHORT)
    long = tokens[:longest]
    # Another continuation than the long one's, where the batch has two different tokens.
    short = np.concatenate([long[:SHORTEST_SHARED], long[SHORTEST_SHARED : SHORT + 1][::-1][: SHORT - SHORTEST_SHARED]])
    fill = max(0, row - (longest - 1) - (SHORT - 1))
    # No longer than `row` in all: some models have no room for more.
    lengths = [longest] * (fill // longest) + [fill % longest] * (fill % longest > 0)
    if len(lengths) % 2:  # a pair each
        last = lengths.pop()
        lengths += [last - last // 2, last // 2] if last > 1 else []
    # Each begins elsewhere in the tokens, so that they share no beginning.
    fillers = [np.roll(tokens, -1 - i)[:length] for i, length in enumerate(lengths or [SHORT, SHORT])]
    half = len(fillers) // 2
    ids = [*fillers[:half], long, *fillers[half:], short]
    # Of the last pair, the last token is only predicted. A model whose answers depend on the number of tokens is given
    # it all the same.
    rests = [np.empty((2, 0), dtype=np.int64)] * len(ids)
    for at in (half, 2 * half + 1):
        if len(ids[at]) > 1:
            rests[at] = np.array([ids[at][-1:], [len(ids[at]) - 1]])
            ids[at] = ids[at][:-1]
    labels = [np.full(len(i), IGNORE_INDEX) for i in ids]
    for at in (half, 2 * half + 1):
        # The label is the token itself, any token will do; the last ones are as far from the beginning as can be.
        places = np.unique(np.linspace(0, len(ids[at]) - 1, min(COMPARED, len(ids[at]))).astype(int))
        labels[at][places] = ids[at][places]
    cu_seqlens = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    positions = np.concatenate([np.arange(len(i)) for i in ids])
    return Sequences(np.concatenate(ids), positions, np.concatenate(labels), cu_seqlens, tuple(rests))


def _answer(model: nn.Module, body: Callable | None, layout: Layout, parameters: list[Tensor] | None) -> _Answer:
    with torch.set_grad_enabled(parameters is not None):
        if body is None:
            logits = completion_logits(model, layout)[0]
        else:
            logits = output_layer(model).logits(completion_hidden(model, layout, body))
        if parameters is None:
            return _Answer(logits, None)
        objective = logits.float().log_softmax(-1).gather(1, layout.labels[:, None]).mean()
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
    return _Answer(logits.detach(), list(gradients))


def _agree(answer: _Answer, truth: _Answer) -> bool:
    if not _close(answer.logits, truth.logits):
        return False
    if truth.gradients is None:
        return True
    autocast = torch.is_autocast_enabled(truth.logits.device.type)
    half = autocast or _is_half(truth.logits) or _is_half(truth.gradients[0])
    tolerance = 2 * HALF_TOLERANCE if half else 1e-3
    # A gradient of nearly 0, such as of a bias that the softmax cancels, is rounding: it counts beside the others.
    norms = [gradient.float().norm() for gradient in truth.gradients]
    least = 1e-2 * torch.stack(norms).norm()
    return all(
        bool((one.float() - other.float()).norm() <= tolerance * (norm + least)) or not bool(norm.isfinite())
        for one, other, norm in zip(answer.gradients, truth.gradients, norms, strict=True)
    )


def _close(logits: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether they differ by rounding alone; NaN equals NaN, so that broken weights are no inability."""
    half = _is_half(expected) or torch.is_autocast_enabled(expected.device.type)
    logits, expected = logits.float(), expected.float()
    if half:  # as a whole: single logits may be off by much in deep models
        same = torch.isfinite(logits) == torch.isfinite(expected)
        logits, expected = (x.nan_to_num(0, 0, 0) for x in (logits, expected))
        centred = expected - expected.mean(-1, keepdim=True)  # what the softmax sees
        return bool(same.all()) and bool((logits - expected).norm() <= HALF_TOLERANCE * centred.norm())
    scale = expected.abs().nan_to_num(0, posinf=0).max().item()
    return torch.allclose(logits, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def _is_wrapped(model: nn.Module) -> bool:
    """Whether somebody has put another forward pass in the place of the class's."""
    return any("forward" in vars(part) for part in (model, inner(model)))


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _some_parameters(model: nn.Module) -> list[Tensor]:
    """Trained parameters, the smallest first: some of every layer, whose gradients depend on all layers above."""
    chosen, left = [], MAX_GRADIENT_ELEMENTS
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=Tensor.numel):
        if chosen and parameter.numel() > left:
            break
        chosen.append(parameter)
        left -= parameter.numel()
    return chosen


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, without autocast, not compiled, with its own attention; random numbers as without."""
    training = [module for module in model.modules() if module.training]
    with (
        random_numbers_kept(next(model.parameters()).device),
        attention.packed_attention(inner(model), packed=False),
        # In the precision of the weights. A forward pass that somebody wrapped, such as accelerate, may bring autocast.
        nullcontext() if _is_wrapped(model) else torch.autocast(next(model.parameters()).device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _packed(sequences: Sequences, device: torch.device, packing: str, share: bool) -> Layout:
    layout = packed_layout(sequences, device, share=share)._replace(packing=packing)
    if packing == "segments":
        return layout
    mask = attention.block_mask(layout.inputs["attention_mask"], device) if packing == "blocks" else None
    return layout._replace(inputs={**layout.inputs, "attention_mask": mask})


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(inner(model).forward).parameters


def _name(model: nn.Module) -> str:
    return type(inner(model)).__name__


def _warn(known: _Model, what: str, message: str) -> None:
    if what not in known.warned:
        known.warned.add(what)
        warnings.warn(message, stacklevel=6)
