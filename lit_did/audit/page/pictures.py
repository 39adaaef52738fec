"""Pictures of an audit as SVG text, drawn by matplotlib. Their colours are the page's and follow dark mode and print.

Every function returns an `<svg>` element for `blocks.Picture`. The page adds its title and description and makes its
ids unique. Values that are not finite are left out.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lit_did.audit.report import Estimate

# Colours that matplotlib draws with, and the colours of style.css that replace them.
_INK, _FAINT, _PAPER, _SERIES = "#010101", "#020202", "#030303", ("#040404", "#050505", "#060606", "#070707")
_VARIABLES = {_INK: "--ink", _FAINT: "--line", _PAPER: "--paper"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)
}
_MARKERS, _LINES = "osD^", ("-", "--", ":", "-.")
_WIDTH = 5.0  # inches, of 72 units each
_MAX_POINTS, _MAX_NAME = 500, 32
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lit-did",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
}


def bars(names: Sequence[str], values: Sequence[float | Estimate], label: str, line: float | None = None) -> str:
    """Horizontal bars, the first name at the top.

    Args:
        names: [bars].
        values: [bars] lengths. An `Estimate` shows its interval.
        label: What the values are, with their unit, such as "accuracy" or "length (words)".
        line: Where a dashed vertical line stands, such as .5 for chance.
    """

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        estimates = [_estimate(value) for value in values]
        axes.barh(places, [e.value for e in estimates], height=0.62, color=_SERIES[0], alpha=0.55, linewidth=0)
        for place, estimate in zip(places, estimates, strict=True):
            if math.isfinite(estimate.lower):
                axes.plot([estimate.lower, estimate.upper], [place, place], color=_INK, linewidth=1.2)
        _names(axes, names)
        axes.set_xlabel(label)
        _vertical(axes, line)

    return _svg(draw, 0.75 + 0.25 * max(1, len(names)))


def forest(
    names: Sequence[str], series: Mapping[str, Sequence[Estimate]], label: str, line: float | None = None
) -> str:
    """Estimates with their intervals, a line a name, the first name at the top.

    Args:
        names: [lines], such as tags.
        series: By name, [lines] estimates. At most four series. A single one needs no name: {"": estimates}.
        label: What the values are, with their unit.
        line: Where a dashed vertical line stands, such as 0.
    """

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        step = 0.7 / max(1, len(series))
        for number, (name, estimates) in enumerate(_checked(series).items()):
            shifted = places + (number - (len(series) - 1) / 2) * step
            marked = [_estimate(estimate) for estimate in estimates]
            for place, estimate in zip(shifted, marked, strict=True):
                if math.isfinite(estimate.lower):
                    axes.plot([estimate.lower, estimate.upper], [place, place], color=_SERIES[number], linewidth=1.4)
            axes.plot(
                [e.value for e in marked],
                shifted,
                linestyle="none",
                marker=_MARKERS[number],
                markersize=4.5,
                color=_SERIES[number],
                label=_shown(name),
            )
        _names(axes, names)
        axes.set_xlabel(label)
        _vertical(axes, line)
        _legend(axes, series)

    height = 0.75 + max(0.25, 0.17 * len(series)) * max(1, len(names)) + _legend_height(series)
    return _svg(draw, height)


def histogram(series: Mapping[str, ArrayLike], label: str, line: float | None = None, num_bins: int = 30) -> str:
    """One or two histograms over the same bins. Outlying values are counted in the first and the last bin.

    Args:
        series: By name, [values]. A single one needs no name: {"": values}.
        label: What the values are, with their unit.
        line: Where a dashed vertical line stands, such as 0.
        num_bins: The most bins. Whole numbers get bins of a whole width.
    """

    def draw(axes: Axes) -> None:
        finite = {name: _finite(values) for name, values in _checked(series, 2).items()}
        together = np.concatenate(list(finite.values()))
        edges, is_cut = _edges(together, num_bins)
        for number, (name, values) in enumerate(finite.items()):
            heights, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            if number == 0:
                axes.stairs(heights, edges, fill=True, color=_SERIES[0], alpha=0.45, linewidth=0, label=_shown(name))
            else:
                axes.stairs(heights, edges, color=_SERIES[1], linewidth=1.5, label=_shown(name))
        axes.set_xlabel(f"{label}; the end bins hold all beyond" if is_cut else label)
        axes.set_ylabel("count")
        axes.locator_params(axis="y", nbins=5, integer=True)
        axes.grid(axis="y", alpha=0.6)
        _vertical(axes, line)
        _legend(axes, series)

    return _svg(draw, 2.3 + _legend_height(series))


def scatter(
    x: ArrayLike,
    y: ArrayLike,
    x_label: str,
    y_label: str,
    groups: Sequence[str] | None = None,
    line: float | None = None,
) -> str:
    """Points. Of more than 500, 500 are drawn, evenly spaced in their order; the label of x says so.

    Args:
        x, y: [points].
        x_label, y_label: What they are, with their units.
        groups: [points] names, at most four different ones. None: one group.
        line: Where a dashed horizontal line stands, such as 0.
    """
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    belongs = np.asarray([""] * len(across) if groups is None else groups, dtype=object)
    known = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
    drawn = known[np.unique(np.linspace(0, len(known) - 1, _MAX_POINTS).round().astype(int))] if len(known) else known
    names = _checked(dict.fromkeys(belongs.tolist() or [""]))

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            mine = drawn[belongs[drawn] == name]
            axes.plot(
                across[mine],
                up[mine],
                linestyle="none",
                marker=_MARKERS[number],
                markersize=3.5,
                markeredgewidth=0,
                alpha=0.55,
                color=_SERIES[number],
                label=_shown(name),
            )
        count = "" if len(drawn) == len(known) else f" ({len(drawn)} of {len(known)} points)"
        axes.set_xlabel(f"{x_label}{count}")
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.6)
        if line is not None:
            axes.axhline(line, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        _legend(axes, names)

    return _svg(draw, 3.0 + _legend_height(names))


def curves(
    series: Mapping[str, tuple[ArrayLike, Sequence[float | Estimate]]],
    x_label: str,
    y_label: str,
    diagonal: bool = False,
) -> str:
    """Lines through points, with the intervals of those that are an `Estimate`.

    Args:
        series: By name, x [points] and y [points]. At most four series. A single one needs no name: {"": (x, y)}.
        x_label, y_label: What they are, with their units.
        diagonal: Whether a dashed line shows y = x, between 0 and 1.
    """

    def draw(axes: Axes) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for number, (name, (x, y)) in enumerate(_checked(series).items()):
            places, estimates = np.asarray(x, dtype=float), [_estimate(value) for value in y]
            for place, estimate in zip(places, estimates, strict=True):
                if math.isfinite(estimate.lower):
                    axes.plot([place, place], [estimate.lower, estimate.upper], color=_SERIES[number], linewidth=1.2)
            axes.plot(
                places,
                [e.value for e in estimates],
                color=_SERIES[number],
                linestyle=_LINES[number],
                linewidth=1.5,
                marker=_MARKERS[number],
                markersize=4,
                label=_shown(name),
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.locator_params(nbins=6)
        axes.grid(alpha=0.6)
        _legend(axes, series)

    return _svg(draw, 2.9 + _legend_height(series))


def reliability(predicted: ArrayLike, observed: Sequence[float | Estimate]) -> str:
    """A reliability curve: where predictions are calibrated, it lies on the diagonal.

    Args:
        predicted: [bins] mean predicted probability of each bin.
        observed: [bins] share of the pairs in it that the label agrees with.
    """
    return curves({"": (predicted, observed)}, "predicted probability", "observed share", diagonal=True)


def position(estimate: float | Estimate, low: str, high: str, ends: tuple[float, float] = (-1.0, 1.0)) -> str:
    """Where a figure lies between two ends, such as "reinforcing" and "exploring".

    Args:
        estimate: The figure, in the units of `ends`. Beyond the ends it is drawn at the end, as an open mark.
        low, high: The names of the ends.
        ends: Their values.
    """
    shown = _estimate(estimate)
    middle = (ends[0] + ends[1]) / 2

    def draw(axes: Axes) -> None:
        axes.plot(ends, (0, 0), color=_FAINT, linewidth=5, solid_capstyle="round")
        axes.plot((middle, middle), (-0.4, 0.4), color=_INK, linewidth=0.9)
        if math.isfinite(shown.lower):
            axes.plot(np.clip((shown.lower, shown.upper), *ends), (0, 0), color=_SERIES[0], linewidth=5, alpha=0.6)
        if math.isfinite(shown.value):
            inside = ends[0] <= shown.value <= ends[1]
            place = float(np.clip(shown.value, *ends))
            face = _SERIES[0] if inside else _PAPER
            axes.plot(place, 0, marker="o", markersize=9, color=_SERIES[0], markerfacecolor=face, clip_on=False)
        axes.text(ends[0], -1.4, f"{_shown(low)} ({ends[0]:g})", ha="left")
        axes.text(ends[1], -1.4, f"{_shown(high)} ({ends[1]:g})", ha="right")
        axes.text(middle, 0.8, str(shown) if math.isfinite(shown.value) else "unknown", ha="center")
        margin = 0.03 * (ends[1] - ends[0])
        axes.set_xlim(ends[0] - margin, ends[1] + margin)
        axes.set_ylim(-1.7, 1.7)
        axes.set_axis_off()

    return _svg(draw, 0.8)


def _svg(draw: Callable[[Axes], None], height: float) -> str:
    """The SVG of a figure with one plot that is `height` inches high."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # browsers have other fonts
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_figure(file, format="svg", metadata=nothing)
    return _lean(file.getvalue())


def _lean(text: str) -> str:
    """An SVG file of matplotlib as an element of a page: its colours and font are the page's, its numbers are short."""
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _lean_tag, text)
    text = re.sub(r"^<svg[^>]*>", f'<svg class="picture" viewBox="{box[1]}" width="100%" role="img">', text)
    return re.sub(r">\s+<", "><", text).replace("<defs></defs>", "").strip()


def _lean_tag(tag: re.Match) -> str:
    if tag[0].startswith("<g "):
        found = re.sub(r' id="[^"]*"', "", tag[0])
    else:
        found = re.sub(r"font-family: [^;\"]*;? ?", "", tag[0]).replace("xlink:href", "href")
    found = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), found)
    for colour, variable in _VARIABLES.items():
        found = found.replace(colour, f"var({variable})")
    return re.sub(r"\s+", " ", found)


def _estimate(value: float | Estimate) -> Estimate:
    return value if isinstance(value, Estimate) else Estimate(float(value))


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def _checked(series: Mapping, most: int = len(_SERIES)) -> Mapping:
    if not 1 <= len(series) <= most:
        raise ValueError(f"Expected 1 to {most} series, but got {len(series)}.")
    return series


def _shown(name: str) -> str:
    """A name on one line, cut, and without what XML cannot hold."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(name))
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Writes the names of horizontal bars or lines, the first one at the top."""
    axes.set_yticks(np.arange(len(names)), [_shown(name) for name in names])
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.6)
    axes.locator_params(axis="x", nbins=6)


def _vertical(axes: Axes, line: float | None) -> None:
    if line is not None:
        axes.axvline(line, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))


def _legend(axes: Axes, series: Mapping) -> None:
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(series), borderaxespad=0, handlelength=1.6)


def _legend_height(series: Mapping) -> float:
    return 0.25 if len(series) > 1 else 0.0


def _edges(values: np.ndarray, num_bins: int) -> tuple[np.ndarray, bool]:
    """The edges of at most `num_bins` bins that hold 99% of the values, and whether they leave some out."""
    if not len(values):
        return np.array([0.0, 1.0]), False
    low, high = values.min(), values.max()
    inner_low, inner_high = np.quantile(values, (0.005, 0.995))
    if high - low > 1.5 * (inner_high - inner_low) > 0:  # far outliers would leave no room for the others
        low, high = max(low, inner_low), min(high, inner_high)
    if np.all(values == values.round()):
        low, high = math.floor(low), math.ceil(high)
        width = max(1, math.ceil((high - low + 1) / num_bins))
        edges = low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1)
    else:
        edges = np.linspace(low, high, num_bins + 1) if high > low else np.array([low - 0.5, low + 0.5])
    return edges, bool((values < edges[0]).any() or (values > edges[-1]).any())
