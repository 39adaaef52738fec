"""`lit-did experiment NAME`: runs an experiment, prints its tables and writes CSV and PNG files."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lit_did.cli.errors import Arguments, run_command
from lit_did.cli.output import make_parent
from lit_did.experiments import EXPERIMENTS
from lit_did.experiments.reporting import Options, header, render, write


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
        arguments: The arguments after the program's name. None: those of this process.

    Returns:
        The options by name.
    """
    parser = Arguments(
        prog="lit-did experiment",
        description="Runs a controlled experiment, prints its tables and writes CSV files and a picture.",
        epilog="experiments:\n"
        + "\n".join(f"  {name:10} {experiment.question}" for name, experiment in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, metavar="NAME", help="the experiment, one of the list below")
    add("--quick", action="store_true", help="smaller: under a minute on two slow cores")
    add(
        "--output",
        type=Path,
        default=Path("experiment_output"),
        help="folder for the tables and the picture (default: %(default)s)",
    )
    usual = ", ".join(f"{experiment.seeds} for {name}" for name, experiment in EXPERIMENTS.items())
    add("--seeds", type=_whole_number(2, 1000), help=f"number of replicates (default: {usual}; with --quick 2)")
    add("--seed", type=_whole_number(0, 2**32 - 1), default=0, help="first replicate's seed (default: %(default)s)")
    add("--quiet", action="store_true", help="without progress bars")
    parsed = parser.parse_args(arguments)
    parsed.seeds = parsed.seeds or (2 if parsed.quick else EXPERIMENTS[parsed.name].seeds)
    return parsed


def _whole_number(least: int, most: int):
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, but got {text}")
        return value

    parse.__name__ = "int"  # argparse names it in "invalid int value"
    return parse


def main(arguments: list[str] | None = None) -> int:
    """Runs an experiment.

    Args:
        arguments: The arguments after the program's name. None: those of this process.

    Returns:
        The exit status: 0, 2 if the input cannot be used, 130 after an interrupt.
    """
    parsed = parse_arguments(arguments)
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        print(f"error: experiments need {' and '.join(missing)}: pip install 'lit-did[demo]'.", file=sys.stderr)
        return 2
    return run_command(partial(_run, parsed), stopped="Stopped; nothing was written.")


def _run(parsed: argparse.Namespace) -> int:
    options = Options(parsed.quick, parsed.seeds, parsed.seed, parsed.quiet)
    begun = time.perf_counter()
    make_parent(parsed.output)
    report = importlib.import_module(f"lit_did.experiments.{parsed.name}").run(options)
    text = render(report, header(parsed.name, options))
    written = write(report, text, parsed.name, parsed.output)
    print(text)
    print(f"\nWritten: {', '.join(map(str, written))}")
    print(f"{time.perf_counter() - begun:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
