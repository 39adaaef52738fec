"""The specification in plain torch: slow, short, differentiable, on any device. The fused code is tested against it.

z and r are the two rows of logits divided by the temperature, pi = softmax(z), rho = softmax(r) and q = softmax(z - r).
`lit-did docs theory` has the formulas, and the rules for infinite and NaN logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_did.ops.statistics import TokenStatistics

LARGEST_LOGIT = 1e6  # float32 has no digits left for differences of larger numbers


def token_statistics(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int, temperature: float
) -> TokenStatistics:
    """`lit_did.token_statistics` for checked arguments: logits [..., V], labels [...] int64."""
    ignored = labels == ignore_index
    # masked_fill, not multiplication: what an ignored row holds, NaN included, reaches neither value nor gradient.
    z = _scaled(policy_logits.masked_fill(ignored[..., None], 0), temperature)
    r = _scaled(reference_logits.masked_fill(ignored[..., None], 0), temperature)
    y = labels.masked_fill(ignored, 0)[..., None]

    invalid = ~((_defines_a_distribution(z)) & (_defines_a_distribution(r)))
    poison = torch.zeros_like(z[..., 0]).masked_fill(invalid, torch.nan)[..., None]
    z, r = z + poison, r + poison

    z_hole, r_hole = z == -torch.inf, r == -torch.inf
    no_ratio = z_hole | r_hole
    policy_hole, reference_hole = (z_hole & ~r_hole).any(-1), (r_hole & ~z_hole).any(-1)

    d = (z - r).masked_fill(no_ratio, -torch.inf)
    log_pi, log_rho, log_q = z.log_softmax(-1), r.log_softmax(-1), d.log_softmax(-1)
    pi, rho, q = log_pi.exp(), log_rho.exp(), log_q.exp()
    log_ratios = (log_pi - log_rho).masked_fill(no_ratio, 0)

    def entropy(p: Tensor, log_p: Tensor, hole: Tensor) -> Tensor:
        return -(p * log_p.masked_fill(hole, 0)).sum(-1)

    token_did_entropy = entropy(q, log_q, no_ratio)
    support_size = (~(z_hole & r_hole)).sum(-1).to(z.dtype)
    concentration = support_size.log() - token_did_entropy
    concentration = concentration - concentration.detach().clamp(max=0)  # below 0 by rounding alone
    log_partition = d.logsumexp(-1) - z.logsumexp(-1) + r.logsumexp(-1)
    statistics = TokenStatistics(
        policy_logprob=log_pi.gather(-1, y)[..., 0],
        reference_logprob=log_rho.gather(-1, y)[..., 0],
        token_did_entropy=token_did_entropy.masked_fill(reference_hole, torch.nan),
        token_did_concentration=concentration.masked_fill(reference_hole, torch.nan),
        token_did_log_partition=log_partition.masked_fill(reference_hole, torch.inf),
        policy_entropy=entropy(pi, log_pi, z_hole),
        reference_entropy=entropy(rho, log_rho, r_hole),
        kl=(pi * log_ratios).sum(-1).masked_fill(reference_hole, torch.inf),
        reverse_kl=-(rho * log_ratios).sum(-1).masked_fill(policy_hole, -torch.inf),
    )
    return TokenStatistics(*(value.masked_fill(ignored, 0) for value in statistics))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits / temperature
    beyond = torch.zeros_like(scaled)
    beyond = beyond.masked_fill(scaled < -LARGEST_LOGIT, -torch.inf).masked_fill(scaled > LARGEST_LOGIT, torch.inf)
    return scaled + beyond  # a sum, so that an entry counted as infinite has the gradient of an infinite one


def _defines_a_distribution(logits: Tensor) -> Tensor:
    """[...]: no NaN, no +inf, and at least one finite entry in the row."""
    return (logits < torch.inf).all(-1) & (logits > -torch.inf).any(-1)
