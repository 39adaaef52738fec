"""Scores preference pairs under a policy and its reference: a row a pair, as a table in memory or in a file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_did.scoring.scorer import PairScorer, score_pairs
    from lit_did.scoring.table import write_table

_HOME = {"PairScorer": "scorer", "score_pairs": "scorer", "write_table": "table"}
__all__ = ["PairScorer", "score_pairs", "write_table"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
