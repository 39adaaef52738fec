"""The tokenised pairs of one split: made from rows once, in memory or in a folder, and opened from such a folder."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lit_did.data.chunks import Tokenization
from lit_did.data.counts import Counts
from lit_did.data.examples import ContextArrays, Example, FlatPairs, flat_pairs, tokens_file
from lit_did.data.reading import OnBadRows, SkippedRow, SourceRow, describe_skipped
from lit_did.data.tokenizing import Truncation

__all__ = ["ContextArrays", "Example", "PreferenceDataset"]

_COUNTS = "counts.json"


class PreferenceDataset(Counts, Dataset):
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
        num_proc: The number of processes that tokenise. 1 is this process alone.
        folder: An empty folder to write to, so that the tokens are not in memory; see `open`. None: they are.
        progress: What a progress bar is called, which appears after some seconds. None: there is no bar.

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
        num_proc: int = 1,
        folder: Path | None = None,
        progress: str | None = None,
    ) -> None:
        super().__init__(max_length, num_rows=len(rows) + len(skipped), skipped=list(skipped))
        tokenization = Tokenization(
            tokenizer,
            max_length,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            as_chat=as_chat,
            parse_special_tokens=parse_special_tokens,
            truncation=truncation,
            min_completion_tokens=min_completion_tokens,
            on_bad_rows=on_bad_rows,
        )
        renderer = tokenization.renderer  # made here, so that its errors come before any row
        self._folder = folder
        lengths, numbers = [], []
        with nullcontext(io.BytesIO()) if folder is None else open(tokens_file(folder), "wb") as stream:
            bar = tqdm(total=len(rows), desc=progress, unit="pair", delay=5, disable=progress is None)
            for chunk in tokenization.chunks(rows, num_proc):
                stream.write(chunk.tokens.data)
                lengths.append(chunk.lengths)
                numbers.append(chunk.row_numbers)
                self.add(chunk.counts)
                bar.update(len(chunk.row_numbers) + chunk.counts.num_dropped)
            bar.close()
        tokens = np.frombuffer(stream.getbuffer() if isinstance(stream, io.BytesIO) else b"", dtype=np.int32)
        if not self.num_pairs:
            raise ValueError(
                f"Expected preference pairs with tokens in both completions, but got none in {self.num_rows} rows."
                + (f" {describe_skipped('Skipped', self.skipped)}" if self.skipped else "")
                + (f" {self.describe_length()}" if self.num_too_long else "")
            )
        if self.headers:
            self.header_tokens = tokenizer.tokenize(self.headers.most_common(1)[0][0])
        rendered_before = parse_special_tokens or 2 * self.num_spelling_control > self.num_pairs
        self.lacks_turns = not self.num_chats and renderer.has_template and not rendered_before
        self._pairs = flat_pairs(tokens, np.concatenate(lengths), np.concatenate(numbers))
        if folder is not None:
            self._pairs.save(folder)
            (folder / _COUNTS).write_text(json.dumps(self.to_json()))
            self._pairs = FlatPairs.open(folder)

    @classmethod
    def open(cls, folder: Path) -> PreferenceDataset:
        """Opens a folder that a dataset was written to. Tokens are read from its files when they are asked for.

        Raises:
            OSError, ValueError, KeyError: A file is missing or was changed.
        """
        dataset = cls.__new__(cls)
        dataset._folder, dataset._pairs = folder, FlatPairs.open(folder)
        vars(dataset).update(vars(Counts.from_json(json.loads((folder / _COUNTS).read_text()))))
        return dataset

    def __reduce__(self) -> Any:
        # A worker process opens the folder again, so that the tokens are not copied to it.
        return super().__reduce__() if self._folder is None else (type(self).open, (self._folder,))

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, position: int) -> Example:
        if position < 0:
            position += len(self)
        return self._pairs.example(position % len(self), weight=float(position < len(self)))

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))  # without this, Python would iterate past the end for ever

    @property
    def name(self) -> str | None:
        """The name of its folder. Under `cache_tokens`, folders of one name hold the same tokens. None: it has none."""
        return None if self._folder is None else self._folder.name

    @property
    def num_tokens(self) -> np.ndarray:
        """The number of tokens of each pair, [pairs] int64: its prompt twice and both completions."""
        return self._pairs.num_tokens()

    @property
    def row_numbers(self) -> np.ndarray:
        """The row number of each pair in the source, [pairs] int64."""
        return self._pairs.row_numbers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()} to max_length={self.max_length})"
