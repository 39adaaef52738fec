"""Metrics of information, means over tokens: TokenDIDEntropy, TokenDIDLogPartition, PolicyEntropy, PolicyKL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_did.functional.information import check_unit, in_unit, token_sums
from lit_did.metrics.base import StatisticsMetric
from lit_did.ops import SequenceStatistics


class MeanOverTokens(StatisticsMetric):
    """Base: the mean of one field of the statistics over all labelled tokens, in nats or bits."""

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0

    def __init__(self, *, unit: str = "nats", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_unit(unit)
        self.unit = unit

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return token_sums(statistics, self.quantity)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return in_unit(totals / counts, self.unit)


class TokenDIDEntropy(MeanOverTokens):
    """Mean over tokens of the entropy of the token DID, softmax(policy_logits - reference_logits).

    In [0, log V]; log V where the policy is its reference. Low: few tokens carry what the policy learned. Not the
    entropy of the DID of completions: docs/theory.md.

    `update` takes logits [..., T, V] of the policy and of the reference with labels [..., T], or `TokenStatistics` with
    labels, or `SequenceStatistics`. `compute` returns a float64 scalar; NaN before there is a labelled token.

    Args:
        unit: "nats" or "bits".
        ignore_index: Labels that are skipped, where `update` is given labels.
        temperature: Both logits are divided by it, where `update` is given logits.
        backend: "auto", "fused" or "reference", as in `lit_did.token_statistics`.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import TokenDIDEntropy
        >>> metric = TokenDIDEntropy(unit="bits")
        >>> metric.update(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    quantity = "token_did_entropy"


class TokenDIDLogPartition(MeanOverTokens):
    """Mean over tokens of log Z = log sum_v pi_v / rho_v. log q_y = log-ratio of y - log Z.

    At least 0, without an upper bound; log V where the policy is its reference. Large: the policy gives mass to tokens
    that the reference all but excludes. Input, arguments and errors: as `TokenDIDEntropy`.

    Example:
        >>> import torch
        >>> from lit_did.metrics import TokenDIDLogPartition
        >>> metric = TokenDIDLogPartition(unit="bits")
        >>> metric.update(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    quantity = "token_did_log_partition"


class PolicyEntropy(MeanOverTokens):
    """Mean over tokens of the policy's entropy over the next token, at the data's prefixes. In [0, log V].

    Input, arguments and errors: as `TokenDIDEntropy`.

    Example:
        >>> import torch
        >>> from lit_did.metrics import PolicyEntropy
        >>> metric = PolicyEntropy(unit="bits")
        >>> metric.update(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    quantity = "policy_entropy"


class PolicyKL(MeanOverTokens):
    """Mean over tokens of KL(pi, rho) over the next token, or with `reverse` of KL(rho, pi). At least 0.

    Exact over the vocabulary at the data's prefixes; not the divergence of whole completions, nor an estimate from
    samples. Input, other arguments and errors: as `TokenDIDEntropy`.

    Args:
        reverse: KL(rho, pi), from the reference to the policy, instead.

    Example:
        >>> import torch
        >>> from lit_did.metrics import PolicyKL
        >>> metric = PolicyKL()
        >>> metric.update(torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 2), torch.tensor([[1]]))
        >>> metric.compute()
        tensor(0.3278, dtype=torch.float64)
    """

    def __init__(self, *, reverse: bool = False, **kwargs: Any) -> None:
        self.quantity = "reverse_kl" if reverse else "kl"
        super().__init__(**kwargs)
        self.reverse = reverse
