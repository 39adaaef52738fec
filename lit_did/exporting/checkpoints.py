"""Finds and reads checkpoints of LitDPO: a file, a folder of shards, or the best or last one of a run's folder."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_did.modules.run_facts import FACTS, KEY

PREFIX = "models.policy."
_WEIGHTS = f"state_dict.{PREFIX}"  # in shards
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError),  # what torch.load raises for broken files
    pickle.UnpicklingError,
    dcp.CheckpointException,
)


class Checkpoint(NamedTuple):
    """A checkpoint of LitDPO."""

    path: Path
    content: dict[str, Any]
    """what Lightning saved; tensors of a file are read when they are used"""
    which: str
    """why this one was taken from a folder, such as "the best by val/loss (0.61)"; "" for a file"""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint. Nothing in it is executed. Optimizer states stay on disk.

    Args:
        path: A file, a folder of shards (`save_distributed_checkpoint=True`), or a folder with checkpoints somewhere
            below. Of several, the one that a ModelCheckpoint with `monitor` calls the best is taken, and without one
            the newest. Files that a kill cut off are passed over.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, is of another project, or the folder has several best ones.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected `checkpoint` to be a checkpoint or a run's folder, but {path} is not there.")
    if path.is_file() or _is_sharded(path):
        return Checkpoint(path, _read(path), "")
    found = {p for p in path.rglob("*.ckpt") if p.is_file() or _is_sharded(p)}
    found = {p for p in found if not any(parent in found for parent in p.parents)}
    if not found:
        raise FileNotFoundError(f"Expected `checkpoint` to be a checkpoint or a run's folder, but {path} holds none.")
    newest, content, passed_over = _newest(found, path)
    best: dict[str, Checkpoint] = {}
    for state in content.get("callbacks", {}).values():
        monitor = state.get("monitor") if isinstance(state, dict) else None
        named = Path(state["best_model_path"]) if monitor and state.get("best_model_path") else None
        for candidate in [] if named is None else _named_by(newest, named, found):
            score = float(state["best_model_score"])
            best[str(monitor)] = Checkpoint(candidate, {}, f"the best by {monitor} ({score:.4g})")
    if len({checkpoint.path for checkpoint in best.values()}) > 1:
        files = ", ".join(f"{checkpoint.path} ({checkpoint.which})" for checkpoint in best.values())
        raise ValueError(
            f"Expected `checkpoint` to be one of the best checkpoints of {path}, but it has several: {files}."
        )
    for checkpoint in best.values():
        return checkpoint._replace(content=content if checkpoint.path == newest else _read(checkpoint.path))
    return Checkpoint(newest, content, f"the newest of {len(found)}{passed_over}")


def _named_by(newest: Path, named: Path, found: set[Path]) -> list[Path]:
    """The checkpoint that `newest` names, which may have been moved since. Other runs have files of the same name."""
    here = [p for p in found if p.resolve() == named.resolve()] or [p for p in found if p == newest.parent / named.name]
    elsewhere = [p for p in found if p.name == named.name]
    return here or (elsewhere if len(elsewhere) == 1 else [])


def _newest(found: set[Path], folder: Path) -> tuple[Path, dict[str, Any], str]:
    """The newest checkpoint that can be read, its content, and a remark on newer ones."""
    passed_over = []
    for candidate in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            content = _read(candidate)
        except ValueError as error:
            passed_over.append(error)
            continue
        return candidate, content, f"; {len(passed_over)} newer cannot be read" if passed_over else ""
    raise ValueError(
        f"Expected {folder} to hold a checkpoint of lit-did, but none of {len(found)} is: {passed_over[0]}"
    )


def _is_sharded(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _read_shards(path) if path.is_dir() else _load(path)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (
            f"it holds a Python object, {foreign[1]}, which is not loaded because it could run code"
            if foreign
            else "it is no checkpoint, or a part of it is missing"
        )
        raise ValueError(f"Expected {path} to be a whole checkpoint of Lightning, but {why}.") from error
    if not isinstance(content, dict) or KEY not in content or "state_dict" not in content:
        raise ValueError(f"Expected {path} to be a checkpoint of LitDPO or LitDPOPG, but it is something else's.")
    facts, arguments = content[KEY], content.get("hyper_parameters")
    if not isinstance(facts, dict) or not isinstance(arguments, dict) or not facts.keys() >= FACTS:
        raise ValueError(
            f"Expected {path} to describe its run, but parts of `{KEY}` or `hyper_parameters` are missing. Pass a "
            "checkpoint as the Trainer saved it."
        )
    return content


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _read_shards(folder: Path) -> dict[str, Any]:
    """The policy's weights alone, and what Lightning keeps beside the shards."""
    reader = dcp.FileSystemReader(folder)
    weights = {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the intent is to load in a single process")
        dcp.load({"state_dict": weights}, storage_reader=reader, no_dist=True)
    return {**_load(folder / "meta.pt"), "state_dict": weights}
