"""The results of a run: tables on the terminal, and a CSV with every figure. chart.py draws the chart."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import BASELINE
from benchmarks.harness import Result
from benchmarks.targets import Verdict

WIDTH = 170  # Of the tables. A narrower terminal wraps them; no figure is cut.


def machine(device: torch.device) -> str:
    """One line about the machine and the versions."""
    from lit_did.ops.extension import EXTENSION

    if device.type == "cuda":
        what = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        level = EXTENSION.module.simd_level() if EXTENSION.module else "no extension"
        what = f"{_processor()} ({level}), {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{what}, Python {platform.python_version()}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def show(results: Sequence[Result]) -> None:
    """Prints a table of each race, with every time over that of the fused operators in the same race."""
    for race in dict.fromkeys(result.race for result in results):
        _show_race(race, [result for result in results if result.race == race])
    print(
        f"`over {BASELINE}`: the median over that of {BASELINE}, in the same race, with the same threads and no row "
        "ignored.\n`spread`: slowest less fastest, over the median. `limit`: share of the GB/s that reading the inputs "
        "reaches\n(on CUDA, copying them). `peak`: memory beyond the inputs. `extra`: the same, beyond results too."
    )


def _show_race(race: str, results: Sequence[Result]) -> None:
    base = {_group(r): r.median_ms for r in results if r.contestant == BASELINE and not r.ignored}
    table = Table(title=race, title_justify="left")
    for column in ("dtype", "rows x V", "contestant", "direction"):
        table.add_column(column, no_wrap=True)
    columns = (
        "threads",
        "ignored",
        "calls",
        "median ms",
        "spread",
        "GB/s",
        "limit",
        f"over {BASELINE}",
        "peak",
        "extra",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if previous not in (None, (r.dtype, r.rows, r.vocabulary)):
            table.add_section()
        previous = r.dtype, r.rows, r.vocabulary
        table.add_row(
            r.dtype,
            f"{r.rows} x {r.vocabulary}",
            r.contestant,
            r.direction,
            str(r.threads),
            f"{r.ignored:.0%}",
            str(r.repeats),
            f"{r.median_ms:.3g}",
            f"{(r.slowest_ms - r.fastest_ms) / r.median_ms:.0%}",
            f"{r.gigabytes_per_second:.1f}",
            _number(r.percent_of_limit, ".0f", "%"),
            _number(r.median_ms / base.get(_group(r), math.nan), ".2f", " x"),
            _number(r.peak_mib, ".1f", " MiB"),
            _number(r.extra_mib, ".1f", " MiB"),
        )
    Console(width=WIDTH).print(table)


def show_verdicts(verdicts: Sequence[Verdict], title: str) -> None:
    """Prints every target beside its figure."""
    table = Table(title=f"Targets: {title}", title_justify="left")
    for column in ("target of", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("V", "measured", "target", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for v in verdicts:
        met = "?" if math.isnan(v.figure) else "yes" if v.met else "NO"
        table.add_row(v.text, v.dtype, str(v.vocabulary or ""), v.shown, v.target, met)
    Console(width=WIDTH).print(table)


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Writes all results, one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def _group(r: Result) -> tuple:
    return r.direction, r.dtype, r.rows, r.vocabulary, r.threads


def _number(value: float, form: str, unit: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"
