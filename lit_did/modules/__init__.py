"""LightningModules."""

from lit_did.modules.dpo import LitDPO, PairStatistics

__all__ = ["LitDPO", "PairStatistics"]
