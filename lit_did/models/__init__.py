"""Language models of transformers: loading, finding, and running a policy beside its reference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_did.models.adapters import save_policy
    from lit_did.models.policy_and_reference import PolicyAndReference

__all__ = ["PolicyAndReference", "save_policy"]

_LAZY = {
    "PolicyAndReference": "lit_did.models.policy_and_reference",
    "save_policy": "lit_did.models.adapters",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lit_did.models' has no attribute {name!r}")
