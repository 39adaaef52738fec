"""Metrics of information, means over tokens: DID entropy, concentration and log-partition, policy entropy, KL."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_did.arguments import check_bools
from lit_did.functional.information import Unit, check_unit, in_unit, token_sums
from lit_did.metrics.base import StatisticsMetric
from lit_did.ops import SequenceStatistics
from lit_did.ops.extension import Backend


class MeanOverTokens(StatisticsMetric):
    """Base: the mean of one field of the statistics over all labelled tokens, in nats or bits."""

    is_differentiable = True
    higher_is_better = None
    plot_lower_bound = 0.0

    def __init__(
        self,
        *,
        unit: Unit = "nats",
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(ignore_index=ignore_index, temperature=temperature, backend=backend, **kwargs)
        check_unit(unit)
        self.unit = unit

    def sums(self, statistics: SequenceStatistics) -> tuple[Tensor, Tensor]:
        return token_sums(statistics, self.quantity)

    def value(self, totals: Tensor, counts: Tensor) -> Tensor:
        return in_unit(totals / counts, self.unit)


class TokenDIDEntropy(MeanOverTokens):
    """Mean over tokens of the entropy of the token DID, softmax(policy_logits - reference_logits).

    It is in [0, log V], and log V where the policy is its reference. Low: few tokens carry what the policy learned. It
    is an average of the entropies of single tokens' DIDs, not the entropy of the DID of whole completions: that is
    `lit_did.metrics.DIDEntropy`.

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. `compute` returns a float64 scalar, NaN before the first labelled token.

    Args:
        unit: "nats" or "bits".
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import TokenDIDEntropy
        >>> metric = TokenDIDEntropy(unit="bits")
        >>> metric.update(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    quantity = "token_did_entropy"


class TokenDIDConcentration(MeanOverTokens):
    """Mean over tokens of log V less the entropy of the token DID: what the policy learned, 0 at the start.

    It is in [0, log V], and 0 where the policy is its reference. V counts the support: vocabulary entries that are -inf
    in both models do not count. It is an average over tokens, not the concentration of the DID of whole completions:
    that is `concentration` of `lit_did.metrics.DIDEntropy`.

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. `compute` returns a float64 scalar, NaN before the first labelled token.

    Args:
        unit: "nats" or "bits".
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import TokenDIDConcentration
        >>> metric = TokenDIDConcentration(unit="bits")
        >>> metric.update(torch.tensor([[[0.0, 0.0, 2.0, 0.0]]]), torch.zeros(1, 1, 4), torch.tensor([[1]]))
        >>> metric.compute()
        tensor(0.6752, dtype=torch.float64)
    """

    quantity = "token_did_concentration"


class TokenDIDLogPartition(MeanOverTokens):
    """Mean over tokens of log Z = log sum_v pi_v / rho_v. log q_y = log-ratio of y - log Z.

    It is at least 0, without an upper bound, and log V where the policy is its reference. Large: the policy gives mass
    to tokens that the reference all but excludes.

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. `compute` returns a float64 scalar, NaN before the first labelled token.

    Args:
        unit: "nats" or "bits".
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

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

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. `compute` returns a float64 scalar, NaN before the first labelled token.

    Args:
        unit: "nats" or "bits".
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

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
    """Mean over tokens of KL(pi, rho) over the next token, pi being the policy and rho the reference. At least 0.

    It is exact: a sum over the vocabulary at the data's prefixes. It is neither the divergence of whole completions nor
    an estimate from samples.

    `update` takes logits [..., T, V] of policy and reference with labels [..., T], or `TokenStatistics` with labels, or
    `SequenceStatistics`. `compute` returns a float64 scalar, NaN before the first labelled token.

    Args:
        reverse: KL(rho, pi) instead of KL(pi, rho).
        unit: "nats" or "bits".
        ignore_index: Tokens with this label do not count, if `update` gets labels.
        temperature: Both logits are divided by it, if `update` gets logits.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> from lit_did.metrics import PolicyKL
        >>> metric = PolicyKL()
        >>> metric.update(torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 2), torch.tensor([[1]]))
        >>> metric.compute()
        tensor(0.3278, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        reverse: bool = False,
        unit: Unit = "nats",
        ignore_index: int = -100,
        temperature: float = 1.0,
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_bools(reverse=reverse)
        self.quantity = "reverse_kl" if reverse else "kl"
        super().__init__(unit=unit, ignore_index=ignore_index, temperature=temperature, backend=backend, **kwargs)
        self.reverse = reverse
