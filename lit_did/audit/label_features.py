"""What the parts of an audit have measured that may predict a label: differences between the sides of each pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.special import expit

from lit_did.audit.data.words import Words, words_of
from lit_did.audit.label_model import LARGEST_FIT, Matrix
from lit_did.audit.report import Part
from lit_did.audit.source import AuditData

_LARGEST_LOGIT = 6.0
_KNOTS = 10  # of a piecewise linear function of a length


class Feature(NamedTuple):
    """Something that may speak for one of the two sides.

    Attributes:
        name: What it is called.
        matrices: [pairs, numbers] each: chosen less rejected, on one or more scales. 0: unknown.
        evidence: What it says of the pair with a number, in a few words, given its part of the score.
    """

    name: str
    matrices: list[Matrix]
    evidence: Callable[[int, float], str]


def features_of(data: AuditData, parts: Mapping[str, Part]) -> tuple[list[Feature], np.ndarray]:
    """What the parts offer that may predict a label.

    Args:
        data: The pairs.
        parts: The parts that ran, by name.

    Returns:
        The features, and [pairs] whether more than its words is known of a pair.
    """
    values = {name: np.asarray(v) for part in parts.values() for name, v in part.columns.items()}
    reference = parts.get("reference")
    found: list[Feature] = []
    known = np.zeros(len(data), dtype=bool)

    def add(name: str, matrix: np.ndarray, evidence: Callable[[int, float], str]) -> None:
        finite = np.isfinite(matrix).all(axis=1)
        known[finite] = True
        if (matrix != 0).any(axis=1)[finite].any():
            found.append(Feature(name, [matrix if finite.all() else np.where(finite[:, None], matrix, 0)], evidence))

    def add_scalar(name: str, numbers: np.ndarray, evidence: Callable[[int, float], str]) -> None:
        add(name, _tamed(numbers.astype(float))[:, None], evidence)

    def add_counts(name: str, chosen: csr_array, rejected: csr_array) -> None:
        matrices = [chosen - rejected, _shares(chosen) - _shares(rejected)]
        matrices = [matrix for matrix in matrices if abs(matrix).max() > 0]
        if matrices:
            found.append(Feature(name, matrices, lambda _, part: f"{name} give the label {expit(part):.2f}"))

    def sides(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        pair = tuple(values.get(f"{side}_{name}") for side in ("chosen", "rejected"))
        return None if pair[0] is None or pair[1] is None else (pair[0].astype(float), pair[1].astype(float))

    if len(data) <= LARGEST_FIT:
        add_counts("the words", *_word_counts(data))
    elif "words_probability" in values:
        # The classifier of the data part has seen more pairs.
        add_scalar(
            "the words",
            logit(values["words_probability"].astype(float)),
            lambda i, _: f"the words give the label {values['words_probability'][i]:.2f}",
        )
    if counts := getattr(reference, "token_counts", None):
        add_counts("the tokens", *counts)
    for name, unit in (("words", "words"), ("num_tokens", "tokens")):
        if lengths := sides(name):
            add(
                f"the length in {unit}",
                _bent(np.log1p(lengths[0]), np.log1p(lengths[1])),
                lambda i, _, n=lengths, u=unit: f"the lengths are {n[0][i]:.0f} (chosen) and {n[1][i]:.0f} {u}",  # type: ignore[misc]
            )
    logprobs, tokens = sides("reference_logprob"), sides("num_tokens")
    if logprobs and tokens:
        totals, means = logprobs, (logprobs[0] / tokens[0], logprobs[1] / tokens[1])
        add_scalar(
            "the reference's log-probability",
            totals[0] - totals[1],
            lambda i, _: f"the reference gives {totals[0][i]:.1f} (chosen) and {totals[1][i]:.1f} nats",
        )
        add_scalar(
            "the reference's log-probability per token",
            means[0] - means[1],
            lambda i, _: f"the reference gives {means[0][i]:.2f} (chosen) and {means[1][i]:.2f} nats per token",
        )
    for attribute, name in (
        ("hidden_difference", "the mean last hidden states"),
        ("end_difference", "the last hidden states at the end"),
    ):
        hidden = getattr(reference, attribute, None)
        if hidden is not None:
            add(name, hidden, lambda _, part, n=name: f"{n} give the label {expit(part):.2f}")  # type: ignore[misc]
    for name, title in (("margin", "the policy's margin"), ("side_margin", "the sides' margin")):
        if name in values:
            margins = values[name].astype(float)
            add_scalar(title, margins, lambda i, _, m=margins, t=title: f"{t} is {m[i]:.2f} nats")  # type: ignore[misc]
    return found, known


def counts_of(sequences: Sequence[np.ndarray], places: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """[pairs, numbers] float32: how often each number comes in a sequence.

    Args:
        sequences: Numbers from 0.
        places: [sequences] the pair that each one is of.
        shape: Of the result.
    """
    numbers = np.concatenate([np.zeros(0, np.int32), *sequences]).astype(np.int32)
    pairs = np.repeat(places.astype(np.int32), [len(sequence) for sequence in sequences])
    counts = csr_array((np.ones(len(numbers), np.float32), (pairs, numbers)), shape)
    counts.sum_duplicates()
    return counts


def logit(probability: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), at most 6 in size. NaN where p is."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probability) - np.log1p(-probability), -_LARGEST_LOGIT, _LARGEST_LOGIT)


def _word_counts(data: AuditData) -> tuple[csr_array, csr_array]:
    sides: list[Words] = [words_of([data.texts(i)[side] for i in range(len(data))]) for side in (1, 2)]
    distinct, numbers = np.unique(np.concatenate([side.numbers for side in sides]), return_inverse=True)
    shape, places = (len(data), len(distinct)), np.arange(len(data))
    one, other = np.split(numbers, [len(sides[0].numbers)])
    chosen, rejected = (
        counts_of(np.split(of, side.offsets[1:-1]), places, shape) for of, side in zip((one, other), sides, strict=True)
    )
    return chosen, rejected


def _shares(counts: csr_array) -> csr_array:
    """Counts divided by their sum over a row."""
    return (diags_array(1 / np.maximum(counts.sum(axis=1), 1)) @ counts).tocsr()


def _bent(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """[pairs, knots] of which a linear function is the difference of a piecewise linear function of both sides."""
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    knots = np.unique(np.quantile(np.concatenate([chosen[finite], rejected[finite]]), np.linspace(0, 1, _KNOTS)))
    if len(knots) < 2:
        return np.where(finite, 0.0, np.nan)[:, None]
    bases = np.eye(len(knots))
    return np.stack([np.interp(chosen, knots, base) - np.interp(rejected, knots, base) for base in bases], axis=1)


def _tamed(values: np.ndarray) -> np.ndarray:
    """Values of which those far above three medians in size are drawn in."""
    known = np.abs(values[np.isfinite(values) & (values != 0)])
    return np.arcsinh(values / (3 * np.median(known) if len(known) else 1.0))
