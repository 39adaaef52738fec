"""audit: checks its arguments, loads data and models once, runs the parts in order, and collects what they found."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_did.arguments import check_bools, check_integer, check_range
from lit_did.audit.blocks import Paragraph
from lit_did.audit.plain import plain
from lit_did.audit.report import FLAGS, PARTS, Column, Finding, Part
from lit_did.audit.settings import NEEDED, TOKENIZATION, Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS
from lit_did.audit.wording import many
from lit_did.data.errors import in_words
from lit_did.data.formats import check_columns
from lit_did.data.reading import Columns
from lit_did.data.rendering import check_template_kwargs
from lit_did.data.templates import check_chat_template
from lit_did.data.tokenizing import Truncation, check_truncation
from lit_did.models.names import load_tokenizer
from lit_did.models.quiet import adapter_off
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.scoring.models import Model, check_adapter, check_models, device_of, load_models, load_placed, tokenizer_of

VERDICT = 5  # findings
_LEARNED, _NOT_FAULTS = 3, 2  # of them, about the policy; and of these, that are no faults
_PACKAGES = {"sklearn": "scikit-learn", "rensa": "rensa", "matplotlib": "matplotlib"}


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        data: The pairs.
        settings: How it was made.
        parts: What each part found, by name.
        inputs: The names of pairs, validation pairs, tokenizer, reference and policy.
        val_source: The validation pairs, as they were given.
        stopped: What stopped the audit before its end. "": nothing.
    """

    data: AuditData
    settings: Settings
    parts: dict[str, Part] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    val_source: Any = None
    stopped: str = ""

    @property
    def num_read(self) -> int:
        """How many pairs models read."""
        return min(len(self.data), self.settings.max_pairs or len(self.data))

    @property
    def findings(self) -> list[Finding]:
        """All findings: faults of rows, other faults, and what is no fault; of each kind the most severe first."""
        found = [finding for part in self.parts.values() for finding in part.findings]
        return sorted(found, key=lambda f: (not f.raised, f.raised and not FLAGS[f.name].of_rows, -f.severity))

    @property
    def raised(self) -> list[Finding]:
        """The faults, those of rows first."""
        return [finding for finding in self.findings if finding.raised]

    @property
    def verdict(self) -> list[Finding]:
        """At most five findings: faults of the data and of the policy, what limits the audit, and what is worth knowing
        of a policy, such as who made its margin. If there is no fault, one finding says so."""
        incomplete, few = self._incomplete(), self._too_few_prompts()
        of_policy = [finding for finding in self.raised if FLAGS[finding.name].part == "policy"]
        facts = [f for name in ("policy", "sides") if name in self.parts for f in self.parts[name].findings]
        facts = sorted((f for f in facts if f.name not in FLAGS), key=lambda f: -f.severity)[:_NOT_FAULTS]
        learned = [*of_policy, *facts][:_LEARNED]
        faults = [finding for finding in self.raised if FLAGS[finding.name].part != "policy"]
        if not self.raised:
            sentence = f"No flag was raised in {many(len(self.data), 'pair')}."
            faults = [Finding("no_flags", sentence, "", raised=False, severity=0.0)]
        room = VERDICT - len(incomplete) - len(few) - len(learned)
        return [*incomplete, *faults[:room], *few, *learned]

    @property
    def more(self) -> list[Finding]:
        """The faults that the verdict has no room for."""
        said = list(map(id, self.verdict))
        return [finding for finding in self.raised if id(finding) not in said]

    def _incomplete(self) -> list[Finding]:
        if not self.stopped:
            return []
        models = {name: self.inputs.get(name) for name in ("tokenizer", "reference", "policy")}
        missing = [name for name in parts_of(**models, sides=self.settings.sides) if name not in self.parts]
        what = f"without the part{'s' * (len(missing) > 1)} {in_words(missing)}" if missing else "without `mislabelled`"
        sentence = f"This audit is incomplete, {what}: {self.stopped} stopped it."
        return [Finding("incomplete", sentence, "Run it again for the whole.", raised=False, severity=1.0)]

    def _too_few_prompts(self) -> list[Finding]:
        count = int(self.data.prompt_groups.max()) + 1
        if count >= MIN_PROMPTS:
            return []
        sentence = (
            f"{many(count, 'prompt')} {'is' if count == 1 else 'are'} too few to tell what these pairs have in common, "
            "such as longer chosen sides, from chance."
        )
        advice = f"Audit pairs of at least {MIN_PROMPTS} prompts."
        return [Finding("too_few_prompts", sentence, advice, raised=False, severity=1.0)]

    def table(self) -> dict[str, list]:
        """A row a row of the source: index, where, tag, other columns of the source, the parts' columns, flags,
        and why a row was refused."""
        from lit_did.audit.table import pairs_table

        return pairs_table(self.data, self.parts, self.raised)

    def figures(self) -> dict[str, Any]:
        """Everything but the table, as plain values of JSON: settings, versions, findings, and the parts' figures."""
        packages = ("lit-did", "torch", "transformers", "numpy", "scipy", *_PACKAGES.values())
        return plain(
            {
                "inputs": self.inputs,
                "num_rows": self.data.num_rows,
                "num_refused": len(self.data.skipped),
                "num_pairs": len(self.data),
                "settings": self.settings,
                "versions": {**{name: version(name) for name in packages}, "python": platform.python_version()},
                "verdict": [f"{finding.sentence} {finding.advice}".strip() for finding in self.verdict],
                "stopped": self.stopped or None,
                "flags": [finding.name for finding in self.raised],
                "findings": self.findings,
                "parts": {name: part.figures for name, part in self.parts.items()},
            }
        )

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> list[Path]:
        """Writes audit.html, pairs.csv, audit.json and the rows of each flag. `lit-did docs audit` describes the files.

        Args:
            folder: The folder, which appears whole or not at all.
            overwrite: Whether to replace an audit that is there.

        Returns:
            The files.

        Raises:
            FileExistsError: There is something else, or an audit and not `overwrite`.
        """
        from lit_did.audit.writing import write_audit

        return write_audit(self, Path(folder).expanduser(), overwrite, "`folder`")


def audit(
    pairs: Any,
    *,
    val: Any = None,
    tokenizer: Any = None,
    reference: Model | None = None,
    policy: Model | None = None,
    sides: bool = False,
    by: Sequence[str] = (),
    beta: float = 0.1,
    columns: Columns | None = None,
    max_pairs: int | None = None,
    max_length: int = 1024,
    truncation: Truncation = "completion",
    min_completion_tokens: int | None = None,
    as_chat: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool = False,
    batch_size: int = 8,
    num_prompts: int = 8,
    max_new_tokens: int = 32,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Audit:
    """Audits preference pairs: what they hold, what a reference says of them, and what a policy learned from them.

    How much is measured depends on what is given. The pairs alone need no model. A tokenizer shows what `max_length`
    cuts and what is scored. A reference, a policy and `sides` add a part each. `lit-did docs audit` describes them.

    Args:
        pairs: Files, folders, patterns, a name of the Hugging Face hub, a table or a list of dicts; see
            `lit-did docs data`.
        val: Validation pairs, which training must not see.
        tokenizer: A transformers tokenizer, or its name or path. None: that of the policy or the reference.
        reference: The model that training starts from: a causal language model of transformers, or its name or path.
            None: a policy that is a `PeftModel` is compared with its base model.
        policy: The trained model, as `reference`.
        sides: Whether to predict what training would learn, from four adapters that are fitted to the chosen and to the
            rejected completions. It needs a reference.
        by: Columns of the source, besides `tag`, for whose values a policy gets figures of their own.
        beta: DPO's inverse temperature.
        columns: Names of the source's columns by field, such as {"prompt": "question"}.
        max_pairs: The most pairs that models read, drawn at random. The data alone is examined in all pairs. None: all.
        max_length: The most tokens of a prompt and its completion together.
        truncation: What loses tokens in longer pairs: "completion", "prompt" or "drop".
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some.
        as_chat: Whether to wrap plain text as messages of user and assistant.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the chat template.
        parse_special_tokens: Whether to read control tokens that the text spells as control tokens.
        batch_size: Pairs a forward pass.
        num_prompts: How many prompts are completed by the models.
        max_new_tokens: Where these completions are cut.
        seed: Of all draws.
        dtype: Of models that are given by name. None: float32.
        device: Of models that are given by name. None: the GPU if there is one, else the CPU.
        progress: Whether a terminal shows progress bars.

    Raises:
        TypeError, ValueError: An argument is out of range or has no effect without another, the data is malformed, or
            the models do not fit together.
        FileNotFoundError: There is no such file or model.
        ModuleNotFoundError: A package of the extra `audit` is not installed.

    An error or an interrupt that comes after the reference has read the pairs has the attribute `audit`: the `Audit`
    with the parts until then.
    """
    given = dict(locals())
    _check(given)
    placed = device_of(device)
    check_models(policy, reference)
    _check_packages(sides)
    read: dict[str, Any] = {"columns": columns, "warn": warnings.warn}
    data = AuditData(pairs, "pairs", **read)
    held_out = None if val is None else AuditData(val, "val", **read)
    settings = Settings(
        columns=columns,
        sides=sides,
        by=_check_by(by, data),
        beta=beta,
        tokenization={name: given[name] for name in TOKENIZATION},
        batch_size=batch_size,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        max_pairs=max_pairs,
        seed=seed,
        dtype=dtype,
        device=placed if _names_a_model(given) else None,
        progress=progress and sys.stderr.isatty(),
    )
    inputs = {name: given[name] for name in ("pairs", "val", "tokenizer", "reference", "policy")}
    names = {name: _name(value) for name, value in inputs.items() if value is not None}
    found = Audit(data, settings, inputs=names, val_source=val)
    model, owner = (reference, "reference") if policy is None else (policy, "policy")
    named = "tokenizer"
    if tokenizer is None and model is not None:
        tokenizer, named = tokenizer_of(model), owner
        found.inputs["tokenizer"] = tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer, named)
    placing: dict[str, Any] = {"dtype": dtype, "device": placed}
    if policy is not None:
        policy, reference = load_models(policy, reference, **placing)
        if reference is None:
            check_adapter(is_peft(unwrapped(policy)))
        else:
            from lit_did.models.loading import check_separate

            check_separate(unwrapped(policy), unwrapped(reference))
    elif reference is not None:
        reference = load_placed(reference, "reference", **placing)
    if sides and reference is not None and is_peft(unwrapped(reference)):
        raise ValueError(
            "Expected `reference` to be a model without an adapter for `sides`, but got a PeftModel. Merge its adapter "
            "first (`merge_and_unload`)."
        )
    try:
        _run(found, held_out, tokenizer, reference, policy)
    except BaseException as stop:
        if "reference" in found.parts:  # what came before takes little time
            # Lightning turns an interrupt into SystemExit.
            found.stopped = f"{type(stop).__name__}: {stop}" if isinstance(stop, Exception) else "an interrupt"
            stop.audit = found  # type: ignore[attr-defined]
        raise
    return found


def _run(
    found: Audit,
    val: AuditData | None,
    tokenizer: Any,
    reference: nn.Module | None,
    policy: nn.Module | None,
) -> None:
    """Runs the parts. Each is imported when it runs."""
    data, settings = found.data, found.settings
    found.parts["data"] = _function("data", "examine_data")(data, settings, val=val)
    if tokenizer is not None:
        found.parts["tokens"] = _function("tokens", "examine_tokens")(data, settings, tokenizer)
    if found.num_read == len(data):
        _run_models(found.parts, data, settings, tokenizer, reference, policy)
        return
    places = np.sort(np.random.default_rng(settings.seed).choice(len(data), found.num_read, replace=False))
    read = {
        name: replace(part, columns={column: _taken(values, places) for column, values in part.columns.items()})
        for name, part in found.parts.items()
    }
    try:
        _run_models(read, data.select(places), settings, tokenizer, reference, policy)
    finally:  # what was found before an error stays
        for name in PARTS:
            if name in read and name not in found.parts:
                part = found.parts[name] = read[name]
                part.columns = {column: _spread(values, places, len(data)) for column, values in part.columns.items()}
                sentence = f"Models read {found.num_read:,} of the {len(data):,} pairs, drawn at random (`max_pairs`)."
                part.blocks.insert(0, Paragraph(sentence))


def _taken(values: Column, places: np.ndarray) -> Column:
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places.tolist()]


def _spread(values: Column, places: np.ndarray, count: int) -> list[Any]:
    """The values of some pairs as those of all, of which the others have None."""
    result: list[Any] = [None] * count
    for place, value in zip(places.tolist(), values, strict=True):
        result[place] = value
    return result


def _run_models(
    parts: dict[str, Part],
    data: AuditData,
    settings: Settings,
    tokenizer: Any,
    reference: nn.Module | None,
    policy: nn.Module | None,
) -> None:
    """Runs the parts that need a model, and adds them to `parts`."""
    shared = (data, settings)
    if reference is not None or policy is not None:
        # The base of an adapter is the policy without its adapter.
        with nullcontext() if reference is not None or policy is None else adapter_off(policy):
            base = policy if reference is None else reference
            parts["reference"] = _function("reference", "examine_reference")(*shared, tokenizer, base)
    if policy is not None:
        examine = _function("policy", "examine_policy")
        parts["policy"] = examine(*shared, tokenizer, reference, policy, parts)
    if settings.sides:
        parts["sides"] = _function("sides", "examine_sides")(*shared, tokenizer, reference, policy, parts)
    if "reference" in parts:
        columns, finding, blocks = _function("mislabelled", "examine_labels")(*shared, parts)
        parts["reference"].columns |= columns
        parts["reference"].findings.append(finding)
        parts["reference"].blocks.extend(blocks)


def _function(module: str, name: str) -> Any:
    return getattr(import_module(f"lit_did.audit.{module}"), name)


def parts_of(*, tokenizer: Any, reference: Any, policy: Any, sides: bool) -> list[str]:
    """The parts that an audit with these arguments has."""
    model = reference is not None or policy is not None
    runs = {
        "data": True,
        "tokens": model or tokenizer is not None,
        "reference": model,
        "policy": policy is not None,
        "sides": sides,
    }
    return [name for name, is_run in runs.items() if is_run]


def _check(given: Mapping[str, Any]) -> None:
    """Checks all arguments that can be checked before anything is read."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(audit).parameters.items()}
    check_bools(**{name: given[name] for name in ("sides", "as_chat", "parse_special_tokens", "progress")})
    check_range("beta", given["beta"], "(0, inf)")
    check_columns(given["columns"])
    check_truncation(given["max_length"], given["truncation"], given["min_completion_tokens"])
    check_chat_template(given["chat_template"])
    check_template_kwargs(given["chat_template_kwargs"])
    for name, least in (("batch_size", 1), ("num_prompts", 1), ("max_new_tokens", 1), ("seed", 0), ("max_pairs", 1)):
        if given[name] is not None or name != "max_pairs":
            check_integer(name, given[name], least)
    by, dtype, tokenizer = given["by"], given["dtype"], given["tokenizer"]
    if isinstance(by, str) or not isinstance(by, Sequence) or not all(isinstance(name, str) for name in by):
        raise TypeError(f"Expected `by` to be a list of names of columns, but got {by!r}.")
    given = {**given, "by": tuple(by)}
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"Expected `dtype` to be a floating-point dtype of torch or None, but got {dtype!r}.")
    if not (tokenizer is None or isinstance(tokenizer, str | os.PathLike) or hasattr(tokenizer, "decode")):
        raise TypeError(
            f"Expected `tokenizer` to be a tokenizer of transformers or its name, but got {type(tokenizer).__name__}."
        )
    for name in ("reference", "policy"):
        if not isinstance(given[name], str | os.PathLike | nn.Module | None):
            raise TypeError(f"Expected `{name}` to be a model or its name, but got {type(given[name]).__name__}.")
    if given["sides"] and given["reference"] is None and given["policy"] is None:
        raise ValueError("Expected `reference` with `sides`, whose adapters are fitted on top of it, but got None.")
    for name, others in NEEDED.items():
        if given[name] != defaults[name] and not any(given[other] not in (None, False) for other in others):
            raise ValueError(
                f"Expected {' or '.join(f'`{other}`' for other in others)} with `{name}`, which has no effect without "
                "it, but got none."
            )
    for name in ("dtype", "device"):
        if given[name] is not None and not _names_a_model(given):
            loaded = given["policy"] if given["policy"] is not None else given["reference"]
            raise ValueError(
                f"Expected `reference` or `policy` to be a name or path with `{name}`, which has no effect on a model "
                f"in memory, but got {type(loaded).__name__}."
            )


def _names_a_model(given: Mapping[str, Any]) -> bool:
    return any(isinstance(given[name], str | os.PathLike) for name in ("reference", "policy"))


def _check_packages(sides: bool) -> None:
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"An audit needs {' and '.join(missing)}. Run pip install 'lit-did[audit]'.")
    if sides and importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("`sides` needs the package peft. Run pip install 'lit-did[lora]'.")


def _check_by(by: Sequence[str], data: AuditData) -> tuple[str, ...]:
    names = {name for row in data.columns.values() for name in row} if by else set()
    for name in by:
        if name not in names:
            raise ValueError(
                f"Expected `by` to name columns of {data.name} that are no part of the pairs, but no row has {name!r}. "
                f"It has {in_words(sorted(names)) if names else 'none'}."
            )
    return tuple(by)


def _name(value: Any) -> str:
    """What the report calls an input."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and value and all(isinstance(part, str | os.PathLike) for part in value):
        return ", ".join(map(os.fspath, value))
    return getattr(value, "name_or_path", "") or f"a {type(value).__name__}"
