"""The power law's regression against matrix formulas, on models that obey the law, and its errors over replicates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_did.functional.enumeration import enumerate_did
from lit_did.functional.power_law import fit_power_law, merge_power_law_sums, power_law_sums, power_law_value


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(seed: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """reference_log_ratio, policy_log_ratio, prompt: uneven errors, and prompts of 1 to 8 samples, each its level."""
    prompt = torch.randint(count // 3, (count,), generator=generator(seed))
    level, v, error = torch.randn(3, count, generator=generator(seed + 1), dtype=torch.float64)
    v = 2 * v + 3 * level[prompt]
    return 0.7 * v + 5 * level[prompt] ** 2 + error * (0.5 + v.abs()), v, prompt


def by_matrices(u: Tensor, v: Tensor, prompt: Tensor | None, confidence: float = 0.95) -> dict[str, float]:
    """Everything of `PowerLawFit`, with a column for every intercept, and a loop over groups."""
    u, v = u.numpy(), v.numpy()
    if prompt is None:
        groups = np.arange(len(u))
        constants = np.ones((len(u), 1))
    else:
        prompt = prompt.numpy()
        several = np.isin(prompt, [p for p in prompt if (prompt == p).sum() > 1])
        u, v, prompt = u[several], v[several], prompt[several]
        groups = np.unique(prompt, return_inverse=True)[1]
        constants = np.eye(groups.max() + 1)[groups]
    count, clusters = len(u), groups.max() + 1

    def residual(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return y - x @ np.linalg.lstsq(x, y, rcond=None)[0]

    design = np.column_stack([constants, v])
    coefficients = np.linalg.lstsq(design, u, rcond=None)[0]
    error = u - design @ coefficients

    def deviation(x: np.ndarray) -> float:
        scores = [(x * error)[groups == g].sum() for g in range(clusters)]
        correction = clusters / (clusters - 1) * (count - 1) / (count - 2)
        return math.sqrt(correction * sum(s * s for s in scores)) / (x @ x)

    free = v - v.mean() if prompt is None else residual(v, constants)
    bend = residual(v**2, design)
    freedom = count - 2 if prompt is None else clusters - 1
    margin = stats.t.ppf((1 + confidence) / 2, freedom) * deviation(free)
    t = (bend @ u) / (bend @ bend) / deviation(bend)
    return {
        "exponent": coefficients[-1],
        "lower": coefficients[-1] - margin,
        "upper": coefficients[-1] + margin,
        "standard_error": deviation(free),
        "intercept": coefficients[0] if prompt is None else math.nan,
        "r_squared": 1 - error @ error / (residual(u, constants) @ residual(u, constants)),
        "linearity_p": 2 * stats.t.sf(abs(t), count - 3 if prompt is None else freedom),
        "curvature": 2 * (bend @ u) / (bend @ bend) * math.sqrt(free @ free / count),
        "num_samples": count,
        "num_prompts": 0 if prompt is None else clusters,
    }


@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_against_matrices(with_prompts, confidence):
    u, v, prompt = samples(0)
    prompt = prompt if with_prompts else None
    expected = by_matrices(u, v, prompt, confidence)
    fit = fit_power_law(u, v, group=prompt, confidence=confidence)
    assert fit._asdict() == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert expected["num_samples"] == (60 if prompt is None else 58)  # the premise: some prompts have one sample


def test_against_scipy():
    u, v, _ = samples(1)
    fit, line = fit_power_law(u, v), stats.linregress(v.numpy(), u.numpy())
    assert fit.exponent == pytest.approx(line.slope, rel=1e-12)
    assert fit.intercept == pytest.approx(line.intercept, rel=1e-10)
    assert fit.r_squared == pytest.approx(line.rvalue**2, rel=1e-12)


def test_prompts_are_distinguished_not_ordered():
    u, v, prompt = samples(2)
    order = torch.randperm(len(u), generator=generator(0))
    fit = fit_power_law(u, v, group=prompt)
    other = fit_power_law(u[order], v[order], group=(1000 - 7 * prompt[order]).int())
    assert fit == pytest.approx(other, rel=1e-10, nan_ok=True)
    pooled = fit_power_law(u, v, group=torch.zeros_like(prompt).index_fill(0, torch.arange(20), 1))
    assert abs(pooled.exponent - fit.exponent) > 0.05  # the premise: prompts matter


def test_a_prompts_intercept_would_bias_the_pooled_exponent():
    """log Z goes along with v: with it in one intercept the exponent is another, within prompts it is the law's."""
    _, v, prompt = samples(3)
    highest = torch.stack([v[prompt == p].max() for p in prompt])
    u = 0.5 * v + highest
    assert fit_power_law(u, v, group=prompt).exponent == pytest.approx(0.5, rel=1e-12)
    assert fit_power_law(u, v).exponent > 1


# --- models that obey the law, and others ----------------------------------------------------------------------------


def enumerated(beta: float, *, off: bool = False) -> tuple[Tensor, Tensor]:
    """Both log-ratios of all completions of a bigram model; pi_l proportional to rho (rho / pi)^beta unless `off`."""
    reference, policy, other = 1.5 * torch.randn(3, 5, 5, generator=generator(0), dtype=torch.float64)

    def bigram(logits: Tensor):
        return lambda prefixes: logits[prefixes[:, -1] if prefixes.shape[1] else torch.zeros(1, dtype=torch.long)]

    exact = enumerate_did(bigram(policy), bigram(reference), max_new_tokens=4, eos_token_id=0)
    if off:
        rejected = enumerate_did(bigram(other), bigram(reference), max_new_tokens=4, eos_token_id=0).policy_logprob
    else:
        rejected = (exact.reference_logprob - beta * exact.log_ratio).log_softmax(0)
    return exact.reference_logprob - rejected, exact.log_ratio


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_exact_law_of_enumerated_models(beta):
    u, v = enumerated(beta)
    fit = fit_power_law(u, v)
    assert fit.exponent == pytest.approx(beta, rel=1e-12)
    assert fit.r_squared == pytest.approx(1, abs=1e-12)
    # errors are the square root of what is left of sums of squares in float64
    assert fit.standard_error < 1e-7
    assert fit.linearity_p == 1
    assert fit.curvature == pytest.approx(0, abs=1e-12)
    # q_{rho/pi_l} = q_{pi/rho}^beta / Z', so the intercept is made of the DIDs' normalisers
    did = (v - v.logsumexp(0)) * beta
    assert fit.intercept == pytest.approx(float(u.logsumexp(0) - did.logsumexp(0) - beta * v.logsumexp(0)), rel=1e-9)


def test_models_off_the_law():
    u, v = enumerated(0.5, off=True)
    fit = fit_power_law(u, v)
    assert fit.r_squared < 0.9
    curved = fit_power_law(0.5 * v - 0.05 * v**2, v)
    assert curved.linearity_p < 1e-6
    assert curved.curvature == pytest.approx(-0.1 * float(v.std(correction=0)), rel=1e-9)


def test_unrelated_models_have_an_exponent_towards_minus_one():
    policy, reference, rejected = torch.randn(3, 20_000, generator=generator(0), dtype=torch.float64)
    fit = fit_power_law(2 * reference - rejected, policy - 2 * reference)
    # -var(rho) / (var(pi) + var(rho)) = -4 / 5; a standard error of 0.005
    assert fit.exponent == pytest.approx(-0.8, abs=0.02)


# --- errors over replicates ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicates() -> dict[str, list]:
    """600 fits on a line of slope 0.7: pooled, 400 samples with uneven errors, and within 100 prompts of five."""
    fits: dict[str, list] = {"pooled": [], "prompts": []}
    normal = generator(5)
    prompt = torch.arange(100).repeat_interleave(5)
    for _ in range(600):
        v, error = torch.randn(2, 400, generator=normal, dtype=torch.float64)
        fits["pooled"].append(fit_power_law(0.7 * v + error * (0.3 + v.abs()), v))
        v, error = torch.randn(2, 500, generator=normal, dtype=torch.float64)
        level, slope = torch.randn(2, 100, generator=normal, dtype=torch.float64)[:, prompt]
        u = (0.7 + 0.5 * slope) * v + 5 * level + error  # errors within a prompt go together
        fits["prompts"].append(fit_power_law(u, v + 3 * level, group=prompt))
    return fits


@pytest.mark.parametrize("kind", ["pooled", "prompts"])
def test_the_interval_covers(replicates, kind):
    covered = np.mean([fit.lower <= 0.7 <= fit.upper for fit in replicates[kind]])
    # A standard deviation of sqrt(.95 * .05 / 600) = .009, three of them; HC1 itself lacks a hundredth at this size.
    assert 0.95 - 0.027 - 0.01 < covered < 0.95 + 0.027
    error = np.std([fit.exponent for fit in replicates[kind]])
    assert np.mean([fit.standard_error for fit in replicates[kind]]) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("kind", ["pooled", "prompts"])
def test_p_values_of_data_on_a_line_are_uniform(replicates, kind):
    p = np.array([fit.linearity_p for fit in replicates[kind]])
    for level in (0.05, 0.2, 0.5, 0.8):
        share = np.mean(p < level)
        # three standard deviations of a share of 600, and .02 as the test is uniform only for many samples
        assert share == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 600) + 0.02)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prompts", [False, True])
def test_far_from_zero(with_prompts):
    """Log-ratios of -1,000 with a spread of 1."""
    u, v, prompt = samples(6)
    prompt = prompt if with_prompts else None
    fit = fit_power_law(u, v, group=prompt)._asdict()
    far = fit_power_law(u - 3000, v - 1000, group=prompt)._asdict()
    fit["intercept"] += 0.0 if with_prompts else -3000 + 1000 * fit["exponent"]
    assert far == pytest.approx(fit, rel=1e-8, nan_ok=True)  # the input itself is rounded to 1e-13 of 1,000
    apart = [(prompt if with_prompts else torch.arange(60)) % 3 == i for i in range(3)]
    parts = [power_law_sums(u[i] - 3000, v[i] - 1000, prompt[i] if with_prompts else None) for i in apart]
    merged = power_law_value(merge_power_law_sums(torch.stack(parts)), 0.95)
    assert merged._asdict() == pytest.approx(fit, rel=1e-8, nan_ok=True)


def test_far_apart_batches_merge_to_one():
    u, v, prompt = samples(7)
    u, v = u + 1000.0 * (prompt % 3), v - 2000.0 * (prompt % 3)
    for labels in (None, prompt):
        parts = [
            power_law_sums(u[mine], v[mine], None if labels is None else labels[mine])
            for mine in (prompt % 3 == 0, prompt % 3 == 1, prompt > 100, prompt % 3 == 2)
        ]
        nested = merge_power_law_sums(torch.stack([merge_power_law_sums(torch.stack(parts[:2])), *parts[2:]]))
        fit = fit_power_law(u, v, group=labels)._asdict()
        assert power_law_value(nested, 0.95)._asdict() == pytest.approx(fit, rel=1e-7, nan_ok=True)
        assert fit["num_samples"] == (60 if labels is None else 56)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_prompts", [False, True])
def test_low_precision_input_is_computed_in_float64(dtype, with_prompts):
    u, v, prompt = samples(8)
    u, v, prompt = u.to(dtype), v.to(dtype), prompt if with_prompts else None
    expected = by_matrices(u.double(), v.double(), prompt)
    fit = fit_power_law(u.requires_grad_(), v, group=prompt)
    assert fit._asdict() == pytest.approx(expected, rel=1e-9, nan_ok=True)
    assert not power_law_sums(u, v, prompt).requires_grad


def test_equal_values_do_not_vary_by_rounding():
    tenths = torch.full((7,), 0.1, dtype=torch.float64)
    assert tenths.mean() != tenths[0]  # the premise
    u, v = torch.randn(14, generator=generator(0)), torch.cat([tenths, 7 * tenths])
    with pytest.raises(ValueError, match="`policy_log_ratio` to vary, but got no difference"):
        fit_power_law(u[:7], v[:7])
    with pytest.raises(ValueError, match="`policy_log_ratio` to vary within prompts, but got no difference"):
        fit_power_law(u, v, group=torch.arange(2).repeat_interleave(7))


def test_what_cannot_be_known_is_nan():
    three = fit_power_law(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert math.isnan(three.linearity_p)
    assert math.isnan(three.curvature)
    assert three.exponent == pytest.approx(0.5)
    two_values = torch.tensor([0.0, 0.3, 0.0, 0.3, 0.3], dtype=torch.float64)
    assert math.isnan(fit_power_law(torch.arange(5.0), two_values).linearity_p)
    flat = fit_power_law(torch.ones(5), torch.arange(5.0))
    assert flat.exponent == 0
    assert math.isnan(flat.r_squared)


def test_preference_pairs():
    """Two completions a prompt: the regression of differences on differences, without an intercept."""
    u, v, _ = samples(9)
    prompt = torch.arange(30).repeat(2)
    du, dv = (x[:30] - x[30:] for x in (u, v))
    fit = fit_power_law(u, v, group=prompt)
    assert fit.exponent == pytest.approx(float(du @ dv / (dv @ dv)), rel=1e-12)
    assert 0 < fit.linearity_p < 1


GOOD = {"reference_log_ratio": torch.tensor([0.0, 1.0, 3.0]), "policy_log_ratio": torch.tensor([0.0, 2.0, 1.0])}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reference_log_ratio": [0.0]}, TypeError, "`reference_log_ratio` to be a tensor of floats, but got list"),
        ({"policy_log_ratio": torch.arange(3)}, TypeError, "`policy_log_ratio` to be .* but got torch.int64"),
        ({"reference_log_ratio": torch.zeros(3, 1)}, ValueError, r"`reference_log_ratio` .* \[N\], but got \(3, 1\)"),
        ({"policy_log_ratio": torch.zeros(4)}, ValueError, r"`policy_log_ratio` to have shape \(3,\), but got \(4,\)"),
        (
            {"policy_log_ratio": torch.tensor([0.0, -torch.inf, 1.0])},
            ValueError,
            "`policy_log_ratio` to be finite, but got -inf in sample 1",
        ),
        ({"reference_log_ratio": torch.tensor([0, 1, torch.nan])}, ValueError, "finite, but got nan in sample 2"),
        ({"policy_log_ratio": torch.full((3,), 0.1)}, ValueError, "`policy_log_ratio` to vary, but got no difference"),
        ({"group": torch.zeros(3)}, TypeError, "`group` to be a tensor of integers, but got torch.float32"),
        ({"group": torch.zeros(2).long()}, ValueError, r"`group` to have shape \(3,\), but got \(2,\)"),
        ({"group": torch.tensor([1, 1, 2])}, ValueError, "2 prompts with 2 samples each, or more, but got 1"),
        ({"group": torch.arange(3)}, ValueError, "2 prompts with 2 samples each, or more, but got 0"),
        ({name: value[:2] for name, value in GOOD.items()}, ValueError, r"\[N\] with N >= 3, but got N = 2"),
        ({name: value[:0] for name, value in GOOD.items()}, ValueError, "Expected 3 samples, .* but got 0"),
        (
            {
                "policy_log_ratio": torch.tensor([0.1, 0.1, 0.7, 0.7]),
                "reference_log_ratio": torch.arange(4.0),
                "group": torch.tensor([0, 0, 1, 1]),
            },
            ValueError,
            "`policy_log_ratio` to vary within prompts, but got no difference",
        ),
        ({"confidence": 1.0}, ValueError, r"`confidence` to be in \(0, 1\), but got 1.0"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        fit_power_law(**{**GOOD, **change})
