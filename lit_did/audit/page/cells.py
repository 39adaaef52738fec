"""Texts and numbers as HTML: nothing in a text can act, and everything in it can be seen."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

from markupsafe import Markup, escape

from lit_did.audit.report import Estimate

MAX_TEXT = 2000  # letters of a text that the page shows

# What a browser would not show, or would let change other text: control characters, halves of surrogate pairs,
# marks that change the direction of writing, and blanks without width. Those that join letters stay.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


def shown(text: Any, most: int | None = MAX_TEXT) -> Markup:
    """A text as HTML. Characters that cannot be seen are written as their code points.

    Args:
        text: The text.
        most: Its first letters that are shown. A note says how many follow. None: all.
    """
    text = str(text)
    cut = 0 if most is None else max(0, len(text) - most)
    html = HIDDEN.sub(
        lambda found: f'<span class="code">U+{ord(found[0]):04X}</span>', str(escape(text[: len(text) - cut]))
    )
    note = f' <span class="cut">… {cut:,} more letters are cut on this page</span>' if cut else ""
    return Markup(html + note)


def said(text: str, most: int | None = MAX_TEXT) -> Markup:
    """A sentence of the audit as `shown`, where names in backticks are code and numbers have a minus sign."""
    html = re.sub(r"`([^`<>]+)`", r"<code>\1</code>", str(shown(text, most)))
    return Markup(re.sub(r"(?<![\w<&;/=.,:-])-(?=\.?\d)", "−", html))


def marked(text: str, most: int | None = MAX_TEXT) -> Markup:
    """`shown`, with a mark at the end of each line."""
    return Markup(str(shown(text, most)).replace("\n", '<span class="code">⏎</span>\n'))


def number(value: float) -> str:
    """A number with three significant digits."""
    if isinstance(value, Integral):
        text = f"{int(value):,}"
    elif math.isnan(value):
        return "–"
    elif math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif abs(value) >= 100:
        text = f"{value:,.0f}"
    elif abs(value) >= 1e-3 or value == 0:
        text = f"{value:.3g}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def is_number(value: Any) -> bool:
    """Whether a cell sorts by number."""
    return isinstance(value, Real | Estimate) and not isinstance(value, bool)


def sort_value(value: Any) -> str:
    """What a cell sorts by: its number, or "" where there is none."""
    figure = value.value if isinstance(value, Estimate) else value
    return f"{float(figure):.9g}" if is_number(value) and not math.isnan(figure) else ""


def cell(value: Any) -> Markup:
    """A cell of a table."""
    if value is None:
        return Markup("–")
    if isinstance(value, Estimate):
        if math.isnan(value.lower) or math.isnan(value.value):
            return Markup(number(value.value))
        middle, _, interval = str(value).replace("-", "−").partition(" (")
        return Markup('{}<span class="interval"> {}</span>').format(middle, interval.rstrip(")"))
    if is_number(value):
        return Markup(number(value))
    return shown({True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value, 300)
