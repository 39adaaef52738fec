"""A whole DPO step: TRL's DPOTrainer beside LitDPO on the same tokens, each run in its own process.

python -m benchmarks.step [--pairs FILE] [--steps 8] [--rounds 1] [--lora] [--dtype bfloat16] [--contestants NAME ...]
python -m benchmarks.step --profile [--before FILE]

The default is SmolLM2-135M-Instruct with full fine-tuning in float32. All contestants must see the same tokens in every
step, and their losses must agree to 1e-3 relative. The first step of a run is not timed. `--profile` shows where the
time of LitDPO's steps goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import parts, report, trainers
from benchmarks.harness import in_own_process
from benchmarks.targets import Verdict
from benchmarks.trainers import Run, Task
from lit_did.cli.errors import Arguments

TRL, OURS, CACHED = "trl", "lit_did", "lit_did, cached reference"
RECOMPUTED = "lit_did, elementwise recomputed"
CONTESTANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    TRL: (trainers.trl, {}),
    "trl, its default checkpointing": (trainers.trl, {"checkpointing": True}),
    "trl, precomputed reference": (trainers.trl, {"precompute": True}),
    OURS: (trainers.lit_did, {}),
    CACHED: (trainers.lit_did, {"cached": True}),
    "lit_did, prompts not shared": (trainers.lit_did, {"share_prompts": False}),
    "lit_did, padded": (trainers.lit_did, {"padding_free": False, "share_prompts": False}),
    "lit_did, parts of 512 tokens": (trainers.lit_did, {"micro_batch_tokens": 512}),
    RECOMPUTED: (trainers.lit_did, {"recompute_elementwise": True}),
    "lit_did, checkpointing": (trainers.lit_did, {"gradient_checkpointing": True}),
}
DEFAULT = [name for name in CONTESTANTS if name.startswith(TRL) or name in (OURS, CACHED)]
LOSS_TOLERANCE = 1e-3


def train(name: str, task: Task) -> Run:
    """A contestant's run."""
    function, options = CONTESTANTS[name]
    return function(task, **options)


def measure(names: Sequence[str], task: Task, *, rounds: int, threads: int) -> dict[str, list[Run]]:
    """Runs in turns, each in its own process.

    Raises:
        RuntimeError: A run saw different tokens than the first.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            run = in_own_process(threads, train, name, task)
            first = runs[names[0]][0] if runs[names[0]] else run
            if run.tokens != first.tokens:
                raise RuntimeError(f"{name} is wrong: it trained on different tokens than {names[0]}.")
            runs[name].append(run)
            print(f"  {name}: {_seconds([run]):.2f} s a step", flush=True)
    return runs


def _seconds(runs: Sequence[Run], kind: str = "seconds") -> float:
    """The mean over all steps except every run's first. Steps differ in their tokens, and all count."""
    return statistics.fmean(value for run in runs for value in getattr(run, kind)[1:])


def _peak(runs: Sequence[Run]) -> float:
    return statistics.median(run.peak_mib for run in runs)


def _loss_difference(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """The largest of any step, relative."""
    return max(abs(a - b) / abs(b) for x in runs for y in others for a, b in zip(x.losses, y.losses, strict=True))


def judge(runs: Mapping[str, Sequence[Run]], task: Task) -> list[Verdict]:
    """The targets: full fine-tuning in float32, two threads. LoRA and bfloat16 are reported beside them."""
    theirs = runs.get(TRL)
    verdicts = []
    if theirs:
        at = (task.dtype, None)
        for name, speed in ((OURS, 2.2), (CACHED, 3.0)):
            if name in runs:
                ratio = _seconds(theirs) / _seconds(runs[name])
                verdicts.append(Verdict(f"{name}: steps a second over TRL's", *at, ratio, speed, " x"))
        for name, most in ((OURS, 0.6), (RECOMPUTED, 0.5)):
            if name in runs:
                share = _peak(runs[name]) / _peak(theirs)
                verdicts.append(Verdict(f"{name}: peak memory over TRL's", *at, share, most, " x", at_most=True))
        for name in runs:
            if name.startswith(OURS):
                # In thousandths, since figures are shown with two digits.
                error = _loss_difference(runs[name], theirs) / LOSS_TOLERANCE
                text = f"{name}: largest difference of a step's loss"
                verdicts.append(Verdict(text, *at, error, 1, " / 1000", at_most=True))
    return verdicts


def show(runs: Mapping[str, Sequence[Run]], title: str) -> None:
    """Prints one line for each contestant."""
    table = Table(title=title, title_justify="left")
    table.add_column("contestant", no_wrap=True)
    headings = ("s a step", "CPU s", "steps/s over TRL", "peak MiB", "over TRL", "loss differs", "set-up s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    theirs = runs.get(TRL)
    for name, mine in runs.items():
        table.add_row(
            name,
            f"{_seconds(mine):.2f}",
            f"{_seconds(mine, 'cpu_seconds'):.2f}",
            f"{_seconds(theirs) / _seconds(mine):.2f} x" if theirs else "",
            f"{_peak(mine):.0f}",
            f"{_peak(mine) / _peak(theirs):.2f} x" if theirs else "",
            f"{_loss_difference(mine, theirs):.1e}" if theirs else "",
            f"{mine[0].setup_seconds:.1f}",
        )
    Console(width=report.WIDTH).print(table)
    run = next(iter(runs.values()))[0]
    for what, tokens in (
        ("completion", run.completion_tokens),
        ("prompt and completion", run.real_tokens),
        ("with padding", run.padded_tokens),
    ):
        print(f"Tokens a step, {what}: {', '.join(map(str, tokens))}.")
    print(
        "`s a step`: mean from the end of one step to the end of the next, without the first step. `CPU s`: of all\n"
        "threads. `peak`: most resident memory of the process after set-up. `loss differs`: largest relative\n"
        "difference from TRL's. `set-up s`: of the first run, with what it computes about the reference before."
    )


def show_parts(profiles: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Prints one column for each profile."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in profiles:
        table.add_column(name, justify="right")
    totals = {name: sum(profile.values()) for name, profile in profiles.items()}
    for part in parts.PARTS:
        cells = (f"{profile[part]:.2f} s, {profile[part] / totals[name]:4.0%}" for name, profile in profiles.items())
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("a step, mean", *(f"{total:.2f} s      " for total in totals.values()))
    Console(width=report.WIDTH).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses the command line and runs; returns what it writes as JSON."""
    from lit_did.demo import smollm2
    from tools import preference_data

    parser = Arguments(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a causal language model: name or path (default: SmolLM2-135M-Instruct)")
    add("--pairs", type=Path, help="JSON Lines (default: the AlpacaEval pairs, see tools/preference_data.py)")
    add("--steps", type=int, default=8, help="steps of a run, of which the first is not timed (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="pairs a step (default: %(default)s)")
    add("--max-length", type=int, default=256, help="most tokens of a prompt and completion (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-5, help="(default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast, float32 weights")
    add("--lora", action="store_true", help="rank 16 on all linear layers, instead of full fine-tuning")
    add(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        metavar="NAME",
        help=f"of {', '.join(map(repr, CONTESTANTS))}, in quotes; default: TRL's, and lit_did with and without a cache",
    )
    add("--rounds", type=int, default=1, help="runs of every contestant (default: %(default)s)")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="the targets are for 2")
    add("--profile", action="store_true", help="where the time of LitDPO's steps goes, instead of comparing")
    add("--before", type=Path, help="step_parts.json of an earlier commit, to show beside with --profile")
    add("--output", type=Path, default=Path("bench_output"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be at least 2, --rounds at least 1")
    if options.before and not options.profile:
        parser.error("--before needs --profile")
    names = options.contestants or [n for n in DEFAULT if n.startswith(OURS) or not options.profile]
    if options.profile and not all(name.startswith(OURS) for name in names):
        parser.error(f"--profile: of {', '.join(n for n in CONTESTANTS if n.startswith(OURS))} only")
    try:
        pairs = options.pairs or preference_data.find(preference_data.ALPACA_EVAL)
    except FileNotFoundError as error:
        parser.error(f"{error} Or pass other pairs: --pairs lit_did/demo/pairs.jsonl")
    if not pairs.is_file():
        parser.error(f"--pairs must be a file, but {pairs} is none")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            model=str(options.model or smollm2()),
            pairs=str(pairs),
            steps=options.steps,
            batch_size=options.batch_size,
            max_length=options.max_length,
            learning_rate=options.learning_rate,
            dtype=options.dtype,
            lora=options.lora,
            folder=folder,
        )
        machine = report.machine(torch.device("cpu"))
        title = (
            f"{Path(task.model).name}, {'LoRA' if task.lora else 'full fine-tuning'}, {task.dtype}, "
            f"{task.batch_size} pairs a step of {pairs.name}, at most {task.max_length} tokens"
        )
        print(f"{machine}\n{title}", flush=True)
        written = {"machine": machine, "versions": _versions(), "task": dataclasses.asdict(task)}
        if options.profile:
            profiles = {
                name: in_own_process(options.threads, parts.profile, task, CONTESTANTS[name][1]) for name in names
            }
            written["parts"] = dict(profiles)
            if options.before:
                before = json.loads(options.before.read_text())["parts"]
                profiles = {f"before: {name}": profile for name, profile in before.items()} | profiles
            show_parts(profiles, title)
            _write(written, options.output / "step_parts.json")
            try:
                parts.draw(profiles, title, options.output / "step_parts.png")
            except ImportError as error:
                print(f"Note: No picture, because matplotlib is missing: pip install 'lit-did[bench]' ({error}).")
        else:
            runs = measure(names, task, rounds=options.rounds, threads=options.threads)
            show(runs, title)
            report.show_verdicts(judge(runs, task), machine)
            written["runs"] = {name: [dataclasses.asdict(run) for run in mine] for name, mine in runs.items()}
            _write(written, options.output / "step.json")
    return written


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("lit-did", "torch", "transformers", "lightning", "trl", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(content: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
