"""Attention over all segments of a packed row in one call: flex attention with a block mask.

It computes what flash attention does not: float32, softcaps and sinks, other sizes of heads, an older torch. Segments
(see `lit_did.batches.layout`), common beginnings and sliding windows are in the mask, so nothing is copied. Blocks of
128 queries by 128 keys in which no query attends are skipped.

Flex attention is always compiled here, in trials too: without compilation it holds all scores of a row. One kernel does
for all numbers of tokens, segments and windows. transformers compiles its own call for the first number of tokens, and
again for others.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_did.batches.moving import to_device

FLEX = "flex_attention"  # transformers' name
BLOCK = 128  # flex attention's own
KNOWN = ("softcap", "s_aux")  # arguments of few models that `attend` takes


class BlockMasks:
    """The block masks of the segments of a batch, on the device of the model. Layers with one window share a mask."""

    kernel = FLEX

    def __init__(self, segments: Tensor, device: torch.device) -> None:
        """`segments`: [1, 1, segments, 2] int64 on the CPU, see `lit_did.batches.layout.packed_layout`."""
        self.segments, self.device = segments[0, 0].numpy(), device
        self.longest = int(_keys(self.segments).max(initial=0))
        self.masks: dict[int | None, list[Tensor]] = {}
        self.refused: str | None = None  # why a layer did not use the kernel, and what to do

    def of(self, sliding_window: int | None) -> list[Tensor]:
        """What `block_mask` takes, for layers whose queries attend to this many keys at most, their own included."""
        if sliding_window is not None and sliding_window >= self.longest:
            sliding_window = None
        if sliding_window not in self.masks:
            parts = mask_parts(self.segments, sliding_window)
            self.masks[sliding_window] = [to_device(part, self.device) for part in parts]
            for part in self.masks[sliding_window]:
                _for_any_size(part, *(range(2, part.dim()) if part.dim() > 2 else [0]))
        return self.masks[sliding_window]


def refusal(dropout: float, others: list[str]) -> str | None:
    """Why flex attention cannot be used in place of a model's own attention, and what to do. None: it can.

    Args:
        dropout: Of the attention's weights.
        others: Names of other arguments of the attention that are not None.
    """
    if dropout:
        return (
            f"flex attention lacks the model's dropout of {dropout}. Set `attention_dropout` to 0 in the model's "
            "configuration."
        )
    unknown = [name for name in others if name not in KNOWN]
    return f"flex attention does not know the model's {', '.join(unknown)}." if unknown else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: BlockMasks,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim of values].

    Args:
        query: [1, heads, tokens, dim]
        key: [1, key heads, tokens, dim]
        value: [1, key heads, tokens, dim of values]
        masks: Of the segments in these tokens.
        scaling: Of the scores. None: 1 / sqrt(dim).
        sliding_window: Number of keys that a query attends to at most, its own included. None: all before it.
        softcap: Scores are softcap tanh(scores / softcap).
        s_aux: [heads] Sinks: scores of a key without a value.
        others: Not used.
    """
    for tensor in (query, key, value):
        _for_any_size(tensor, 2)
    # Texts, because dynamo replaces a number that changes by a variable, which score functions do not know.
    numbers = (
        repr(query.shape[-1] ** -0.5 if scaling is None else float(scaling)),
        None if softcap is None else repr(float(softcap)),
    )
    with torch.compiler.set_stance("default"):  # a trial runs models without compilation
        return _compiled()(query, key, value, masks.of(sliding_window), *numbers, s_aux).transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(_attend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: list[Tensor],
    scaling: str,
    softcap: str | None,
    sinks: Tensor | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    options: dict[str, Any] = {"block_mask": block_mask(parts, query.shape[2]), "scale": float(scaling)}
    if softcap is not None:
        most = float(softcap)
        options["score_mod"] = lambda score, *_: most * torch.tanh(score / most)
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if sinks is None:
        return flex_attention(query, key, value, **options)
    output, auxiliary = flex_attention(query, key, value, **options, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(auxiliary.lse - sinks.float()[:, None])  # of the keys, beside the sink
    return (output * share[..., None]).to(output.dtype)


def _for_any_size(tensor: Tensor, *dimensions: int) -> None:
    """Lets PyTorch compile for any number of tokens or blocks at once."""
    for dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def mask_parts(segments: np.ndarray, sliding_window: int | None) -> list[Tensor]:
    """What `block_mask` takes for some segments. torch's `create_block_mask` would make a [tokens, tokens] mask for it.

    Each query attends to two ranges of keys: in its own segment, and in the one that it continues.

    Args:
        segments: [segments, 2] int64
        sliding_window: Number of keys that a query attends to at most. None: all.

    Returns:
        Three [tokens] int32: where the first range begins, and where the second begins and ends. Then the counts and
        the columns of blocks: masked and whole ones of each block of queries, and the same of each block of keys.
    """
    own, continues = segments.T
    starts = own.cumsum() - own
    begin, first, length = (
        np.repeat(x, own) for x in (starts, np.where(continues >= 0, starts[continues], 0), _keys(segments) - own)
    )
    last, queries = first + length, np.arange(len(begin))
    if sliding_window is not None:
        hidden = queries - begin + length - sliding_window + 1  # keys of the sequence before the window
        first = np.minimum(first + np.maximum(hidden, 0), last)
        begin = np.maximum(begin, queries - sliding_window + 1)
    ranges = ((begin, queries + 1), (first, last))
    some, whole = (_blocks(ranges, whole) for whole in (False, True))
    masked, given = some & ~whole, [begin, first, last]
    for chosen in (masked, whole, masked.T, whole.T):
        # How many are chosen in each row, and the columns, those of the chosen ones first.
        columns = np.argsort(~chosen, axis=1, kind="stable")
        given += [chosen.sum(1)[None, None], columns[None, None]]
    return [torch.from_numpy(x.astype(np.int32)) for x in given]


def block_mask(parts: list[Tensor], tokens: int) -> Any:
    """The `BlockMask` of the `mask_parts` of a row of `tokens`."""
    from torch.nn.attention.flex_attention import BlockMask

    make: Any = BlockMask
    begin, first, last, *blocks = parts

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= begin[query]) & (key <= query)) | ((key >= first[query]) & (key < last[query]))

    return make((tokens, tokens), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=attends)


def _keys(segments: np.ndarray) -> np.ndarray:
    """[segments] The number of keys of each: its own and those of the segment that it continues."""
    own, continues = segments.T
    return own + np.where(continues >= 0, own[continues], 0)


def _blocks(ranges: Iterable[tuple[np.ndarray, np.ndarray]], whole: bool) -> np.ndarray:
    """[blocks, blocks] bool: where some query attends to some key. `whole`: where all attend to all of a block.

    There are at least two blocks, because dynamo compiles for sizes of 1 alone.
    """
    (starts, _), _ = ranges
    size = max(2, -(-len(starts) // BLOCK))
    numbers = np.zeros((size, size + 1), dtype=np.int64)  # of queries, as differences along the keys
    rows = np.arange(len(starts)) // BLOCK
    for start, stop in ranges:
        first, last = (-(-start // BLOCK), stop // BLOCK) if whole else (start // BLOCK, -(-stop // BLOCK))
        there = (start < stop) & (first < last)
        np.add.at(numbers, (rows[there], first[there]), 1)
        np.add.at(numbers, (rows[there], last[there]), -1)
    return numbers.cumsum(1)[:, :-1] >= (BLOCK if whole else 1)
