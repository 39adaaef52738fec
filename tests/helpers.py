"""What the operators' tests share: the truth from the formulas in docs/theory.md, and the rule that judges against it.

Three computations of the same numbers meet in a test: `ours` (an operator of lit_did), `naive` (what somebody would
write in plain torch, in the same precision) and `truth` (NumPy, in float64; extended for float64 input, where the
platform has it). None of them shares code with another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_did.ops.extension import EXTENSION

FIELDS = (
    "policy_logprob",
    "reference_logprob",
    "token_did_entropy",
    "token_did_concentration",
    "token_did_log_partition",
    "policy_entropy",
    "reference_entropy",
    "kl",
    "reverse_kl",
)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


def as_array(tensor: Tensor, dtype: type = np.float64) -> np.ndarray:
    return tensor.detach().double().numpy().astype(dtype)


def simd_level() -> str:
    """The instruction-set level in use; without the extension, "none"."""
    return "none" if EXTENSION.module is None else EXTENSION.module.simd_level()


class Truth(NamedTuple):
    """Values [9, rows] and gradients [rows, V], each with the size of the terms that it is a sum of.

    Terms are what rounding errors are proportional to: a difference of two large terms may be as wrong as they are.
    """

    values: np.ndarray
    policy_grad: np.ndarray
    reference_grad: np.ndarray
    value_terms: np.ndarray
    policy_terms: np.ndarray
    reference_terms: np.ndarray


def truth(policy: Tensor, reference: Tensor, labels: Tensor, upstream: Tensor, temperature: float = 1.0) -> Truth:
    """The tables of docs/theory.md, "One token", for finite logits [rows, V], labels [rows] and upstream [9, rows].

    The logits are brought to a maximum of 0 first, which changes no statistic; the policy's and the reference's maxima
    come back in the terms, because z - r is rounded before they can cancel.
    """
    double = torch.float64 in (policy.dtype, reference.dtype)
    precision = np.longdouble if double else np.float64
    t = precision(temperature)
    z, r = as_array(policy, precision) / t, as_array(reference, precision) / t
    # For float32 the kernels multiply by log2(e) and subtract the maximum in one rounding, and add in float64. For
    # float64 there is nothing wider to add in, and x86 without AVX2 rounds twice: the logits' own size is felt.
    size = (np.abs(z).max(-1) + np.abs(r).max(-1)) * (double or simd_level() == "baseline")
    rounded = np.abs(z - r)
    offset = z.max(-1) - r.max(-1)
    z, r = z - z.max(-1, keepdims=True), r - r.max(-1, keepdims=True)
    d = z - r
    rows, y = np.arange(z.shape[0]), labels.numpy()

    def lse(x: np.ndarray) -> np.ndarray:
        return np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)

    a, b, c = lse(z), lse(r), lse(d)
    log_pi, log_rho, log_q = z - a[:, None], r - b[:, None], d - c[:, None]
    pi, rho, q = np.exp(log_pi), np.exp(log_rho), np.exp(log_q)
    log_ratio = d - a[:, None] + b[:, None]
    h_q, h_pi, h_rho = c - (q * d).sum(-1), a - (pi * z).sum(-1), b - (rho * r).sum(-1)
    kl, reverse_kl = (pi * d).sum(-1) - a + b, a - b - (rho * d).sum(-1)
    concentration = np.log(precision(z.shape[-1])) - h_q
    values = np.stack([log_pi[rows, y], log_rho[rows, y], h_q, concentration, c - a + b, h_pi, h_rho, kl, reverse_kl])
    value_terms = 1 + np.abs(values) + size
    value_terms[2] += (q * np.abs(log_q + h_q[:, None]) * rounded).sum(-1)
    value_terms[3] += h_q + value_terms[2]
    value_terms[4] += np.abs(c) + a + b + np.abs(offset) + (q * rounded).sum(-1)
    value_terms[7] += (pi * (np.abs(log_ratio) + rounded)).sum(-1)
    value_terms[8] += (rho * (np.abs(log_ratio) + rounded)).sum(-1)

    g = as_array(upstream, precision)[:, :, None]
    label = np.zeros_like(z)
    label[rows, y] = 1
    h_q, h_pi, h_rho, kl, reverse_kl = (x[:, None] for x in (h_q, h_pi, h_rho, kl, reverse_kl))
    policy_grad = (
        g[0] * (label - pi)
        - (g[2] - g[3]) * q * (log_q + h_q)
        + g[4] * (q - pi)
        - g[5] * pi * (log_pi + h_pi)
        + g[7] * pi * (log_ratio - kl)
        + g[8] * (pi - rho)
    )
    reference_grad = (
        g[1] * (label - rho)
        + (g[2] - g[3]) * q * (log_q + h_q)
        + g[4] * (rho - q)
        - g[6] * rho * (log_rho + h_rho)
        + g[7] * (rho - pi)
        + g[8] * rho * (-log_ratio - reverse_kl)
    )
    # An exponent is rounded relative to its size, so a probability to eps * (1 + |log p|).
    g, size = np.abs(g), size[:, None]
    pi, rho, q = pi * (1 - log_pi + size), rho * (1 - log_rho + size), q * (1 - log_q + rounded + size)
    from_q = (g[2] + g[3]) * q * (h_q - log_q) + g[4] * q
    ratio = np.abs(log_ratio) + rounded + size
    policy_terms = (
        g[0] * (label + pi)
        + from_q
        + g[4] * pi
        + g[5] * pi * (h_pi - log_pi)
        + g[7] * pi * (ratio + kl)
        + g[8] * (pi + rho)
    )
    reference_terms = (
        g[1] * (label + rho)
        + from_q
        + g[4] * rho
        + g[6] * rho * (h_rho - log_rho)
        + g[7] * (rho + pi)
        + g[8] * rho * (ratio + reverse_kl)
    )
    return Truth(values, policy_grad / t, reference_grad / t, value_terms, policy_terms / t, reference_terms / t)


def naive(policy: Tensor, reference: Tensor, labels: Tensor, temperature: float = 1.0) -> list[Tensor]:
    """The nine statistics as plain torch, in float32 (float64 if either input is), differentiable."""
    double = torch.float64 in (policy.dtype, reference.dtype)
    z, r = ((x.double() if double else x.float()) / temperature for x in (policy, reference))
    log_pi, log_rho, log_q = z.log_softmax(-1), r.log_softmax(-1), (z - r).log_softmax(-1)
    pick = labels[:, None]
    return [
        log_pi.gather(-1, pick)[:, 0],
        log_rho.gather(-1, pick)[:, 0],
        -(log_q.exp() * log_q).sum(-1),
        math.log(z.shape[-1]) + (log_q.exp() * log_q).sum(-1),
        (z - r).logsumexp(-1) - z.logsumexp(-1) + r.logsumexp(-1),
        -(log_pi.exp() * log_pi).sum(-1),
        -(log_rho.exp() * log_rho).sum(-1),
        (log_pi.exp() * (log_pi - log_rho)).sum(-1),
        (log_rho.exp() * (log_rho - log_pi)).sum(-1),
    ]


# Units in the last place of a number's terms that are free. CUDA's float32 exponential, ex2.approx, may be off by two
# of them: 2^-22.
UNITS, CUDA_UNITS = 2, 4


def assert_no_worse_than(ours: Tensor, naive: Tensor, truth: np.ndarray, terms: np.ndarray, what: str = "") -> None:
    """`ours` is at most twice as far from `truth` as `naive` is, entry by entry, plus a floor.

    The floor: naive may hit the truth by luck, so `UNITS` in the last place of the terms are free (in float32, or
    float64 for float64). And a probability below float32's smallest normal number may be 0, times coefficients below
    1,000; float16 has a coarser bottom, the spacing of its subnormal numbers.
    """
    double = ours.dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    smallest = 2**-24 if ours.dtype == torch.float16 else 1000 * torch.finfo(torch.float32).tiny
    error, naive_error = np.abs(as_array(ours) - truth), np.abs(as_array(naive) - truth)
    allowed = 2 * naive_error + (2 if double else UNITS) * eps * terms + smallest
    # Not `error > allowed`, which NaN would pass.
    wrong = ~(error <= allowed)
    if not wrong.any():
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(np.isnan(error), np.inf, np.where(wrong, error / allowed, 0))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{what or 'ours'} is worse than naive at {index} ({int(wrong.sum())} of {wrong.size} entries are):\n"
        f"  truth {float(truth[worst])!r}\n  ours  {ours[worst].item()!r}\n  naive {naive[worst].item()!r}\n"
        f"  error {float(error[worst]):.3g}, allowed {float(allowed[worst]):.3g}"
    )


def random_logits(
    rows: int, vocabulary: int, policy_dtype: torch.dtype, reference_dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A policy, a reference near it, and labels: as peaked as language models are (probabilities from e-15 to 1/2)."""
    generator = torch.Generator().manual_seed(seed)
    policy = 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    reference = policy + 0.7 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) + 2
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return policy.to(policy_dtype), reference.to(reference_dtype), labels
