"""Finds and reads checkpoints of Lightning: a file, a folder of shards, or the best or newest one of a run's folder."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_did.modules.run_facts import FACTS, KEY
from lit_did.writing import whole_file

PREFIX = "models.policy."
_WEIGHTS = f"state_dict.{PREFIX}"  # in shards
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError),  # what torch.load raises for broken files
    pickle.UnpicklingError,
    dcp.CheckpointException,
)


class Checkpoint(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    content: dict[str, Any]
    """what Lightning saved; tensors of a file are read when they are used, and shards by `read_checkpoint` only"""
    which: str = ""
    """why this one was taken from a folder, such as "the best by val/loss (0.61)"; "" for a file"""

    @property
    def step(self) -> int:
        """The optimiser steps before it."""
        return self.content["global_step"]

    @property
    def continues(self) -> bool:
        """Whether training can continue from it. It cannot after `save_weights_only=True`."""
        return "lr_schedulers" in self.content  # saved with the optimiser's state, and not in shards


class NotWhole(ValueError):
    """A file is no checkpoint of Lightning, or a part of it is missing."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"Expected {path} to be a whole checkpoint of Lightning, but {why}.")
        self.path, self.why = path, why


def read_whole(path: Path) -> Checkpoint:
    """Reads a checkpoint, a file or a folder of shards. Nothing in it is executed. Weights stay on disk.

    Raises:
        NotWhole: It cannot be read.
    """
    file = path / "meta.pt" if path.is_dir() else path
    if path.is_dir() and not _is_sharded(path):
        raise NotWhole(path, "its .metadata is missing")
    if file.is_file() and not file.stat().st_size:
        raise NotWhole(path, "it is empty")
    if file.is_file() and not zipfile.is_zipfile(file):  # the end has the table of contents
        raise NotWhole(path, "it is cut off, or no checkpoint")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        raise NotWhole(path, _why(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("global_step"), int):
        raise NotWhole(path, "it is something else's")
    return Checkpoint(path, content)


def whole_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[NotWhole]]:
    """The whole checkpoints below a folder, the newest first, and what is wrong with the others.

    Of several runs, the one that wrote last comes first. Within a run, the checkpoint after the most steps comes first,
    and of those after the same step the one that was written last. Hidden files were being written, and do not count.
    """
    found = {p for p in folder.rglob("*.ckpt") if not any(part[0] == "." for part in p.relative_to(folder).parts)}
    whole, broken = [], []
    for path in sorted(p for p in found if not any(parent in found for parent in p.parents)):
        try:
            whole.append(read_whole(path))
        except NotWhole as error:
            broken.append(error)
    runs: dict[Path, int] = {}
    for checkpoint in whole:
        run = _run_of(checkpoint.path)
        runs[run] = max(runs.get(run, 0), _time(checkpoint.path))

    def age(checkpoint: Checkpoint) -> tuple:
        run = _run_of(checkpoint.path)
        return runs[run], str(run), checkpoint.step, _time(checkpoint.path), str(checkpoint.path)

    return sorted(whole, key=age, reverse=True), broken


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of LitDPO with the policy's weights. Optimizer states stay on disk.

    Args:
        path: A file, a folder of shards (`save_distributed_checkpoint=True`), or a folder with checkpoints somewhere
            below. Of several, the one that a ModelCheckpoint with `monitor` calls the best is taken, and without one
            the newest, see `whole_checkpoints`. Files that a kill cut off are passed over.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, is of another project, or the folder has several best ones.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected `checkpoint` to be a checkpoint or a run's folder, but {path} is not there.")
    if path.is_file() or _is_sharded(path):
        return _with_weights(read_whole(path))
    whole, broken = whole_checkpoints(path)
    if not whole and not broken:
        raise FileNotFoundError(f"Expected `checkpoint` to be a checkpoint or a run's folder, but {path} holds none.")
    ours = [checkpoint for checkpoint in whole if KEY in checkpoint.content]
    count = len(whole) + len(broken)
    if not ours:
        why = broken[0] if broken else f"{whole[0].path} is something else's"
        raise ValueError(f"Expected {path} to hold a checkpoint of lit-did, but none of {count} is: {why}")
    newest = ours[0]
    best: dict[str, Checkpoint] = {}
    for state in newest.content.get("callbacks", {}).values():
        monitor = state.get("monitor") if isinstance(state, dict) else None
        named = Path(state["best_model_path"]) if monitor and state.get("best_model_path") else None
        paths = {checkpoint.path for checkpoint in ours} | {error.path for error in broken}
        for candidate in [] if named is None else _named_by(newest.path, named, paths):
            score = float(state["best_model_score"])
            best[str(monitor)] = Checkpoint(candidate, {}, f"the best by {monitor} ({score:.4g})")
    if len({checkpoint.path for checkpoint in best.values()}) > 1:
        files = ", ".join(f"{checkpoint.path} ({checkpoint.which})" for checkpoint in best.values())
        raise ValueError(
            f"Expected `checkpoint` to be one of the best checkpoints of {path}, but it has several: {files}."
        )
    for checkpoint in best.values():
        return _with_weights(read_whole(checkpoint.path))._replace(which=checkpoint.which)
    newer = sum(_time(error.path) > _time(newest.path) for error in broken)
    passed_over = f"; {newer} newer cannot be read" if newer else ""
    return _with_weights(newest)._replace(which=f"the newest of {count}{passed_over}")


def _named_by(newest: Path, named: Path, found: Iterable[Path]) -> list[Path]:
    """The checkpoint that `newest` names, which may have been moved since. Other runs have files of the same name."""
    here = [p for p in found if p.resolve() == named.resolve()] or [p for p in found if p == newest.parent / named.name]
    elsewhere = [p for p in found if p.name == named.name]
    return here or (elsewhere if len(elsewhere) == 1 else [])


def _run_of(path: Path) -> Path:
    """The folder of a checkpoint's run, which may keep its checkpoints in folders below `checkpoints`."""
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path.parent)


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _is_sharded(path: Path) -> bool:
    return (path / ".metadata").is_file()


def _why(error: BaseException) -> str:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return f"it holds a Python object, {foreign[1]}, which is not loaded because it could run code"
    return "it is no checkpoint, or a part of it is missing"


def _with_weights(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of LitDPO with its policy's weights. Raises ValueError if it is another one's."""
    path, content = checkpoint.path, checkpoint.content
    facts, arguments = content.get(KEY), content.get("hyper_parameters")
    if path.is_dir():
        try:
            content = {**content, "state_dict": _read_shards(path)}
        except PermissionError:
            raise
        except _UNREADABLE as error:
            raise NotWhole(path, _why(error)) from error
    if KEY not in content or "state_dict" not in content:
        raise ValueError(f"Expected {path} to be a checkpoint of LitDPO or LitDPOPG, but it is something else's.")
    if not isinstance(facts, dict) or not isinstance(arguments, dict) or not facts.keys() >= FACTS:
        raise ValueError(
            f"Expected {path} to describe its run, but parts of `{KEY}` or `hyper_parameters` are missing. Pass a "
            "checkpoint as the Trainer saved it."
        )
    return checkpoint._replace(content=content)


def consolidate_checkpoint(folder: str | os.PathLike, file: str | os.PathLike) -> None:
    """Writes a sharded checkpoint as one file, from which a run goes on in one process or with DDP.

    Args:
        folder: What ModelParallelStrategy saved.
        file: The file to write. It appears whole or not at all.

    Raises:
        FileExistsError: `file` exists.
        ValueError: `folder` is not a whole sharded checkpoint.
    """
    path, target = Path(folder), Path(file)
    if target.exists():
        raise FileExistsError(f"Expected `file` to be new, but {target} exists. Choose another one.")
    content = read_whole(path).content
    if not path.is_dir():
        raise ValueError(f"Expected `folder` to be a sharded checkpoint, but got the file {path}, which is whole.")
    with whole_file(target) as beside:
        dcp_to_torch_save(path, beside)
        shards = torch.load(beside, weights_only=True)
        optimizers = [shards[name] for name in sorted(shards) if name.startswith("optimizer_")]
        torch.save({**content, "state_dict": shards["state_dict"], "optimizer_states": optimizers}, beside)


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The policy's weights alone."""
    reader = dcp.FileSystemReader(folder)
    weights = {
        name.removeprefix("state_dict."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the intent is to load in a single process")
        dcp.load({"state_dict": weights}, storage_reader=reader, no_dist=True)
    return weights
