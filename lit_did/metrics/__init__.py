"""torchmetrics.Metric classes."""

from lit_did.metrics.weighted_means import WeightedMeans

__all__ = ["WeightedMeans"]
