"""Finds what a model's name means: "smollm2", a folder, or a name of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_did.models.smollm2 import SMOLLM2, smollm2

PACKAGE = Path(__file__).parents[1]
HUB_TIMEOUT = 5  # seconds for the hub to answer
_SMOLLM2_NAMES = ("smollm2", SMOLLM2.lower())
_MODEL_FILES = ("config.json", "adapter_config.json")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def local_folder(name: str | os.PathLike, argument: str, files: tuple[str, ...] = _MODEL_FILES) -> Path | None:
    """The folder of a model on this machine. None: the name is one of the hub.

    Args:
        name: "smollm2", a folder's path, or a name of the hub.
        argument: The name of the argument, for errors.
        files: The folder holds at least one of these.

    Raises:
        FileNotFoundError: It is a path where no folder is, or the folder holds no model.
        ModuleNotFoundError, RuntimeError: SmolLM2 cannot be fetched.
    """
    text = os.fspath(name)
    if text.lower() in _SMOLLM2_NAMES and not os.path.isdir(text):
        return smollm2()
    path = Path(text).expanduser()
    if not (os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1 or path.exists()):
        return None
    if not any((path / file).is_file() for file in files):
        if "\n" in text:  # a parser has read a file that was named
            raise FileNotFoundError(
                f"Expected `{argument}` to be a folder with a transformers model, but got the content of a file."
            )
        what = f"{path} holds neither {' nor '.join(_MODEL_FILES)}" if path.is_dir() else f"{path} is not a folder"
        raise FileNotFoundError(f"Expected `{argument}` to be a folder with a transformers model, but {what}.")
    return path.resolve()


def load_by_name(
    load: Callable[..., Any],
    name: str | os.PathLike,
    argument: str,
    *,
    files: tuple[str, ...] = _MODEL_FILES,
    **options: Any,
) -> Any:
    """Calls a `from_pretrained` of transformers or peft with the folder or the hub's name that `name` means.

    What the hub's client has downloaded before is loaded without asking the hub. Otherwise the hub is asked once,
    because transformers would try for most of a minute if it cannot be reached.

    Args:
        load: The function, such as `AutoTokenizer.from_pretrained`.
        name: "smollm2", a folder's path, or a name of the hub.
        argument: The name of the argument, for errors.
        files: A folder holds at least one of these.
        **options: Further arguments of `load`.

    Raises:
        FileNotFoundError: There is no such folder, and the hub has no such model.
        ConnectionError: The hub cannot be reached, and the model is not on this machine.
        OSError: The model does not load.
    """
    folder = local_folder(name, argument, files)
    if folder is not None:
        return _load(load, str(folder), argument, {"local_files_only": True, **options})
    try:
        return load(os.fspath(name), **{**options, "local_files_only": True})
    except Exception:  # it is not on this machine, or not whole
        _ask_hub(os.fspath(name), argument)
        return _load(load, os.fspath(name), argument, options)


def _load(load: Callable[..., Any], name: str, argument: str, options: Mapping[str, Any]) -> Any:
    try:
        return load(name, **options)
    except Exception as error:
        if not (isinstance(error, OSError) or raised_by_library(error)):
            raise
        why = first_line(error)
        if "ignore_mismatched_sizes" in why:  # the shapes are in a report of many lines
            why = "its weights have other shapes than its config.json says."
        given = [key for key in options if key not in ("dtype", "local_files_only", "adapter_kwargs")]
        having = f" with `model_kwargs` {', '.join(given)}" if given else ""
        raise OSError(
            f"Expected `{argument}` to be a folder or name that transformers loads{having}, but {name} does not: {why}"
        ) from error


def raised_by_library(error: Exception) -> bool:
    """Whether the error comes from a library that refuses what it was given, and not from this package."""
    if isinstance(error, ImportError | MemoryError | torch.OutOfMemoryError):
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and PACKAGE not in Path(traceback.tb_frame.f_code.co_filename).parents


def load_tokenizer(name: str | os.PathLike, argument: str = "tokenizer") -> Any:
    """Loads a tokenizer of transformers by its name, or by that of its model. Raises as `load_by_name`."""
    from transformers import AutoTokenizer

    files = (*_MODEL_FILES, *_TOKENIZER_FILES)
    return load_by_name(AutoTokenizer.from_pretrained, name, argument, files=files)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or else its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _ask_hub(name: str, argument: str) -> None:
    """Raises unless the hub answers that it has the model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    expected = f"Expected `{argument}` to be a folder on this machine or a model of the Hugging Face hub, but {name} is"
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{expected} neither: {first_line(error)}") from error
    except Exception as error:  # of the HTTP client, which differs between versions
        raise ConnectionError(f"{expected} no folder, and the hub cannot be reached: {first_line(error)}") from error
