"""The share of swapped labels, from held-out scores that say how strongly each pair's features support its label.

The model of a label: P(right | s) = eps + (1 - 2 eps) sigmoid(k sign(s) |s|^a). Without swaps, eps is 0, and the chance
of a wrong label vanishes as the score grows. A share of swaps leaves a floor. The power a lets the curve be steeper or
flatter than a logistic one, so that scores on another scale than logits are not taken for swaps.

Pairs of a prompt may be right or wrong together. The likelihood ratios are divided by the design effect: the variance
of the sums of the efficient scores over prompts, over that of independent pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from lit_did.audit.report import Estimate

_LARGEST = 0.45  # of eps: at 1/2, labels and scores are unrelated, and k has no meaning
_POWERS = (0.75, 2.5)  # of a; flatter curves look like swaps, and would hide them
_START = np.array([0.0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.07, 0.11, 0.16, 0.22, 0.3, 0.38, _LARGEST])


class LabelNoise(NamedTuple):
    """The fitted model, see the module.

    Attributes:
        share: eps, with its profile-likelihood interval. The count is the number of prompts.
        slope: k, for scores divided by `scale`.
        power: a.
        scale: The scores' root mean square.
        p_value: Of the likelihood-ratio test of eps = 0. The statistic is 0 half of the time, as eps is at a boundary.
        p_unrelated: Of the likelihood-ratio test of k = 0: labels and scores are unrelated.
    """

    share: Estimate
    slope: float
    power: float
    scale: float
    p_value: float
    p_unrelated: float

    def label_probability(self, scores: np.ndarray) -> np.ndarray:
        """The chance that a pair with this score gets the label that it has, swaps included."""
        eps = self.share.value
        return eps + (1 - 2 * eps) * special.expit(self._logits(scores))

    def swap_probability(self, scores: np.ndarray) -> np.ndarray:
        """The chance that a pair with this score has a swapped label, given the label that it has.

        eps is taken as half a pair (of one a prompt) at least. With 0, all chances would be 0 and would rank nothing.
        """
        eps, logits = max(self.share.value, 0.5 / self.share.count), self._logits(scores)
        swapped, right = eps * special.expit(-logits), (1 - eps) * special.expit(logits)
        return swapped / np.maximum(swapped + right, np.finfo(float).tiny)

    def _logits(self, scores: np.ndarray) -> np.ndarray:
        scaled = np.asarray(scores, dtype=float) / self.scale
        return self.slope * np.sign(scaled) * np.abs(scaled) ** self.power


def fit_label_noise(scores: np.ndarray, groups: np.ndarray) -> LabelNoise:
    """Fits the model by maximum likelihood.

    Args:
        scores: [pairs], held out: positive where the features support the label.
        groups: [pairs] the number of each pair's prompt.
    """
    scores = np.asarray(scores, dtype=float)
    scale = float(np.sqrt(np.mean(np.square(scores)))) or 1.0
    sign, size = np.sign(scores), np.log(np.maximum(np.abs(scores) / scale, 1e-12))

    def gradients(eps: float, log_slope: float, log_power: float) -> tuple[np.ndarray, np.ndarray]:
        """[pairs] the likelihood, and [3, pairs] the gradient of its logarithm in eps, log k and log a."""
        power = np.exp(log_power)
        logits = sign * np.exp(np.clip(log_slope + power * size, -700, 6.5))
        right = special.expit(logits)
        likelihood = np.maximum(eps + (1 - 2 * eps) * right, 1e-300)
        slope = (1 - 2 * eps) * right * (1 - right) / likelihood * logits
        return likelihood, np.stack([(1 - 2 * right) / likelihood, slope, slope * power * size])

    def loss(eps: float, log_slope: float, log_power: float) -> tuple[float, np.ndarray]:
        """The negative log-likelihood, and its gradient in log k and log a."""
        likelihood, gradient = gradients(eps, log_slope, log_power)
        return -float(np.log(likelihood).sum()), -gradient[1:].sum(axis=1)

    bounds = [(np.log(1e-6), np.log(1e3)), tuple(np.log(_POWERS))]

    def profile(eps: float, start: np.ndarray) -> optimize.OptimizeResult:
        return optimize.minimize(lambda at: loss(eps, *at), start, jac=True, method="L-BFGS-B", bounds=bounds)

    start = np.zeros(2)
    fits = []
    for eps in _START:  # each from the one before
        fits.append(profile(eps, start))
        start = fits[-1].x
    best = int(np.argmin([fit.fun for fit in fits]))
    around = (_START[max(0, best - 1)], _START[min(len(_START) - 1, best + 1)])
    middle = fits[best].x
    found = optimize.minimize_scalar(lambda eps: profile(eps, middle).fun, bounds=around, options={"xatol": 1e-6})
    eps, lowest = (float(found.x), float(found.fun)) if found.fun < fits[best].fun else (_START[best], fits[best].fun)
    fit = profile(eps, middle)
    lowest = min(lowest, fit.fun)
    _, numbers = np.unique(groups, return_inverse=True)
    _, at_best = gradients(eps, *fit.x)
    effect = _design_effect(at_best[0], at_best[1:], numbers)
    statistic = max(0.0, 2 * (fits[0].fun - lowest)) / effect
    unrelated = max(0.0, 2 * (len(scores) * np.log(2) - min(fits[0].fun, lowest)))
    unrelated /= _design_effect(at_best[1], at_best[:0], numbers)
    half = stats.chi2.ppf(0.95, 1) / 2 * effect

    def crosses(value: float) -> float:
        return profile(value, fit.x).fun - lowest - half

    lower = 0.0 if crosses(0.0) <= 0 else optimize.brentq(crosses, 0.0, eps, xtol=1e-5)
    upper = _LARGEST if crosses(_LARGEST) <= 0 else optimize.brentq(crosses, eps, _LARGEST, xtol=1e-5)
    return LabelNoise(
        Estimate(float(eps), float(lower), float(upper), int(numbers.max()) + 1),
        slope=float(np.exp(fit.x[0])),
        power=float(np.exp(fit.x[1])),
        scale=scale,
        p_value=float(stats.chi2.sf(statistic, 1) / 2) if statistic > 0 else 1.0,
        p_unrelated=float(stats.chi2.sf(unrelated, 2)),
    )


def _design_effect(scores: np.ndarray, others: np.ndarray, groups: np.ndarray) -> float:
    """By how much pairs of a prompt that are right or wrong together raise the variance of an estimate, at least 1.

    Args:
        scores: [pairs] the gradients of the log-likelihoods in the parameter.
        others: [parameters, pairs] those in parameters that are estimated too.
        groups: [pairs] the number of each pair's prompt, from 0.
    """
    known = np.vstack([np.ones(len(scores)), others])
    efficient = scores - np.linalg.lstsq(known.T, scores, rcond=None)[0] @ known
    alone = float(np.square(efficient).sum())
    return max(1.0, float(np.square(np.bincount(groups, efficient)).sum()) / alone) if alone else 1.0
