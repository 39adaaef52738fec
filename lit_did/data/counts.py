"""What tokenising left out, cut or noticed in the pairs of a split, in numbers and as warnings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from lit_did.data.reading import SkippedRow, describe_skipped

_MANY = 0.05  # if more than this share of the pairs is too long, there is a warning


@dataclass(eq=False, repr=False)
class Counts:
    """Counts of a split, or of some of its rows. `PreferenceDataset` documents them."""

    max_length: int
    num_rows: int = 0
    num_pairs: int = 0
    num_too_long: int = 0
    num_identical: int = 0
    num_cut_prompts: int = 0
    num_cut_completions: int = 0
    num_spelling_control: int = 0
    num_chats: int = 0
    num_with_context: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    truncated: set[int] = field(default_factory=set)
    headers: Counter[str] = field(default_factory=Counter)
    """how many rows kept have each text that the template puts before answers"""
    header_tokens: list[str] = field(default_factory=list)
    """the tokens of the most common header"""
    first_spelled: str = ""
    """the first control token that the text of a row spells, and its place"""
    lacks_turns: bool = False
    """whether the pairs are plain text for a model that was trained on chats"""

    @property
    def num_truncated(self) -> int:
        """Rows kept that lost tokens to `max_length`."""
        return len(self.truncated)

    @property
    def num_dropped(self) -> int:
        """Rows left out, because they were skipped or too long."""
        return len(self.skipped) + self.num_too_long

    @property
    def num_with_header(self) -> int:
        """Rows kept with the most common header."""
        return max(self.headers.values(), default=0)

    def add(self, later: Counts) -> None:
        """Adds the counts of the rows that follow."""
        self.first_spelled = self.first_spelled or later.first_spelled
        self.skipped += later.skipped
        self.truncated |= later.truncated
        self.headers.update(later.headers)
        for entry in fields(self):
            if entry.name.startswith("num_"):
                setattr(self, entry.name, getattr(self, entry.name) + getattr(later, entry.name))

    def to_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(Counts)}
        return values | {"truncated": sorted(self.truncated)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Counts:
        """The counts from a result of `to_json` that was a file since."""
        skipped = [SkippedRow(*row) for row in values["skipped"]]
        others = {"truncated": set(values["truncated"]), "headers": Counter(values["headers"])}
        return Counts(**{**values, "skipped": skipped, **others})

    def summary(self) -> str:
        """The counts, in one line."""
        too_long = f"{self.num_too_long} dropped as too long, " if self.num_too_long else ""
        return (
            f"{self.num_pairs} pairs of {self.num_rows} rows: {len(self.skipped)} skipped, {too_long}"
            f"{self.num_identical} with identical chosen and rejected, {self.num_truncated} truncated"
        )

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
        if self.num_truncated + self.num_too_long > _MANY * (self.num_pairs + self.num_too_long):
            texts["length"] = f"{name}: {self.describe_length()}"
        if self.num_identical:
            texts["identical"] = (
                f"{name}: {self.num_identical} of {self.num_pairs} pairs have the same tokens in chosen and rejected, "
                "so they carry no preference and DPO learns nothing from them. Remove them. If only `max_length` made "
                "them equal, raise it."
            )
        if self.lacks_turns:
            texts["turns"] = (
                f"{name}: The pairs are plain text, but the tokenizer has a chat template. A model that was trained on "
                "chats then sees text without turns. Pass `as_chat=True` to wrap prompts and answers as messages. If "
                "the model continues plain text, ignore this."
            )
        if self.headers:
            [(header, count)] = self.headers.most_common(1)
            texts["header"] = (
                f"{name}: The chat template starts the answers of {count} pairs with {header!r}, "
                f"which its generation prompt does not include. So its tokens {self.header_tokens} are scored as a "
                'part of the completions. To leave them out, pass `chat_template_kwargs`, such as {"enable_thinking": '
                "False}, or a `chat_template` whose generation prompt ends where the answers start."
            )
        if self.num_spelling_control:
            texts["control"] = (
                f"{name}: The text of {self.num_spelling_control} of {self.num_pairs} pairs spells control tokens of "
                f"the tokenizer (the first is {self.first_spelled}). They are encoded as text, so they end no turn. "
                "If you want that, ignore this. If a chat template made the text, pass `parse_special_tokens=True`, or "
                "the messages instead of the text."
            )
        return texts

    def describe_length(self) -> str:
        """Says how many pairs are too long, and what they lost."""
        if self.num_too_long:
            return (
                f"{self.num_too_long} of {self.num_pairs + self.num_too_long} pairs are longer than "
                f'max_length={self.max_length} and are left out (`truncation="drop"`). Raise `max_length` to keep more.'
            )
        return (
            f"{self.num_truncated} of {self.num_pairs} pairs are longer than max_length={self.max_length}: "
            f"{self.num_cut_prompts} lost the start of their prompt, {self.num_cut_completions} the end of a "
            "completion. Raise `max_length`, or choose what is cut with `truncation` and `min_completion_tokens`."
        )
