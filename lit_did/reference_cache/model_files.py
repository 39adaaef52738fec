"""The fingerprint of a reference that was given by name: of its files, so that nobody reads or holds all weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_did.arguments import as_plain
from lit_did.file_digests import file_digest
from lit_did.models.names import local_folder
from lit_did.reference_cache.storage import KEY_BYTES

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_FILES = ("config.json", "*.safetensors.index.json", "*.bin.index.json", *_WEIGHTS)
_SAMPLES = 64
_SAMPLE_BYTES = 64
_FOR_HUB = ("revision", "cache_dir", "token")  # arguments of `from_pretrained` that say which files it loads


def files_digest(name: str, model_kwargs: Mapping[str, Any], kept: Path) -> str | None:
    """The digest of a model's weights and configuration in its files, and of the arguments that it is loaded with.

    Args:
        name: "smollm2", a folder or a name of the hub, as it was loaded.
        model_kwargs: Arguments of `from_pretrained`.
        kept: A folder for digests of files.

    Returns:
        The digest. None: the files do not hold the whole model, because they are an adapter's, or they were not found.
    """
    files = _files(name, model_kwargs, _FILES)
    if len(files) < 2:
        return None
    found = [(file.name, file_digest(file, kept)) for file in files]
    content = json.dumps([found, as_plain(model_kwargs)], sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=KEY_BYTES).hexdigest()


def quick_files_digest(name: str, model_kwargs: Mapping[str, Any]) -> str | None:
    """A digest of the sizes and of a few bytes of a model's files of weights, which changes with training.

    Args:
        name: "smollm2", a folder or a name of the hub, as it was loaded.
        model_kwargs: Arguments of `from_pretrained`.

    Returns:
        The digest. None: the files are an adapter's, or they were not found.
    """
    files = _files(name, model_kwargs, _WEIGHTS)
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for sample in range(1, _SAMPLES + 1):  # the last bytes too
                file.seek(max(0, sample * size // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def _files(name: str, model_kwargs: Mapping[str, Any], patterns: Iterable[str]) -> list[Path]:
    """The files of a model. None are found of an adapter, whose files do not hold the whole model."""
    folder = local_folder(name, "reference")
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        options = {key: model_kwargs[key] for key in _FOR_HUB if key in model_kwargs}
        try:
            folder = Path(snapshot_download(name, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            return []
    folder /= model_kwargs.get("subfolder", "")
    if (folder / "adapter_config.json").exists():
        return []
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def reference_name(given: Mapping[str, Any]) -> str | None:
    """The name that a reference's weights are loaded from. None: from no name.

    Args:
        given: The arguments `policy` and `reference` of LitDPO.
    """
    name = given["policy"] if given["reference"] is None else given["reference"]
    return os.fspath(name) if isinstance(name, str | os.PathLike) and name != "adapter" else None
