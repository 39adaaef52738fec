"""Timing with honest comparisons: contestants take turns within one run, so that a drifting machine hits all alike."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """One contestant at one size. Times in milliseconds."""

    question: str
    contestant: str
    direction: str
    rows: int
    vocabulary: int
    dtype: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int
    gigabytes_per_second: float
    """bytes of both inputs (and of the gradients written) over the median"""


def race(contestants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, {contestant: [repeats]}: each round calls every contestant once, in turn."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def result(
    question: str, contestant: str, direction: str, logits: torch.Tensor, times: list[float], gigabytes: float
) -> Result:
    """The summary of one contestant's times; `gigabytes` must be moved at least."""
    median = statistics.median(times)
    return Result(
        question=question,
        contestant=contestant,
        direction=direction,
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        dtype=str(logits.dtype).removeprefix("torch."),
        median_ms=1e3 * median,
        fastest_ms=1e3 * min(times),
        slowest_ms=1e3 * max(times),
        repeats=len(times),
        gigabytes_per_second=gigabytes / median,
    )


def machine() -> str:
    """One line on what the figures were measured with."""
    from lit_did.ops.extension import EXTENSION

    level = EXTENSION.module.simd_level() if EXTENSION.module else "no extension"
    return (
        f"{platform.machine()} ({level}), {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def show(results: list[Result], baseline: str) -> None:
    """Prints a table, with every time over that of the contestant `baseline` in the same race."""
    from rich.console import Console
    from rich.table import Table

    base = {_race(r): r.median_ms for r in results if r.contestant == baseline}
    table = Table(title=machine())
    for column in ("dtype", "rows x V", "direction", "contestant"):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "spread", "GB/s", f"over {baseline}"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if previous is not None and _race(r) != previous:
            table.add_section()
        previous = _race(r)
        table.add_row(
            r.dtype,
            f"{r.rows} x {r.vocabulary}",
            r.direction,
            r.contestant,
            f"{r.median_ms:.2f}",
            f"{(r.slowest_ms - r.fastest_ms) / r.median_ms:.0%}",
            f"{r.gigabytes_per_second:.1f}",
            f"{r.median_ms / base[_race(r)]:.1f} x",
        )
    Console(width=max(100, Console().width)).print(table)
    print(f"`over {baseline}`: the median over that of {baseline} in the same race. `spread`: slowest less fastest.")


def _race(r: Result) -> tuple:
    return r.question, r.direction, r.rows, r.vocabulary, r.dtype


def write_csv(results: list[Result], path: Path) -> None:
    """Writes all results, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)
