"""Fair comparisons: contestants take turns within one run, so that a change of the machine's speed affects all.

A runner is checked on its first full-size call, before it is timed; its memory is measured on its last warm-up call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks import memory

T = TypeVar("T")
LIMIT = "limit"  # The contestant, and the direction, that only moves the memory.
MEBIBYTE = 2**20
_AWAKE = torch.zeros(2**17)  # large enough for torch to use all its threads


@dataclass(frozen=True)
class Size:
    """The inputs of a race: logits [rows, vocabulary] of `dtype`, a share of the rows `ignored`."""

    rows: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    ignored: float = 0.0

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocabulary} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Result:
    """One contestant, in one direction, at one size: a line of the CSV. NaN means not measured."""

    race: str
    contestant: str
    direction: str
    """forward, backward, both, or limit"""
    device: str
    threads: int
    dtype: str
    rows: int
    vocabulary: int
    ignored: float
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    repeats: int
    gigabytes_per_second: float
    """bytes that must be moved (inputs read, gradients written) over the median"""
    percent_of_limit: float
    """Of the limit's GB/s in the same race: on the CPU reading the inputs, on CUDA copying them."""
    peak_mib: float
    """the most memory during the call, beyond its inputs"""
    extra_mib: float
    """the same, beyond what it returns: statistics and gradients"""


@dataclass(frozen=True)
class Runner:
    """A contestant that is ready to run. `prepare()` is not timed. Each step gets what the step before returned.

    `directions` maps each figure to report to the steps that it adds up and the bytes that they must move.
    """

    contestant: str
    size: Size
    prepare: Callable[[], object]
    steps: Sequence[Callable[[object], object]]
    directions: Mapping[str, tuple[slice, int]]
    verify: Callable[[object], None] = lambda returned: None
    warmup: int = 2
    threads: int = field(default_factory=torch.get_num_threads)


def race(name: str, runners: Sequence[Runner], *, repeats: int, seconds: float = math.inf) -> list[Result]:
    """Checks and warms up every runner, then times them in rounds: each round calls every runner once, in turn.

    A runner whose `repeats` calls would take more than `seconds` is left out of some rounds, but not of all.
    """
    before = torch.get_num_threads()
    try:
        peaks, turns = [], []
        for runner in runners:
            torch.set_num_threads(runner.threads)
            bytes_at_peak, duration = _warm_up(runner)
            peaks.append(bytes_at_peak)
            turns.append(max(1, int(min(repeats, seconds / duration))))
        times: list[list[list[float]]] = [[] for _ in runners]
        for turn in range(repeats):
            for runner, wanted, mine in zip(runners, turns, times, strict=True):
                if turn * wanted % repeats < wanted:  # spread over the rounds
                    if torch.get_num_threads() != runner.threads:
                        torch.set_num_threads(runner.threads)
                        _timed(runner)  # New threads share a processor until the system moves them.
                    mine.append(_timed(runner)[0])
    finally:
        torch.set_num_threads(before)
    return _results(name, runners, times, peaks)


def in_own_process(threads: int, function: Callable[..., T], *arguments: object) -> T:
    """Calls `function` in a new process with that many threads, so that its memory is its own."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(function, *arguments).result()


def _warm_up(runner: Runner) -> tuple[tuple[float, float], float]:
    """((peak bytes beyond its inputs, the same beyond its results too), seconds of the last call)."""
    for turn in range(runner.warmup):
        state = runner.prepare()
        inputs = list(tensors(state))
        at_peak, (durations, returned) = memory.peak(lambda state=state: _timed(runner, state), runner.size.device)
        if turn == 0:
            runner.verify(returned)
        beyond = at_peak - memory.held(tensors(returned), apart_from=inputs)
        beyond = 0.0 if beyond < 0 else beyond  # pages counted late
        del state, inputs, returned
    return (at_peak, beyond), sum(durations)


def _timed(runner: Runner, state: object = None) -> tuple[list[float], object]:
    """Seconds of every step, and what the last returned."""
    state = runner.prepare() if state is None else state
    if runner.size.device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runner.steps) + 1)]
        torch.cuda.synchronize()
        # About a millisecond, in which the host gets ahead, so that launches are not timed.
        torch.cuda._sleep(2_000_000)
        events[0].record()
        for step, event in zip(runner.steps, events[1:], strict=True):
            state = step(state)
            event.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in pairwise(events)], state
    # Threads sleep between calls. This wakes them, so that no contestant is timed doing it.
    _AWAKE.add_(1)
    clock = [time.perf_counter()]
    for step in runner.steps:
        state = step(state)
        clock.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(clock)], state


def tensors(value: object) -> Iterable[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors(entry)


def _results(
    name: str,
    runners: Sequence[Runner],
    times: Sequence[Sequence[Sequence[float]]],
    peaks: Sequence[tuple[float, float]],
) -> list[Result]:
    calls = {}
    for i, runner in enumerate(runners):
        for direction, (steps, _) in runner.directions.items():
            calls[i, direction] = sorted(sum(call[steps]) for call in times[i])
    # The limit of a runner is the one with its size and threads.
    limits = {
        (runner.size, runner.threads): runner.directions[LIMIT][1] / statistics.median(calls[i, LIMIT])
        for i, runner in enumerate(runners)
        if runner.contestant == LIMIT
    }
    results = []
    for i, runner in enumerate(runners):
        size = runner.size
        limit = limits.get((size, runner.threads), math.nan)
        for direction, (_, moved) in runner.directions.items():
            durations = calls[i, direction]
            median = statistics.median(durations)
            # The memory of the backward alone is not measured: its peak is that of both.
            at_peak, beyond = (math.nan, math.nan) if direction == "backward" else peaks[i]
            results.append(
                Result(
                    race=name,
                    contestant=runner.contestant,
                    direction=direction,
                    device=size.device.type,
                    threads=runner.threads,
                    dtype=str(size.dtype).removeprefix("torch."),
                    rows=size.rows,
                    vocabulary=size.vocabulary,
                    ignored=size.ignored,
                    median_ms=1e3 * median,
                    fastest_ms=1e3 * durations[0],
                    slowest_ms=1e3 * durations[-1],
                    repeats=len(durations),
                    gigabytes_per_second=moved / median / 1e9,
                    percent_of_limit=100 * moved / median / limit,
                    peak_mib=at_peak / MEBIBYTE,
                    extra_mib=beyond / MEBIBYTE,
                )
            )
    return results
