"""All pairs of one split, tokenised once and kept in memory, with the counts of what tokenising changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from lit_did.data.pairs import UnusableRowError, prepare_pair
from lit_did.data.reading import SkippedRow, SourceRow, check_on_bad_rows, describe_skipped
from lit_did.data.rendering import RenderedPair, render_pair
from lit_did.data.tokenizing import TokenizedPair, tokenize_rendered, truncate_pair

_CHUNK = 1024  # rows a tokenizer call: enough for its threads, little enough text in memory


class Example(NamedTuple):
    """One pair as the collate function takes it: int32 ids, the row's number in its source, and its weight."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    index: int
    weight: float


class PreferenceDataset(Dataset):
    """Tokenised pairs.

    Positions from `len(dataset)` on are valid too: they repeat the rows with weight 0. `EvaluationSampler` hands them
    out so that all ranks get equally many rows.

    Attributes:
        num_rows: rows before skipping.
        skipped: the rows left out because they cannot be trained on, those that the reader skipped among them.
        num_dropped: how many these are.
        num_identical: rows kept although chosen and rejected have the same token ids, and so carry no preference.
        num_truncated: rows kept that lost tokens to `max_length`.
    """

    def __init__(
        self,
        rows: Sequence[SourceRow],
        tokenizer: Any,
        max_length: int,
        *,
        chat_template: str | None = None,
        as_chat: bool = False,
        skipped: Sequence[SkippedRow] = (),
        on_bad_rows: str = "skip",
    ) -> None:
        """Tokenises `rows` by the rules of `tokenize_pair`; its arguments are explained there.

        Args:
            rows, skipped: what `read_rows` returns. `skipped` is counted in `num_rows` and `num_dropped`.
            on_bad_rows: "skip" or "raise", for rows that only now turn out to be unusable.

        Raises:
            ValueError: if a row cannot be rendered (naming it), or if no row is left.
        """
        check_on_bad_rows(on_bad_rows)
        self.num_rows = len(rows) + len(skipped)
        self.skipped = list(skipped)
        self.num_identical = self.num_truncated = 0
        self._examples: list[Example] = []
        for start in range(0, len(rows), _CHUNK):
            chunk, rendered = [], []
            for row in rows[start : start + _CHUNK]:
                try:
                    rendered.append(_render(row, tokenizer, chat_template, as_chat))
                    chunk.append(row)
                except UnusableRowError as error:
                    self._skip(row, error, on_bad_rows)
            for row, pair in zip(chunk, tokenize_rendered(rendered, tokenizer), strict=True):
                try:
                    self._add(row, pair, truncate_pair(pair, max_length, tokenizer.bos_token_id))
                except UnusableRowError as error:
                    self._skip(row, error, on_bad_rows)
        if not self._examples:
            raise ValueError(
                f"Expected preference pairs with tokens in both completions, but got none in {self.num_rows} rows. "
                + describe_skipped("Skipped", self.skipped)
            )

    @property
    def num_dropped(self) -> int:
        return len(self.skipped)

    def _skip(self, row: SourceRow, error: UnusableRowError, on_bad_rows: str) -> None:
        if on_bad_rows == "raise":
            raise error
        self.skipped.append(SkippedRow(row.index, row.where, str(error).removeprefix(f"{row.where}: ")))

    def _add(self, row: SourceRow, whole: TokenizedPair, pair: TokenizedPair) -> None:
        for name in ("chosen", "rejected"):
            if not getattr(pair, f"{name}_ids"):
                raise UnusableRowError(f"{row.where}: Expected `{name}` to have tokens, but got none.")
        self.num_identical += pair.chosen_ids == pair.rejected_ids
        self.num_truncated += pair != whole
        # Arrays take 4 bytes a token where lists of int take up to 36, and move to worker processes as they are.
        self._examples.append(Example(*(np.array(ids, dtype=np.int32) for ids in pair), index=row.index, weight=1.0))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, position: int) -> Example:
        if position < len(self):
            return self._examples[position]
        return self._examples[position % len(self)]._replace(weight=0.0)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)  # without this, Python would ask for positions past the end for ever

    @property
    def num_tokens(self) -> np.ndarray:
        """The tokens of each pair, (pairs,) int64: its prompt twice and both completions."""
        counts = [2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected, *_ in self]
        return np.array(counts, dtype=np.int64)

    def summary(self) -> str:
        """The counts in one line."""
        return (
            f"{len(self)} pairs of {self.num_rows} rows: {self.num_dropped} skipped, "
            f"{self.num_identical} with identical chosen and rejected, {self.num_truncated} truncated"
        )


def _render(row: SourceRow, tokenizer: Any, chat_template: str | None, as_chat: bool) -> RenderedPair:
    try:
        return render_pair(prepare_pair(row.pair, as_chat), tokenizer, chat_template)
    except UnusableRowError as error:
        raise UnusableRowError(f"{row.where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error
