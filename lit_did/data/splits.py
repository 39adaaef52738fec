"""The splits of a data module: reads their rows, holds some out, tokenises them or opens tokens on disk, and warns."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_did.data.dataset import PreferenceDataset
from lit_did.data.mixing import is_mixture
from lit_did.data.reading import SkippedRow, SourceRow, read_rows
from lit_did.data.templates import describe_unread
from lit_did.data.token_cache import cached_dataset, source_digests, what_tokens_depend_on

if TYPE_CHECKING:
    from lit_did.data.datamodule import PreferenceDataModule

_OPTIONS = (
    *("max_length", "truncation", "min_completion_tokens", "on_bad_rows"),
    *("as_chat", "chat_template", "chat_template_kwargs", "parse_special_tokens"),
)


class Rows(NamedTuple):
    """The rows of a split."""

    rows: list[SourceRow]
    skipped: list[SkippedRow]
    notes: list[str]
    """the warnings of the source"""
    starts: list[int]
    """the number of the first row of each source; a mixture has several"""


class Splits:
    """Reads the splits of a data module, and tokenises them or opens tokens on disk.

    Args:
        data: The data module. Its attributes are the sources and the options.

    Attributes:
        starts: The number of the first row of each source of `train`, once that is made.
    """

    def __init__(self, data: PreferenceDataModule) -> None:
        self._data = data
        self._parts: tuple[Rows, Rows] | None = None  # of `train`, to train on and to validate on
        self._warned: set[str] = set()
        self.starts: list[int] = []

    def make(self, name: str) -> PreferenceDataset:
        """The tokenised pairs of a split. Warnings and a line say what it holds."""
        if self._data.cache_tokens is None:
            rows, is_first = self._rows(name), getattr(rank_zero_only, "rank", 0) == 0
            dataset, starts = self._tokenize(name, rows, show=is_first), rows.starts
        else:
            dataset, starts = self._open(name, Path(self._data.cache_tokens).expanduser())
        if name == "train":
            self.starts = starts
        for kind, text in dataset.warnings(name).items():
            if kind not in self._warned or kind not in ("turns", "header"):  # these hold for all splits
                rank_zero_warn(text)
            self._warned.add(kind)
        rank_zero_info(f"{name}: {dataset.summary()} to max_length={dataset.max_length}.")
        return dataset

    def read(self, name: str) -> Rows:
        """The rows of an argument of the data module. Those of a mixture follow each other and are counted through."""
        data, split = self._data, Rows([], [], [], [])

        def note(text: str) -> None:
            split.notes.append(text)
            self._warn(text)

        for source in self._sources(name):
            rows, skipped = read_rows(source, name, columns=data.columns, on_bad_rows=data.on_bad_rows, warn=note)
            template = (data.tokenizer, data.chat_template, data.chat_template_kwargs)
            if unread := describe_unread(name, (row.pair for row in rows), *template):
                note(unread)
            start = len(split.rows) + len(split.skipped)
            split.rows.extend(row._replace(index=row.index + start) for row in rows)
            split.skipped.extend(row._replace(index=row.index + start) for row in skipped)
            split.starts.append(start)
        return split

    def options(self) -> dict[str, Any]:
        """The arguments of `PreferenceDataset` and `Tokenization` besides the rows and the tokenizer."""
        return {name: getattr(self._data, name) for name in _OPTIONS}

    def forget_rows(self) -> None:
        """Frees the rows that are kept while both parts of `train` are made."""
        self._parts = None

    def _rows(self, name: str) -> Rows:
        if not self._data.val_fraction or name not in ("train", "val"):
            return self.read(name)
        if self._parts is None:
            self._parts = hold_out(self.read("train"), self._data.val_fraction)
        return self._parts[name == "val"]

    def _sources(self, name: str) -> list[Any]:
        source = getattr(self._data, name)
        return list(source) if name == "train" and is_mixture(source) else [source]

    def _open(self, name: str, folder: Path) -> tuple[PreferenceDataset, list[int]]:
        """The dataset in the folder of the cache, which is written first if need be, and its `starts`."""
        data = self._data
        fraction = data.val_fraction if name in ("train", "val") else 0
        sources = self._sources("train" if fraction else name)
        digests = partial(source_digests, sources, name, folder)
        made_from = {
            "files": digests(),
            "num_sources": len(sources),  # those of a mixture are read one by one
            "columns": data.columns,
            "val_fraction": fraction,
            **self.options(),
            **what_tokens_depend_on(data.tokenizer, data.chat_template),
        }

        def write(part: Path) -> dict[str, Any]:
            rows = self._rows(name)
            self._tokenize(name, rows, folder=part)
            if digests() != made_from["files"]:
                raise ValueError(f"Expected the files of `{name}` not to change while they are read, but they changed.")
            return {"notes": rows.notes, "starts": rows.starts}

        dataset, about = cached_dataset(folder, name, made_from, write)
        for text in about["notes"]:
            self._warn(text)
        return dataset, about["starts"]

    def _tokenize(self, name: str, rows: Rows, *, folder: Path | None = None, show: bool = True) -> PreferenceDataset:
        trainer = self._data.trainer
        quiet = not show or (trainer is not None and trainer.progress_bar_callback is None)
        return PreferenceDataset(
            rows.rows,
            self._data.tokenizer,
            skipped=rows.skipped,
            num_proc=self._data.num_proc,
            folder=folder,
            progress=None if quiet else f"Tokenising {name}",
            **self.options(),
        )

    def _warn(self, text: str) -> None:
        """Warns of a text once."""
        if text not in self._warned:
            rank_zero_warn(text)
        self._warned.add(text)


def hold_out(split: Rows, fraction: float) -> tuple[Rows, Rows]:
    """The rows to train on and the last ones, each with the skipped rows among them.

    Raises:
        ValueError: If no row is left to train on.
    """
    rows, skipped = split.rows, split.skipped
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise ValueError(
            f"Expected `train` to have rows left after holding out val_fraction={fraction}, but got {len(rows)} in all."
        )
    cut = len(rows) - count
    first = rows[cut].index
    return (
        split._replace(rows=rows[:cut], skipped=[row for row in skipped if row.index < first]),
        split._replace(rows=rows[cut:], skipped=[row for row in skipped if row.index >= first]),
    )
