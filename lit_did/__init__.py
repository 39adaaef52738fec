"""lit-did: preference optimisation seen through the Differential Information Distribution (DID).

The operators load with the package. All else (`lit_did.metrics`, `lit_did.callbacks`, `lit_did.modules`,
`lit_did.data`) loads where it is used, so that `import lit_did` stays quick and needs neither lightning nor
transformers.
"""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

from lit_did.ops import (
    SequenceStatistics,
    TokenStatistics,
    linear_sequence_statistics,
    linear_token_statistics,
    sequence_statistics,
    token_statistics,
)

if TYPE_CHECKING:
    from lit_did.callbacks import DIDMonitor
    from lit_did.data import PreferenceDataModule
    from lit_did.metrics import DIDMetrics
    from lit_did.models import PolicyAndReference
    from lit_did.modules import LitDPO, LitDPOPG, LitSFT

__all__ = [
    "DIDMetrics",
    "DIDMonitor",
    "LitDPO",
    "LitDPOPG",
    "LitSFT",
    "PolicyAndReference",
    "PreferenceDataModule",
    "SequenceStatistics",
    "TokenStatistics",
    "linear_sequence_statistics",
    "linear_token_statistics",
    "sequence_statistics",
    "token_statistics",
]

_LAZY = {
    "DIDMetrics": "lit_did.metrics",
    "DIDMonitor": "lit_did.callbacks",
    "LitDPO": "lit_did.modules",
    "LitDPOPG": "lit_did.modules",
    "LitSFT": "lit_did.modules",
    "PolicyAndReference": "lit_did.models",
    "PreferenceDataModule": "lit_did.data",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lit_did' has no attribute {name!r}")
