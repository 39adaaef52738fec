"""`python -m benchmarks`: times the operators beside others, and prints the ratios and which targets are met."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import contestants, read_limit, report
from benchmarks.chart import draw
from benchmarks.harness import Result
from benchmarks.targets import judge
from benchmarks.token_statistics import ON_CPU_ONLY, RACES, Plan
from lit_did.cli.errors import Arguments

ROWS = {"cpu": 512, "cuda": 4096}
VOCABULARIES = {"cpu": [49152, 151936, 262144], "cuda": [32768, 49152, 131072, 262144]}
BUSY = 0.5  # runnable processes a core, over the last minute
RACES_HELP = """races:
  table      every contestant at every vocabulary size and dtype: what the targets are judged by
  threads    one thread against two (CPU)
  ignored    no rows ignored against 60% of them
  few-rows   1, 2, 4 and 8 rows of the last vocabulary size, with one thread and with all
  growth     smaller vocabularies, and fewer and more rows, for the chart
  sequence   sequence_statistics of packed sequences beside token_statistics

contestants (docs/benchmarks.md says more):
  fused              lit_did.token_statistics, the compiled operators
  fused in place     the same, with gradients written over the logits (inplace_backward=True): backward only
  compile            torch.compile of eager: the fastest torch version that we know
  eager              the nine statistics in plain torch
  trl                TRL's log-probabilities and the policy's entropy: less work; only if TRL is installed
  reference          lit_did's own specification, not tuned
  compile reference  torch.compile of it: slower than compile

The limit is the time to move the memory: on the CPU to read both inputs, on CUDA to copy them."""


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Parses the command line and runs."""
    options = _parse(arguments)
    if options.device.type == "cpu":
        torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    plan = _plan(options)
    title = report.machine(options.device)
    print(title, flush=True)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > BUSY * (os.cpu_count() or 1):
        plan.notes.append(f"The machine was busy at the start (load {busy:.1f}), so these figures are not reliable.")
    results: list[Result] = []
    try:
        for name in options.races:
            sizes = set()
            for result in RACES[name](plan):
                results.append(result)
                size = f"{name}: {result.rows} x {result.vocabulary} {result.dtype}"
                if size not in sizes and not options.quiet:
                    print(f"  {size} done after {time.perf_counter() - begin:.0f} s", flush=True)
                sizes.add(size)
    except KeyboardInterrupt:
        plan.notes.append("The run was interrupted, so the figures are incomplete.")
    report.show(results)
    report.show_verdicts(judge(results), title)
    report.write_csv(results, options.output / "benchmarks.csv")
    written = [options.output / "benchmarks.csv"]
    try:
        draw(results, plan.rows, plan.vocabularies[0], title, options.output / "benchmarks.png")
        written.append(options.output / "benchmarks.png")
    except ImportError as error:
        plan.notes.append(f"There is no chart, because matplotlib is missing: pip install 'lit-did[bench]' ({error}).")
    for note in plan.notes:
        print(f"Note: {note}")
    print(f"Written: {', '.join(map(str, written))}. This took {time.perf_counter() - begin:.0f} s.")
    return results


def _plan(options: argparse.Namespace) -> Plan:
    notes, read = [], None
    if options.device.type == "cpu":
        try:
            read = read_limit.load()
        except RuntimeError as error:
            notes.append(f"The read limit and the targets that need it are left out: {error}.")
    return Plan(
        device=options.device,
        rows=options.rows,
        vocabularies=options.vocabulary,
        dtypes=[getattr(torch, name) for name in options.dtype],
        contestants=options.made,
        repeats=options.repeats,
        seconds=options.seconds,
        read=read,
        notes=notes,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = Arguments(prog="python -m benchmarks", description=__doc__, epilog=RACES_HELP, formatter_class=Formatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    add("--races", nargs="+", choices=RACES, help="which races (default: all of the device)")
    add("--rows", type=int, help=f"tokens (default: {ROWS['cpu']}, on CUDA {ROWS['cuda']})")
    add(
        "--vocabulary",
        type=int,
        nargs="+",
        help=f"sizes (default: {VOCABULARIES['cpu']}, on CUDA {VOCABULARIES['cuda']})",
    )
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16", "float64"])
    add("--contestants", nargs="+", choices=contestants.MAKERS, help="in the table (default: all but the references)")
    add("--repeats", type=int, default=5, help="timed calls of each contestant")
    add(
        "--seconds",
        type=float,
        default=4,
        help="seconds of timed calls: slower contestants are called less often, at least once",
    )
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads; the targets are for 2")
    add("--output", type=Path, default=Path("bench_output"), help="folder for benchmarks.csv and benchmarks.png")
    add("--quiet", action="store_true", help="without a line when a size is done")
    options = parser.parse_args(arguments)
    device = options.device
    options.rows = ROWS[device] if options.rows is None else options.rows
    options.vocabulary = options.vocabulary or VOCABULARIES[device]
    options.races = options.races or [name for name in RACES if device == "cpu" or name not in ON_CPU_ONLY]
    options.contestants = options.contestants or contestants.default()
    for name in ("rows", "vocabulary", "repeats", "seconds", "threads"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name} must be above 0")
    if contestants.BASELINE not in options.contestants:
        parser.error(f"--contestants must hold {contestants.BASELINE}: the others are compared with it")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if device == "cuda" and set(options.races) & set(ON_CPU_ONLY):
        parser.error(f"--races {' '.join(ON_CPU_ONLY)}: only with --device cpu")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: not a folder")
    try:
        options.made = contestants.make(options.contestants)
    except RuntimeError as error:
        parser.error(str(error))
    options.device = torch.device(device)
    return options


if __name__ == "__main__":
    main()
