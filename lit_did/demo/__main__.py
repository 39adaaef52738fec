"""`lit-did demo`: trains a LoRA policy with DPO, logs its DID, and shows what changed on held-out pairs.

Without arguments: SmolLM2-135M-Instruct on the pairs shipped with this package, some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from lit_did.cli.errors import Arguments, run_command
from lit_did.cli.quiet import quieten
from lit_did.demo import PAIRS

Number = TypeVar("Number", int, float)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading anything."""
    parser = Arguments(
        prog="lit-did demo",
        description="Trains a LoRA policy with DPO, logs its DID, and compares held-out pairs before and after.",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="a causal language model of transformers: a folder, a hub name, or smollm2")
    add("--data", type=Path, default=PAIRS, help="preference pairs: .jsonl, .jsonl.gz or .parquet; `tag` is optional")
    add("--output", type=Path, default=Path("demo_output"), help="folder for metrics.csv and the pictures")
    add("--save", type=Path, help="new or empty folder for the policy: its LoRA adapter and its tokenizer")
    add("--max-steps", type=_positive(int), default=32, help="optimiser steps")
    add("--batch-size", type=_positive(int), default=4, help="pairs a micro-batch")
    add("--accumulate", type=_positive(int), default=1, help="micro-batches an optimiser step")
    add("--quiet", action="store_true", help="without progress bars")
    add("--max-pairs", type=_positive(int), help="use only the first pairs of the data (default: all)")
    add("--max-length", type=_positive(int), default=256, help="most tokens of a prompt and its completion together")
    add("--val-fraction", type=_share, default=0.2, help="share of the pairs to hold out: the last ones")
    add(
        "--val-every",
        type=_positive(int),
        help="optimiser steps from one measurement of the held-out pairs to the next (default: a quarter of all)",
    )
    add("--learning-rate", type=_positive(float), default=2e-4, help="AdamW's, after 10%% warmup, then linear decay")
    add("--beta", type=_positive(float), default=0.1, help="DPO's inverse temperature")
    add("--loss", choices=("sigmoid", "ipo", "hinge"), default="sigmoid", help="preference loss")
    add("--lora-rank", type=_positive(int), default=16, help="rank of the LoRA adapter, on all linear layers")
    add("--seed", type=_seed, default=0, help="of the adapter's initialisation and the training order")
    return parser.parse_args(arguments)


def _positive(kind: type[Number]) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, but got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, but got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, but got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; the exit status is 2 if the input cannot be used or training diverges."""
    options = parse_arguments(arguments)
    missing = [name for name in ("matplotlib", "peft", "rich") if find_spec(name) is None]
    if missing:
        print(f"error: the demo needs {', '.join(missing)}: pip install 'lit-did[demo]'.", file=sys.stderr)
        return 2
    quieten()
    from lit_did.demo import run

    return run_command(partial(run.run, options), stopped="Stopped; nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
