"""Pairs whose sides seem to be swapped: whatever the parts have measured speaks against their label.

A logistic regression predicts the label from differences between the sides. It has no intercept, so that swapped sides
negate its score. It is cross-fitted: no pair is scored by a fit that has seen a pair of its prompt. The probe of hidden
states is fitted again without each of these folds, so that it does not carry their labels into the regression.
`lit_did.audit.label_noise` then estimates which share of the labels is swapped. docs/audit.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_did.audit.blocks import Block, PairList, Paragraph, Table
from lit_did.audit.data.bag_of_words import FOLDS, draw_folds
from lit_did.audit.label_noise import LabelNoise, fit_label_noise
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import share_over_groups
from lit_did.audit.wording import many, percent, percent_between

LEAST_PROMPTS = 50  # with fewer, the regression and the share of swaps are guesses
LARGEST_P = 0.005  # of the test that no label is swapped
LEAST_SHARE = 0.01  # of the lower end of the share's interval
LARGEST_P_UNRELATED = 0.001  # of the test that the score predicts nothing
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # inverse strengths of the ridge penalty, for features of mean square 1
_PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of hundreds of features
_SHOWN = 20
_LARGEST_LOGIT = 6.0


class Feature(NamedTuple):
    """Something that may speak for one of the two sides.

    Attributes:
        name: What it is called.
        values: [FOLDS, pairs]: positive if the chosen side has more of it, as fits without that fold see it. NaN:
            unknown.
        evidence: What it says of the pair with a number, in a few words.
    """

    name: str
    values: np.ndarray
    evidence: Callable[[int], str]


def examine_labels(
    data: AuditData, settings: Settings, parts: Mapping[str, Part]
) -> tuple[dict[str, Sequence[Any]], Finding, list[Block]]:
    """Ranks the pairs by how likely their sides are swapped, by what the parts so far have measured.

    Args:
        data: The pairs.
        settings: The seed is that of the folds.
        parts: The parts that ran, by name.

    Returns:
        The columns `label_score`, `label_probability` and `swap_probability`, the finding "mislabelled", and what the
        page shows.
    """
    groups = data.prompt_groups
    unknown = np.full(len(data), np.nan)
    columns: dict[str, Any] = dict.fromkeys(("label_score", "label_probability", "swap_probability"), unknown)
    prompts = len(np.unique(groups))
    folds = draw_folds(groups, settings.seed)
    features = features_of(parts, groups, folds) if prompts >= LEAST_PROMPTS else []
    known = np.zeros(len(data), dtype=bool)
    for feature in features:
        known |= np.isfinite(feature.values[0])
    if len(np.unique(groups[known])) < LEAST_PROMPTS:
        sentence = (
            f"At least {LEAST_PROMPTS} prompts are needed to tell whether labels are swapped, but there "
            f"{'is' if prompts == 1 else 'are'} {many(prompts, 'prompt')}."
        )
        return columns, Finding("mislabelled", sentence, "", raised=False, severity=0.0), []
    of_folds = np.stack(
        [np.stack([_tamed(feature.values[fold, known]) for feature in features], axis=1) for fold in range(FOLDS)]
    )
    scores, weights, _ = cross_fitted(of_folds, folds[known], _STRENGTHS)
    matrix = of_folds[folds[known], np.arange(int(known.sum()))]
    noise = fit_label_noise(scores, groups[known])
    predicts = noise.p_unrelated < LARGEST_P_UNRELATED

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
        int(numbers[i]): _evidence(i, features, matrix[place[i]] * weights[place[i]])
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
        _table(features, matrix, weights, groups[known]),
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


# ------------------------------------------------------------------------------------------------------------- features


def features_of(parts: Mapping[str, Part], groups: np.ndarray, folds: np.ndarray) -> list[Feature]:
    """What the parts offer that may predict a label."""
    values = {name: np.asarray(v) for part in parts.values() for name, v in part.columns.items()}
    found: list[Feature] = []

    def add(name: str, numbers: np.ndarray, evidence: Callable[[int], str]) -> None:
        if np.isfinite(numbers).any() and np.nanmax(np.abs(numbers)) > 0:
            found.append(Feature(name, np.broadcast_to(numbers.astype(float), (FOLDS, len(groups))), evidence))

    def sides(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        pair = tuple(values.get(f"{side}_{name}") for side in ("chosen", "rejected"))
        return None if pair[0] is None or pair[1] is None else (pair[0].astype(float), pair[1].astype(float))

    if "words_probability" in values:
        probability = values["words_probability"].astype(float)
        add("the words", logit(probability), lambda i: f"the words give the label {probability[i]:.2f}")
    if words := sides("words"):
        one, other = words
        add(
            "the length",
            np.log((one + 1) / (other + 1)),
            lambda i: f"the lengths are {one[i]:.0f} (chosen) and {other[i]:.0f} words",
        )
    logprobs, tokens = sides("reference_logprob"), sides("num_tokens")
    if logprobs and tokens:
        totals, means = logprobs, (logprobs[0] / tokens[0], logprobs[1] / tokens[1])
        add(
            "the reference's log-probability",
            totals[0] - totals[1],
            lambda i: f"the reference gives {totals[0][i]:.1f} (chosen) and {totals[1][i]:.1f} nats",
        )
        add(
            "the reference's log-probability per token",
            means[0] - means[1],
            lambda i: f"the reference gives {means[0][i]:.2f} (chosen) and {means[1][i]:.2f} nats per token",
        )
    hidden = getattr(parts.get("reference"), "hidden_difference", None)
    if hidden is not None:
        probe = np.full((FOLDS, len(groups)), np.nan)
        known = np.isfinite(hidden).all(axis=1)
        if len(np.unique(groups[known])) >= LEAST_PROMPTS:
            probe[:, known] = nested(_scaled(hidden[known]), folds[known], _PROBE_STRENGTHS)
            add(
                "a linear probe of the reference's last hidden states",
                probe,
                lambda i: f"the probe of hidden states gives the label {1 / (1 + np.exp(-probe[folds[i], i])):.2f}",
            )
    for name, title in (("margin", "the policy's margin"), ("side_margin", "the sides' margin")):
        if name in values:
            margins = values[name].astype(float)
            add(title, margins, lambda i, m=margins, t=title: f"{t} is {m[i]:.2f} nats")  # type: ignore[misc]
    return found


def logit(probability: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), at most 6 in size. NaN where p is."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probability) - np.log1p(-probability), -_LARGEST_LOGIT, _LARGEST_LOGIT)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Each column with mean square 1. The mean stays: the sides must be able to change places."""
    return values / np.sqrt(np.maximum(np.mean(np.square(values), axis=0), 1e-30))


def _tamed(values: np.ndarray) -> np.ndarray:
    """A feature with mean square 1, its outliers drawn in, and 0 where it is unknown."""
    values = np.where(np.isfinite(values), values, 0.0)
    return _scaled(np.arcsinh(values / (np.median(np.abs(values[values != 0])) if values.any() else 1.0)))


# ----------------------------------------------------------------------------------------------------------- regression


def cross_fitted(
    features: np.ndarray, folds: np.ndarray, strengths: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Held-out scores of a logistic regression without an intercept, which predicts that the chosen side is chosen.

    Args:
        features: [pairs, features]: differences, chosen less rejected. Or [FOLDS, pairs, features]: those that the fit
            without a fold sees, and that this fold is scored with.
        folds: [pairs]: pairs of one prompt are in one fold.
        strengths: Inverse strengths of the ridge penalty. The one with the best held-out likelihood is taken.

    Returns:
        The scores [pairs], the weights [pairs, features] of the fit that gave each score, and the strength.
    """
    of_folds = np.broadcast_to(features, (FOLDS, *features.shape[-2:]))
    own = of_folds[folds, np.arange(len(folds))]
    best: tuple[float, np.ndarray, np.ndarray, float] | None = None
    for strength in strengths:
        weights = np.zeros_like(own, dtype=float)
        for fold in range(FOLDS):
            weights[folds == fold] = _fitted(of_folds[fold][folds != fold], strength)
        scores = (own * weights).sum(axis=1)
        loss = float(np.logaddexp(0, -scores).sum())
        if best is None or loss < best[0]:
            best = loss, scores, weights, strength
    assert best is not None
    return best[1:]


def nested(features: np.ndarray, folds: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
    """[FOLDS, pairs]: scores of `cross_fitted` from fits that have seen neither the pair's own fold nor that fold.

    So a regression on these scores that leaves out a fold has seen nothing of that fold's labels, but for the choice of
    the strength.
    """
    strength = cross_fitted(features, folds, strengths)[2]
    scores = np.empty((FOLDS, len(folds)))
    for one in range(FOLDS):
        for other in range(one, FOLDS):
            in_one, in_other = folds == one, folds == other
            weights = _fitted(features[~in_one & ~in_other], strength)
            scores[one, in_other] = features[in_other] @ weights
            scores[other, in_one] = features[in_one] @ weights
    return scores


def _fitted(features: np.ndarray, strength: float) -> np.ndarray:
    """[features] the weights of a logistic regression without an intercept."""
    from sklearn.linear_model import LogisticRegression

    # Every second pair is turned round. This changes no fit, but scikit-learn needs two classes.
    signs = np.where(np.arange(len(features)) % 2 == 0, 1.0, -1.0)
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000)
    return model.fit(features * signs[:, None], signs).coef_[0]


# ------------------------------------------------------------------------------------------------------------- the page


def _evidence(number: int, features: Sequence[Feature], contributions: np.ndarray) -> str:
    """What speaks most against the label of a pair."""
    against = [i for i in np.argsort(contributions) if contributions[i] < 0][:3]
    return "; ".join(features[i].evidence(number) for i in against)


def _table(features: Sequence[Feature], matrix: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> Table:
    rows = []
    for i, feature in enumerate(features):
        signed = np.sign(matrix[:, i] * np.sign(weights[:, i]))
        alone: Estimate = share_over_groups(np.where(np.isfinite(signed), (signed + 1) / 2, np.nan), groups)
        rows.append((feature.name, float(weights[:, i].mean()), alone))
    return Table(
        "What speaks for a label",
        ("what", "weight", "right alone"),
        rows,
        "Weights are of the regression, for features of mean square 1. A negative one speaks for the side that has "
        "less. Right alone: the share of pairs whose label the feature gives in the direction of its weight.",
    )
