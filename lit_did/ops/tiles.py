"""The fused linear token statistics: output layers and statistics a tile of logits at a time, and their gradient.

A tile is some tokens by a block of the vocabulary. What the tiles of a token say merges (`lit_did.ops.partials`), and
the gradient of a tile's logits needs some numbers a token of the whole vocabulary, so no [tokens, V] tensor is ever
needed: the backward computes a tile's logits again, or finds them where the forward left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_did.ops.checks import is_fake
from lit_did.ops.extension import check_gradients
from lit_did.ops.partials import Partials
from lit_did.ops.statistics import TokenStatistics

NARROWEST = 512  # entries of the narrowest block of the vocabulary, on any device
_MOST_SLICES = 8  # of a block, if tokens are cut: they are in memory for all tokens.
_MULTIPLE = 64  # Blocks are a multiple of this many entries wide, because matrix products are slow in others.


class Tiling(NamedTuple):
    """What tiles are like on a device."""

    extra_bytes: int
    """the default of `max_extra_bytes`"""
    narrowest: int
    """Entries of the narrowest block, if the memory allows it. Matrix products are slow in narrower ones."""
    slice_entries: int
    """The kernel sums up at most as many entries of a token together."""
    tile: int
    """Entries of a tile: enough for products at full speed, few enough that the rest of the memory can keep others."""
    single_tile: int
    """Entries of a tile if no other is kept."""
    wide_products: bool
    """Whether a product of half precision can return float32, in which it is summed."""


TILING = {
    "cpu": Tiling(
        extra_bytes=2**28,
        narrowest=NARROWEST,
        slice_entries=2**62,
        tile=2**23,
        single_tile=2**23,  # Memory costs time where it is first touched.
        wide_products=False,
    ),
    # Calculated for an H200: a product of 8,192 tokens by 4,096 entries takes 0.3 ms, a launch 5 us. A warp sums up one
    # slice (kPartEntries in csrc/cuda/kernels.h), and blocks are whole slices.
    "cuda": Tiling(
        extra_bytes=2**30, narrowest=4096, slice_entries=4096, tile=2**25, single_tile=2**62, wide_products=True
    ),
}


def tiling_on(device: torch.device) -> Tiling:
    """What tiles are like on this device."""
    return TILING.get(device.type, TILING["cpu"])


class Layer(NamedTuple):
    """An output layer and its input."""

    hidden: Tensor
    """[N, H] the last hidden states"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""

    def double(self) -> Layer:
        return Layer(self.hidden.double(), self.weight.double(), None if self.bias is None else self.bias.double())


def linear_token_statistics(
    policy: Layer,
    reference: Layer,
    labels: Tensor,
    softcap: tuple[float | None, float | None],
    scale: tuple[float, float],
    ignore_index: int,
    temperature: float,
    plan: Plan,
    process_group: dist.ProcessGroup | None,
    first_entry: int,
) -> TokenStatistics:
    """`lit_did.linear_token_statistics` for checked arguments.

    Args:
        policy, reference: N >= 1. A layer has one dtype, and both or neither are float64.
        labels: [N] int64, in the vocabulary or `ignore_index`.
        softcap, scale: Pairs of the policy's and the reference's.
        ignore_index: Tokens with this label return 0, and the gradients of their logits are 0. Their hidden states take
            part in the products, so they must be finite.
        plan: Of `plan_of`.
        first_entry: Of this process's slice of the vocabulary.
    """
    of_policy, of_reference = softcap
    if of_policy is not None and of_reference is not None:
        # Logits and temperature are divided by the policy's softcap, so that tanh alone computes a tile.
        softcap = 1.0, of_reference / of_policy
        scale = scale[0] / of_policy, scale[1] / of_policy
        temperature /= of_policy
    options = Options(softcap, scale, ignore_index, float(temperature), plan, process_group, first_entry)
    return TokenStatistics(*_LinearTokenStatistics.apply(*policy, *reference, labels, options))


class Plan(NamedTuple):
    """How tokens and vocabulary are cut, and how many tiles each side has memory for."""

    rows: int
    columns: int
    policy_slots: int
    reference_slots: int

    def tiles(self, tokens: int, vocabulary: int) -> list[tuple[slice, slice]]:
        """(tokens, entries) of every tile; the tokens of a block of the vocabulary follow one another."""
        return [
            (slice(row, min(row + self.rows, tokens)), slice(column, min(column + self.columns, vocabulary)))
            for column in range(0, vocabulary, self.columns)
            for row in range(0, tokens, self.rows)
        ]


def plan_of(
    policy: Layer,
    reference: Layer,
    chunk_tokens: int | Literal["auto"],
    max_extra_bytes: int,
) -> Plan:
    """`make_plan` for these layers."""
    trained = tuple(
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer)
        for layer in (policy, reference)
    )
    itemsizes = policy.hidden.element_size(), reference.hidden.element_size()
    tokens, vocabulary = len(policy.hidden), len(policy.weight)
    tiling = tiling_on(policy.hidden.device)
    return make_plan(tokens, vocabulary, itemsizes, chunk_tokens, max_extra_bytes, trained, tiling)


def make_plan(
    tokens: int,
    vocabulary: int,
    itemsizes: tuple[int, int],
    chunk_tokens: int | Literal["auto"],
    max_extra_bytes: int,
    trained: tuple[bool, ...],
    tiling: Tiling,
) -> Plan:
    """Cuts [tokens, vocabulary] so that the tiles in memory at a time take at most `max_extra_bytes`.

    Tokens are cut before blocks of the vocabulary become narrower than `tiling.narrowest`.

    Args:
        itemsizes: Bytes of a policy and of a reference logit.
        trained: Whether a backward of the policy and of the reference will come: the memory left over then holds tiles
            for it, the policy's first. A frozen reference's are kept only if all fit, because losses of
            log-probabilities do not read them again.
        tiling: Of `tiling_on`.

    Raises:
        ValueError: `max_extra_bytes` is too small for one token and a block of `NARROWEST` entries.
    """
    entry = sum(itemsizes)
    least = min(vocabulary, NARROWEST)
    entries = max_extra_bytes // entry
    if entries < least:
        raise ValueError(
            f"Expected `max_extra_bytes` to be at least {least * entry}, for one token and {least} entries of "
            f"the vocabulary, but got {max_extra_bytes}."
        )
    tile = min(entries, tiling.tile if any(trained) else tiling.single_tile)
    wide = entries >= tiling.narrowest > NARROWEST
    narrowest = min(vocabulary, tiling.narrowest) if wide else least
    multiple = tiling.slice_entries if wide else _MULTIPLE
    chunk = tokens if chunk_tokens == "auto" else chunk_tokens
    rows = max(1, min(chunk, tokens, tile // narrowest))
    widest = max(narrowest, tile // rows // multiple * multiple)
    if rows < tokens:
        widest = min(widest, _MOST_SLICES * tiling.slice_entries)
    blocks = -(-vocabulary // widest)
    columns = -(-vocabulary // blocks)
    columns = min(vocabulary, columns + -columns % multiple)
    tiles = blocks * -(-tokens // rows)
    policy_slots = reference_slots = 1
    if any(trained):
        policy_tile, reference_tile = (rows * columns * size for size in itemsizes)
        left = max_extra_bytes - policy_tile - reference_tile
        policy_slots += min(tiles - 1, left // policy_tile)
        more = min(tiles - 1, (left - (policy_slots - 1) * policy_tile) // reference_tile)
        reference_slots += more if trained[1] or more == tiles - 1 else 0
    return Plan(rows, columns, policy_slots, reference_slots)


class Options(NamedTuple):
    """What `_LinearTokenStatistics` takes besides tensors. Pairs are the policy's and the reference's."""

    softcaps: tuple[float | None, float | None]
    scales: tuple[float, float]
    ignore_index: int
    temperature: float
    plan: Plan
    process_group: dist.ProcessGroup | None
    first_entry: int
    """of this process's slice of the vocabulary"""


class _Tiles:
    """One model's logits, a tile at a time. Tile i lies in slot min(i, slots - 1), until another takes its place."""

    def __init__(
        self,
        layer: Layer,
        softcap: float | None,
        scale: float,
        tiles: list[tuple[slice, slice]],
        buffer: Tensor,
        held: list[int | None],
    ) -> None:
        self.hidden, self.weight, self.bias = layer
        self.softcap, self.scale = softcap, scale
        self.tiles, self.buffer, self.held = tiles, buffer, held
        self.alpha = self.beta = scale
        self.added = self.bias
        if softcap is not None:
            self.alpha /= softcap
            self.beta = 1.0  # On CUDA, torch copies a bias into the tile for any other factor.
            self.added = None if self.bias is None else self.bias * self.alpha

    def memory(self, index: int) -> Tensor:
        """[rows, columns]: where the tile lies. It may hold another tile now."""
        rows, columns = self.tiles[index]
        shape = rows.stop - rows.start, columns.stop - columns.start
        return self.buffer[self._slot(index), : shape[0] * shape[1]].view(shape)

    def logits(self, index: int) -> Tensor:
        """[rows, columns], computed unless they are still there."""
        tile = self.memory(index)
        if self.held[self._slot(index)] != index:
            rows, columns = self.tiles[index]
            added, beta = (tile, 0) if self.added is None else (self.added[columns], self.beta)
            torch.addmm(added, self.hidden[rows], self.weight[columns].T, beta=beta, alpha=self.alpha, out=tile)
            if self.softcap is not None:
                tile.tanh_()
                if self.softcap != 1:
                    tile.mul_(self.softcap)
            self.held[self._slot(index)] = index
        return tile

    def overwritten(self, index: int) -> None:
        """Says that the tile's memory no longer holds its logits."""
        self.held[self._slot(index)] = None

    def _slot(self, index: int) -> int:
        return min(index, len(self.held) - 1)


class _Gradients:
    """The gradients of one model's hidden states, weight and bias, from those of its tiles, last tile first."""

    def __init__(self, logits: _Tiles, needed: tuple[bool, bool, bool], across: bool) -> None:
        self.logits = logits
        rows, columns = logits.tiles[-1]
        hidden, weight = logits.hidden, logits.weight
        double = hidden.dtype == torch.float64
        sum_dtype = torch.float64 if double else torch.float32
        blocks, chunks = columns.start > 0, rows.start > 0
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.block: Tensor | None = None
        if needed[0]:
            self.hidden = torch.empty_like(hidden, dtype=sum_dtype if blocks or across else hidden.dtype)
        if needed[1]:
            self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if chunks and weight.dtype != sum_dtype:  # one block's sum over chunks of tokens
                self.block = weight.new_empty(logits.tiles[0][1].stop, weight.shape[1], dtype=sum_dtype)
        if needed[2] and logits.bias is not None:
            self.bias = torch.zeros_like(logits.bias, dtype=sum_dtype)
            self.ones = hidden.new_ones(1, logits.tiles[0][0].stop)

    def add(self, index: int) -> None:
        """Adds the tile's share; in its memory is the gradient of its logits before the softcap."""
        self.logits.overwritten(index)
        tile = self.logits.memory(index)
        rows, columns = self.logits.tiles[index]
        last_rows, last_columns = self.logits.tiles[-1]
        if self.hidden is not None:
            _multiply(
                self.hidden[rows], tile, self.logits.weight[columns], self.logits.scale, add=columns != last_columns
            )
        if self.weight is not None:
            block = self.weight[columns]
            total = block if self.block is None else self.block[: len(block)]
            _multiply(total, tile.T, self.logits.hidden[rows], self.logits.scale, add=rows != last_rows)
            if self.block is not None and rows.start == 0:
                block.copy_(total)
        if self.bias is not None:
            # A product, because a sum to another dtype copies the tile first.
            _multiply(self.bias[None, columns], self.ones[:, : len(tile)], tile, self.logits.scale, add=True)


def _multiply(out: Tensor, a: Tensor, b: Tensor, scale: float, *, add: bool) -> None:
    """out = scale a b, added to what is there with `add`. A wider `out` holds a sum of several products."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=int(add), alpha=scale)
    elif tiling_on(a.device).wide_products:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), alpha=scale, out=out)
    elif add:
        out.add_(a @ b, alpha=scale)
    else:
        torch.mul(a @ b, scale, out=out)


class _LinearTokenStatistics(torch.autograd.Function):
    """From the policy's hidden, weight and bias, the reference's, labels and `Options`: `linear_token_statistics`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *layers, labels, options = arguments
        hidden, weight = layers[:2]
        tiles = options.plan.tiles(len(hidden), len(weight))
        rows, columns = options.plan.rows, options.plan.columns
        slots = options.plan.policy_slots, options.plan.reference_slots
        buffers = [side.new_empty(n, rows * columns) for side, n in zip((layers[0], layers[3]), slots, strict=True)]
        ctx.tiles, ctx.options, ctx.held = tiles, options, [[None] * n for n in slots]
        policy, reference = _sides(ctx, layers, buffers)

        # A policy beside itself: what the reference would compute is there already.
        of_reference = policy if _are_one(layers, options) else reference
        slice_entries = tiling_on(hidden.device).slice_entries
        partials = Partials(labels, options.ignore_index, options.temperature, len(weight), columns, slice_entries)
        for index, (rows, columns) in enumerate(tiles):
            if rows.start == 0:
                partials.begin_block(columns.stop - columns.start)
            first_entry = options.first_entry + columns.start
            partials.add(policy.logits(index), of_reference.logits(index), rows, first_entry)
        if options.process_group is not None:
            partials.gather(options.process_group)
        statistics, normalizers = partials.finish(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        ctx.set_materialize_grads(False)
        # Saved, not attributes, so that autograd lets the tiles go after the backward.
        ctx.save_for_backward(*layers, *buffers, labels, *statistics, normalizers)
        return tuple(statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_gradients(grads)
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = _backward(ctx, saved, grads)
        if torch.is_grad_enabled():
            results = _DifferentiableOnce.apply(*results, *saved[:6], *grads)
        return *results, None, None


def _backward(ctx: Any, saved: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    layers, buffers, labels, statistics, normalizers = saved[:6], saved[6:8], saved[8], saved[9:-1], saved[-1]
    # .data: the buffers are ours to overwrite, and `held` says what a second backward finds in them.
    sides = _sides(ctx, layers, [buffer.data for buffer in buffers])
    options = ctx.options
    grads = tuple(None if grad is None else grad.contiguous() for grad in grads)  # once, not a part in each tile
    reads_both = any(grad is not None for grad in grads[2:])
    needed = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:6]
    writes = [any(needs) and (reads_both or grad is not None) for needs, grad in zip(needed, grads, strict=False)]
    gradients = [
        _Gradients(side, needs, options.process_group is not None) if write else None
        for side, needs, write in zip(sides, needed, writes, strict=True)
    ]
    for index in reversed(range(len(ctx.tiles))):
        rows, columns = ctx.tiles[index]
        # A log-probability's gradient needs its own side's logits only.
        logits = [
            side.logits(index) if reads_both or write else side.memory(index)
            for side, write in zip(sides, writes, strict=True)
        ]
        torch.ops.lit_did.token_statistics_backward_(
            [None if grad is None else grad[rows] for grad in grads],
            *logits,
            labels[rows],
            [value[rows] for value in statistics],
            normalizers[rows],
            options.ignore_index,
            options.temperature,
            *writes,
            options.first_entry + columns.start,
            *options.softcaps,
        )
        for gradient in filter(None, gradients):
            gradient.add(index)
    return [
        *_results(layers[:3], needed[0], gradients[0], options),
        *_results(layers[3:], needed[1], gradients[1], options),
    ]


class _DifferentiableOnce(torch.autograd.Function):
    """The first six tensors, in a graph that says what they depend on and cannot be gone through."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if value is None else value.view_as(value) for value in tensors[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError("The fused linear statistics are differentiable once: use `backend='reference'` for more.")


def _are_one(layers: Sequence[Tensor | None], options: Options) -> bool:
    """Whether both models have the same hidden states and output layer, by their memory."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None or is_fake(a):
            return a is b
        return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)

    options_too = options.softcaps[0] == options.softcaps[1] and options.scales[0] == options.scales[1]
    return options_too and all(map(same, layers[:3], layers[3:6]))


def _sides(ctx: Any, tensors: Sequence[Any], buffers: Sequence[Tensor]) -> list[_Tiles]:
    """Both models' tiles. `tensors`: the policy's hidden, weight and bias, and the reference's."""
    options = ctx.options
    both = (Layer(*tensors[:3]), Layer(*tensors[3:6])), options.softcaps, options.scales, buffers, ctx.held
    return [
        _Tiles(layer, softcap, scale, ctx.tiles, buffer, held)
        for layer, softcap, scale, buffer, held in zip(*both, strict=True)
    ]


def _results(
    layer: Sequence[Any], needed: Sequence[bool], gradients: _Gradients | None, options: Options
) -> list[Tensor | None]:
    if gradients is None:
        return [torch.zeros_like(value) if need else None for value, need in zip(layer, needed, strict=True)]
    if options.process_group is not None and gradients.hidden is not None:
        dist.all_reduce(gradients.hidden, group=options.process_group)
    both = zip((gradients.hidden, gradients.weight, gradients.bias), layer, strict=True)
    return [None if grad is None else grad.to(value.dtype) for grad, value in both]


def _gathered(partials: Tensor, process_group: dist.ProcessGroup) -> list[Tensor]:
    gathered = [torch.empty_like(partials) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, partials, group=process_group)
    return gathered
