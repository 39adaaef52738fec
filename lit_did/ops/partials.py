"""Statistics of slices of a vocabulary, and how they merge into those of the whole.

A slice is described by `NUM_PARTIALS` float64 numbers a token, relative to the slice's own distributions, so that
nothing cancels and slices merge in any grouping; in nats, but log-sum-exps to base 2 as in csrc/row_statistics.h. They
come from the fused operator, which reads a slice as though it were the vocabulary. With w_s, v_s, u_s the shares of
slice s in pi, rho and q:

    log pi(y) = log pi_s(y) + log w_s            of the slice that holds the label
    H(pi) = sum_s w_s (H(pi_s) - log w_s)        and so H(rho), H(q)
    KL(pi, rho) = sum_s w_s (KL(pi_s, rho_s) + log w_s - log v_s)    and so KL(rho, pi)
    log Z = C - A + B                            of the log-sum-exps of the policy, the reference and their difference

With S_s the size of the slice's support and S their sum, the concentration is a KL, too: of q from the uniform
distribution over the support, log S - H(q) = sum_s u_s (log S_s - H(q_s) + log u_s - log (S_s / S)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_did.ops.reference import LARGEST_LOGIT
from lit_did.ops.statistics import TokenStatistics

# The numbers of a slice, in their order. The log-sum-exps are -inf where the slice has no finite entry on that side (in
# common, for the difference), and NaN where it holds NaN or +inf; the rest is 0 where it means nothing.
(
    POLICY_LOGPROB,
    REFERENCE_LOGPROB,
    POLICY_LSE,
    REFERENCE_LSE,
    DIFFERENCE_LSE,
    POLICY_ENTROPY,
    REFERENCE_ENTROPY,
    TOKEN_DID_ENTROPY,
    TOKEN_DID_CONCENTRATION,
    KL,
    REVERSE_KL,
    SUPPORT_SIZE,
    HOLDS_LABEL,  # from here on 0 or 1
    POLICY_HOLE,
    REFERENCE_HOLE,
    INFINITE,
) = range(16)
NUM_PARTIALS = 16
_Side = tuple[Tensor, Tensor, Tensor]  # log-probability, entropy and log-sum-exp
NO_LABEL = torch.iinfo(torch.int64).min  # for `ignore_index` where every label counts


def slice_partials(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    temperature: float,
    sides_may_be_empty: bool = True,
) -> Tensor:
    """The partial statistics of one slice.

    Args:
        policy_logits, reference_logits: [N, slice], as `torch.ops.lit_did.token_statistics` takes them.
        labels: [N] int64, counted from the slice's first entry; they may lie outside.
        sides_may_be_empty: Whether a row may be -inf throughout on one side. It is then read again, after a look at the
            values that waits for the device.

    Returns:
        [NUM_PARTIALS, N] float64.
    """
    size = policy_logits.shape[-1]
    inside = (labels >= 0) & (labels < size)
    y = labels.clamp(0, size - 1)
    *outputs, normalizers = torch.ops.lit_did.token_statistics(
        policy_logits, reference_logits, y, NO_LABEL, temperature, False
    )
    s = TokenStatistics(*(value.double() for value in outputs))
    a, b, c = normalizers[:, :3].unbind(-1)
    flags, support_size = normalizers[:, 3].long(), normalizers[:, 4]
    policy_hole, reference_hole = (flags & 1).bool(), (flags & 2).bool()
    policy = s.policy_logprob, s.policy_entropy, a
    reference = s.reference_logprob, s.reference_entropy, b
    undefined = a.isnan()
    if sides_may_be_empty and undefined.any():
        # Nothing finite on a side, as where a vocabulary is padded, is no error in a slice: each side by itself then.
        policy = _where(undefined, _one_side(policy_logits, y, temperature), policy)
        reference = _where(undefined, _one_side(reference_logits, y, temperature), reference)
        a, b = policy[-1], reference[-1]
        empty = (a == -torch.inf) | (b == -torch.inf)
        c = c.masked_fill(empty, -torch.inf)
        policy_hole, reference_hole = policy_hole | (empty & (b > a)), reference_hole | (empty & (a > b))

    def finite(value: Tensor) -> Tensor:  # what is not is so because of a hole, or of NaN that the log-sum-exps show
        return value.nan_to_num(0, 0, 0)

    return torch.stack(
        [
            *(torch.where(inside, side[0], 0) for side in (policy, reference)),
            *(a, b, c, policy[1], reference[1]),
            *(finite(value) for value in (s.token_did_entropy, s.token_did_concentration, s.kl, s.reverse_kl)),
            support_size,
            *(flag.double() for flag in (inside, policy_hole, reference_hole, (flags & 4).bool())),
        ]
    )


def _where(condition: Tensor, one: _Side, other: _Side) -> _Side:
    first, second, third = (torch.where(condition, *values) for values in zip(one, other, strict=True))
    return first, second, third


def _one_side(logits: Tensor, labels: Tensor, temperature: float) -> _Side:
    """Log-probability, entropy and log-sum-exp [N] float64 of one side; -inf, 0 and -inf where nothing is finite."""
    *outputs, normalizers = torch.ops.lit_did.token_statistics(logits, logits, labels, NO_LABEL, temperature, False)
    s = TokenStatistics(*(value.double() for value in outputs))
    empty = logits.amax(-1).double() < -LARGEST_LOGIT * temperature  # double: float16 has no such limit
    return (
        s.policy_logprob.masked_fill(empty, -torch.inf),
        s.policy_entropy.masked_fill(empty, 0),
        normalizers[:, 0].masked_fill(empty, -torch.inf),
    )


def merge_partials(slices: Tensor) -> Tensor:
    """The partial statistics [NUM_PARTIALS, N] of several slices [slices, NUM_PARTIALS, N] together."""

    def shares(index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The log-sum-exp [N] over all slices, each slice's share in it and the share's logarithm [slices, N]."""
        lse = slices[:, index]
        empty = lse == -torch.inf
        peak = lse.amax(0)
        peak = peak.masked_fill(peak == -torch.inf, 0)
        total = peak + (lse - peak).exp2().sum(0).log2()
        log_share = math.log(2) * (lse - total).masked_fill(empty, 0)
        return total, log_share.exp().masked_fill(empty, 0), log_share

    a, w, log_w = shares(POLICY_LSE)
    b, v, log_v = shares(REFERENCE_LSE)
    c, u, log_u = shares(DIFFERENCE_LSE)
    support_size = slices[:, SUPPORT_SIZE]
    total_size = support_size.sum(0)
    log_uniform = (support_size / total_size).log().masked_fill(u == 0, 0)
    held = slices[:, HOLDS_LABEL]
    return torch.stack(
        [
            (slices[:, POLICY_LOGPROB] + held * log_w).sum(0),
            (slices[:, REFERENCE_LOGPROB] + held * log_v).sum(0),
            *(a, b, c),
            (w * (slices[:, POLICY_ENTROPY] - log_w)).sum(0),
            (v * (slices[:, REFERENCE_ENTROPY] - log_v)).sum(0),
            (u * (slices[:, TOKEN_DID_ENTROPY] - log_u)).sum(0),
            (u * (slices[:, TOKEN_DID_CONCENTRATION] + log_u - log_uniform)).sum(0),
            (w * (slices[:, KL] + log_w - log_v)).sum(0),
            (v * (slices[:, REVERSE_KL] + log_v - log_w)).sum(0),
            total_size,
            *slices[:, HOLDS_LABEL:].amax(0),
        ]
    )


def finish_partials(partials: Tensor, dtype: torch.dtype) -> tuple[TokenStatistics, Tensor]:
    """What the whole vocabulary's partial statistics [NUM_PARTIALS, N] say.

    Returns:
        TokenStatistics: nine tensors [N] of `dtype`, as the fused operator would return them; log-probabilities of
        labels that no slice holds are NaN.
        normalizers: [N, 5] float64, as `torch.ops.lit_did.token_statistics_backward` reads them.
    """
    a, b, c = partials[POLICY_LSE : DIFFERENCE_LSE + 1]
    held, policy_hole, reference_hole, infinite = partials[HOLDS_LABEL:].bool()
    invalid = ~((a > -torch.inf) & (b > -torch.inf))
    statistics = TokenStatistics(
        policy_logprob=partials[POLICY_LOGPROB].masked_fill(~held, torch.nan),
        reference_logprob=partials[REFERENCE_LOGPROB].masked_fill(~held, torch.nan),
        token_did_entropy=partials[TOKEN_DID_ENTROPY].masked_fill(reference_hole, torch.nan),
        token_did_concentration=partials[TOKEN_DID_CONCENTRATION].clamp(min=0).masked_fill(reference_hole, torch.nan),
        token_did_log_partition=(math.log(2) * (c - a + b)).masked_fill(reference_hole, torch.inf),
        policy_entropy=partials[POLICY_ENTROPY],
        reference_entropy=partials[REFERENCE_ENTROPY],
        kl=partials[KL].masked_fill(reference_hole, torch.inf),
        reverse_kl=partials[REVERSE_KL].masked_fill(policy_hole, torch.inf),
    )
    flags = (policy_hole.double() + 2 * reference_hole.double() + 4 * infinite.double()).masked_fill(invalid, 4)
    log_sum_exps = (value.masked_fill(invalid, torch.nan) for value in (a, b, c))
    normalizers = torch.stack([*log_sum_exps, flags, partials[SUPPORT_SIZE]], -1)
    return (
        TokenStatistics(*(value.masked_fill(invalid, torch.nan).to(dtype) for value in statistics)),
        normalizers,
    )
