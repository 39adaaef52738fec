"""Tokenises all pairs of one split once, keeps them in memory, and counts what tokenising changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from lit_did.arguments import check_choice
from lit_did.data.pairs import UnusableRowError, prepare_pair
from lit_did.data.reading import OnBadRows, SkippedRow, SourceRow, describe_skipped
from lit_did.data.rendering import RenderedPair, Renderer
from lit_did.data.tokenizing import (
    TokenizedPair,
    TooLongError,
    Truncation,
    check_tokens,
    tokenize_rendered,
    truncate_pair,
)

_CHUNK = 1024  # rows a tokenizer call: enough for its threads, with little text in memory
_MANY = 0.05  # if more than this share of the pairs is too long, there is a warning


class ContextArrays(NamedTuple):
    """A `Context` as int32 arrays."""

    ids: np.ndarray
    places: np.ndarray


class Example(NamedTuple):
    """One pair as the collate functions take it: the ids of a `TokenizedPair` as int32 arrays."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    index: int  # type: ignore[assignment]  # a field may hide the method of tuples
    """row number in the source"""
    weight: float
    """1, or 0 for a row that only fills a batch"""
    chosen_context: ContextArrays | None = None
    rejected_context: ContextArrays | None = None


class PreferenceDataset(Dataset):
    """Tokenised pairs, see `tokenize_pair`.

    Positions from `len(dataset)` on are valid too: they repeat the rows with weight 0. `EvaluationSampler` uses them so
    that all ranks get the same number of rows.

    Args:
        rows: The pairs, from `read_rows`.
        tokenizer: A transformers tokenizer.
        max_length: The most tokens of a prompt and its completion together, at least 2.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template. A row's own override them.
        as_chat: Whether to wrap plain text as messages of user and assistant.
        parse_special_tokens: Whether to read control tokens that the text of rows spells as control tokens.
        truncation: What loses tokens in pairs that are too long: "completion", "prompt" or "drop"; see `truncate_pair`.
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some, with "completion"; by
            default a quarter of `max_length`.
        skipped: The skipped rows from `read_rows`. They are counted in `num_rows` and `num_dropped`.
        on_bad_rows: What to do with rows that tokenising shows to be unusable: "skip" or "raise".

    Attributes:
        num_rows: Rows before skipping.
        skipped: All rows left out because they cannot be trained on, with those that the reader skipped.
        num_too_long: Rows left out by `truncation="drop"`.
        num_identical: Rows kept although chosen and rejected have the same token ids, so that they carry no preference.
        truncated: The row numbers, in the source, of rows kept that lost tokens to `max_length`.
        num_cut_prompts: Truncated rows whose prompt lost tokens.
        num_cut_completions: Truncated rows of which at least one completion lost tokens.
        num_spelling_control: Rows kept whose text spells control tokens, which are encoded as text.
        num_chats: Rows kept that a chat template rendered.
        num_with_context: Rows kept with turns within a completion that are not scored.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a row cannot be rendered (the message names it), or no row is left.
    """

    def __init__(
        self,
        rows: Sequence[SourceRow],
        tokenizer: Any,
        max_length: int,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        as_chat: bool = False,
        parse_special_tokens: bool = False,
        truncation: Truncation = "completion",
        min_completion_tokens: int | None = None,
        skipped: Sequence[SkippedRow] = (),
        on_bad_rows: OnBadRows = "skip",
    ) -> None:
        check_choice("on_bad_rows", on_bad_rows, OnBadRows)
        self.max_length = max_length
        self.num_rows = len(rows) + len(skipped)
        self.skipped = list(skipped)
        self.num_too_long = self.num_identical = self.num_spelling_control = self.num_with_context = 0
        self.num_chats = 0
        self.num_cut_prompts = self.num_cut_completions = 0
        self.truncated: set[int] = set()
        self._examples: list[Example] = []
        self._headers: Counter[str] = Counter()
        self._first_spelled = ""
        renderer = Renderer(
            tokenizer,
            chat_template,
            chat_template_kwargs=chat_template_kwargs,
            parse_special_tokens=parse_special_tokens,
        )
        for start in range(0, len(rows), _CHUNK):
            chunk, rendered = [], []
            for row in rows[start : start + _CHUNK]:
                try:
                    rendered.append(_render(row, renderer, as_chat))
                    chunk.append(row)
                except UnusableRowError as error:
                    self._skip(row, error, on_bad_rows)
            for row, pair, whole in zip(chunk, rendered, tokenize_rendered(rendered, tokenizer), strict=True):
                try:
                    check_tokens(whole)
                    cut = truncate_pair(
                        whole,
                        max_length,
                        tokenizer.bos_token_id,
                        truncation=truncation,
                        min_completion_tokens=min_completion_tokens,
                    )
                    self._add(row, pair, whole, cut)
                except TooLongError:
                    self.num_too_long += 1
                except UnusableRowError as error:
                    self._skip(row, error, on_bad_rows)
        if not self._examples:
            raise ValueError(
                f"Expected preference pairs with tokens in both completions, but got none in {self.num_rows} rows."
                + (f" {describe_skipped('Skipped', self.skipped)}" if self.skipped else "")
                + (f" {self._describe_length()}" if self.num_too_long else "")
            )
        header, self.num_with_header = next(iter(self._headers.most_common(1)), ("", 0))
        self._header = (header, tokenizer.tokenize(header)) if header else None
        rendered_before = parse_special_tokens or 2 * self.num_spelling_control > len(self)
        self._lacks_turns = not self.num_chats and renderer.has_template and not rendered_before

    @property
    def num_truncated(self) -> int:
        """Rows kept that lost tokens to `max_length`."""
        return len(self.truncated)

    @property
    def num_dropped(self) -> int:
        """Rows left out, because they were skipped or too long."""
        return len(self.skipped) + self.num_too_long

    def _skip(self, row: SourceRow, error: UnusableRowError, on_bad_rows: OnBadRows) -> None:
        reason = str(error).removeprefix(f"{row.where}: ")
        if on_bad_rows == "raise":
            raise UnusableRowError(f"{row.where}: {reason}") from error
        self.skipped.append(SkippedRow(row.index, row.where, reason))

    def _add(self, row: SourceRow, rendered: RenderedPair, whole: TokenizedPair, pair: TokenizedPair) -> None:
        self.num_chats += rendered.is_chat
        self.num_identical += pair.chosen_ids == pair.rejected_ids
        if pair != whole:
            self.truncated.add(row.index)
        self.num_cut_prompts += pair.prompt_ids != whole.prompt_ids
        self.num_cut_completions += pair[1:] != whole[1:]
        contexts = (pair.chosen_context, pair.rejected_context)
        self.num_with_context += contexts != (None, None)
        if rendered.spelled:
            self.num_spelling_control += 1
            self._first_spelled = self._first_spelled or f"{rendered.spelled!r} in {row.where}"
        if rendered.header:
            self._headers[rendered.header] += 1
        prompt, chosen, rejected = map(_array, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        arrays = (None if c is None else ContextArrays(_array(c.ids), _array(c.places)) for c in contexts)
        self._examples.append(Example(prompt, chosen, rejected, row.index, 1.0, *arrays))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, position: int) -> Example:
        if position < len(self):
            return self._examples[position]
        return self._examples[position % len(self)]._replace(weight=0.0)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)  # without this, Python would iterate past the end for ever

    @property
    def num_tokens(self) -> np.ndarray:
        """The number of tokens of each pair, [pairs] int64: its prompt twice and both completions."""
        counts = [
            2 * len(e.prompt_ids)
            + sum(map(len, (e.chosen_ids, e.rejected_ids)))
            + sum(len(context.ids) for context in (e.chosen_context, e.rejected_context) if context is not None)
            for e in self
        ]
        return np.array(counts, dtype=np.int64)

    def summary(self) -> str:
        """The counts, in one line."""
        too_long = f"{self.num_too_long} dropped as too long, " if self.num_too_long else ""
        return (
            f"{len(self)} pairs of {self.num_rows} rows: {len(self.skipped)} skipped, {too_long}"
            f"{self.num_identical} with identical chosen and rejected, {self.num_truncated} truncated"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()} to max_length={self.max_length})"

    def warnings(self, name: str = "pairs") -> dict[str, str]:
        """What a user should know about the pairs.

        Args:
            name: What the warnings call the pairs.

        Returns:
            Warnings by kind. Each names cause, effect and remedy.
        """
        texts = {}
        if self.skipped:
            texts["skipped"] = describe_skipped(name, self.skipped, self.num_rows)
        if self.num_truncated + self.num_too_long > _MANY * (len(self) + self.num_too_long):
            texts["length"] = f"{name}: {self._describe_length()}"
        if self.num_identical:
            texts["identical"] = (
                f"{name}: {self.num_identical} of {len(self)} pairs have the same tokens in chosen and rejected, so "
                "they carry no preference and DPO learns nothing from them. Remove them. If only `max_length` made "
                "them equal, raise it."
            )
        if self._lacks_turns:
            texts["turns"] = (
                f"{name}: The pairs are plain text, but the tokenizer has a chat template. A model that was trained on "
                "chats then sees text without turns. Pass `as_chat=True` to wrap prompts and answers as messages. If "
                "the model continues plain text, ignore this."
            )
        if self._header:
            header, tokens = self._header
            texts["header"] = (
                f"{name}: The chat template starts the answers of {self.num_with_header} pairs with {header!r}, "
                f"which its generation prompt does not include. So its tokens {tokens} are scored as a part of the "
                'completions. To leave them out, pass `chat_template_kwargs`, such as {"enable_thinking": False}, or a '
                "`chat_template` whose generation prompt ends where the answers start."
            )
        if self.num_spelling_control:
            texts["control"] = (
                f"{name}: The text of {self.num_spelling_control} of {len(self)} pairs spells control tokens of the "
                f"tokenizer (the first is {self._first_spelled}). They are encoded as text, so they end no turn. "
                "If you want that, ignore this. If a chat template made the text, pass `parse_special_tokens=True`, or "
                "the messages instead of the text."
            )
        return texts

    def _describe_length(self) -> str:
        if self.num_too_long:
            return (
                f"{self.num_too_long} of {len(self) + self.num_too_long} pairs are longer than "
                f'max_length={self.max_length} and are left out (`truncation="drop"`). Raise `max_length` to keep more.'
            )
        return (
            f"{self.num_truncated} of {len(self)} pairs are longer than max_length={self.max_length}: "
            f"{self.num_cut_prompts} lost the start of their prompt, {self.num_cut_completions} the end of a "
            "completion. Raise `max_length`, or choose what is cut with `truncation` and `min_completion_tokens`."
        )


def _array(ids: Sequence[int]) -> np.ndarray:
    """int32: 4 bytes a token, where a list takes up to 36, and quick to copy to worker processes."""
    return np.array(ids, dtype=np.int32)


def _render(row: SourceRow, renderer: Renderer, as_chat: bool) -> RenderedPair:
    try:
        return renderer(prepare_pair(row.pair, as_chat))
    except UnusableRowError:
        raise
    except (TypeError, ValueError) as error:
        raise type(error)(f"{row.where}: {error}") from error
