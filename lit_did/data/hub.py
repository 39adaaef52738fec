"""Data sets of the Hugging Face hub by name: "org/name", "org/name:split", "org/name/config:split"."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lit_did.data.files import SUFFIXES
from lit_did.models.names import first_line

_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?")
_TIMEOUT = 10.0  # seconds for the hub to answer


def is_hub_name(source: str) -> bool:
    """Whether a path may name a data set of the hub: it has no suffix of a file, and its first part does not exist."""
    exists = os.path.lexists(source.split("/")[0])
    return not (exists or source.startswith(".") or source.endswith(SUFFIXES)) and _NAME.fullmatch(source) is not None


def load(source: str) -> Any:
    """Loads the `datasets.Dataset` of a name. If the hub cannot be reached, the cache of `datasets` is used.

    Args:
        source: The name. Its split may be any that `datasets` takes, such as "train[:1000]".

    Raises:
        ImportError: If `datasets` is not installed.
        FileNotFoundError: If there is no such data set, neither in a file nor on the hub.
        ConnectionError: If the hub cannot be reached and the data set is not in the cache.
        ValueError: If there is no such config or split, or several splits to choose from.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Loading {source} from the hub needs datasets. Install it with: pip install datasets"
        ) from error
    name = _NAME.fullmatch(source)
    assert name is not None  # the caller has asked `is_hub_name`
    path, config, split = name.group("path", "config", "split")
    expected = f"Expected a file, a folder or a data set of the hub, but {source} does not exist here, and"
    problem = _problem(path)
    try:
        with _offline(datasets.config, problem is not None):
            dataset = datasets.load_dataset(path, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{expected} the hub has none of this name: {first_line(error)}") from error
    except OSError as error:
        raise ConnectionError(f"{expected} the hub cannot be reached: {problem or first_line(error)}") from error
    except ValueError as error:  # no such config or split
        raise ValueError(f"{source}: Expected a data set that can be loaded, but got: {first_line(error)}") from error
    if split is not None:
        return dataset
    if len(dataset) != 1:
        raise ValueError(
            f'{source}: Expected one split, but got {", ".join(dataset)}. Pass "{source}:{next(iter(dataset))}".'
        )
    return next(iter(dataset.values()))


def _problem(path: str) -> str | None:
    """Why the hub does not answer, or None if it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(path, timeout=_TIMEOUT)
    except HfHubHTTPError:
        return None  # it answers; the error of `datasets` explains more
    except Exception as error:  # of the HTTP client, which differs between versions
        return first_line(error)
    return None


@contextmanager
def _offline(config: Any, offline: bool) -> Iterator[None]:
    """With `offline`, lets `datasets` look into its cache only. It would try to reach the hub for half a minute."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
