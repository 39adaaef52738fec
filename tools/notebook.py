"""`make notebook`: runs examples/demo.ipynb and writes its outputs into it. A test runs it with smaller settings."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "demo.ipynb"


def run(folder: Path, **settings: int) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run. What it writes to stderr is left out.

    Args:
        folder: The folder that it runs in.
        **settings: Values for variables of its first code cell, such as `steps=2`.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for name, value in settings.items():
        code[0].source = re.sub(rf"^{name} = \d+", f"{name} = {value}", code[0].source, flags=re.MULTILINE)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in code:
        cell.metadata.pop("execution", None)  # times
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(run(NOTEBOOK.parents[1]), NOTEBOOK)
