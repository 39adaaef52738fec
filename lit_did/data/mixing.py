"""Mixtures: several sources to train on, of which each gives a share of the pairs of an epoch."""

from __future__ import annotations

from typing import Any


def is_mixture(source: Any) -> bool:
    """Whether a source is a dict from sources to weights."""
    return isinstance(source, dict) and not hasattr(source, "column_names")  # a datasets.DatasetDict has them
