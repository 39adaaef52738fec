"""The power law of preferences, q_{rho/pi_l} proportional to q_{pi/rho}^beta: its exponent, by regression.

`fit_power_law` is the twin of `lit_did.metrics.PowerLawExponent`. Both go through sums of fixed size, which merge over
batches and processes: `power_law_sums`, `merge_power_law_sums`, `power_law_value`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_did.functional.did_entropy import check_confidence, kind
from lit_did.representing import short_repr

# Of every sample, v = policy_log_ratio and u = reference_log_ratio less a pivot: (1, v, v^2, u). In the regression
# within prompts all four less the prompt's mean, so that the first is 0.
ONE, V, V_SQUARED, U = range(4)
SIZES = {"count": 1, "groups": 1, "pivot": 2, "gram": 16, "gram_squared": 256}
ROUNDING = 1e-12
"""a sum of squares that is less of what it was before a projection is rounding: its square is still above float64's"""


@short_repr
class PowerLawFit(NamedTuple):
    """The regression log rho(y) - log pi_l(y) = intercept + beta (log pi(y) - log rho(y)) + error. Floats."""

    exponent: float
    """beta: nats of `reference_log_ratio` a nat of `policy_log_ratio`"""
    lower: float
    """where the confidence interval of `exponent` begins"""
    upper: float
    """where it ends"""
    standard_error: float
    """of `exponent`; robust to unequal variances of the errors (HC1), with `group` also to correlations in prompts
    (CR1)"""
    intercept: float
    """in nats; NaN with `group`, where every prompt has its own"""
    r_squared: float
    """the share of the variance of `reference_log_ratio` (with `group`, within prompts) that the law explains"""
    linearity_p: float
    """the p-value of a quadratic term: small where the points lie on a curve; 1 where all lie exactly on the line"""
    curvature: float
    """by how much the exponent changes over one standard deviation of `policy_log_ratio`, by that quadratic term"""
    num_samples: int
    """that count: with `group`, those of prompts with two or more"""
    num_prompts: int
    """with two or more samples; 0 without `group`"""


def fit_power_law(
    reference_log_ratio: Tensor,
    policy_log_ratio: Tensor,
    *,
    group: Tensor | None = None,
    confidence: float = 0.95,
) -> PowerLawFit:
    """The exponent beta of q_{rho/pi_l} proportional to q_{pi/rho}^beta, by least squares, and whether it is a law.

    Where the law holds (Won et al., arXiv 2505.23761), preferences of rho's completions over those of pi_l are what
    DPO's reward with this beta learns, and pi is their optimum: log rho(y) - log pi_l(y) is linear in
    log pi(y) - log rho(y). Each log-ratio is a DID's log-density up to a constant of the prompt, log Z. So with
    completions of several prompts give `group`: each then has its own intercept, and only differences between
    completions of one prompt count. Without it all are taken to have one intercept, and the exponent is biased where
    log Z goes along with the log-ratios, as both do with completions' lengths.

    Both log-ratios hold log rho(y), with opposite signs. That attenuates nothing, as they are exact numbers of three
    models, not measurements: on the law every sample lies on the line. Off it, where pi_l and pi have nothing to do
    with each other, the shared rho may pull the exponent below 0, down to -1; and rounding of rho's log-probabilities,
    such as bfloat16's, does the same. The exponent off the law depends on where the completions were drawn from.

    Read `r_squared`, `linearity_p` and `curvature` beside it: with many samples a curvature that matters to nobody has
    a small p-value.

    Args:
        reference_log_ratio: [N] log rho(y) - log pi_l(y), rho the reference and pi_l the model of the rejected
            samples, summed over the completion, in nats, any float dtype.
        policy_log_ratio: [N] log pi(y) - log rho(y).
        group: [N] integers, equal where completions have one prompt: a preference pair's two sides, say. Errors may
            then be correlated within prompts. A prompt's only completion does not count.
        confidence: Of the interval, in (0, 1).

    Returns:
        PowerLawFit: floats computed in float64, without gradients. The interval is a t interval, of N - 2 or
        `num_prompts` - 1 degrees of freedom. `r_squared` is NaN where `reference_log_ratio` does not vary;
        `linearity_p` and `curvature` are NaN with 3 samples, or where `policy_log_ratio` takes but two values.

    Raises:
        TypeError: An argument is no tensor, or has the wrong kind of dtype.
        ValueError: Shapes do not agree, a value is not finite, `confidence` is out of range, there are fewer than 3
            samples or than 2 prompts with two, or `policy_log_ratio` does not vary.

    Example:
        >>> policy_log_ratio = torch.linspace(-2, 2, 101, dtype=torch.float64)
        >>> fit = fit_power_law(0.5 * policy_log_ratio + 1, policy_log_ratio)
        >>> round(fit.exponent, 4), round(fit.intercept, 4), round(fit.r_squared, 4), fit.linearity_p
        (0.5, 1.0, 1.0, 1.0)
        >>> fit = fit_power_law(0.5 * policy_log_ratio + 0.1 * policy_log_ratio**2, policy_log_ratio)
        >>> round(fit.exponent, 4), round(fit.curvature, 4), fit.linearity_p < 1e-6
        (0.5, 0.2332, True)
    """
    check_confidence(confidence)
    sums = power_law_sums(reference_log_ratio, policy_log_ratio, group)
    missing = _missing(sums)
    if missing:
        raise ValueError(missing)
    return power_law_value(sums, confidence)


def power_law_sums(reference_log_ratio: Tensor, policy_log_ratio: Tensor, group: Tensor | None = None) -> Tensor:
    """All that the regression needs of samples, [276] float64: see `SIZES`.

    With f a sample's four features (`ONE`, ...) and G = sum of f f^T over a group, which is a prompt or else a sample:

    - `count`: samples; `groups`: groups; `pivot`: what was subtracted from v and u
    - `gram`: sum of all G, [4, 4]
    - `gram_squared`: sum over groups of the outer product of G with itself, [4, 4, 4, 4]. A residual is c^T f for some
      c, and so a group's score of the regression is G c: robust errors, made of the scores' squares, are linear in it.
    """
    u, v = _checked(reference_log_ratio, policy_log_ratio, group)
    if len(v) == 0:
        return v.new_zeros(sum(SIZES.values()))
    if group is not None:
        _, index, sizes = torch.unique(group.to(v.device), return_inverse=True, return_counts=True)
        several = sizes[index] > 1
        u, v = u[several], v[several]
        _, index = torch.unique(index[several], return_inverse=True)
        if len(v) == 0:
            return v.new_zeros(sum(SIZES.values()))
    pivot = torch.stack([_mean(v), _mean(u)])
    if group is not None:
        pivot[1] = 0  # u is centred prompt by prompt
    v = v - pivot[0]
    features = torch.stack([torch.ones_like(v), v, v.square(), u - pivot[1]], -1)
    if group is not None:
        features = _within(features, index)
    gram = (features[:, :, None] * features[:, None, :]).flatten(1)
    if group is not None:
        gram = gram.new_zeros(int(index.max()) + 1, 16).index_add(0, index, gram)
    numbers = pivot.new_tensor([len(v), len(gram)])
    return torch.cat([numbers, pivot, gram.sum(0), (gram.T @ gram).flatten()])


def merge_power_law_sums(parts: Tensor) -> Tensor:
    """[276] of several [parts, 276], such as batches or processes: as if all samples had been one batch.

    Each part is moved to the mean of all samples first, which keeps the sums as exact as they would be in one batch.

    Raises:
        ValueError: Some have prompts and others do not.
    """
    count, groups, pivot, gram, gram_squared = parts.split(list(SIZES.values()), -1)
    pooled = gram[:, 0] > 0
    if (pooled.any() & (~pooled & (count[:, 0] > 0)).any()).item():
        raise ValueError("Expected `group` in all updates or in none, but got both.")
    anchor = pivot[count.argmax()]  # from there equal pivots have their mean exactly
    moved_to = anchor + (count * (pivot - anchor)).sum(0) / count.sum().clamp(min=1)
    by_v, by_u = (moved_to - pivot).unbind(-1)
    shift = torch.eye(4, dtype=parts.dtype, device=parts.device).repeat(len(parts), 1, 1)
    shift[:, V, ONE], shift[:, U, ONE] = -by_v, -by_u
    shift[:, V_SQUARED, V], shift[:, V_SQUARED, ONE] = -2 * by_v, by_v.square()
    shift = torch.einsum("nab,ncd->nacbd", shift, shift).reshape(-1, 16, 16)
    gram = (shift @ gram[:, :, None]).sum(0)
    gram_squared = (shift @ gram_squared.view(-1, 16, 16) @ shift.mT).sum(0)
    return torch.cat([count.sum(0), groups.sum(0), moved_to, gram.flatten(), gram_squared.flatten()])


def power_law_value(sums: Tensor, confidence: float) -> PowerLawFit:
    """The fit of sums [276]; NaN where there is too little, or `policy_log_ratio` does not vary."""
    from scipy.special import stdtr, stdtrit  # here, so that `import lit_did` does not wait for it

    sums = sums.cpu()
    count, groups, pivot, gram, gram_squared = sums.split(list(SIZES.values()))
    count, groups, gram = int(count), int(groups), gram.view(4, 4)
    pooled = bool(gram[ONE, ONE] > 0)
    num_prompts = 0 if pooled else groups
    if _missing(sums):
        nan = math.nan
        return PowerLawFit(nan, nan, nan, nan, nan, nan, nan, nan, count, num_prompts)

    def squares(one: Tensor) -> float:
        return float(one @ gram @ one)

    def variance(of: Tensor, error: Tensor, parameters: int) -> float:
        """Of the coefficient of the feature `of`, which is orthogonal to all others in the regression."""
        score_squares = torch.einsum("abcd,a,b,c,d", gram_squared.view(4, 4, 4, 4), of, error, of, error)
        correction = groups / (groups - 1) * (count - 1) / (count - parameters)
        return correction * max(float(score_squares), 0.0) / squares(of) ** 2

    constant = [ONE] if pooled else []
    v, error = _orthogonal(gram, V, constant), _orthogonal(gram, U, [*constant, V])
    exponent = -float(error[V])
    standard_error = math.sqrt(variance(v, error, 2))
    freedom = count - 2 if pooled else groups - 1
    margin = float(stdtrit(freedom, (1 + confidence) / 2)) * standard_error
    total = squares(_orthogonal(gram, U, constant))
    exact = squares(error) <= ROUNDING * total

    bend = _orthogonal(gram, V_SQUARED, [*constant, V])
    linearity_p = curvature = math.nan
    if count > 3 and squares(bend) > ROUNDING * squares(_orthogonal(gram, V_SQUARED, constant)):
        coefficient = float(bend @ gram[:, U]) / squares(bend)
        curvature = 2 * coefficient * math.sqrt(squares(v) / count)
        # With the line's residuals, not the parabola's: of 100 samples, up to 8 % of the p-values of data on a line are
        # below 0.05 with the former, up to 28 % with the latter.
        deviation = math.sqrt(variance(bend, error, 2))
        t = abs(coefficient) / deviation if deviation else math.inf
        linearity_p = 1.0 if exact else 2 * float(stdtr(freedom - pooled, -t))
    return PowerLawFit(
        exponent,
        exponent - margin,
        exponent + margin,
        standard_error,
        float(pivot[1]) - exponent * float(pivot[0]) - float(error[ONE]) if pooled else math.nan,
        1 - squares(error) / total if total else math.nan,
        linearity_p,
        curvature,
        count,
        num_prompts,
    )


def _missing(sums: Tensor) -> str | None:
    """Why there is no exponent, as an error's sentence."""
    count, groups, _, gram, _ = sums.split(list(SIZES.values()))
    if gram[0] > 0 and count < 3:
        return f"Expected `policy_log_ratio` to have shape [N] with N >= 3, but got N = {int(count)}."
    if gram[0] == 0 and groups < 2:
        return f"Expected 3 samples, or with `group` 2 prompts with 2 samples each, or more, but got {int(groups)}."
    if gram.view(4, 4)[V, V] == 0:
        return f"Expected `policy_log_ratio` to vary{' within prompts' if gram[0] == 0 else ''}, but got no difference."
    return None


def _orthogonal(gram: Tensor, feature: int, others: list[int]) -> Tensor:
    """[4] coefficients of `feature` less its projection on the `others`."""
    coefficients = gram.new_zeros(4)
    coefficients[feature] = 1
    if others:
        coefficients[others] = -torch.linalg.solve(gram[others][:, others], gram[others, feature])
    return coefficients


def _mean(values: Tensor) -> Tensor:
    """The mean over the first dimension, exact where all are equal, so that what is constant has a variance of 0."""
    return values[0] + (values - values[0]).mean(0)


def _within(features: Tensor, index: Tensor) -> Tensor:
    """[N, 4] less the means over groups, and as exact as `_mean`."""
    groups = int(index.max()) + 1
    anchor = features.new_zeros(groups, 4)
    anchor[index] = features  # any one of the group
    features = features - anchor[index]
    sizes = torch.bincount(index, minlength=groups)
    return features - (torch.zeros_like(anchor).index_add(0, index, features) / sizes[:, None])[index]


def _checked(reference_log_ratio: Tensor, policy_log_ratio: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both log-ratios in float64, without gradients."""
    for name, value in {"reference_log_ratio": reference_log_ratio, "policy_log_ratio": policy_log_ratio}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"Expected `{name}` to be a tensor of floats, but got {kind(value)}.")
        if value.dim() != 1 or value.shape != reference_log_ratio.shape:
            expected = "[N]" if value is reference_log_ratio else f"({len(reference_log_ratio)},)"
            raise ValueError(f"Expected `{name}` to have shape {expected}, but got {tuple(value.shape)}.")
        if not value.isfinite().all():
            index = int((~value.isfinite()).nonzero()[0])
            raise ValueError(f"Expected `{name}` to be finite, but got {float(value[index])} in sample {index}.")
    if group is not None:
        if not isinstance(group, Tensor) or group.is_floating_point() or group.is_complex():
            raise TypeError(f"Expected `group` to be a tensor of integers, but got {kind(group)}.")
        if group.shape != policy_log_ratio.shape:
            raise ValueError(
                f"Expected `group` to have shape {tuple(policy_log_ratio.shape)}, but got {tuple(group.shape)}."
            )
    return reference_log_ratio.detach().double(), policy_log_ratio.detach().double()
