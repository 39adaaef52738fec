"""The command `lit-did`: the table of its commands, and the screen that shows them.

Each command is a function that takes its arguments and returns the exit status: 0 if all is done, 1 if `lit-did audit`
raised a flag of --fail_on, 2 if something has to be mended first, 130 after an interrupt.
"""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from lit_did import __version__
from lit_did.cli.errors import InputError, run_command
from lit_did.cli.quiet import quieten


class Command(NamedTuple):
    """A command of `lit-did`."""

    summary: str
    """in one line"""
    function: str
    """"module:function", loaded when the command runs"""


COMMANDS = {
    "Train": {
        "fit": Command("trains a policy:  lit-did fit -c recipe.yaml --model.beta 0.2", "lit_did.cli.training:fit"),
        "validate": Command("measures the validation pairs", "lit_did.cli.training:validate"),
        "test": Command("measures the test pairs", "lit_did.cli.training:test"),
        "predict": Command("measures every pair on its own", "lit_did.cli.training:predict"),
    },
    "Use": {
        "export": Command("writes a checkpoint's policy as a folder for transformers", "lit_did.cli.export:main"),
        "generate": Command("shows two models' completions side by side", "lit_did.cli.generate:main"),
    },
    "Measure": {
        "audit": Command("reports what pairs hold and what a policy learned from them", "lit_did.cli.audit:main"),
        "compare": Command(
            "reports what training changed: compare BASE TUNED --data PAIRS", "lit_did.cli.compare:main"
        ),
        "score": Command("writes a table of pairs: log-ratios, margin, token DID ...", "lit_did.cli.score:main"),
        "entropy": Command("estimates the DID entropy of completions of prompts", "lit_did.cli.entropy:main"),
        "experiment": Command(
            "tests a claim about the DID: lit-did experiment reward", "lit_did.experiments.__main__:main"
        ),
    },
    "More": {
        "plan": Command("works out the memory of a GPU: plan llama3-8b --gpus 8", "lit_did.cli.plan:main"),
        "demo": Command("trains SmolLM2 on 128 pairs and shows what it learned", "lit_did.demo.__main__:main"),
        "docs": Command("shows a page of the documentation: lit-did docs losses", "lit_did.cli.docs:main"),
        "doctor": Command("prints what is installed and which backend runs where", "lit_did.doctor:main"),
        "bench": Command("times the kernels beside torch (in a clone)", "lit_did.cli.bench:main"),
    },
}
"""the commands by name, in groups"""


def screen() -> str:
    """What `lit-did` shows without arguments."""
    lines = [f"lit-did {__version__}: preference optimisation, seen through the DID", "", "usage: lit-did COMMAND ..."]
    for group, commands in COMMANDS.items():
        lines += ["", group, *(f"  {name:11} {command.summary}" for name, command in commands.items())]
    lines += [
        "",
        "`lit-did COMMAND --help` shows a command's options. Models are folders, names of the Hugging Face hub, or",
        '"smollm2", a small model that comes as a Python package.',
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command's name and its arguments. None: those of this process.

    Returns:
        The exit status.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(screen())
        return 0
    if name == "--version":
        print(f"lit-did {__version__}")
        return 0
    return run_command(partial(_run, name, rest))


def _run(name: str, arguments: list[str]) -> int:
    commands = {name: command for group in COMMANDS.values() for name, command in group.items()}
    if name not in commands:
        near = get_close_matches(name, commands, n=1)
        hint = f" Did you mean {near[0]}?" if near else " `lit-did` shows all commands."
        raise InputError(f"Expected a command of lit-did, but got {name}.{hint}")
    quieten()
    module, _, function = commands[name].function.partition(":")
    return getattr(importlib.import_module(module), function)(arguments)
