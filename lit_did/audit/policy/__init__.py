"""examine_policy: what a policy learned from preference pairs, in comparison with its reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from lit_did.audit.blocks import Block, Paragraph, Picture, Table
from lit_did.audit.page import pictures
from lit_did.audit.policy.breakdown import (
    breakdown_blocks,
    by_value,
    column_values,
    figures_of,
    figures_table,
)
from lit_did.audit.policy.calibration import calibration_findings, reliability
from lit_did.audit.policy.completions import did_entropy_of_completions, greedy_samples
from lit_did.audit.policy.displacement import REASON, displacement_findings
from lit_did.audit.policy.heat import heat_maps
from lit_did.audit.policy.information import CLAIM, information_findings, num_not_finite, token_means
from lit_did.audit.policy.length import length_findings
from lit_did.audit.policy.margins import accuracy_table, margin_findings
from lit_did.audit.policy.scored import Scored, scored_from
from lit_did.audit.prompts import nothing_to_complete, places_to_complete
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS
from lit_did.audit.tokenized import tokenized
from lit_did.audit.wording import many
from lit_did.models import PolicyAndReference
from lit_did.scoring.scorer import score_dataset

INTRODUCTION = (
    "What the policy's reward, its log-ratio to the reference, says of the pairs. If the policy was trained on these "
    "pairs, its accuracy is in-sample: it also says how well the policy remembers them."
)


def examine_policy(
    data: AuditData,
    settings: Settings,
    tokenizer: Any,
    reference: nn.Module | None,
    policy: nn.Module,
    parts: Mapping[str, Part],
) -> Part:
    """What a policy learned from the pairs.

    Args:
        data: The pairs.
        settings: How they are tokenised and scored, and how many prompts are completed.
        tokenizer: A transformers tokenizer.
        reference: The reference. None: `policy` is a PeftModel, and its reference is itself without its adapter.
        policy: The policy.
        parts: The parts that ran before: baselines and lengths in words come from "data".

    Raises:
        ValueError: No pair has tokens in both completions.
    """
    dataset = tokenized(data.rows, settings, tokenizer)
    models = PolicyAndReference(policy, reference, freeze=False)
    batches = score_dataset(
        models, dataset, batch_size=settings.batch_size, beta=settings.beta, progress=settings.progress
    )
    table = [row for batch in batches for row in batch]
    places = {int(row): place for place, row in enumerate(data.row_numbers)}
    at = np.array([places[row["index"]] for row in table])
    columns = _columns(table, at, len(data), parts)
    of_data = parts["data"].columns if "data" in parts else {}
    lengths = (
        {side: np.asarray(of_data[f"{side}_words"], dtype=float)[at] for side in ("chosen", "rejected")}
        if "chosen_words" in of_data
        else None
    )
    groups = data.prompt_groups[at]
    everything = scored_from(table, groups, lengths, settings.beta)
    finite = np.isfinite(everything.margin)
    scored = everything.select(finite)
    part = Part("policy", "What the policy learned", INTRODUCTION, columns=columns)
    part.figures |= {"num_pairs": len(table), "num_prompts": scored.num_prompts, "beta": settings.beta}
    part.figures["num_not_finite"] = int((~finite).sum())
    part.findings += _not_finite(everything, finite, data)
    words = of_data.get("words_probability")
    _add_figures(
        part,
        scored,
        data,
        settings,
        parts["data"].figures.get("baselines", {}) if "data" in parts else {},
        None if words is None else np.asarray(words, dtype=float)[at][finite],
    )
    examples = {example.index: example for example in dataset}
    part.blocks += heat_maps(scored, places, examples, data, tokenizer, policy, reference)
    chosen = places_to_complete(dataset, groups, settings, [m for m in (policy, reference) if m is not None])
    prompts = [dataset[i].prompt_ids.tolist() for i in chosen]
    if not chosen:
        part.blocks.append(nothing_to_complete(settings))
        return part
    figures, findings, blocks = did_entropy_of_completions(prompts, policy, reference, settings)
    part.figures |= figures
    part.findings += findings
    part.blocks += blocks
    rows = [dataset[i].index for i in chosen]
    part.blocks.append(
        greedy_samples([places[row] for row in rows], rows, prompts, data, tokenizer, policy, reference, settings)
    )
    return part


def _add_figures(
    part: Part,
    scored: Scored,
    data: AuditData,
    settings: Settings,
    baselines: Mapping[str, Estimate],
    words_probability: np.ndarray | None,
) -> None:
    """Adds what the statistics say: figures, findings, tables and pictures."""
    figures = figures_of(scored)
    part.figures |= figures
    if scored.num_prompts < MIN_PROMPTS:
        part.findings.append(
            Finding(
                "too_little",
                f"Finite margins come from {many(scored.num_prompts, 'prompt')}: too little data to say what the "
                "policy learned.",
                f"Audit pairs of at least {MIN_PROMPTS} prompts.",
                raised=False,
                severity=1.0,
            )
        )
        return
    curve = reliability(scored)
    part.figures |= {
        "expected_calibration_error": curve.error,
        "expected_calibration_error_by_chance": curve.by_chance,
    }
    part.findings += [
        *margin_findings(scored, figures),
        *length_findings(scored, figures),
        *displacement_findings(scored, figures),
        *calibration_findings(scored, figures, curve),
        *information_findings(figures),
    ]
    means, _ = token_means(scored)
    bins = zip(curve.confidence, curve.accuracy, curve.counts, strict=True)
    blocks: list[Block] = [
        figures_table(figures),
        accuracy_table(scored, figures["accuracy_at_equal_length"], baselines, words_probability),
        Picture(
            "Margins",
            pictures.histogram({"": scored.margin}, "margin (nats)", line=0.0),
            "A histogram of the margins of all pairs.",
        ),
        Picture(
            "Where the margin comes from",
            pictures.histogram(
                {"chosen": scored.chosen, "rejected": scored.rejected}, "change of the log-likelihood (nats)", line=0.0
            ),
            "Histograms of the changes of the chosen and of the rejected completions' log-likelihood.",
            note=REASON,
        ),
        Picture(
            "Calibration",
            pictures.reliability(curve.confidence, curve.accuracy),
            "A reliability curve: the accuracy of pairs against the policy's confidence. Calibrated: on the diagonal.",
        ),
        Table(
            "Calibration, by confidence",
            ["confidence", "accuracy", "pairs"],
            [[confidence, accuracy, count] for confidence, accuracy, count in bins],
            note=f"Confidence is sigmoid(beta |margin|) with beta {settings.beta:g}. The expected calibration error is "
            f"{curve.error:.3f}; a calibrated policy would have {curve.by_chance:.3f} with as many pairs.",
        ),
        Picture(
            "Between reinforcing and exploring",
            pictures.scatter(
                means["token_did_entropy"],
                means["entropy_change"],
                "token DID entropy (nats a token)",
                "entropy change (nats a token)",
                line=0.0,
            ),
            "A point a pair: the token DID entropy, and the change of the policy's entropy, which is below 0 where the "
            "policy concentrates and above 0 where it spreads.",
            note=CLAIM,
        ),
    ]
    if count := num_not_finite(scored):
        blocks.append(
            Paragraph(
                "Token DID entropies and KLs that are not finite are left out of their figures: those of "
                f"{count:,} of {many(len(scored), 'pair')}."
            )
        )
    part.blocks += blocks
    part.figures["by"] = {}
    for column, values in column_values(data, scored.rows.tolist(), settings.by).items():
        found = by_value(scored, values)
        part.figures["by"][column] = found
        part.blocks += breakdown_blocks(column, found, len(set(values)))


def _not_finite(scored: Scored, finite: np.ndarray, data: AuditData) -> list[Finding]:
    broken = scored.rows[~finite].tolist()
    if not broken:
        return []
    return [
        Finding(
            "not_finite",
            f"Margins that are not finite are left out of every figure: those of {len(broken):,} of "
            f"{many(len(scored), 'pair')}, the first in {data.called(broken[0])}.",
            "Check the models' weights, and score in float32 or bfloat16.",
            raised=False,
            severity=1.0,
            rows=broken,
        )
    ]


def _columns(table: list[dict[str, Any]], at: np.ndarray, count: int, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The columns of scored pairs, None for pairs without tokens, without those that an earlier part has."""
    taken = {name for part in parts.values() for name in part.columns} | {"index"}
    found: dict[str, Any] = {}
    for name in table[0]:
        if name not in taken:
            values: list[Any] = [math.nan if isinstance(table[0][name], float) else None] * count
            for place, row in zip(at.tolist(), table, strict=True):
                values[place] = row[name]
            found[name] = values
    return found
