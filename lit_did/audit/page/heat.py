"""The colours and the data of heat maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
from markupsafe import Markup

from lit_did.audit.blocks import HeatMaps, HeatToken

LEVELS = 5  # on each side of 0; style.css has a colour for each
_ROUNDED = 4  # significant digits


class Heat:
    """What the page needs to know of a block of heat maps.

    Attributes:
        quantities: The names of what the tokens are coloured by.
        limits: By quantity, the size of the values that have the strongest colour: 98% are not larger.
        has_negative: By quantity, whether there are values below 0.
    """

    def __init__(self, block: HeatMaps) -> None:
        self._tokens = list(_tokens(block))
        self.quantities = list(dict.fromkeys(name for token in self._tokens for name in token.values))
        values = {
            name: np.array([v for token in self._tokens if math.isfinite(v := token.values.get(name, math.nan))])
            for name in self.quantities
        }
        self.limits = {
            name: float(np.quantile(abs(found), 0.98)) or float(abs(found).max()) if len(found) else 0.0
            for name, found in values.items()
        }
        self.has_negative = {name: bool((found < 0).any()) for name, found in values.items()}

    def colour(self, token: HeatToken) -> str:
        """The class of a token's first colour: n5, the most negative, to n1, none, p1 to p5."""
        if not self.quantities:
            return ""
        name = self.quantities[0]
        value, limit = token.values.get(name, math.nan), self.limits[name]
        if math.isnan(value) or not limit:
            return ""
        level = math.floor(min(abs(value) / limit, 1.0) * LEVELS + 0.5)
        return f"{'n' if value < 0 else 'p'}{level}" if level else ""

    def data(self) -> Markup:
        """JSON for script.js: what hovering over tokens shows, in their order on the page. Each text is there once."""
        texts: dict[str, int] = {}
        distributions = list(dict.fromkeys(name for token in self._tokens for name in token.top))
        tokens = [
            [
                [_rounded(token.values.get(name, math.nan)) for name in self.quantities],
                [
                    [
                        part
                        for text, p in token.top.get(name, ())
                        for part in (texts.setdefault(text, len(texts)), _rounded(p))
                    ]
                    for name in distributions
                ],
            ]
            for token in self._tokens
        ]
        found = {
            "quantities": self.quantities,
            "limits": [_rounded(limit) for limit in self.limits.values()],
            "negative": list(self.has_negative.values()),
            "distributions": distributions,
            "texts": list(texts),
            "tokens": tokens,
        }
        return script_json(found)


def script_json(value: object) -> Markup:
    """JSON that a script element can hold: no text in it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _tokens(block: HeatMaps) -> Iterator[HeatToken]:
    for pair in block.pairs:
        for tokens in pair.sides.values():
            yield from tokens


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_ROUNDED}g}") if math.isfinite(value) else None
