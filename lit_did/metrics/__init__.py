"""torchmetrics metrics of the DID and of DPO's implicit reward; their functional twins are in `lit_did.functional`."""

from lit_did.metrics.collection import DIDMetrics
from lit_did.metrics.did_entropy import DIDEntropy
from lit_did.metrics.information import (
    PolicyEntropy,
    PolicyKL,
    TokenDIDConcentration,
    TokenDIDEntropy,
    TokenDIDLogPartition,
)
from lit_did.metrics.power_law import PowerLawExponent
from lit_did.metrics.rewards import (
    LikelihoodDisplacement,
    LogRatioReward,
    PreferenceLoss,
    RewardAccuracy,
    RewardCalibration,
    RewardMargin,
)

__all__ = [
    "DIDEntropy",
    "DIDMetrics",
    "LikelihoodDisplacement",
    "LogRatioReward",
    "PolicyEntropy",
    "PolicyKL",
    "PowerLawExponent",
    "PreferenceLoss",
    "RewardAccuracy",
    "RewardCalibration",
    "RewardMargin",
    "TokenDIDConcentration",
    "TokenDIDEntropy",
    "TokenDIDLogPartition",
]
