"""`lit-did export`: `lit_did.exporting.export_policy` as a command."""

from __future__ import annotations

from lit_did.cli.functions import call
from lit_did.exporting import export_policy


def main(arguments: list[str]) -> int:
    """Writes a checkpoint's policy as a folder for transformers."""
    call(export_policy, "export", arguments)
    return 0
