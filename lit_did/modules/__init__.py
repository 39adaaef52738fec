"""LightningModules."""

from lit_did.modules.dpo import LitDPO
from lit_did.modules.dpo_pg import LitDPOPG
from lit_did.modules.pairs import PairStatistics
from lit_did.modules.sft import LitSFT

__all__ = ["LitDPO", "LitDPOPG", "LitSFT", "PairStatistics"]
