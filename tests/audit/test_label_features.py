"""What may predict a label: counts by hand, and features that swapped sides negate."""

from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_array, issparse

from lit_did.audit import label_features
from lit_did.audit.label_features import counts_of, features_of, logit
from lit_did.audit.reference import ReferencePart
from lit_did.audit.report import Part
from lit_did.audit.source import AuditData

ROWS = [
    {"prompt": "1", "chosen": "red red hot", "rejected": "red, cold"},
    {"prompt": "2", "chosen": "old", "rejected": "old"},
    {"prompt": "3", "chosen": "hot", "rejected": "a very very long text of words"},
    {"prompt": "4", "chosen": "nine of ten words", "rejected": "hot red"},
]
SWAPPED = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]


def parts(sign=1):
    """Of four pairs. With the sign -1, of the same pairs with swapped sides."""
    generator = np.random.default_rng(0)
    names = ("chosen", "rejected")[::sign]
    words = {f"{name}_words": v for name, v in zip(names, ([3, 1, 1, 4], [2, 1, 7, 2]), strict=True)}
    reference = ReferencePart("reference", "", "")
    for name, tokens in zip(names, generator.integers(1, 30, (2, 4)), strict=True):
        reference.columns[f"{name}_reference_logprob"] = -3.0 * tokens + generator.normal(size=4)
        reference.columns[f"{name}_num_tokens"] = tokens
    reference.hidden_difference = sign * generator.normal(size=(4, 3))
    reference.end_difference = sign * generator.normal(size=(4, 3))
    counts = tuple(csr_array(generator.integers(0, 3, (4, 5)).astype(np.float32)) for _ in range(2))
    reference.token_counts = counts[::sign]
    found = {"data": Part("data", "", "", columns=words), "reference": reference}
    for part, column in (("policy", "margin"), ("sides", "side_margin")):
        found[part] = Part(part, "", "", columns={column: sign * generator.normal(size=4)})
    return found


def dense(matrix):
    return matrix.toarray() if issparse(matrix) else matrix


def test_swapped_sides_negate_every_feature():
    one, known = features_of(AuditData(ROWS, "pairs"), parts())
    other, _ = features_of(AuditData(SWAPPED, "pairs"), parts(-1))
    assert known.all()
    assert [feature.name for feature in one] == [
        *("the words", "the tokens", "the length in words", "the length in tokens"),
        *("the reference's log-probability", "the reference's log-probability per token"),
        *("the mean last hidden states", "the last hidden states at the end"),
        *("the policy's margin", "the sides' margin"),
    ]
    for feature, swapped in zip(one, other, strict=True):
        for matrix, negated in zip(feature.matrices, swapped.matrices, strict=True):
            assert np.abs(dense(matrix)).max() > 0
            assert np.allclose(dense(matrix), -dense(negated)), feature.name


def test_words_are_counted_and_their_shares():
    words = features_of(AuditData(ROWS, "pairs"), {})[0][0]
    counts, shares = (dense(matrix) for matrix in words.matrices)
    texts = [[Counter(row[side].replace(",", " ,").split()) for side in ("chosen", "rejected")] for row in ROWS]
    for i, (one, other) in enumerate(texts):
        vocabulary = one.keys() | other.keys()
        assert sorted(counts[i][counts[i] != 0]) == sorted(d for w in vocabulary if (d := one[w] - other[w]))
        expected = [one[w] / one.total() - other[w] / other.total() for w in vocabulary]
        assert sorted(shares[i][shares[i] != 0]) == pytest.approx(sorted(d for d in expected if d))
    assert counts[0] @ counts[3] == -2  # red and hot have the same columns in all rows


def test_numbers_are_counted():
    found = counts_of([np.array([2, 0, 2]), np.array([], int), np.array([1])], np.array([1, 0, 1]), (3, 4))
    assert found.toarray().tolist() == [[0] * 4, [1, 1, 2, 0], [0] * 4]


def test_a_piecewise_linear_function_of_length_is_linear_in_the_feature():
    lengths = np.log1p(np.random.default_rng(0).integers(1, 100, (2, 200)))
    knots = np.unique(np.quantile(lengths, np.linspace(0, 1, label_features._KNOTS)))
    values = np.random.default_rng(1).normal(size=len(knots))
    one, other = (np.interp(of, knots, values) for of in lengths)
    assert np.allclose(label_features._bent(*lengths) @ values, one - other)
    with_unknown = label_features._bent(np.append(lengths[0], np.nan), np.append(lengths[1], 1.0))
    assert np.allclose(with_unknown[:-1] @ values, one - other)
    assert np.isnan(with_unknown[-1]).any()


def test_far_numbers_are_drawn_in():
    values = np.array([1.0, -1.0, 1e6, 0.0, np.nan])
    tamed = label_features._tamed(values)
    assert tamed[:2] == pytest.approx([1 / 3, -1 / 3], rel=0.02)  # in three medians
    assert tamed[2] == pytest.approx(np.log(2e6 / 3))
    assert tamed[3] == 0
    assert np.isnan(tamed[4])
    assert (label_features._tamed(np.zeros(3)) == 0).all()


def test_logits_are_at_most_6():
    assert logit(np.array([0.0, 0.5, 0.75, 1.0])) == pytest.approx([-6, 0, np.log(3), 6])


def test_what_is_not_finite_says_nothing():
    found = parts()
    found["reference"].hidden_difference[2] = np.nan
    found["policy"].columns["margin"][:] = np.nan
    features, known = features_of(AuditData(ROWS, "pairs"), found)
    matrix = next(feature for feature in features if feature.name == "the mean last hidden states").matrices[0]
    assert (matrix[2] == 0).all()
    assert (matrix[[0, 1, 3]] != 0).all()
    assert known.all()
    assert "the policy's margin" not in [feature.name for feature in features]
    only = {"policy": Part("policy", "", "", columns={"margin": np.array([1.0, np.nan, 2.0, 3.0])})}
    assert features_of(AuditData(ROWS, "pairs"), only)[1].tolist() == [True, False, True, True]


def test_the_classifier_of_the_data_stands_for_the_words_of_large_data(monkeypatch):
    monkeypatch.setattr(label_features, "LARGEST_FIT", 3)
    found = parts()
    found["data"].columns["words_probability"] = np.array([0.5, 0.9, 0.2, 0.999999])
    words = features_of(AuditData(ROWS, "pairs"), found)[0][0]
    assert words.name == "the words"
    assert words.matrices[0][:, 0] == pytest.approx(label_features._tamed(logit(np.array([0.5, 0.9, 0.2, 0.999999]))))
    assert words.evidence(1, 0.0) == "the words give the label 0.90"


def test_evidence_names_the_numbers():
    found = {feature.name: feature for feature in features_of(AuditData(ROWS, "pairs"), parts())[0]}
    reference = parts()["reference"].columns
    one, other = (reference[f"{side}_reference_logprob"][2] for side in ("chosen", "rejected"))
    tokens = [reference[f"{side}_num_tokens"][2] for side in ("chosen", "rejected")]
    expected = {
        "the words": "the words give the label 0.12",
        "the length in words": "the lengths are 1 (chosen) and 7 words",
        "the length in tokens": f"the lengths are {tokens[0]} (chosen) and {tokens[1]} tokens",
        "the reference's log-probability": f"the reference gives {one:.1f} (chosen) and {other:.1f} nats",
        "the reference's log-probability per token": f"the reference gives {one / tokens[0]:.2f} (chosen) and "
        f"{other / tokens[1]:.2f} nats per token",
        "the mean last hidden states": "the mean last hidden states give the label 0.12",
        "the last hidden states at the end": "the last hidden states at the end give the label 0.12",
        "the policy's margin": f"the policy's margin is {parts()['policy'].columns['margin'][2]:.2f} nats",
    }
    for name, text in expected.items():
        assert found[name].evidence(2, -2.0) == text
