"""What the slices of a vocabulary say about each token. They merge in any grouping into the statistics of the whole.

A slice is described by `NUM_PARTIALS` float64 numbers per token: sums over its entries, and the label's two logits if
the slice holds it. csrc/row_partials.h has the formulas.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lit_did.ops.statistics import TokenStatistics

NUM_PARTIALS = 16
NO_LABEL = torch.iinfo(torch.int64).min  # for `ignore_index` where every label counts
_MERGED_AT_ONCE = 8  # slices: what they hold stays far smaller than a tile


class Partials:
    """The partial statistics of some tokens, block by block of the vocabulary.

    Args:
        labels: [N] int64, counted over the whole vocabulary.
        ignore_index: Tokens with this label are not read. Their statistics are 0.
        temperature: Logits are divided by it.
        entries: Of all blocks together.
        block: Entries of a block.
        slice_entries: Entries of a slice, of which a block may have several.
    """

    def __init__(
        self, labels: Tensor, ignore_index: int, temperature: float, entries: int, block: int, slice_entries: int
    ) -> None:
        self.labels, self.ignore_index, self.temperature = labels, ignore_index, temperature
        self.slice_entries = min(block, slice_entries)
        most = -(-block // self.slice_entries)
        slices = min(-(-entries // block) * most, max(_MERGED_AT_ONCE, most + 1))
        self.memory = labels.new_empty(slices, len(labels), NUM_PARTIALS, dtype=torch.float64)
        self.used = 0

    def begin_block(self, entries: int) -> None:
        """Makes room for the slices of the next block."""
        slices = -(-entries // self.slice_entries)
        if self.used + slices > len(self.memory):
            self.merge()
        self.block = slice(self.used, self.used + slices)
        self.used += slices

    def add(self, policy_logits: Tensor, reference_logits: Tensor, tokens: slice, first_entry: int) -> None:
        """Reads the logits [tokens, block] of some tokens in the block that was begun last.

        Args:
            policy_logits, reference_logits: As `torch.ops.lit_did.token_statistics` takes them.
            tokens: Whose logits these are.
            first_entry: Of the block, in the whole vocabulary.
        """
        torch.ops.lit_did.token_partials_(
            policy_logits,
            reference_logits,
            self.labels[tokens],
            self.memory[self.block, tokens],
            self.slice_entries,
            first_entry,
            self.ignore_index,
            self.temperature,
        )

    def merge(self) -> None:
        """Merges all slices into one."""
        if self.used > 1:
            torch.ops.lit_did.merge_token_partials_(self.memory[: self.used], self.labels, self.ignore_index)
            self.used = 1

    def gather(self, process_group: dist.ProcessGroup) -> None:
        """Replaces the slices by those of all processes, in the order of the group's ranks."""
        self.merge()
        own = self.memory[0]
        self.memory = own.new_empty(dist.get_world_size(process_group), *own.shape)
        self.used = len(self.memory)
        dist.all_gather(list(self.memory), own, group=process_group)

    def finish(self, dtype: torch.dtype) -> tuple[TokenStatistics, Tensor]:
        """What all slices together say.

        Returns:
            TokenStatistics: nine tensors [N] of `dtype`, float32 or float64. Log-probabilities of labels that no slice
            holds are NaN.
            normalizers: [N, 5] float64, as `torch.ops.lit_did.token_statistics_backward` reads them.
        """
        *statistics, normalizers = torch.ops.lit_did.finish_token_partials(
            self.memory[: self.used], self.labels, self.ignore_index, dtype == torch.float64
        )
        return TokenStatistics(*statistics), normalizers
