"""Rewards and preference losses against their formulas in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from lit_did.functional import pair_accuracy, pair_margin, preference_loss

CHOSEN = [0.0, 3.0, -2.0, 40.0, -300.0]
REJECTED = [0.0, 1.0, 2.5, -60.0, 900.0]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda h, b: -log_sigmoid(b * h)),
        ({"label_smoothing": 0.2}, lambda h, b: -0.8 * log_sigmoid(b * h) - 0.2 * log_sigmoid(-b * h)),
        ({"loss": "ipo"}, lambda h, b: (h - 1 / (2 * b)) ** 2),
        ({"loss": "hinge"}, lambda h, b: max(0.0, 1 - b * h)),
    ],
)
def test_losses(beta, options, formula):
    loss = preference_loss(torch.tensor(CHOSEN).double(), torch.tensor(REJECTED).double(), beta=beta, **options)
    expected = [formula(c - r, beta) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_gradients_are_finite_and_push_apart(loss):
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    rejected = torch.tensor(REJECTED, requires_grad=True)
    preference_loss(chosen, rejected, beta=0.1, loss=loss).sum().backward()
    assert torch.isfinite(chosen.grad).all()
    assert torch.equal(chosen.grad, -rejected.grad)
    assert chosen.grad[0] < 0  # at a tie every loss raises the chosen log-ratio
    assert chosen.grad[4] < 0


def test_label_smoothing_is_least_where_the_policy_is_as_sure_as_the_labels():
    h = torch.linspace(-10, 40, 5001, dtype=torch.float64)
    loss = preference_loss(h, torch.zeros_like(h), beta=0.1, label_smoothing=0.2)
    assert float(torch.sigmoid(0.1 * h[loss.argmin()])) == pytest.approx(0.8, abs=1e-3)


def test_margin_and_accuracy():
    chosen, rejected = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, -2.0, 3.0])
    assert pair_margin(chosen, rejected, 0.5).tolist() == [0.0, 2.0, -2.0]
    assert pair_accuracy(chosen, rejected).tolist() == [0.5, 1.0, 0.0]
    assert pair_accuracy(torch.tensor([torch.nan]), torch.zeros(1)).isnan()  # no tie
