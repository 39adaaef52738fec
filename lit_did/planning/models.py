"""Finds the configuration that a model's name means. No weights are needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_did.models.names import load_by_name

FOLDER = Path(__file__).parent / "shapes"


def known_shapes() -> list[str]:
    """The names of configurations that come with lit-did, such as "llama3-8b"."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_config(model: str | os.PathLike | Any) -> Any:
    """The configuration of a model.

    Args:
        model: One of `known_shapes`; a folder with a config.json; a config.json of another name; "smollm2"; a name of
            the Hugging Face hub; or a configuration, which is returned unchanged.

    Raises:
        FileNotFoundError: There is no such file, and the hub has no such model.
        ConnectionError: The hub cannot be reached, and the model is not on this machine.
        ValueError: transformers does not know such a model, or its weights are quantised.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return _checked(model, type(model).__name__)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"Expected `model` to be a name, a path or a configuration, but got {type(model).__name__}.")
    name = os.fspath(model)
    file = FOLDER / f"{name}.json" if name in known_shapes() else Path(name).expanduser()
    if file.suffix != ".json":
        try:
            return _checked(load_by_name(AutoConfig.from_pretrained, name, "model"), name)
        except (FileNotFoundError, ConnectionError) as error:
            known = f"Models whose shape lit-did knows: {', '.join(known_shapes())}."
            raise type(error)(f"{str(error).rstrip('.')}. {known}") from error
    try:
        values = json.loads(file.read_text())
        kind = values.pop("model_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected {file} to be a model's config.json, with its model_type, but it is not.") from error
    try:
        return _checked(AutoConfig.for_model(kind, **values), name)
    except ValueError as error:
        raise ValueError(f"Expected {file} to be the config.json of a model of transformers, but: {error}") from error


def _checked(config: Any, name: str) -> Any:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"Expected the weights of `model` not to be quantised, but those of {name} are. Plan with the model that "
            "it was made from."
        )
    return config
