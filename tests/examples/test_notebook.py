"""The notebook runs, in a small setting, and the outputs that it holds are those of its code."""

from __future__ import annotations

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra dev brings it")
notebook = pytest.importorskip("tools.notebook", reason="the tools are for clones")


def kinds(cell) -> list[str]:
    """What a cell shows, in order."""
    shown = (max(output.data, default="") if "data" in output else output.name for output in cell.outputs)
    return list(shown)


@pytest.mark.long
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(notebook.NOTEBOOK.parents[1]))  # for the kernel
    stored = nbformat.read(notebook.NOTEBOOK, as_version=4).cells
    found = notebook.run(tmp_path, pairs=10, steps=2).cells
    code = [(a, b) for a, b in zip(stored, found, strict=True) if a.cell_type == "code"]
    assert [kinds(a) for a, _ in code] == [kinds(b) for _, b in code]
    assert [a.execution_count for a, _ in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in kinds(a) or "text/plain" in kinds(a) for a, _ in code) == 5
