"""The help of `lit-did fit`, `validate`, `test` and `predict`: one screen, and the rest by section."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import docstring_parser
import lightning
from lightning.pytorch.cli import LightningArgumentParser

from lit_did.data import PreferenceDataModule
from lit_did.modules import LitDPO

SECTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "model": (
        LitDPO,
        ("policy", "reference", "beta", "loss", "lora", "learning_rate", "warmup_steps", "schedule", "weight_decay"),
    ),
    "data": (
        PreferenceDataModule,
        ("train", "val", "val_fraction", "tokenizer", "batch_size", "max_length", "as_chat"),
    ),
    "trainer": (
        lightning.Trainer,
        ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "devices"),
    ),
}
"""by key, the class whose arguments they are, and those that are used most"""

OTHER_DEFAULTS = {"max_epochs": "Epochs to train: 1, unless max_steps or max_time is given."}
"""of options whose default on the command line is not the class's"""
COLUMN, WIDTH = 35, 72  # of the options' names and of their descriptions

HEAD = """usage: lit-did {command} -c recipe.yaml [--model.beta 0.2] [--data.train pairs.jsonl] ...

{what} A recipe is a YAML file with the keys model, data and trainer.
An option replaces what the recipe says. A recipe with all defaults:
`lit-did {command} --print_config > recipe.yaml`"""

WHAT = {
    "fit": "Trains a policy.",
    "validate": "Measures the validation pairs.",
    "test": "Measures the test pairs.",
    "predict": "Measures every pair.",
}

FOOT = """
run
  --output FOLDER                    Where config.yaml, metrics.csv and checkpoints go (runs/RECIPE/version_N)
  --ckpt_path PATH                   A checkpoint to begin with; "last" and "best" are those of the run
  --save_every N                     Optimiser steps from one checkpoint to the next (100)
  --seed N                           Of all random numbers; --data.seed is that of the data's order (0)
  --optimizer, --lr_scheduler CLASS  Instead of AdamW and its schedule; then --optimizer.lr and so on
  --quiet                            No progress bar and no messages

all options: --model.help, --data.help, --trainer.help; --model.help LitDPOPG for another class"""


def print_help(command: str, arguments: list[str]) -> bool:
    """Prints the help that the arguments ask for, and says whether they do."""
    if {"-h", "--help"} & set(arguments):
        print(_short(command))
        return True
    for name, (kind, _) in SECTIONS.items():
        if arguments == [f"--{name}.help"]:
            parser = LightningArgumentParser(prog=f"lit-did {command}", usage=f"lit-did {command} ...", description="")
            parser.add_lightning_class_args(kind, name)
            parser.print_help()
            return True
    return False


def _short(command: str) -> str:
    lines = [HEAD.format(command=command, what=WHAT[command])]
    for name, (kind, options) in SECTIONS.items():
        parameters = inspect.signature(kind.__init__).parameters
        helps = _helps(kind) | OTHER_DEFAULTS
        lines += ["", name]
        for option in options:
            default = parameters[option].default
            shown = "" if default in (None, inspect.Parameter.empty) else f" ({default})"
            text = shorten(helps[option], WIDTH - len(shown), placeholder=" ...")
            lines.append(f"  {f'--{name}.{option}':{COLUMN}}{text}{shown}")
    return "\n".join([*lines, FOOT])


def _helps(kind: Callable) -> dict[str, str]:
    """The descriptions of a class's arguments."""
    texts = [inspect.getdoc(kind), inspect.getdoc(kind.__init__)]  # type: ignore[misc]
    return {p.arg_name: p.description or "" for text in texts for p in docstring_parser.parse(text or "").params}
