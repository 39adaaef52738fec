"""The chart of a run: how the time grows with vocabulary and rows, one line for each contestant and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants import BASELINE
from benchmarks.harness import LIMIT, Result

STYLES = {"float32": "-", "bfloat16": "--", "float16": "-.", "float64": ":"}


def draw(results: Sequence[Result], rows: int, vocabulary: int, title: str, path: Path) -> None:
    """Writes a PNG with three panels: forward and forward + backward by vocabulary at `rows`, both by rows at V.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    results = [r for r in results if r.race in ("table", "growth")]
    names = list(dict.fromkeys(r.contestant for r in results))
    colors = {name: "black" if name == LIMIT else f"C{i}" for i, name in enumerate(names)}
    by_vocabulary = [r for r in results if r.rows == rows]
    by_rows = [r for r in results if r.vocabulary == vocabulary and r.contestant.startswith((BASELINE, LIMIT))]
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _panel(left, by_vocabulary, ("forward", LIMIT), "vocabulary", colors)
    left.set(title=f"forward, {rows} rows", xlabel="V", ylabel="median, ms")
    _panel(middle, by_vocabulary, ("both",), "vocabulary", colors)
    middle.set(title=f"forward + backward, {rows} rows", xlabel="V")
    _panel(right, by_rows, ("forward", "both", LIMIT), "rows", colors)
    right.set(title=f"V = {vocabulary}: forward; above, forward + backward", xlabel="rows")
    for panel in (left, middle, right):
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.3, which="both")
        if panel.lines:
            panel.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(panel, results: Sequence[Result], directions: Sequence[str], along: str, colors: dict[str, str]) -> None:
    for direction in directions:
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for r in results:
            if r.direction == direction:
                lines.setdefault((r.contestant, r.dtype), {})[getattr(r, along)] = r.median_ms
        for (name, dtype), points in lines.items():
            xs = sorted(points)
            known = panel.get_legend_handles_labels()[1]
            label = f"{name}, {dtype}"
            panel.plot(
                xs,
                [points[x] for x in xs],
                STYLES.get(dtype, "-"),
                color=colors[name],
                marker=".",
                label=None if label in known else label,
            )
