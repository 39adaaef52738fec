"""lit-did: preference optimisation seen through the Differential Information Distribution (DID).

The operators load with the package. LightningModules (`lit_did.modules`) and preference data (`lit_did.data`) load
where they are used, so that `import lit_did` stays quick and needs neither lightning nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lit_did.ops import SequenceStatistics, TokenStatistics, sequence_statistics, token_statistics

if TYPE_CHECKING:
    from lit_did.data import PreferenceDataModule
    from lit_did.modules import LitDPO

__version__ = "0.1.0"
__all__ = [
    "LitDPO",
    "PreferenceDataModule",
    "SequenceStatistics",
    "TokenStatistics",
    "sequence_statistics",
    "token_statistics",
]

_LAZY = {"LitDPO": "lit_did.modules", "PreferenceDataModule": "lit_did.data"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lit_did' has no attribute {name!r}")
