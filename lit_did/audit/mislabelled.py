"""Pairs whose sides seem to be swapped: what the parts have measured speaks against their label.

`label_features` collects what may predict a label, `label_model` predicts labels from it, and `label_noise` estimates
which share of the labels is swapped. `lit-did docs audit` has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_did.audit.blocks import Block, PairList, Paragraph, Table
from lit_did.audit.label_features import Feature, features_of
from lit_did.audit.label_model import held_out
from lit_did.audit.label_noise import LabelNoise, fit_label_noise
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import share_over_groups
from lit_did.audit.wording import many, percent, percent_between

LEAST_PROMPTS = 50  # with fewer, the scores and the share of swaps are guesses
LARGEST_P = 0.005  # of the test that no label is swapped
LEAST_SHARE = 0.01  # of the lower end of the share's interval
LARGEST_P_UNRELATED = 0.001  # of the test that the score predicts nothing
_SHOWN = 20


def examine_labels(
    data: AuditData, settings: Settings, parts: Mapping[str, Part]
) -> tuple[dict[str, Sequence[Any]], Finding, list[Block]]:
    """Ranks the pairs by how likely their sides are swapped, by what the parts so far have measured.

    Args:
        data: The pairs.
        settings: The seed is that of the draw of prompts in large data sets.
        parts: The parts that ran, by name.

    Returns:
        The columns `label_score`, `label_probability` and `swap_probability`, the finding "mislabelled", and what the
        page shows.
    """
    groups = data.prompt_groups
    unknown = np.full(len(data), np.nan)
    columns: dict[str, Any] = dict.fromkeys(("label_score", "label_probability", "swap_probability"), unknown)
    prompts = len(np.unique(groups))
    features, known = features_of(data, parts) if prompts >= LEAST_PROMPTS else ([], np.zeros(len(data), dtype=bool))
    if len(np.unique(groups[known])) < LEAST_PROMPTS:
        sentence = (
            f"At least {LEAST_PROMPTS} prompts are needed to tell whether labels are swapped, but there "
            f"{'is' if prompts == 1 else 'are'} {many(prompts, 'prompt')}."
        )
        return columns, Finding("mislabelled", sentence, "", raised=False, severity=0.0), []
    matrices = [m if known.all() else m[known] for feature in features for m in feature.matrices]
    scores, parts_of_scores, halves = held_out(matrices, groups[known], settings.seed)
    # [pairs, features]: a feature may have several matrices
    starts = np.cumsum([0, *(len(feature.matrices) for feature in features)])[:-1]
    contributions = np.add.reduceat(parts_of_scores, starts, axis=1)
    noise = fit_label_noise(scores, groups[known])
    of_halves = [fit_label_noise(own, groups[known][places]).p_unrelated for places, own in halves]
    # Both halves use the same labels, one to fit and one to test, so that their tests are not independent.
    predicts = 2 * min(of_halves, default=1.0) < LARGEST_P_UNRELATED

    def column(values: np.ndarray) -> np.ndarray:
        result = unknown.copy()
        result[known] = values
        return result

    columns["label_score"] = column(scores)
    columns["label_probability"] = column(noise.label_probability(scores))
    if predicts:
        columns["swap_probability"] = column(noise.swap_probability(scores))
    raised = predicts and noise.p_value < LARGEST_P and noise.share.lower > LEAST_SHARE
    order = [int(i) for i in np.argsort(columns["label_score"], kind="stable") if known[i]]
    place = np.cumsum(known) - 1
    numbers = data.row_numbers
    worst = [i for i in order if columns["swap_probability"][i] > 0.5] if raised else []
    remarks = {
        int(numbers[i]): _evidence(i, features, contributions[place[i]])
        for i in dict.fromkeys([*order[:_SHOWN], *worst])
    }
    finding = Finding(
        "mislabelled",
        _sentence(noise, raised, predicts, len(worst)),
        "Read the flagged pairs, and swap or drop those that are wrong." if raised else "",
        raised=raised,
        severity=noise.share.value if raised else 0.0,
        rows=[int(numbers[i]) for i in worst],
        evidence={int(numbers[i]): remarks[int(numbers[i])] for i in worst},
        value=noise.share if predicts else None,
    )
    accuracy = share_over_groups((scores > 0) + 0.5 * (scores == 0), groups[known])
    blocks: list[Block] = [
        Paragraph(
            f"What speaks for a label: {', '.join(feature.name for feature in features)}. Together they give the label "
            f"of held-out pairs in {accuracy} of the pairs. {finding.sentence}"
        ),
        _table(features, contributions, groups[known]),
    ]
    if trained := [name for name in ("policy", "sides") if name in parts]:
        blocks.append(Paragraph(_TRAINED[trained[0]]))
    if predicts:
        blocks.append(
            PairList(
                "Pairs whose label the features support least",
                [int(numbers[i]) for i in order[:_SHOWN]],
                remarks,
                "" if raised else "They are not flagged: so many wrong guesses are expected without swapped labels.",
            )
        )
    return columns, finding, blocks


_TRAINED = {
    "policy": (
        "The policy's margin is one of the features. A policy that was trained on these very pairs has learned their "
        "labels, wrong ones too. Swapped pairs then look right, and the share of swapped labels is too low. Audit "
        "pairs that the policy was not trained on, or leave out the policy."
    ),
    "sides": (
        "The margin of the sides' adapters is one of the features. It is cross-fitted, so no adapter has seen the "
        "label of a pair that it scores."
    ),
}


def _sentence(noise: LabelNoise, raised: bool, predicts: bool, count: int) -> str:
    if not predicts:
        return "Nothing that was measured predicts the labels, so that swapped labels cannot be found."
    interval = percent_between(noise.share)
    if raised:
        pairs = f"{many(count, 'pair')} {'is' if count == 1 else 'are'}"
        return f"About {interval} of the labels seem to be swapped; {pairs} more likely swapped than not."
    return (
        "No swapped labels were found, but as far as these features show, up to "
        f"{percent(noise.share.upper)} of the labels may be swapped."
    )


# ------------------------------------------------------------------------------------------------------------- the page


def _evidence(number: int, features: Sequence[Feature], contributions: np.ndarray) -> str:
    """What speaks most against the label of a pair."""
    against = [i for i in np.argsort(contributions) if contributions[i] < 0][:3]
    return "; ".join(features[i].evidence(number, float(contributions[i])) for i in against)


def _table(features: Sequence[Feature], contributions: np.ndarray, groups: np.ndarray) -> Table:
    sizes = np.abs(contributions).sum(axis=0)
    rows = []
    for feature, own, size in zip(features, contributions.T, sizes, strict=True):
        alone: Estimate = share_over_groups((np.sign(own) + 1) / 2, groups)
        rows.append((feature.name, percent(size / max(sizes.sum(), 1e-30)), alone))
    return Table(
        "What speaks for a label",
        ("what", "part of the score", "right alone"),
        rows,
        "Part of the score: the mean size of what this adds to the score of held-out pairs. Right alone: the share of "
        "held-out pairs whose label it gives by its sign. Evidence that says the same shares its part.",
    )
