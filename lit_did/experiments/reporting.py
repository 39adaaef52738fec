"""What an experiment gives back, and how it is shown and written: tables of means over seeds, CSV files, a picture."""

from __future__ import annotations

import csv
import io
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import lit_did

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
WIDTH = 130
"""characters of a line: the widest table's"""


class Options(NamedTuple):
    """What every experiment is asked for."""

    quick: bool = False
    """smaller and in seconds, with the same claims"""
    seeds: int = 5
    """replicates, at least 2: intervals are over them"""
    seed: int = 0
    """of the first replicate; the others count on from it"""

    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


class Table(NamedTuple):
    """Rows for a CSV file, one a replicate, and which of their columns are shown as means over replicates."""

    name: str
    """of the CSV file, without ".csv" """
    title: str
    rows: list[dict[str, str | int | float]]
    by: tuple[str, ...] = ()
    """the columns that tell the shown rows apart; without any, the table is only written"""
    values: tuple[str, ...] = ()
    """the columns whose means are shown"""
    across: str | None = None
    """a column each value of which is shown as columns of its own"""


class Report(NamedTuple):
    """The outcome of an experiment."""

    tables: list[Table]
    draw: Callable[[Figure], None]
    """draws the picture on an empty figure"""
    size: tuple[float, float]
    """of the picture, in inches"""
    notes: list[str]
    """sentences for below the tables: how to read them"""


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


def means(table: Table, value: str, over: str, **where: str | int | float) -> dict:
    """{value of the column `over`: mean of the column `value`} of the rows that agree with `where`."""
    groups: dict = {}
    for row in table.rows:
        if all(row[name] == wanted for name, wanted in where.items()):
            groups.setdefault(row[over], []).append(row[value])
    return {key: sum(values) / len(values) for key, values in groups.items()}


def curve(points: dict[float, float]) -> tuple[list[float], list[float]]:
    """What `means` gives as x and y."""
    return list(points), list(points.values())


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Writes what is drawn on it."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)


def render(report: Report, header: str) -> str:
    """The header, the tables and the notes as text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(header, highlight=False, markup=False, soft_wrap=True)
    for table in report.tables:
        if table.by:
            console.print()
            console.print(_shown(table))
    for note in report.notes:
        console.print(note, highlight=False, markup=False)
    return console.file.getvalue().rstrip()


def _shown(table: Table):
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
    columns = list(dict.fromkeys(name for group in cells.values() for name in group))
    for name in table.by:
        shown.add_column(name.replace("_", " "))
    for name in columns:
        shown.add_column(name.replace("_", " "), justify="right")
    for key, group in cells.items():
        shown.add_row(*key, *(_interval(group[name]) if name in group else "" for name in columns))
    return shown


def _interval(values: list[float]) -> str:
    mean, half_width = mean_and_half_width(values)
    if half_width < 1e-12 * abs(mean):  # equal but for rounding
        half_width = 0
    return f"{mean:.3g} ± {half_width:.1g}"


def header(name: str, options: Options) -> str:
    """The versions and the command that a result is cited with."""
    command = f"python -m lit_did.experiments {name}{' --quick' if options.quick else ''}"
    return (
        f"{command} --seeds {options.seeds} --seed {options.seed}\n"
        f"lit-did {lit_did.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}; "
        f"mean ± half a {CONFIDENCE:.0%} interval over {options.seeds} seeds"
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
