"""`lit-did audit`: what preference data holds, what a reference says of it, and what a policy learned from it."""

from __future__ import annotations

import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lit_did.audit.report import FLAGS
from lit_did.audit.running import Audit, parts_of
from lit_did.audit.running import audit as run_audit
from lit_did.audit.wording import many
from lit_did.audit.writing import PAGE, check_folder, write_audit
from lit_did.cli.errors import InputError
from lit_did.cli.functions import call
from lit_did.cli.output import make_parent, short_name
from lit_did.scoring.models import Dtype

_OPTIONS = {"tokens": "--tokenizer", "reference": "--reference", "policy": "--policy", "sides": "--sides"}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    return call(audit, "audit", arguments, options_of=[run_audit], without=("progress",))


def audit(
    pairs: str,
    *,
    val: str | None = None,
    tokenizer: str | None = None,
    reference: str | None = None,
    policy: str | None = None,
    sides: bool = False,
    fail_on: list[str] | None = None,
    output: str | None = None,
    overwrite: bool = False,
    by: list[str] | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> int:
    """Reports what preference pairs hold, and with models, what a reference says of them and what a policy learned.

    It writes a folder with a page (audit.html), a table of all pairs (pairs.csv), all figures (audit.json), and for
    each flag that it raises the rows flagged and kept. The pairs alone need no model.

    Args:
        pairs: Preference pairs: a file, a folder, a pattern or a data set of the Hugging Face hub.
        val: Validation pairs, which training must not see.
        tokenizer: The name or path of the tokenizer, by default that of the policy or the reference.
        reference: The model that training starts from: a folder, a name of the hub, or smollm2.
        policy: The trained model. Without a reference, an adapter is compared with its base.
        sides: Whether to predict what training would learn, from four adapters that are fitted to the chosen and to the
            rejected completions.
        fail_on: Flags that make the exit status 1 if they are raised, or any for all.
        output: The folder, by default the name of the pairs with .audit.
        overwrite: Whether to replace an audit that is there.
        by: Columns of the pairs, besides tag, for whose values a policy gets figures of their own.
        dtype: The number format of the models' weights.
        device: The device, such as cuda:1. By default the GPU if there is one.
        quiet: Whether to show neither progress bars nor the verdict.
        **options: The other arguments of `lit_did.audit.audit`.
    """
    parts = parts_of(tokenizer=tokenizer, reference=reference, policy=policy, sides=sides)
    failing = _check_flags(fail_on or [], parts, val)
    folder = Path(output or f"{short_name(pairs)}.audit").expanduser()
    make_parent(folder)
    check_folder(folder, overwrite, "--output", (pairs, val))
    try:
        found = run_audit(
            pairs,
            val=val,
            tokenizer=tokenizer,
            reference=reference,
            policy=policy,
            sides=sides,
            by=by or (),
            dtype=None if dtype == "float32" else getattr(torch, dtype),
            device=device,
            progress=not quiet,
            **options,
        )
    except BaseException as stop:
        if (unfinished := getattr(stop, "audit", None)) is not None:
            beside = folder.with_name(f"{folder.name}.incomplete")
            write_audit(unfinished, beside, True, "--output")
            print(f"Written: {beside / PAGE}, with the parts {', '.join(unfinished.parts)}")
        raise
    files = write_audit(found, folder, overwrite, "--output")
    if not quiet:
        print(describe(found))
    names = dict.fromkeys(path.relative_to(folder).parts[0] for path in files)
    print(f"Written: {folder / PAGE}, {', '.join(name for name in names if name != PAGE)}")
    failed = [finding.name for finding in found.raised if finding.name in failing]
    if failed:
        print(f"Raised, as --fail_on names: {', '.join(failed)}")
    return 1 if failed else 0


def describe(found: Audit) -> str:
    """The verdict for a terminal."""
    refused = len(found.data.skipped)
    first = f"{many(len(found.data), 'pair')} of {many(found.data.num_rows, 'row')}"
    first += f", {refused:,} refused" if refused else ""
    first += f", {found.num_read:,} read by models" if found.num_read < len(found.data) else ""
    lines = [first]
    for finding in found.verdict:
        text = f"{finding.sentence} {finding.advice}".strip() + (f" [{finding.name}]" if finding.raised else "")
        lines += textwrap.wrap(text, 110, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    if found.more:
        names = ", ".join(finding.name for finding in found.more)
        lines.append(f"And {many(len(found.more), 'more flag')} in the page: {names}")
    return "\n".join(lines)


def _check_flags(names: list[str], parts: list[str], val: str | None) -> set[str]:
    """The flags of --fail_on, each of which this audit can raise."""
    for name in names:
        if name != "any" and name not in FLAGS:
            near = get_close_matches(name, FLAGS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The flags are {', '.join(FLAGS)}."
            raise InputError(f"Expected --fail_on to name flags or any, but got {name}. {hint}")
        part = FLAGS[name].part if name != "any" else "data"
        option = _OPTIONS[part] if part not in parts else "--val" if name == "leaked" and val is None else None
        if option:
            raise InputError(
                f"Expected {option} with --fail_on {name}, which cannot be raised without it, but got none."
            )
    return set(FLAGS) if "any" in names else set(names)
