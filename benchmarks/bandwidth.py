"""Which share of a device copy's bandwidth do the operators reach? Each kernel runs alone, with gradients made before.

python -m benchmarks.bandwidth [--device cuda] [--vocabulary 32768 ...] [--dtype bfloat16 ...] [--spread 1 3] [--gib 1]

Every kernel is checked against float64 before it is timed. The share compares GB/s with those of a copy of one side's
logits in the same race. It counts the bytes that must move: inputs read once, gradients written once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import check, report
from benchmarks.contestants import reference_statistics
from benchmarks.harness import LIMIT, Result, Runner, Size, race
from lit_did import TokenStatistics
from lit_did.cli.errors import Arguments

VOCABULARIES = [32768, 50257, 131072, 151936]  # 50,257 is odd: its rows do not begin on 16-byte boundaries
FIELDS = TokenStatistics._fields
ONLY_STEP = slice(0, 1)


def _logprobs(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return tuple(reference_statistics(policy, reference, labels)[:2])


def runners(size: Size, spread: float) -> list[Runner]:
    """A copy, the forward and three backwards, on logits whose standard deviation is `spread`."""
    generator = torch.Generator(size.device).manual_seed(0)
    policy, reference = (torch.empty(size.rows, size.vocabulary, dtype=size.dtype, device=size.device) for _ in "ab")
    for rows in range(0, size.rows, 512):  # no float32 tensor of the whole size
        part = policy[rows : rows + 512]
        logits = spread * torch.randn(part.shape, generator=generator, device=size.device)
        part.copy_(logits)
        reference[rows : rows + 512] = logits + 0.5 * torch.randn(part.shape, generator=generator, device=size.device)
    labels = torch.randint(size.vocabulary, (size.rows,), generator=generator, device=size.device)

    operators = torch.ops.lit_did
    *statistics, normalizers = operators.token_statistics(policy, reference, labels, -100, 1.0, False)
    grads = check.upstream(statistics)
    truth = check.Truth(reference_statistics, policy, reference, labels)
    of_logprobs = check.Truth(_logprobs, policy, reference, labels)
    target, side = torch.empty_like(policy), policy.nbytes

    def forward(_: object) -> Sequence[Tensor]:
        return operators.token_statistics(policy, reference, labels, -100, 1.0, False)[:-1]

    def backward(used: int, policy_too: bool, reference_too: bool, _: object) -> Sequence[Tensor]:
        given = [grad if i < used else None for i, grad in enumerate(grads)]
        return operators.token_statistics_backward(
            given, policy, reference, labels, statistics, normalizers, -100, 1.0, policy_too, reference_too
        )[: 1 + reference_too]

    def runner(name: str, direction: str, sides: int, step: Callable, verify: Callable = lambda returned: None):
        directions = {direction: (ONLY_STEP, sides * side)}
        return Runner(name, size, lambda: (), (step,), directions, verify=verify)

    def right(name: str, expected: check.Truth, fields: Sequence[str], returned: Sequence[Tensor]) -> None:
        expected.verify(name, fields, statistics[: len(fields)], returned)

    both, alone, logprob = "both gradients", "policy's gradient", "log-probability's gradient"
    two = FIELDS[:2]
    return [
        runner(LIMIT, LIMIT, 2, lambda _: target.copy_(policy)),
        runner("statistics", "forward", 2, forward, lambda values: truth.verify("statistics", FIELDS, values)),
        runner(both, "backward", 4, partial(backward, len(FIELDS), True, True), partial(right, both, truth, FIELDS)),
        runner(alone, "backward", 3, partial(backward, len(FIELDS), True, False), partial(right, alone, truth, FIELDS)),
        runner(logprob, "backward", 2, partial(backward, 1, True, False), partial(right, logprob, of_logprobs, two)),
    ]  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[Result]:
    """A race for every dtype, vocabulary size and spread; a line is printed for each result."""
    device = torch.device(options.device)
    for dtype in (getattr(torch, name) for name in options.dtype):
        for vocabulary in options.vocabulary:
            rows = max(check.ROWS, int(options.gib * 2**30 / (vocabulary * dtype.itemsize)))
            for spread in options.spread:
                size = Size(rows, vocabulary, dtype, device)
                for r in race(f"spread {spread:g}", runners(size, spread), repeats=options.repeats):
                    print(
                        f"{r.dtype:8} {r.rows:6} x {r.vocabulary:6}  {r.race:9} {r.contestant:27} "
                        f"{r.median_ms:8.3f} ms ({r.fastest_ms:.3f} to {r.slowest_ms:.3f}) "
                        f"{r.gigabytes_per_second:5.0f} GB/s {r.percent_of_limit:5.1f}%",
                        flush=True,
                    )
                    yield r


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Parses the command line and runs."""
    parser = Arguments(
        prog="python -m benchmarks.bandwidth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cpu", "cuda"], help="(default: %(default)s)")
    add("--vocabulary", type=int, nargs="+", default=VOCABULARIES, help="(default: %(default)s)")
    add("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16", "float16"])
    add(
        "--spread",
        type=float,
        nargs="+",
        default=[1.0, 3.0],
        help="standard deviation of the logits; about 3 in language models (default: %(default)s)",
    )
    add("--gib", type=float, default=1.0, help="GiB of one side's logits (default: %(default)s)")
    add("--repeats", type=int, default=15, help="timed calls of each kernel (default: %(default)s)")
    add("--output", type=Path, default=Path("bench_output"), help="folder for bandwidth.csv")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    print(report.machine(torch.device(options.device)), flush=True)
    results = list(measure(options))
    report.write_csv(results, options.output / "bandwidth.csv")
    return results


if __name__ == "__main__":
    main()
