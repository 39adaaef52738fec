"""Means over tokens of what the token statistics tell of information: DID entropy, log-partition, entropy, KL.

Each function is the twin of a metric in `lit_did.metrics.information`, which adds up what `token_sums` returns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_did.functional.inputs import Statistics, as_sequences
from lit_did.ops import SequenceStatistics

UNITS = ("nats", "bits")


def token_did_entropy(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: str = "nats",
    **options: Any,
) -> Tensor:
    """Mean over tokens of the entropy of the token DID, q = softmax(policy_logits - reference_logits).

    In [0, log V]; log V where the policy is its reference. Not the entropy of the DID of completions: docs/theory.md.

    Args:
        policy_logits: Logits [..., T, V] with `reference_logits` and `labels`, `TokenStatistics` with `labels`, or
            `SequenceStatistics`: see `lit_did.functional.as_sequences`.
        reference_logits, labels: As there.
        unit: "nats" or "bits".
        options: `cu_seqlens`, `ignore_index`, `temperature`, `backend`, as there.

    Returns:
        A float64 scalar, differentiable in what was given; NaN without labelled tokens.

    Raises:
        TypeError, ValueError, RuntimeError: An argument has the wrong type, dtype, shape or device, or is out of range.

    Example:
        >>> token_did_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    return _mean_over_tokens("token_did_entropy", unit, policy_logits, reference_logits, labels, options)


def token_did_log_partition(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: str = "nats",
    **options: Any,
) -> Tensor:
    """Mean over tokens of log Z = log sum_v pi_v / rho_v: what a log-ratio must exceed for its token to gain weight.

    At least 0, without an upper bound; log V where the policy is its reference.
    Arguments, result and errors: as `token_did_entropy`.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> token_did_log_partition(logits, logits, torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    return _mean_over_tokens("token_did_log_partition", unit, policy_logits, reference_logits, labels, options)


def policy_entropy(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    unit: str = "nats",
    **options: Any,
) -> Tensor:
    """Mean over tokens of the policy's entropy over the next token, in [0, log V].

    Arguments, result and errors: as `token_did_entropy`.

    Example:
        >>> policy_entropy(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), unit="bits")
        tensor(2.0000, dtype=torch.float64)
    """
    return _mean_over_tokens("policy_entropy", unit, policy_logits, reference_logits, labels, options)


def policy_kl(
    policy_logits: Statistics,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    reverse: bool = False,
    unit: str = "nats",
    **options: Any,
) -> Tensor:
    """Mean over tokens of KL(pi, rho) over the next token, or with `reverse` of KL(rho, pi). At least 0.

    Exact over the vocabulary at the data's prefixes; not the divergence of whole completions, nor an estimate from
    samples. Other arguments, result and errors: as `token_did_entropy`.

    Example:
        >>> policy_kl(torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 2), torch.tensor([[1]]))
        tensor(0.3278, dtype=torch.float64)
    """
    quantity = "reverse_kl" if reverse else "kl"
    return _mean_over_tokens(quantity, unit, policy_logits, reference_logits, labels, options)


def token_sums(statistics: SequenceStatistics, quantity: str) -> tuple[Tensor, Tensor]:
    """The sum of a quantity over all tokens, float64, and the tokens, int64: what a mean over tokens needs."""
    values = getattr(statistics, quantity).double()
    if quantity != "token_did_log_partition":  # all others are means over a sequence's tokens
        values = values * statistics.num_tokens
    # Not a product with the mask: a sequence that does not count may hold NaN.
    return torch.where(statistics.num_tokens > 0, values, 0).sum(), statistics.num_tokens.sum()


def in_unit(value: Tensor, unit: str) -> Tensor:
    """`value`, given in nats, in `unit`."""
    return value / math.log(2) if unit == "bits" else value


def check_unit(unit: str) -> None:
    """Raises ValueError unless `unit` is one of `UNITS`."""
    if unit not in UNITS:
        raise ValueError(f"Expected `unit` to be 'nats' or 'bits', but got {unit!r}.")


def _mean_over_tokens(
    quantity: str, unit: str, policy_logits: Any, reference_logits: Any, labels: Any, options: dict[str, Any]
) -> Tensor:
    check_unit(unit)
    total, tokens = token_sums(as_sequences(policy_logits, reference_logits, labels, **options), quantity)
    return in_unit(total / tokens, unit)
