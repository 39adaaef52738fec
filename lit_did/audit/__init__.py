"""Audits preference data: what a data set holds, what a reference says of it, and what a policy learned from it.

`audit` runs the parts, each in a module of its own. Every part returns findings, which make the verdict, figures,
columns of the table of pairs, and blocks, which the page shows. `lit-did docs audit` describes what is measured.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_did.audit.running import Audit, audit

_HOME = {"Audit": "running", "audit": "running"}
__all__ = ["Audit", "audit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
