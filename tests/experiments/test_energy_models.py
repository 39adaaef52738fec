"""Exact models against double loops, scipy and least squares: distributions, losses over all pairs, their minima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial import distance
from scipy.stats import entropy as scipy_entropy

from lit_did.experiments import energy_models
from lit_did.experiments.energy_models import (
    Preferences,
    entropy,
    gaussian,
    jensen_shannon,
    kl,
    minimise,
    one_thread,
    population_loss,
    power_law,
    random_power_law,
    train,
)
from lit_did.functional import preference_loss

LOSSES = [
    {"loss": "sigmoid", "beta": 0.5},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "hinge", "beta": 0.5},
    {"loss": "slic", "beta": 0.5, "nll_weight": 0.3},
    {"loss": "cpo", "beta": 0.5, "nll_weight": 0.3},
    {"loss": "orpo", "beta": 0.5},
    {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
]


def test_divergences_are_scipys():
    first, second = (logits.log_softmax(-1)[0] for logits in gaussian(2, 9, [3]))
    p, q = first.exp().numpy(), second.exp().numpy()
    # 1e-14: some tens of roundings
    assert float(entropy(first)) == pytest.approx(scipy_entropy(p), abs=1e-14)
    assert float(kl(first, second)) == pytest.approx(scipy_entropy(p, q), abs=1e-14)
    assert float(jensen_shannon(first, second)) == pytest.approx(distance.jensenshannon(p, q) ** 2, abs=1e-14)


def test_replicates_do_not_depend_on_how_many_there_are():
    one, many = gaussian(2, 20, [5]), gaussian(3, 20, [4, 5, 6])
    assert torch.equal(one[:, 0], many[:2, 1])
    values = gaussian(3, 4000, range(3)).flatten(0, 1)
    # independent: correlations of 4,000 numbers are within 5 standard deviations, 5 / sqrt(4000)
    assert (torch.corrcoef(values) - torch.eye(9)).abs().max() < 0.08
    assert values.std(-1) == pytest.approx([1] * 9, abs=0.06)


@pytest.mark.parametrize("chosen_share", [0.0, 0.3, 1.0])
def test_preferences_of_the_power_law(chosen_share):
    """The share of pairs in which y_w is the chosen one, counted over both orders, is the Bradley-Terry probability."""
    beta = 0.7
    lawful = random_power_law(6, range(2), beta)
    preferences = power_law(lawful.reference, lawful.target, beta, chosen_share)
    rho, chosen, rejected, target = (field.exp().numpy() for field in preferences)
    assert chosen.sum(-1) == pytest.approx([1, 1], abs=1e-14)
    assert rejected.sum(-1) == pytest.approx([1, 1], abs=1e-14)
    if chosen_share in (0, 1):
        assert {0: chosen, 1: rejected}[chosen_share] == pytest.approx(rho, rel=1e-12)
    for seed in range(2):
        for w in range(6):
            for l in range(6):  # noqa: E741
                right, wrong = chosen[seed, w] * rejected[seed, l], chosen[seed, l] * rejected[seed, w]
                odds = target[seed, w] / rho[seed, w] / (target[seed, l] / rho[seed, l])
                assert right / (right + wrong) == pytest.approx(1 / (1 + odds**-beta), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["loss"])
def test_population_loss_is_the_mean_over_all_pairs(loss, monkeypatch):
    monkeypatch.setattr(energy_models, "PIECE", 30)  # two rows at a time, and one that is left over
    preferences = power_law(*random_power_law(7, range(2), 0.5)[::3], 0.5, chosen_share=0.4)
    policy = gaussian(3, 7, range(2))[2].log_softmax(-1)
    values = population_loss(policy, preferences, **loss)
    for seed in range(2):
        expected = 0.0
        score = policy[seed] - (preferences.reference[seed] if loss["loss"] in ("sigmoid", "ipo", "hinge") else 0)
        for w in range(7):
            for l in range(7):  # noqa: E741
                pair = preference_loss(score[w], score[l], chosen_num_tokens=1, rejected_num_tokens=1, **loss)
                expected += float((preferences.chosen[seed, w] + preferences.rejected[seed, l]).exp() * pair)
        assert float(values[seed]) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("chosen_share", [0.0, 0.5])
def test_dpos_minimiser_is_the_closed_form(beta, chosen_share):
    """pi proportional to rho (pi* / rho)^(0.5 / beta): the target itself where beta is the law's."""
    preferences = power_law(*random_power_law(40, range(2), 0.5)[::3], 0.5, chosen_share)
    minimum = minimise(preferences, loss="sigmoid", beta=beta)
    log_ratio = 0.5 / beta * (preferences.target - preferences.reference)
    expected = (preferences.reference + log_ratio).log_softmax(-1)
    assert jensen_shannon(minimum.policy, expected).max() < 1e-12  # the square of what a gradient of 1e-7 leaves
    assert (jensen_shannon(minimum.policy, preferences.target).max() < 1e-6) == (beta == 0.5)
    assert minimum.gradient.max() < 1e-7
    loss = population_loss(minimum.policy, preferences, loss="sigmoid", beta=beta)
    assert torch.allclose(minimum.loss, loss, atol=1e-14, rtol=0)  # alone and together: rounding


def test_ipos_minimiser_is_that_of_least_squares():
    n, tau = 12, 0.1
    preferences = random_power_law(n, [0], 0.5)
    weight = (preferences.reference[0, :, None] + preferences.rejected[0, None, :]).exp().numpy()
    design = np.eye(n)[:, None, :] - np.eye(n)[None, :, :]  # h_w - h_l
    root = np.sqrt(weight)[..., None]
    wanted = np.full((n, n, 1), 1 / (2 * tau))
    log_ratio = np.linalg.lstsq((root * design).reshape(-1, n), (root * wanted).reshape(-1), rcond=None)[0]
    expected = (preferences.reference[0] + torch.from_numpy(log_ratio)).log_softmax(-1)
    found = minimise(preferences, loss="ipo", beta=tau)
    assert torch.allclose(found.policy[0], expected, atol=1e-7, rtol=0)  # the flattest direction under gradient 1e-10


def test_training_brings_the_hinge_to_its_linear_programme():
    n, beta = 8, 0.5
    preferences = random_power_law(n, [1], 0.5)
    weight = (preferences.reference[0, :, None] + preferences.rejected[0, None, :]).exp().numpy().reshape(-1)
    design = (np.eye(n)[:, None, :] - np.eye(n)[None, :, :]).reshape(-1, n)
    # minimise weight . slack with slack >= 1 - beta (h_w - h_l), slack >= 0
    programme = linprog(
        np.concatenate([np.zeros(n), weight]),
        A_ub=np.hstack([-beta * design, -np.eye(n * n)]),
        b_ub=-np.ones(n * n),
        bounds=[(None, None)] * n + [(0, None)] * n * n,
    )
    policies = train(preferences, steps=300, step_size=0.3, loss="hinge", beta=beta)
    assert len(policies) == 301
    assert torch.equal(policies[0], preferences.reference)
    losses = [float(population_loss(policies[step], preferences, loss="hinge", beta=beta)) for step in (0, 300)]
    assert losses[0] == pytest.approx(1)
    assert programme.fun - 1e-9 < losses[1] < programme.fun + 1e-3  # steps that shrink to 0 leave some way to go


def test_training_brings_dpo_to_the_target():
    preferences = random_power_law(16, range(2), 0.5)
    policies = train(preferences, steps=300, step_size=0.1, loss="sigmoid", beta=0.5)
    assert jensen_shannon(policies[-1], preferences.target).max() < 1e-6
    alone = train(preferences.replicate(slice(1, 2)), steps=300, step_size=0.1, loss="sigmoid", beta=0.5)
    assert torch.allclose(alone[-1][0], policies[-1][1], atol=1e-9, rtol=0)  # replicates do not meet; rounding differs


def test_power_law_in_numbers():
    reference, target = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    odds = [0.5 * (0.5 / 0.2) ** 2, 0.3 * (0.3 / 0.2) ** 2, 0.2 * (0.2 / 0.6) ** 2]
    preferences = power_law(reference, target, beta=2)
    assert isinstance(preferences, Preferences)
    assert preferences.rejected.exp().tolist() == pytest.approx([value / math.fsum(odds) for value in odds], rel=1e-6)


def test_one_thread_is_for_a_while():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    inside = []

    @one_thread()
    def fail() -> None:
        inside.append(torch.get_num_threads())
        raise KeyError

    try:
        with pytest.raises(KeyError):
            fail()
        assert inside == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
