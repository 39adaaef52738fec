"""Checks of plain values that all parts share: TypeError for a wrong type, ValueError for a wrong value.

Each error names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch


def check_bools(**values: Any) -> None:
    """Raises TypeError unless all are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"Expected `{name}` to be a bool, but got {value!r}.")


def check_integer(name: str, value: Any, least: int | None = None, why: str = "") -> None:
    """Checks an integer.

    Args:
        name: The argument, for the error.
        value: Its value.
        least: The smallest value allowed, if there is one.
        why: A remark on `least`, for the error.

    Raises:
        TypeError: `value` is not an int. True and False are not integers here.
        ValueError: It is below `least`.
    """
    kind = "an integer" if least is None else f"an integer of at least {least}{why}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be {kind}, but got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"Expected `{name}` to be {kind}, but got {value!r}.")


def check_number(name: str, value: Any, kind: str = "an int or a float") -> None:
    """Raises TypeError, which names the expected `kind`, unless `value` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected `{name}` to be {kind}, but got {value!r}.")


def check_range(name: str, value: Any, interval: str) -> None:
    """Checks a number and its range.

    Args:
        name: The argument, for the error.
        value: Its value.
        interval: The range as it is written, such as "[0, 1)" for 0 <= value < 1, or "(0, inf)".

    Raises:
        TypeError: `value` is not an int or a float.
        ValueError: It is outside the interval, or NaN.
    """
    check_number(name, value)
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"Expected `{name}` to be in {interval}, but got {value!r}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Checks a value against the few that are allowed.

    Args:
        name: The argument, for the error.
        value: Its value.
        choices: The `typing.Literal` type that lists them.

    Raises:
        TypeError: `value` has the type of none of them.
        ValueError: It is none of them.
    """
    allowed = get_args(choices)
    types = tuple(map(type, allowed))
    fits = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
    if not fits or value not in allowed:
        error = ValueError if fits else TypeError
        raise error(f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}, but got {value!r}.")


def as_plain(value: Any) -> Any:
    """`value` as YAML and JSON have it: tuples become lists, and dtypes their names. Other objects stay as they are."""
    if isinstance(value, Mapping):
        return {name: as_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_plain(entry) for entry in (sorted(value) if isinstance(value, set) else value)]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold `value` and be loaded with `weights_only=True`."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool, torch.dtype)
