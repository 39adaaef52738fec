"""The targets of the fused operators, judged from the results of one run. Every ratio stays within one race."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.contestants import BASELINE
from benchmarks.harness import LIMIT, Result
from benchmarks.token_statistics import IGNORED


@dataclass(frozen=True)
class Verdict:
    """A figure beside its target."""

    text: str
    dtype: str
    vocabulary: int | None
    figure: float
    bound: float
    unit: str = ""
    at_most: bool = False

    @property
    def shown(self) -> str:
        return f"{self.figure:.2f}{self.unit}"

    @property
    def target(self) -> str:
        return f"at {'most' if self.at_most else 'least'} {self.bound:g}{self.unit}"

    @property
    def met(self) -> bool:
        """Judged by the rounded figure that the table shows. NaN meets no target."""
        figure = round(self.figure, 2)
        return figure <= self.bound if self.at_most else figure >= self.bound


def judge(results: Sequence[Result]) -> list[Verdict]:
    """Every target that the results have figures for: float32 and bfloat16, on the CPU with 2 threads."""
    on_cuda = any(result.device == "cuda" for result in results)
    verdicts = list(_cuda(results) if on_cuda else _table(results))
    if not on_cuda:
        verdicts += _memory(results)
        verdicts += _threads(results)
    return verdicts + list(_ignored(results))


def _table(results: Sequence[Result]) -> Iterator[Verdict]:
    bounds = {  # (float32, bfloat16)
        ("forward", LIMIT): (2.0, 1.8),
        ("forward", "eager"): (45, 45),
        ("forward", "compile"): (4, 3.5),
        ("both", "eager"): (20, 20),
        ("both", "compile"): (2, 2),
    }
    for (direction, other), by_dtype in bounds.items():
        what = "forward" if direction == "forward" else "forward + backward"
        for ours in _of(results, "table"):
            if not ours.contestant.startswith(BASELINE) or ours.direction != direction:
                continue
            bound = dict(zip(("float32", "bfloat16"), by_dtype, strict=True)).get(ours.dtype)
            theirs = _find(results, ours, other, LIMIT if other == LIMIT else direction)
            if bound is None or theirs is None:
                continue
            at = (ours.dtype, ours.vocabulary)
            if other == LIMIT:
                ratio = ours.median_ms / theirs.median_ms
                yield Verdict(f"{what} over the read limit{_name(ours)}", *at, ratio, bound, " x", at_most=True)
            else:
                ratio = theirs.median_ms / ours.median_ms
                yield Verdict(f"{what} faster than {other}{_name(ours)}", *at, ratio, bound, " x")


def _memory(results: Sequence[Result]) -> Iterator[Verdict]:
    for ours in _of(results, "table"):
        if ours.contestant.startswith(BASELINE) and ours.direction in ("forward", "both"):
            what = "outputs" if ours.direction == "forward" else "outputs and gradients"
            text = f"{ours.contestant}: memory beyond the {what}"
            yield Verdict(text, ours.dtype, ours.vocabulary, ours.extra_mib, 1, " MiB", at_most=True)


def _threads(results: Sequence[Result]) -> Iterator[Verdict]:
    for one in _of(results, "threads"):
        if one.contestant != BASELINE or one.threads != 1 or one.direction == "backward":
            continue
        two = next(r for r in _of(results, "threads") if r.threads == 2 and _same(r, one))
        what = "forward" if one.direction == "forward" else "forward + backward"
        text = f"two threads over one, {what}"
        yield Verdict(text, one.dtype, one.vocabulary, one.median_ms / two.median_ms, 1.8, " x")


def _ignored(results: Sequence[Result]) -> Iterator[Verdict]:
    for some in _of(results, "ignored"):
        # There is no target in place, because zeros must be written over the logits of ignored rows.
        if not some.ignored or some.direction == "backward" or some.contestant != BASELINE:
            continue
        none = next(r for r in _of(results, "ignored") if not r.ignored and _same(r, some))
        what = "forward" if some.direction == "forward" else "forward + backward"
        text = f"{IGNORED:.0%} of the rows ignored, {what}: time over that with none ignored{_name(some)}"
        share = some.median_ms / none.median_ms
        yield Verdict(text, some.dtype, some.vocabulary, share, 1 - IGNORED, at_most=True)


def _cuda(results: Sequence[Result]) -> Iterator[Verdict]:
    for ours in _of(results, "table"):
        if ours.contestant != BASELINE or ours.dtype != "bfloat16" or ours.vocabulary < 32768:
            continue
        bound = {"forward": 90, "backward": 80}.get(ours.direction)
        if bound is not None:
            text = f"{ours.direction}: bandwidth over that of a copy"
            yield Verdict(text, ours.dtype, ours.vocabulary, ours.percent_of_limit, bound, " %")


def _name(ours: Result) -> str:
    return "" if ours.contestant == BASELINE else f" ({ours.contestant})"


def _of(results: Iterable[Result], race: str) -> list[Result]:
    return [result for result in results if result.race == race]


def _same(a: Result, b: Result) -> bool:
    """Whether two results of one race have contestant, direction, dtype and size in common."""
    return all(
        getattr(a, name) == getattr(b, name) for name in ("contestant", "direction", "dtype", "rows", "vocabulary")
    )


def _find(results: Iterable[Result], ours: Result, contestant: str, direction: str) -> Result | None:
    """The other contestant's result in the same race, at the same size."""
    for result in _of(results, ours.race):
        if (result.contestant, result.direction) == (contestant, direction) and (
            (result.dtype, result.rows, result.vocabulary) == (ours.dtype, ours.rows, ours.vocabulary)
        ):
            return result
    return None
