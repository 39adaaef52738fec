"""torchmetrics metrics of the DID and of DPO's implicit reward; their functional twins are in `lit_did.functional`."""

from lit_did.metrics.collection import DIDMetrics
from lit_did.metrics.information import DIDLogPartition, PolicyEntropy, PolicyKL, TokenDIDEntropy
from lit_did.metrics.rewards import (
    LikelihoodDisplacement,
    LogRatioReward,
    PreferenceLoss,
    RewardAccuracy,
    RewardCalibration,
    RewardMargin,
)

__all__ = [
    "DIDLogPartition",
    "DIDMetrics",
    "LikelihoodDisplacement",
    "LogRatioReward",
    "PolicyEntropy",
    "PolicyKL",
    "PreferenceLoss",
    "RewardAccuracy",
    "RewardCalibration",
    "RewardMargin",
    "TokenDIDEntropy",
]
