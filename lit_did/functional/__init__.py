"""Stateless functions: preference losses, what `lit_did.metrics` computes, the DID of completions, the power law."""

from lit_did.functional.did_entropy import DIDEntropyEstimate, did_entropy_over_candidates, estimate_did_entropy
from lit_did.functional.enumeration import EnumeratedDID, enumerate_did
from lit_did.functional.information import (
    policy_entropy,
    policy_kl,
    token_did_concentration,
    token_did_entropy,
    token_did_log_partition,
)
from lit_did.functional.inputs import as_sequences
from lit_did.functional.power_law import PowerLawFit, fit_power_law
from lit_did.functional.preference import (
    LOSSES,
    REFERENCE_FREE_LOSSES,
    pair_accuracy,
    pair_margin,
    preference_loss,
)
from lit_did.functional.rewards import (
    likelihood_displacement,
    log_ratio_reward,
    reward_accuracy,
    reward_calibration,
    reward_margin,
)

__all__ = [
    "LOSSES",
    "REFERENCE_FREE_LOSSES",
    "DIDEntropyEstimate",
    "EnumeratedDID",
    "PowerLawFit",
    "as_sequences",
    "did_entropy_over_candidates",
    "enumerate_did",
    "estimate_did_entropy",
    "fit_power_law",
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
    "token_did_concentration",
    "token_did_entropy",
    "token_did_log_partition",
]
