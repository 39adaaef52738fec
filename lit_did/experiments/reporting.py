"""What an experiment returns, and how it is shown and written: tables over seeds, CSV files, a picture, a finding."""

from __future__ import annotations

import csv
import io
import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import lit_did

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable

CONFIDENCE = 0.95
WIDTH = 150
"""characters of a line: the widest table's"""


class Options(NamedTuple):
    """What every experiment is asked for."""

    quick: bool = False
    """smaller, in seconds"""
    seeds: int = 5
    """replicates, at least 2"""
    seed: int = 0
    """of the first replicate; the next ones follow it"""
    quiet: bool = False
    """without progress bars"""

    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


class Table(NamedTuple):
    """Rows for a CSV file, one a replicate, and the columns that are shown, summarised over replicates."""

    name: str
    """of the CSV file, without ".csv" """
    title: str
    rows: list[dict[str, Any]]
    by: tuple[str, ...] = ()
    """the columns that distinguish the shown rows; without any, the table is only written"""
    values: tuple[str, ...] = ()
    """the columns that are shown"""
    across: str | None = None
    """a column whose values get shown columns of their own"""


class Report(NamedTuple):
    """The outcome of an experiment."""

    tables: list[Table]
    draw: Callable[[Figure], None]
    """draws the picture on an empty figure"""
    size: tuple[float, float]
    """of the picture, in inches"""
    notes: list[str]
    """sentences for below the tables: how to read them"""
    found: str
    """what was found, from the rows: the last sentences"""


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent replicates and half of its 95% confidence interval (Student's t).

    Args:
        values: At least 2.

    Example:
        >>> mean, half_width = mean_and_half_width([1.0, 2.0, 3.0])
        >>> round(mean, 3), round(half_width, 3)  # 4.303 standard errors of 1 / sqrt(3)
        (2.0, 2.484)
    """
    from scipy.special import stdtrit  # takes a tenth of a second to load

    numbers = torch.tensor(values, dtype=torch.float64)
    quantile = float(stdtrit(len(numbers) - 1, (1 + CONFIDENCE) / 2))
    return float(numbers.mean()), quantile * float(numbers.std()) / len(numbers) ** 0.5


def summary(values: Sequence[float]) -> str:
    """Replicates in a table's cell: the mean ± half of its 95% interval, or of two replicates the range.

    Two replicates have no useful interval: Student's t multiplies their standard error by 12.7.

    Example:
        >>> summary([0.171, 0.213]), summary([0.171, 0.213, 0.18]), summary([1e-14, 3e-14, 2e-14]), summary([2.5, 2.5])
        ('0.171 to 0.213', '0.19 ± 0.05', '(2.0 ± 2.5)e-14', '2.5')
    """
    low, high = min(values), max(values)
    mean = sum(values) / len(values)
    if f"{low:.4g}" == f"{high:.4g}" or not math.isfinite(mean):
        return f"{mean:.4g}"
    if len(values) == 2:
        return _rounded([low, high], (high - low) / 5, " to ")
    half_width = mean_and_half_width(values)[1]
    return _rounded([mean, half_width], half_width, " ± ")


def _rounded(numbers: Sequence[float], uncertainty: float, between: str) -> str:
    """Two numbers, rounded to the first digit of `uncertainty`, or to its second digit if the first is 1 or 2."""
    largest = int(f"{max(map(abs, numbers)):.0e}".split("e")[1])
    if not -3 <= largest < 4:
        scaled = [number / 10.0**largest for number in numbers]
        return f"({_rounded(scaled, uncertainty / 10.0**largest, between)})e{largest:+03d}"
    digit, exponent = f"{uncertainty:.0e}".split("e")
    last = int(exponent) - (digit in "12")
    return between.join(f"{round(number, -last) + 0.0:.{max(0, -last)}f}" for number in numbers)


def sign(values: Sequence[float]) -> int:
    """1 or -1 if the mean's 95% interval (of two replicates the range) lies above or below 0, else 0.

    Example:
        >>> sign([1.0, 1.1, 0.9]), sign([1.0, -0.2, 0.9]), sign([-1.0, -1.1])
        (1, 0, -1)
    """
    if len(values) == 2:
        low, high = min(values), max(values)
    else:
        mean, half_width = mean_and_half_width(values)
        low, high = mean - half_width, mean + half_width
    return (low > 0) - (high < 0)


def criterion(seeds: int) -> str:
    """What `sign` asks for, in words."""
    return "both seeds agree in sign" if seeds == 2 else f"the 95% interval over {seeds} seeds excludes 0"


class Points(NamedTuple):
    """Means over replicates, with the lowest and the highest replicate."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def bars(self) -> tuple[list[float], list[float]]:
        """How far error bars go below and above the means."""
        below = [mean - low for mean, low in zip(self.mean, self.low, strict=True)]
        return below, [high - mean for mean, high in zip(self.mean, self.high, strict=True)]


def points(table: Table, value: str, over: str, **where: str | int | float) -> Points:
    """The column `value` at each value of the column `over`, of the rows that agree with `where`."""
    groups: dict[float, list[float]] = {}
    for row in table.rows:
        if all(row[name] == wanted for name, wanted in where.items()):
            groups.setdefault(float(row[over]), []).append(float(row[value]))
    every = groups.values()
    return Points(
        list(groups), [sum(values) / len(values) for values in every], list(map(min, every)), list(map(max, every))
    )


def draw_points(axes: Axes, found: Points, style: str = "o-", **options: Any) -> None:
    """Draws means, with error bars from the lowest to the highest replicate."""
    options = {"capsize": 2, "elinewidth": 0.8, "markersize": 4} | options
    axes.errorbar(found.x, found.mean, yerr=found.bars, fmt=style, **options)


def draw_band(axes: Axes, found: Points, style: str = "-", **options: Any) -> None:
    """Draws a line of means, in a band from the lowest to the highest replicate."""
    (line,) = axes.plot(found.x, found.mean, style, **options)
    axes.fill_between(found.x, found.low, found.high, color=line.get_color(), alpha=0.12, linewidth=0)


def draw_cross(axes: Axes, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """Draws the means of x and of y over replicates, with error bars from the lowest to the highest replicate."""
    at_x, at_y = (sum(values) / len(values) for values in (x, y))
    x_bar, y_bar = [[at_x - min(x)], [max(x) - at_x]], [[at_y - min(y)], [max(y) - at_y]]
    axes.errorbar([at_x], [at_y], yerr=y_bar, xerr=x_bar, linestyle="", capsize=2, elinewidth=0.8, **options)


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Writes what the axes show."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def legend_below(figure: Figure, axes: Axes, columns: int, seeds: int) -> None:
    """Puts the legend of `axes` below all panels, off the lines, and says what the error bars are."""
    handles, labels = axes.get_legend_handles_labels()
    title = f"mean over {seeds} seeds; error bars and bands: lowest to highest seed"
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=title)


def render(report: Report, header: str) -> str:
    """The header, the tables and the notes as text."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=WIDTH)
    console.print(header, highlight=False, markup=False, soft_wrap=True)
    for table in report.tables:
        if table.by:
            console.print()
            console.print(_shown(table))
    for note in (*report.notes, f"\nFound: {report.found}"):
        console.print(note, highlight=False, markup=False)
    return text.getvalue().rstrip()


def _shown(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    def column(row: dict, value: str) -> str:
        names = [] if table.across is None else [str(row[table.across])]
        return ", ".join([value] * (len(table.values) > 1 or not names) + names)

    cells: dict[tuple, dict[str, list[float]]] = {}
    for row in table.rows:
        group = cells.setdefault(tuple(str(row[name]) for name in table.by), {})
        for value in table.values:
            group.setdefault(column(row, value), []).append(float(row[value]))
    shown = RichTable(title=table.title, title_justify="left")
    across = table.across
    in_order = table.rows if across is None else sorted(table.rows, key=lambda row: row[across])
    columns = list(dict.fromkeys(column(row, value) for row in in_order for value in table.values))
    for name in table.by:
        shown.add_column(_heading(name))
    for name in columns:
        shown.add_column(_heading(name), justify="right")
    for key, group in cells.items():
        shown.add_row(*key, *(summary(group[name]) if name in group else "" for name in columns))
    return shown


def _heading(name: str) -> str:
    words = {"did": "DID", "dpo": "DPO", "kl": "KL"}
    return " ".join(words.get(word, word) for word in name.split("_"))


def header(name: str, options: Options) -> str:
    """The versions and the command that a result is cited with."""
    shown = (
        "the lower to the higher of 2 seeds (an interval needs at least 3)"
        if options.seeds == 2
        else f"mean ± half of its {CONFIDENCE:.0%} interval (Student's t) over {options.seeds} seeds"
    )
    command = f"lit-did experiment {name}{' --quick' if options.quick else ''}"
    return (
        f"{command} --seeds {options.seeds} --seed {options.seed}\n"
        f"lit-did {lit_did.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}\n"
        f"Numbers: {shown}"
    )


def write(report: Report, text: str, name: str, output: Path) -> list[Path]:
    """Writes `text`, the tables and the picture into the folder `output`, all of them or none. Returns the files."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".lit_did_experiments_") as work:
        folder = Path(work)
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        for table in report.tables:
            with (folder / f"{table.name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(table.rows[0]))
                writer.writeheader()
                writer.writerows(table.rows)
        _picture(report, folder / f"{name}.png")
        output.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.move(path, output / path.name)) for path in sorted(folder.iterdir())]


def _picture(report: Report, target: Path) -> None:
    # The object-oriented interface: no display is needed and no global state touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=report.size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    report.draw(figure)
    figure.savefig(target, format="png", metadata={"Software": None})  # the same bytes for the same numbers
