"""Completions with an empty think block: spelled in the text, or by a reasoning field of a message that is empty."""

from __future__ import annotations

import re

from lit_did.audit.data.sentences import of_rows
from lit_did.audit.report import Finding
from lit_did.audit.source import AuditData, as_text, thoughts
from lit_did.data.pairs import Text

_NAMES = "think|thinking|thought|thoughts|reasoning|scratchpad|seed:think"
_BLANK = r"[\s\u200b\u2060\ufeff]*"
_EMPTY = re.compile(
    rf"<({_NAMES})>{_BLANK}</\1>|<({_NAMES})\s*/>|\[(think)\]{_BLANK}\[/\3\]|◁think▷{_BLANK}◁/think▷"
    rf"|<\|begin_of_thought\|>{_BLANK}<\|end_of_thought\|>|<\|START_THINKING\|>{_BLANK}<\|END_THINKING\|>",
    re.IGNORECASE,
)
CLOSING = {
    **{f"<{name}>": f"</{name}>" for name in _NAMES.split("|")},
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|start_thinking|>": "<|end_thinking|>",
}
"""what ends a think block by what starts it, in lower case"""


def find_empty_thinking(data: AuditData) -> Finding:
    """Pairs with an empty think block in a completion."""
    evidence = {}
    for row in data.rows:
        sides = [name for name in ("chosen", "rejected") if has_empty_thinking(getattr(row.pair, name))]
        if sides:
            evidence[row.index] = f"An empty think block is in {' and '.join(sides)}."
    return of_rows(
        "empty_think",
        "have an empty think block in a completion",
        "No completion has an empty think block",
        (
            "Remove the empty think block, unless the model is to answer without thinking.",
            "Remove the empty think blocks, unless the model is to answer without thinking.",
        ),
        list(evidence),
        evidence,
        len(data),
    )


def has_empty_thinking(side: Text) -> bool:
    """Whether a completion has an empty think block."""
    if any(isinstance(value, str) and not value.strip() for value in thoughts(side)):
        return True
    text = as_text(side)
    return any(mark in text for mark in "<[◁") and _EMPTY.search(text) is not None
