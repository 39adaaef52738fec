"""Finds the recipes that the package brings, so that `lit-did fit -c smollm2_lora_cpu` works without a clone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


def with_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments with the path of the package's recipe for each `-c` that names one.

    Args:
        arguments: A command line. A file of the user's comes first: `-c NAME`, `-c NAME.yaml` and
            `-c recipes/NAME.yaml` name a recipe only where no such file exists.
    """
    found, named = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option in ("-c", "--config"):
            found.append(f"{option}={_find(value)}")
        else:
            found.append(_find(argument) if named else argument)
        named = argument in ("-c", "--config")
    return found


def _find(name: str) -> str:
    path = Path(name)
    recipe = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    is_name = str(path.parent) in (".", "recipes") and not path.exists()
    return str(recipe) if is_name and recipe.exists() else name
