"""What the page of an audit shows, as plain data: tables, pictures, pairs, heat maps and texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by every column.

    Attributes:
        title: Its heading.
        columns: The names of its columns. The first one names the row.
        rows: Their cells: text, numbers, `Estimate`, or None where there is nothing.
        note: What a reader should know, as plain text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        title: Its heading.
        svg: From `lit_did.audit.page.pictures`.
        description: What it shows, for those who cannot see it.
        note: What a reader should know, as plain text.
    """

    title: str
    svg: str
    description: str
    note: str = ""


@dataclass(frozen=True)
class PairList:
    """Pairs with their texts.

    Attributes:
        title: Its heading.
        rows: Their row numbers in the source.
        remarks: By row number, what is to be said of the pair.
        note: What a reader should know, as plain text.
    """

    title: str
    rows: Sequence[int]
    remarks: Mapping[int, str]
    note: str = ""


@dataclass(frozen=True)
class ScoredSide:
    """What is scored of a side: stretches of text in order.

    Attributes:
        name: "chosen" or "rejected".
        stretches: Pairs of a kind and a text. Kinds: "prompt", "scored", "not scored", "cut", "control" (BOS, EOS and
            other control tokens), "header" (a template's start of an answer), "think".
    """

    name: str
    stretches: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ScoredPair:
    """A pair as it is scored."""

    row: int
    """number in the source"""
    sides: Sequence[ScoredSide]
    remark: str = ""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs as they are scored, in colour."""

    title: str
    pairs: Sequence[ScoredPair]
    note: str = ""


@dataclass(frozen=True)
class HeatToken:
    """A token of a heat map.

    Attributes:
        text: The token as text.
        values: By quantity, such as "log-ratio (nats)", this token's value.
        top: By distribution ("policy", "reference", "DID"), its likeliest tokens and their probabilities.
    """

    text: str
    values: Mapping[str, float]
    top: Mapping[str, Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class HeatPair:
    """A pair whose tokens are coloured: the prompt, and by side its tokens."""

    row: int
    """number in the source"""
    prompt: str
    sides: Mapping[str, Sequence[HeatToken]]
    remark: str = ""


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of pairs. Hovering or tapping a token shows its values and its likeliest tokens."""

    title: str
    pairs: Sequence[HeatPair]
    note: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Texts beside each other.

    Attributes:
        title: Its heading.
        items: A prompt, and by column a text.
        note: What a reader should know, as plain text.
    """

    title: str
    items: Sequence[tuple[str, Mapping[str, str]]]
    note: str = ""


Block = Paragraph | Table | Picture | PairList | ScoredPairs | HeatMaps | SideBySide
