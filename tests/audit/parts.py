"""Parts that find what a test says, in place of those that measure."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from lit_did.audit import running
from lit_did.audit.blocks import Paragraph
from lit_did.audit.report import Estimate, Finding, Part

ROWS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "score": 0.5, "tag": "maths"},
    {"prompt": "Capital of France?", "chosen": "", "rejected": "Lyon"},
    {"prompt": "2+2?", "chosen": "5", "rejected": "4", "notes": ["ö", None], "tag": "maths"},
    {"prompt": "Sky?", "chosen": "blue", "rejected": "blue"},
    {"prompt": "<script>?", "chosen": "a\nb\u2028", "rejected": "c"},
]
FINDINGS = [
    Finding("contradictions", "2 pairs contradict.", "Keep one.", True, 0.4, [2, 0], [2], {2: "swaps row 0"}),
    Finding("identical", "1 pair is identical.", "Drop it.", True, 0.2, [3], value=Estimate(0.25, 0.1, 0.5, 4)),
    Finding("unusable", "1 row is unusable.", "Drop it.", True, 0.1, np.array([1])),
    Finding("length_bias", "The longer side is right in .5.", "", False, 0.9),
]


@pytest.fixture
def parts(monkeypatch):
    """The parts that tests change, and the calls so far: names of parts with their arguments."""
    findings = {"data": list(FINDINGS), "policy": []}
    calls = {}

    def examine(name):
        def part(data, settings, *arguments, **named):
            calls[name] = (*arguments, *named.values())
            if name == "labels":
                label = Finding("mislabelled", "Nobody swapped.", "", False, 0.0)
                return {"swap": np.full(len(data), 0.5)}, label, [Paragraph("labels")]
            columns = {f"{name}_value": np.arange(len(data)) / 2}
            columns[f"{name}_value"][1:2] = np.nan
            figures = {"accuracy": Estimate(0.5), "counts": {1: np.int64(2)}, "none": np.array([np.inf])}
            return Part(name, name, f"The {name}.", list(findings.get(name, ())), [Paragraph(name)], columns, figures)

        return part

    monkeypatch.setattr(running, "_function", lambda module, name: examine(name.removeprefix("examine_")))
    page = SimpleNamespace(render=lambda audit: f"<html>{' '.join(audit.parts)}</html>")
    monkeypatch.setitem(sys.modules, "lit_did.audit.page", page)
    return SimpleNamespace(findings=findings, calls=calls, page=page)


class Named(nn.Linear):
    """A model that knows where it comes from."""

    def __init__(self, name: str) -> None:
        super().__init__(1, 1)
        self.name_or_path = name
