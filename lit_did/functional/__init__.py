"""Stateless functions on statistics: preference losses, and what the metrics of `lit_did.metrics` compute."""

from lit_did.functional.information import did_log_partition, policy_entropy, policy_kl, token_did_entropy
from lit_did.functional.inputs import as_sequences
from lit_did.functional.preference import pair_accuracy, pair_margin, preference_loss
from lit_did.functional.rewards import (
    likelihood_displacement,
    log_ratio_reward,
    reward_accuracy,
    reward_calibration,
    reward_margin,
)

__all__ = [
    "as_sequences",
    "did_log_partition",
    "likelihood_displacement",
    "log_ratio_reward",
    "pair_accuracy",
    "pair_margin",
    "policy_entropy",
    "policy_kl",
    "preference_loss",
    "reward_accuracy",
    "reward_calibration",
    "reward_margin",
    "token_did_entropy",
]
