"""The prediction of two sides against DPO trained to convergence, in float64 on completions that are enumerated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import logsigmoid

from lit_did.audit.sides.prediction import line_between, predicted_change
from lit_did.audit.statistics import calibration_slope
from lit_did.experiments.energy_models import Preferences, entropy, kl, minimise, power_law
from lit_did.functional import enumerate_did
from lit_did.sampling import sample_did
from tests.sampling.bigrams import as_function, bigrams

BETA, LENGTH = 0.5, 3
OPTIONS = {"max_new_tokens": LENGTH, "eos_token_id": 0}


@pytest.fixture(scope="module")
def models():
    """Logits of pi_w, pi_l and rho over 4 tokens, and their log-probabilities of all completions of up to 3."""
    logits = [0.6 * one for one in (*bigrams(4, 0.5, seed=0), bigrams(4, 0.5, seed=2)[0])]
    log_probs = [enumerate_did(as_function(one), as_function(logits[2]), **OPTIONS).policy_logprob for one in logits]
    return logits, log_probs


def test_independent_sides_are_exact(models):
    _, (w, l, rho) = models  # noqa: E741
    optimum = minimise(Preferences(rho[None], w[None], l[None], rho[None]), loss="sigmoid", beta=BETA).policy[0]
    log_partition = (rho + (w - l) / BETA).logsumexp(0)
    change = predicted_change(torch.stack([w - l, w - l], 1), log_partition.expand(len(w)), exponent=1 / BETA)[:, 0]
    np.testing.assert_allclose(change, (optimum - rho).numpy(), atol=1e-6)
    # The means over the two sides, by theory.md's formulas.
    for side, sign, divergence in ((w, 1, kl(w, l)), (l, -1, kl(l, w))):
        mean = float((side.exp() * (optimum - rho)).sum())
        assert float(sign * divergence / BETA - log_partition) == pytest.approx(mean, abs=1e-6)
        assert float(side.exp() @ torch.from_numpy(change)) == pytest.approx(mean, abs=1e-6)
    did = ((w - l) / BETA).log_softmax(0)
    assert float(entropy(did)) == pytest.approx(float(entropy((optimum - rho).log_softmax(0))), abs=1e-6)


def test_draws_have_the_log_partition_and_the_entropy_of_the_trained_policy(models):
    logits, (w, l, rho) = models  # noqa: E741
    chosen, rejected, prior = map(as_function, logits)
    options = {**OPTIONS, "exponent": 1 / BETA, "num_samples": 2048, "progress": False}
    optimum = sample_did(chosen, rejected, prior=prior, **options).estimate
    did = sample_did(chosen, rejected, **options).estimate
    assert optimum.log_partition == pytest.approx(float((rho + (w - l) / BETA).logsumexp(0)), abs=0.2)
    assert did.entropy == pytest.approx(float(entropy(((w - l) / BETA).log_softmax(0))), abs=0.1)


def judged(models, scale: float):
    """Two completions drawn from rho, and labelled by a reward: joint [chosen, rejected], and the reward."""
    rho = models[1][2]
    reward = scale * torch.randn(len(rho), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    joint = 2 * (rho[:, None] + rho[None]).exp() * torch.sigmoid(reward[:, None] - reward[None])
    return joint / joint.sum(), reward, rho


def trained(joint, rho):
    """DPO on the population of pairs, by L-BFGS."""
    logits = rho.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, max_eval=4000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        score = BETA * (logits.log_softmax(0) - rho)
        loss = -(joint * logsigmoid(score[:, None] - score[None])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def slope(joint, log_ratio) -> float:
    """k by maximum likelihood on the population of pairs."""
    difference = log_ratio[:, None] - log_ratio[None]
    return minimize_scalar(lambda k: float(-(joint * logsigmoid(k * difference)).sum()), bounds=(0, 20)).x


def slope_of_draws(joint, log_ratio, count: int = 40_000):
    """The same of pairs that are drawn, as an audit has it."""
    places = torch.multinomial(joint.flatten(), count, replacement=True, generator=torch.Generator().manual_seed(1))
    chosen, rejected = places // len(log_ratio), places % len(log_ratio)
    return calibration_slope((log_ratio[chosen] - log_ratio[rejected]).numpy(), np.arange(count))


@pytest.mark.parametrize(("scale", "most"), [(0.3, 1e-6), (1.0, 0.002), (2.0, 0.03)])
def test_judged_sides_are_an_approximation_that_k_improves(models, scale, most):
    joint, reward, rho = judged(models, scale)
    optimum = trained(joint, rho)
    exact = (rho + reward / BETA).log_softmax(0)
    assert float((optimum.exp() - exact.exp()).abs().max()) < 1e-5  # rho exp(R / beta)
    log_ratio = joint.sum(1).log() - joint.sum(0).log()
    k = slope(joint, log_ratio)
    assert k > 1  # the marginals differ less than the reward
    estimate = slope_of_draws(joint, log_ratio)
    assert estimate.lower < k < estimate.upper

    def divergence(factor: float) -> float:
        """From what was trained to what is predicted with this k."""
        log_partition = (rho + factor * log_ratio / BETA).logsumexp(0).expand(len(rho))
        change = predicted_change(torch.stack([log_ratio, -log_ratio], 1), log_partition, exponent=factor / BETA)
        return float(kl(exact, rho + torch.from_numpy(change[:, 0])))

    assert divergence(k) < divergence(1.0)
    assert divergence(k) < most * float(kl(exact, rho))


def test_k_is_one_for_independent_sides(models):
    _, (w, l, _) = models  # noqa: E741
    joint = (w[:, None] + l[None]).exp()
    assert slope(joint, w - l) == pytest.approx(1, abs=1e-4)
    estimate = slope_of_draws(joint, w - l)
    assert estimate.lower < 1 < estimate.upper
    assert estimate.upper - estimate.lower < 0.2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 0.3])
def test_law_gives_its_share(models, share):
    _, (target, _, rho) = models
    law = power_law(rho, target, BETA, chosen_share=share)
    a, b = torch.randint(len(rho), (2, 50), generator=torch.Generator().manual_seed(0))
    margins = [(x[a] - x[b]).numpy() for x in (law.chosen, law.rejected, law.reference)]
    line = line_between(*margins, np.arange(50))
    assert line.s.value == pytest.approx(share, abs=1e-9)
    assert line.r_squared.value == pytest.approx(1, abs=1e-9)


def test_noise_lowers_r_squared_and_intervals_cover():
    rng = np.random.default_rng(0)
    w, l = rng.normal(size=(2, 400))  # noqa: E741
    line = line_between(w, l, 0.7 * w + 0.3 * l + rng.normal(size=400), np.arange(400))
    assert line.s.lower < 0.3 < line.s.upper
    assert line.r_squared.lower < 0.5 < line.r_squared.upper  # 1 - 1 / 2
    assert line.s.upper - line.s.lower < 0.3
