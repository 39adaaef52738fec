"""`lit-did compare`: an audit of a tuned model beside the model that it was tuned from."""

from __future__ import annotations

from typing import Any

from lit_did.audit.running import audit as run_audit
from lit_did.cli.audit import audit
from lit_did.cli.functions import call
from lit_did.cli.output import short_name


def main(arguments: list[str]) -> int:
    """Runs the command."""
    without = ("pairs", "reference", "policy", "progress")
    return call(compare, "compare", arguments, options_of=[audit, run_audit], without=without)


def compare(base: str, tuned: str, *, data: str, output: str | None = None, **options: Any) -> int:
    """Compares a model before and after training on preference pairs: `lit-did audit` with both models.

    Args:
        base: The model before training: a folder, a name of the Hugging Face hub, or smollm2.
        tuned: The model after training.
        data: Preference pairs: a file, a folder, a pattern or a data set of the Hugging Face hub.
        output: The folder, by default the name of the pairs with .compare.
        **options: The other options of `lit-did audit`.
    """
    output = output or f"{short_name(data)}.compare"
    return audit(data, reference=base, policy=tuned, output=output, **options)
