"""Predicts labels from several kinds of evidence at once, with a Gaussian process that has one kernel for each kind.

The score f of a pair is a sum of linear functions of differences between its sides, one for each kind of evidence. So
swapped sides negate f. The chance of the label is `SHARE` + (1 - 2 `SHARE`) sigmoid(f): a label may be swapped, so
that swapped labels bend f less. Each linear function has normal weights. Their variances maximise Laplace's
approximation of the evidence (Rasmussen and Williams 2006, sections 3.4 and 5.5): evidence that says nothing of the
labels gets a variance near 0.

Scores are held out: what the labels of a prompt's pairs added to the fit is taken out of their scores by a Newton step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import linalg, optimize, special
from scipy.sparse import csr_array

Matrix: TypeAlias = np.ndarray | csr_array

LARGEST_FIT = 3000  # pairs that the scores are fitted to; time grows with the cube
LARGEST_TUNE = 1000  # pairs that the variances are fitted to
SHARE = 0.05  # of swapped labels, as fits assume
_GAIN = 1e-8  # of the posterior, below which a mode is found
_PRIOR = (np.log(0.3), 2.0)  # mean and standard deviation of the logarithm of a variance
_BOUNDS = (-8.0, 6.0)


class HeldOut(NamedTuple):
    """Scores of pairs, from fits without the pairs of their prompt.

    Attributes:
        scores: [pairs] the logits of the labels, below 0 where the evidence speaks against a label.
        contributions: [pairs, matrices], whose sum over matrices are the scores.
        halves: Twice the places of half of the prompts' pairs, and their scores by a fit to the other half. A test of
            one of the two is exact, because neither the fit nor its variances have seen the labels.
    """

    scores: np.ndarray
    contributions: np.ndarray
    halves: list[tuple[np.ndarray, np.ndarray]]


class Fit(NamedTuple):
    """f at the mode of its posterior, and Laplace's approximation.

    Attributes:
        f: [pairs].
        dual: [pairs], with f = K dual.
        first, second, third: [pairs] the derivatives of the log-likelihood in f, the last two negated.
        covariance: [pairs, pairs] of f in the posterior.
        evidence: The logarithm of the approximate evidence.
    """

    f: np.ndarray
    dual: np.ndarray
    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    covariance: np.ndarray
    evidence: float


def held_out(matrices: Sequence[Matrix], groups: np.ndarray, seed: int) -> HeldOut:
    """Scores all pairs. Of more than `LARGEST_FIT` pairs, some prompts are drawn that the scores are fitted to.

    Args:
        matrices: [pairs, features] each: differences, chosen less rejected, of one kind of evidence. None is all 0.
        groups: [pairs] the number of each pair's prompt.
        seed: Of the draw of prompts.
    """
    if not matrices:
        return HeldOut(np.zeros(len(groups)), np.zeros((len(groups), 0)), [])
    fitted = _draw_prompts(groups, LARGEST_FIT, seed)
    _, group = np.unique(groups[fitted], return_inverse=True)
    parts = [matrix[fitted] for matrix in matrices]
    grams = np.empty((len(parts), len(fitted), len(fitted)))
    for number, part in enumerate(parts):
        grams[number] = _gram(part)
    scales = np.maximum(np.einsum("mii->m", grams) / len(fitted), 1e-30)
    grams /= scales[:, None, None]

    def variances_of(places: np.ndarray) -> np.ndarray:
        tuned = places[_draw_prompts(group[places], LARGEST_TUNE, seed)]
        return np.exp(tune(grams[:, tuned[:, None], tuned]))

    half = (np.random.default_rng(seed).permutation(int(group.max()) + 1) % 2)[group]
    halves = []
    for number in (0, 1):
        own, other = np.flatnonzero(half == number), np.flatnonzero(half != number)
        kernel = np.tensordot(variances_of(other), grams, 1)[:, other]
        halves.append((fitted[own], kernel[own] @ mode(kernel[other], SHARE)[1]))
    variances = variances_of(np.arange(len(fitted)))
    fit = laplace(np.tensordot(variances, grams, 1), SHARE)
    duals = without_own(fit, group)
    contributions = np.zeros((len(groups), len(matrices)))
    others = np.setdiff1d(np.arange(len(groups)), fitted)
    for number, (part, variance) in enumerate(zip(parts, variances, strict=True)):
        contributions[fitted, number] = variance * np.einsum("ij,ji->i", grams[number], duals)
        if len(others):
            weights = variance / scales[number] * (part.T @ fit.dual)
            for places in np.array_split(others, len(others) // 10_000 + 1):  # a copy of all would fill the memory
                contributions[places, number] = matrices[number][places] @ weights
    return HeldOut(contributions.sum(axis=1), contributions, halves)


def _draw_prompts(groups: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The places of all pairs of some prompts, about `most` pairs at most."""
    if len(groups) <= most:
        return np.arange(len(groups))
    prompts, sizes = np.unique(groups, return_counts=True)
    # A prompt with very many pairs would take the place of many prompts.
    usual = np.flatnonzero(sizes <= max(most / 10, sizes.min()))
    drawn = np.random.default_rng(seed).permutation(usual)
    kept = drawn[: max(1, int(np.searchsorted(np.cumsum(sizes[drawn]), most, side="right")))]
    return np.flatnonzero(np.isin(groups, prompts[kept]))


def _gram(matrix: Matrix) -> np.ndarray:
    product = matrix @ matrix.T
    return np.asarray(product.toarray() if isinstance(product, csr_array) else product, dtype=float)


# ---------------------------------------------------------------------------------------------- Laplace's approximation


def likelihood(f: np.ndarray, share: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """sum log(share + (1 - 2 share) sigmoid(f)), and [pairs] its derivatives, the last two negated."""
    right, wrong = special.expit(f), special.expit(-f)
    chance = np.maximum(share + (1 - 2 * share) * right, 1e-300)
    first = (1 - 2 * share) * right * wrong / chance
    second = first * (first - (wrong - right))
    third = -2 * first * second + second * (wrong - right) + 2 * first * right * wrong
    return float(np.log(chance).sum()), first, second, third


def mode(kernel: np.ndarray, share: float, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """f where its posterior is highest, and its dual. Newton's method, with shorter steps where one would go down.

    With a share above 0 there may be several modes. The one that is reached from the only mode of share 0 is taken.

    Args:
        kernel: [pairs, pairs] the covariance of f.
        share: Of swapped labels.
        start: A dual of a similar kernel, which saves time.
    """

    def posterior(f: np.ndarray, dual: np.ndarray) -> float:
        return likelihood(f, share)[0] - dual @ f / 2

    f = dual = np.zeros(len(kernel))
    if share:
        f, dual = mode(kernel, 0.0, start)
    elif start is not None:
        f, dual = max((f, dual), (kernel @ start, start), key=lambda at: posterior(*at))
    height = posterior(f, dual)
    for _ in range(100):
        _, first, second, _ = likelihood(f, share)
        curvature = np.maximum(second, 0.05 * special.expit(f) * special.expit(-f) + 1e-9)
        root = np.sqrt(curvature)
        inner = root[:, None] * kernel * root
        inner[np.diag_indices(len(inner))] += 1
        factor = linalg.cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
        target = curvature * f + first
        step = target - root * linalg.cho_solve(factor, root * (kernel @ target), check_finite=False) - dual
        ahead, size = kernel @ step, 1.0
        while True:
            new = f + size * ahead, dual + size * step
            reached = posterior(*new)
            if reached >= height or size < 1e-4:
                break
            size /= 2
        gained = reached - height
        if gained >= 0:
            (f, dual), height = new, reached
        if gained < _GAIN:
            break
    return f, dual


def laplace(kernel: np.ndarray, share: float, start: np.ndarray | None = None) -> Fit:
    """Laplace's approximation of the posterior of f, see `mode` for the arguments."""
    f, dual = mode(kernel, share, start)
    value, first, second, third = likelihood(f, share)
    inner = kernel * second
    inner[np.diag_indices(len(inner))] += 1
    factor = linalg.lu_factor(inner, overwrite_a=True, check_finite=False)
    evidence = value - dual @ f / 2 - np.log(np.abs(np.diag(factor[0]))).sum() / 2
    return Fit(f, dual, first, second, third, linalg.lu_solve(factor, kernel, check_finite=False), float(evidence))


def without_own(fit: Fit, groups: np.ndarray) -> np.ndarray:
    """[pairs, pairs]: in column i the dual of a fit without the labels of pair i's prompt, by one Newton step.

    Without the prompt G, f changes by -V_G c with c = (1 - V_GG W_G)^-1 g_G: V is the posterior covariance, W the
    second and g the first derivative.

    Args:
        fit: To all pairs.
        groups: [pairs] the number of each pair's prompt, from 0.
    """
    count = len(groups)
    order = np.argsort(groups, kind="stable")
    steps = np.zeros((count, int(groups.max()) + 1))
    for own in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        inner = np.eye(len(own)) - fit.covariance[np.ix_(own, own)] * fit.second[own]
        change = np.linalg.solve(inner.T, fit.first[own])
        column = fit.second * (fit.covariance[:, own] @ change)
        column[own] -= change
        steps[:, groups[own[0]]] = column
    return fit.dual[:, None] + steps[:, groups]


# ------------------------------------------------------------------------------------------------------------ variances


def tune(grams: np.ndarray) -> np.ndarray:
    """[kinds] the logarithms of the variances that have the highest evidence, with a weak prior.

    Args:
        grams: [kinds, pairs, pairs] the kernels of each kind.
    """
    last: list[np.ndarray | None] = [None]

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, last[0] = log_evidence(grams, logs, last[0])
        from_mean = (logs - _PRIOR[0]) / _PRIOR[1]
        return from_mean @ from_mean / 2 - value, from_mean / _PRIOR[1] - gradient

    start, bounds = np.zeros(len(grams)), [_BOUNDS] * len(grams)
    options = {"maxiter": 25, "ftol": 1e-4}
    return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def log_evidence(
    grams: np.ndarray, logs: np.ndarray, start: np.ndarray | None = None
) -> tuple[float, np.ndarray, np.ndarray]:
    """The logarithm of the evidence, its gradient in the log-variances, and the dual."""
    variances = np.exp(logs)
    kernel = np.tensordot(variances, grams, 1)
    fit = laplace(kernel, SHARE, start)
    precision = -(fit.second[:, None] * fit.covariance * fit.second)
    precision[np.diag_indices(len(precision))] += fit.second
    through_mode = -np.diag(fit.covariance) * fit.third / 2
    through_mode = through_mode - precision @ (kernel @ through_mode)
    whole = (np.outer(fit.dual, fit.dual) - precision) / 2 + np.outer(through_mode, fit.first)
    return fit.evidence, variances * np.einsum("ij,mij->m", whole, grams), fit.dual
