"""Checks of arguments that all modules share: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch


def check_bools(**values: Any) -> None:
    """Raises TypeError unless all are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"Expected `{name}` to be a bool, but got {value!r}.")


def check_number(name: str, value: Any, kind: str = "an int or a float") -> None:
    """Raises TypeError unless `value` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected `{name}` to be {kind}, but got {value!r}.")


def check_name(argument: str, name: str | os.PathLike) -> None:
    """Raises FileNotFoundError if `name`, a model's or a tokenizer's, is a path where no folder is."""
    path = os.fspath(name)
    if (os.path.isabs(path) or path.startswith((".", "~"))) and not os.path.exists(path):
        raise FileNotFoundError(f"Expected `{argument}` to be a name or a folder, but {path} does not exist.")


def check_integer(name: str, value: Any, least: int, why: str = "") -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be an integer of at least {least}{why}, but got {value!r}.")


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold `value` and be loaded with `weights_only=True`."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool, torch.dtype)
