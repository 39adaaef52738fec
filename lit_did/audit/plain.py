"""An audit's values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lit_did.audit.report import Estimate


def plain(value: Any) -> Any:
    """`value` as dicts, lists, texts, numbers, bools and None. Numbers that JSON lacks (NaN, infinity) become None.

    Example:
        >>> plain({"accuracy": Estimate(0.5, 0.4, 0.6, 100), "lengths": (1, 2), "none": math.nan})
        {'accuracy': {'value': 0.5, 'lower': 0.4, 'upper': 0.6, 'count': 100}, 'lengths': [1, 2], 'none': None}
    """
    if isinstance(value, Estimate):
        return {name: plain(entry) for name, entry in value._asdict().items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers, and tensors
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value).removeprefix("torch.")
