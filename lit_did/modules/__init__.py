"""LightningModules."""

from lit_did.modules.dpo import LitDPO, PairStatistics
from lit_did.modules.dpo_pg import LitDPOPG

__all__ = ["LitDPO", "LitDPOPG", "PairStatistics"]
