"""The summary's means and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lit_did.scoring.summary import describe, summarize


def rows(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        row = {"margin": rng.normal(1.0, 2.0)}
        for side in ("chosen", "rejected"):
            tokens = int(rng.integers(1, 30))
            row[f"{side}_num_tokens"] = tokens
            row[f"{side}_log_ratio"] = row["margin"] if side == "chosen" else 0.0
            # Long completions have a smaller KL, so that a mean over pairs is another number.
            row[f"{side}_kl"] = rng.exponential(1.0) + 3.0 / tokens
            row[f"{side}_token_did_concentration"] = 2.0
        made.append(row)
    return made


def test_means():
    given = rows(50)
    summary = summarize(given)
    margins = np.array([row["margin"] for row in given])
    error = margins.std(ddof=1) / math.sqrt(50)
    assert summary["margin"] == pytest.approx(
        (margins.mean(), *(margins.mean() + 2.0096 * error * s for s in (-1, 1))), rel=1e-4
    )
    sums = [[row[f"{s}_kl"] * row[f"{s}_num_tokens"] for s in ("chosen", "rejected")] for row in given]
    tokens = [[row[f"{s}_num_tokens"] for s in ("chosen", "rejected")] for row in given]
    assert summary["kl"].mean == pytest.approx(np.sum(sums) / np.sum(tokens))
    assert summary["token_did_concentration"] == pytest.approx((2.0, 2.0, 2.0))
    assert summary["accuracy"].mean == (margins > 0).mean()


@pytest.mark.parametrize(("hits", "interval"), [(10, (0.7225, 1.0)), (5, (0.2366, 0.7634))])
def test_accuracy_has_wilsons_interval(hits, interval):
    given = rows(10)
    for number, row in enumerate(given):
        row["chosen_log_ratio"] = 1.0 if number < hits else -1.0
    assert summarize(given)["accuracy"][1:] == pytest.approx(interval, abs=1e-4)


def test_intervals_cover():
    truth = summarize(rows(20000, seed=1))
    runs = [summarize(rows(40, seed)) for seed in range(2, 202)]
    for name in ("margin", "kl"):
        covered = sum(run[name].lower <= truth[name].mean <= run[name].upper for run in runs)
        assert 180 <= covered <= 200, name


def test_one_pair_has_no_interval():
    assert "nan" not in describe(summarize(rows(1)))
