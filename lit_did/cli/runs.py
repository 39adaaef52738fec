"""The folder of a training run: where it is, and which of its checkpoints is the newest whole one."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from lit_did.cli.errors import InputError
from lit_did.cli.output import make_parent

ROOT = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FREE = ("ckpt_path", "output", "quiet", "config")
"""what may differ between a run and its continuation, beside when the run ends"""
ENDS = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")


class Checkpoint(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    step: int
    """the optimiser steps before it"""


def new_folder(name: str) -> Path:
    """A folder for a new run below `runs/NAME`, which does not exist yet."""
    numbers = [number for number, _ in _versions(ROOT / name)]
    return ROOT / name / f"version_{max(numbers, default=-1) + 1}"


def check_unused(folder: Path) -> None:
    """Raises InputError if a folder holds a run already, or if nothing can be written there."""
    if (folder / CONFIG).exists() or (folder / CHECKPOINTS).exists():
        raise InputError(
            f"Expected --output to be a folder without a run, but {folder} holds one. To continue that run, add "
            "`--ckpt_path last`. For a new run, give another --output."
        )
    make_parent(folder)


def find_run(name: str, config: Mapping[str, Any], sections: tuple[str, ...]) -> Path:
    """The newest run below `runs/NAME` that was started with the same configuration.

    Args:
        name: The name.
        config: The configuration.
        sections: The parts of it that have to be equal.

    Raises:
        InputError: There is none. The message names what differs in the newest run.
    """
    folders = [folder for _, folder in _versions(ROOT / name) if (folder / CONFIG).exists()]
    differences = {folder: differing(folder, config, sections) for folder in folders}
    for folder in reversed(folders):
        if not differences[folder]:
            return folder
    if not folders:
        raise InputError(
            f"Expected a run in {ROOT / name} for `--ckpt_path last`, but there is none. Leave `--ckpt_path` out to "
            "start one, or give the folder of the run with --output."
        )
    newest = folders[-1]
    raise InputError(
        f"Expected a run in {ROOT / name} with the same configuration for `--ckpt_path last`, but there is none. In "
        f"the newest, {newest}, {differences[newest][0]}. To continue that run all the same, add `--output {newest}`."
    )


def differing(folder: Path, config: Mapping[str, Any], sections: tuple[str, ...] = ()) -> list[str]:
    """What differs between the configuration of the run in a folder and this one, in words."""
    path = folder / CONFIG
    saved = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else config)
    own = _flat(config)
    return [
        f"{key} is {saved.get(key)!r}, and not {own.get(key)!r}"
        for key in dict.fromkeys([*saved, *own])
        if saved.get(key) != own.get(key) and (not sections or key.split(".")[0] in sections)
    ]


def find_checkpoint(path: str, folder: Path | None) -> Checkpoint:
    """The checkpoint that `--ckpt_path` names.

    Args:
        path: A path, or "last" or "best" in the run's folder. If a run's last checkpoint is not whole, the newest whole
            one is used instead, with a warning.
        folder: The run's folder.

    Raises:
        InputError: There is no such checkpoint, or it is not whole.
    """
    if path == "last" and folder is not None:
        return _newest_whole(folder)
    named = Path(path).expanduser() if path != "best" or folder is None else folder / CHECKPOINTS / "best.ckpt"
    if not named.exists():
        found = sorted(str(p) for p in (named.parent.glob("*.ckpt") if named.parent.is_dir() else ()))
        others = f" There are {', '.join(found)}." if found else ""
        raise InputError(f"Expected `ckpt_path` to be a checkpoint, but {named} does not exist.{others}")
    step = _step(named)
    if isinstance(step, str):
        raise InputError(f"Expected `ckpt_path` to be a whole checkpoint, but {named} does not load: {step}.")
    return Checkpoint(named, step)


def _newest_whole(folder: Path) -> Checkpoint:
    found = (folder / CHECKPOINTS).glob("**/[!.]*.ckpt")  # hidden: what was being written
    paths = sorted(found, key=lambda path: path.stat().st_mtime)
    if not paths:
        raise InputError(f"Expected {folder} to hold a checkpoint for `--ckpt_path last`, but it holds none.")
    steps = {path: _step(path) for path in paths}
    broken = [f"{path} ({step})" for path, step in steps.items() if isinstance(step, str)]
    whole = [Checkpoint(path, step) for path, step in steps.items() if isinstance(step, int)]
    if not whole:
        raise InputError(f"Expected {folder} to hold a whole checkpoint, but none loads: {', '.join(broken)}.")
    newest = max(whole, key=lambda checkpoint: checkpoint.step)  # the latest of equals comes last
    newest = [checkpoint for checkpoint in whole if checkpoint.step == newest.step][-1]
    if broken:
        warnings.warn(
            f"A checkpoint is not whole, perhaps because the disk was full or the run was killed while it was written: "
            f"{', '.join(broken)}. The newest whole one is used instead: {newest.path}, after {newest.step} steps.",
            stacklevel=2,
        )
    return newest


def _step(path: Path) -> int | str:
    """The optimiser steps before a checkpoint, or why it does not load."""
    file = path / "meta.pt" if path.is_dir() else path  # a folder: a sharded checkpoint
    try:
        if path.is_dir() and not (path / ".metadata").exists():
            return "its .metadata is missing"
        if not file.stat().st_size:
            return "it is empty"
        if not zipfile.is_zipfile(file):  # the end has the table of contents
            return "it is cut off, or no checkpoint"
        # Mapped: only the part without weights is read.
        return int(torch.load(file, weights_only=True, mmap=True, map_location="cpu")["global_step"])
    except Exception as error:  # what torch raises for half a file is of many types
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """The runs below a folder with their numbers, the oldest first."""
    found = ((re.fullmatch(r"version_(\d+)", path.name), path) for path in folder.glob("version_*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by dotted key, without those that may differ when a run continues."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if key not in FREE and key not in [f"trainer.{end}" for end in ENDS]:
            flat |= _flat(value, key)
    return flat
