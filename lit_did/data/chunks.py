"""Tokenises the rows of a split chunk by chunk, in this process or in several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lit_did.arguments import check_choice
from lit_did.data.counts import Counts
from lit_did.data.examples import lengths_of, tokens_of
from lit_did.data.pairs import UnusableRowError, prepare_pair
from lit_did.data.processes import ask_processes
from lit_did.data.reading import OnBadRows, SkippedRow, SourceRow
from lit_did.data.rendering import RenderedPair, Renderer
from lit_did.data.tokenizing import (
    TokenizedPair,
    TooLongError,
    Truncation,
    check_tokens,
    check_truncation,
    tokenize_rendered,
    truncate_pair,
)

_CHUNK = 1024  # rows a tokenizer call: enough for its threads, with little text in memory


class TokenizedChunk(NamedTuple):
    """The pairs of some rows, as in `FlatPairs`."""

    tokens: np.ndarray
    lengths: np.ndarray
    """[pairs, 7] the tokens of each part"""
    row_numbers: np.ndarray
    counts: Counts


@dataclass(frozen=True)
class Tokenization:
    """A tokenizer and the options that tokens depend on. `PreferenceDataset` documents them."""

    tokenizer: Any
    max_length: int
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    as_chat: bool = False
    parse_special_tokens: bool = False
    truncation: Truncation = "completion"
    min_completion_tokens: int | None = None
    on_bad_rows: OnBadRows = "skip"

    def __post_init__(self) -> None:
        check_choice("on_bad_rows", self.on_bad_rows, OnBadRows)
        check_truncation(self.max_length, self.truncation, self.min_completion_tokens)

    @cached_property
    def renderer(self) -> Renderer:
        """Turns pairs into text."""
        return Renderer(
            self.tokenizer,
            self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            parse_special_tokens=self.parse_special_tokens,
        )

    def render(self, row: SourceRow) -> RenderedPair:
        """The text of a row.

        Raises:
            UnusableRowError: If the row cannot be trained on.
            TypeError, ValueError: As the renderer raises. The message names the row.
        """
        try:
            return self.renderer(prepare_pair(row.pair, self.as_chat))
        except UnusableRowError:
            raise
        except (TypeError, ValueError) as error:
            raise type(error)(f"{row.where}: {error}") from error

    def cut(self, whole: TokenizedPair) -> TokenizedPair:
        """A pair within `max_length`; see `truncate_pair`.

        Raises:
            UnusableRowError: If the pair cannot be trained on.
        """
        check_tokens(whole)
        return truncate_pair(
            whole,
            self.max_length,
            self.tokenizer.bos_token_id,
            truncation=self.truncation,
            min_completion_tokens=self.min_completion_tokens,
        )

    def chunk(self, rows: Sequence[SourceRow]) -> TokenizedChunk:
        """Tokenises some rows."""
        counts = Counts(self.max_length)
        rendered, kept = [], []
        for row in rows:
            try:
                rendered.append(self.render(row))
                kept.append(row)
            except UnusableRowError as error:
                self._skip(row, error, counts)
        pairs, numbers = [], []
        for row, text, whole in zip(kept, rendered, tokenize_rendered(rendered, self.tokenizer), strict=True):
            try:
                pair = self.cut(whole)
            except TooLongError:
                counts.num_too_long += 1
            except UnusableRowError as error:
                self._skip(row, error, counts)
            else:
                pairs.append(pair)
                numbers.append(row.index)
                _count(counts, row, text, whole, pair)
        return TokenizedChunk(tokens_of(pairs), lengths_of(pairs), np.array(numbers, dtype=np.int64), counts)

    def chunks(self, rows: Sequence[SourceRow], num_proc: int) -> Iterator[TokenizedChunk]:
        """Tokenises all rows, in order, with this number of processes."""
        parts = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
        return map(self.chunk, parts) if num_proc == 1 else ask_processes(self.chunk, parts, num_proc)

    def _skip(self, row: SourceRow, error: UnusableRowError, counts: Counts) -> None:
        reason = str(error).removeprefix(f"{row.where}: ")
        if self.on_bad_rows == "raise":
            raise UnusableRowError(f"{row.where}: {reason}") from error
        counts.skipped.append(SkippedRow(row.index, row.where, reason))


def _count(counts: Counts, row: SourceRow, text: RenderedPair, whole: TokenizedPair, pair: TokenizedPair) -> None:
    counts.num_pairs += 1
    counts.num_chats += text.is_chat
    counts.num_identical += pair.chosen_ids == pair.rejected_ids
    if pair != whole:
        counts.truncated.add(row.index)
    counts.num_cut_prompts += pair.prompt_ids != whole.prompt_ids
    counts.num_cut_completions += pair[1:] != whole[1:]
    counts.num_with_context += (pair.chosen_context, pair.rejected_context) != (None, None)
    if text.spelled:
        counts.num_spelling_control += 1
        counts.first_spelled = counts.first_spelled or f"{text.spelled!r} in {row.where}"
    if text.header:
        counts.headers[text.header] += 1
