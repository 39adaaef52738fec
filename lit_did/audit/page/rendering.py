"""render: the page of an audit, from template.html.jinja, style.css and script.js."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lit_did import __version__
from lit_did.audit.blocks import Block, Picture
from lit_did.audit.page.cells import HIDDEN, cell, is_number, marked, number, said, shown, sort_value
from lit_did.audit.page.heat import LEVELS, Heat
from lit_did.audit.report import FLAGS, PARTS, Finding
from lit_did.audit.settings import NEEDED

if TYPE_CHECKING:
    from lit_did.audit.running import Audit

_BEGINNING = 90  # letters
MAX_ROWS = 50  # of a finding that the page shows
_REMEDIES = {"tokens": "tokenizer", "reference": "reference", "policy": "policy", "leaked": "val"}
_LABELS = {"pairs": "Pairs", "val": "Validation pairs"}


def render(audit: Audit) -> str:
    """The page of an audit as HTML. It needs no other file and no network."""
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    verdict = audit.verdict
    levels = range(1, LEVELS + 1)
    html = (
        _environment()
        .get_template("template.html.jinja")
        .render(
            version=__version__,
            style=Markup(_file("style.css")),
            script=Markup(script),
            digest=digest,
            name=_last_part(audit.inputs.get("pairs", audit.data.name)),
            facts=list(_facts(audit)),
            settings=list(_settings(audit)),
            verdict=verdict,
            more=audit.more,
            flags=list(_flags(audit)),
            parts=[part for name in PARTS if (part := audit.parts.get(name))],
            findings_of=lambda part: [f for f in audit.findings if any(f is own for own in part.findings)],
            listed=[finding for finding in audit.findings if len(finding.rows)],
            in_verdict={finding.name for finding in verdict},
            pairs=_Pairs(audit),
            ids=_Ids(),
            max_rows=MAX_ROWS,
            levels=[*(f"n{level}" for level in reversed(levels)), "", *(f"p{level}" for level in levels)],
        )
    )
    return html.lstrip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lit_did.audit", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "cell": cell,
        "is_number": is_number,
        "kind": lambda block: type(block).__name__,
        "marked": marked,
        "number": number,
        "quoted": lambda text: quote(text, safe=""),
        "said": said,
        "shown": shown,
        "slug": _slug,
        "sort_value": sort_value,
    }
    environment.globals |= {"heat": Heat, "grouped": _grouped, "picture": _picture}
    return environment


@cache
def _file(name: str) -> str:
    return files("lit_did.audit.page").joinpath(name).read_text(encoding="utf-8").strip()


class _Ids:
    """Numbers for ids that are used once on the page."""

    def __init__(self) -> None:
        self._next = 0

    def new(self) -> str:
        self._next += 1
        return f"b{self._next}"


class _Pairs:
    """The texts of rows."""

    def __init__(self, audit: Audit) -> None:
        self._data = audit.data
        self._places = {row.index: place for place, row in enumerate(audit.data.rows)}
        self._refused = {row.index: row for row in audit.data.skipped}

    def called(self, row: int) -> str:
        """What sentences call a row, such as its line."""
        return self._data.called(int(row))

    def where(self, row: int) -> str:
        """The file and line of a row."""
        return self._data.where(int(row))

    def beginning(self, row: int) -> str:
        """The first letters of a row, on one line."""
        text = " ".join(self.texts(row)[0][1][: 2 * _BEGINNING].split())
        return text if len(text) <= _BEGINNING else f"{text[:_BEGINNING]}…"

    def texts(self, row: int) -> list[tuple[str, str]]:
        """The names and texts of a row's sides. A row that was refused has only the reason."""
        if (place := self._places.get(int(row))) is not None:
            return list(zip(("prompt", "chosen", "rejected"), self._data.texts(place), strict=True))
        return [("refused", self._refused[int(row)].reason)]


def _last_part(name: str) -> str:
    """A path without its folders. Several names stay as they are."""
    return name if ", " in name else PurePath(name).name


def _facts(audit: Audit) -> Iterator[tuple[str, str]]:
    """What was audited: names and texts."""
    data = audit.data
    for name, value in audit.inputs.items():
        yield _LABELS.get(name, name.capitalize()), value
    count = f"{len(data):,} of {data.num_rows:,}"
    refused = f", {len(data.skipped):,} refused" if data.skipped else ""
    yield "Rows audited", f"{count}{refused}"
    if audit.num_read < len(data):
        yield "Pairs that models read", f"{audit.num_read:,}, drawn at random"


def _settings(audit: Audit) -> Iterator[tuple[str, str]]:
    """The settings of the parts that ran."""
    settings = asdict(audit.settings)
    given = {*audit.inputs, *(["sides"] if settings.pop("sides") else [])}
    for name, value in (settings.pop("tokenization") | settings).items():
        has_effect = name != "progress" and given & set(NEEDED.get(name, given))
        if has_effect and value not in (None, ()):
            yield name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flags(audit: Audit) -> Iterator[tuple[str, str, str, str, Finding | None]]:
    """Every flag: name, meaning, state, what to read of it, and its finding."""
    found: dict[str, Finding] = {finding.name: finding for finding in reversed(audit.findings)}
    for name, flag in FLAGS.items():
        finding = found.get(name)
        if finding is not None:
            yield name, flag.meaning, "raised" if finding.raised else "not raised", finding.sentence, finding
        else:
            needed = _REMEDIES.get(name) or (_REMEDIES.get(flag.part) if flag.part not in audit.parts else None)
            remedy = f"Pass `{needed}` to look for it." if needed else "It could not be measured here."
            if audit.stopped and (needed is None or needed in audit.inputs):
                remedy = "The audit stopped before."
            yield name, flag.meaning, "not looked for", remedy, None


def _grouped(blocks: Sequence[Block]) -> Iterator[tuple[bool, list[Block]]]:
    """The blocks, with neighbouring pictures together."""
    for are_pictures, group in groupby(blocks, lambda block: isinstance(block, Picture)):
        yield are_pictures, list(group)


def _picture(block: Picture, prefix: str) -> Markup:
    """The SVG of a picture with its description and with ids that no other picture has."""

    def own(tag: re.Match) -> str:
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", tag[0])

    svg = re.sub(r"<[^>]*>", own, block.svg)
    title, description = (HIDDEN.sub(" ", text) for text in (block.title, block.description))
    described = f'<title id="{prefix}-t">{escape(title)}</title><desc id="{prefix}-d">{escape(description)}</desc>'
    labelled = f' aria-labelledby="{prefix}-t" aria-describedby="{prefix}-d"'
    return Markup(re.sub(r"^<svg([^>]*)>", lambda head: f"<svg{head[1]}{labelled}>{described}", svg))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
