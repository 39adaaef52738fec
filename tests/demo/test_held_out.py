"""Held-out pairs by tag: means and their errors, and what the demo says about them."""

from __future__ import annotations

import math

import pytest
import torch

from lit_did.demo.held_out import HeldOut, meaning


def held_out(margins, concentrations=None, tags=None, tokens=None) -> HeldOut:
    count = len(margins)
    margins = torch.tensor(margins, dtype=torch.float64)
    values = {
        "reward_margin": margins,
        "reward_accuracy": (margins > 0).double(),
        "token_did_concentration": torch.tensor(concentrations or [0.1] * count, dtype=torch.float64),
        "kl": torch.full((count,), 0.05, dtype=torch.float64),
    }
    return HeldOut(32, tags or ["all pairs"] * count, values, torch.tensor(tokens or [10.0] * count))


def test_means_and_standard_errors():
    pairs = held_out([1.0, 2.0, 6.0], [0.1, 0.2, 0.4], ["a", "a", "b"], [10.0, 30.0, 5.0])
    assert pairs.mean("reward_margin") == 3
    assert pairs.standard_error("reward_margin") == pytest.approx(torch.tensor([1.0, 2.0, 6.0]).std() / 3**0.5)
    assert pairs.mean("token_did_concentration", "a") == pytest.approx(0.175)  # over tokens
    # By hand: sqrt((10 * 0.075)^2 + (30 * 0.025)^2) / 40 * sqrt(2 / 1)
    assert pairs.standard_error("token_did_concentration", "a") == pytest.approx(0.75 * 2**0.5 / 40 * 2**0.5)
    assert pairs.standard_error("reward_margin", "b") == math.inf


@pytest.mark.parametrize(
    ("margins", "text"),
    [
        ([1.0, 1.2, 0.9, 1.1], "the policy prefers the chosen completion in 100% of the 4 held-out pairs"),
        ([-1.0, -1.2, 0.1, -1.1], "the policy prefers the rejected completion in 75% of the 4 held-out pairs"),
        ([1.0, -1.2, 0.9, -1.1], "do not show which completions the policy prefers: the reward margin, -0.100 ± 0.6"),
        ([math.nan, 1.0], "do not show which completions"),
        ([1.0], "the reward margin is 1.000, but one held-out pair says nothing about others"),
    ],
)
def test_what_the_margin_means(margins, text):
    assert text in meaning(held_out(margins))
    assert meaning(held_out(margins)).startswith("After 32 steps ")


def test_what_the_concentration_means():
    tags = ["factual", "open-ended"] * 3
    clear = meaning(held_out([1.0] * 6, [0.19, 0.15, 0.18, 0.16, 0.2, 0.14], tags))
    assert clear.endswith(
        "What it learned is more concentrated, on fewer tokens, for factual pairs (0.190 ± 0.006 nats a token, "
        "KL 0.050) than for open-ended pairs (0.150 ± 0.006, KL 0.050)."
    )
    alike = meaning(held_out([1.0] * 6, [0.1, 0.2, 0.2, 0.1, 0.15, 0.16], tags))
    assert "does not differ clearly between open-ended pairs (0.153" in alike
    assert "concentrat" not in meaning(held_out([1.0] * 6))
