"""What the operators return: plain named tuples of tensors, in nats."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lit_did.representing import short_repr


@short_repr
class TokenStatistics(NamedTuple):
    """Statistics of every token: tensors shaped like the labels, float32 (float64 for float64 logits), in nats.

    With the policy pi, the reference rho and the token's label y, over the whole vocabulary; the token's DID is
    q = softmax(policy_logits - reference_logits) (arXiv 2505.23761). All are 0 where the label is `ignore_index`.
    """

    policy_logprob: Tensor
    """log pi(y)"""
    reference_logprob: Tensor
    """log rho(y)"""
    token_did_entropy: Tensor
    """H(q) = -sum_v q_v log q_v, in [0, log V]; log V where pi = rho"""
    token_did_concentration: Tensor
    """log V - H(q) = KL(q, uniform), in [0, log V]; 0 where pi = rho. V counts the entries of the support: those that
    are not -inf on both sides"""
    token_did_log_partition: Tensor
    """log Z = log sum_v pi_v / rho_v; log V where pi = rho. log q(y) = log_ratio - log Z"""
    policy_entropy: Tensor
    """H(pi)"""
    reference_entropy: Tensor
    """H(rho)"""
    kl: Tensor
    """KL(pi, rho) = sum_v pi_v log(pi_v / rho_v)"""
    reverse_kl: Tensor
    """KL(rho, pi)"""

    @property
    def log_ratio(self) -> Tensor:
        """log pi(y) - log rho(y): DPO's reward divided by beta."""
        return self.policy_logprob - self.reference_logprob


@short_repr
class SequenceStatistics(NamedTuple):
    """Statistics of every sequence: tensors shaped [sequences], float32 (float64 for float64 logits), in nats.

    Log-probabilities, the log-ratio and the log-partition are sums over the sequence's labelled tokens; entropies and
    divergences are means over them. A sequence without labelled tokens is 0 in every field.
    """

    policy_logprob: Tensor
    """sum_t log pi(y_t)"""
    reference_logprob: Tensor
    """sum_t log rho(y_t)"""
    log_ratio: Tensor
    """sum_t log pi(y_t) - log rho(y_t): DPO's reward divided by beta"""
    token_did_entropy: Tensor
    """mean over t of the token DID's entropy. Not the entropy of the sequence's DID: see `lit-did docs theory`"""
    token_did_concentration: Tensor
    """mean over t of the token DID's concentration"""
    policy_entropy: Tensor
    """mean over t of H(pi_t)"""
    reference_entropy: Tensor
    """mean over t of H(rho_t)"""
    kl: Tensor
    """mean over t of KL(pi_t, rho_t)"""
    reverse_kl: Tensor
    """mean over t of KL(rho_t, pi_t)"""
    token_did_log_partition: Tensor
    """sum over t of log Z_t"""
    num_tokens: Tensor
    """labelled tokens, int64"""
