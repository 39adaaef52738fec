"""Pairs of bigram models with an end-of-sequence token, 0, and the truth about their DID.

The reference's logits are normal with standard deviation 2, the policy's those plus `scale` times a normal number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bigrams(vocab_size: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [V, V] float64 of the policy and of the reference, by the token before."""
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    policy = reference + scale * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    return policy, reference


def as_function(logits: Tensor):
    """The model as a function of prefixes. Row 0 is for the first token, since nothing follows the end."""
    return lambda prefixes: logits[prefixes[:, -1] if prefixes.shape[1] else torch.zeros(len(prefixes)).long()]


def exact(policy: Tensor, reference: Tensor, max_new_tokens: int) -> tuple[float, float]:
    """log Z and H(q), by dynamic programming over the last token: any vocabulary, any length."""
    log_ratio = policy.log_softmax(-1) - reference.log_softmax(-1)
    log_partition, mean = torch.zeros(2, len(policy), dtype=torch.float64)  # after every token, with n tokens to go
    for _ in range(max_new_tokens):
        log_partition[0] = mean[0] = 0  # the end
        total = log_ratio + log_partition
        sums = total.logsumexp(-1)
        mean = ((total - sums[:, None]).exp() * (log_ratio + mean)).sum(-1)
        log_partition = sums
    return float(log_partition[0]), float(log_partition[0] - mean[0])
