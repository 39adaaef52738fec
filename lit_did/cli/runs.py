"""The folder of a training run: where it is, how a new run takes it, and with which checkpoint a run continues."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_did.cli.errors import InputError
from lit_did.cli.output import make_parent
from lit_did.exporting.checkpoints import Checkpoint, NotWhole, read_whole, whole_checkpoints

ROOT = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FREE = ("ckpt_path", "output", "quiet", "config")
"""what may differ between a run and its continuation, beside when the run ends"""
ENDS = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")


def next_folder(name: str) -> Path:
    """The folder below `runs/NAME` that the next run gets."""
    numbers = [number for number, _ in _versions(ROOT / name)]
    return ROOT / name / f"version_{max(numbers, default=-1) + 1}"


def take_next(name: str) -> Path:
    """Makes the folder of a new run below `runs/NAME`, which no other run gets."""
    while True:
        folder = next_folder(name)
        make_parent(folder)
        try:
            folder.mkdir()
        except FileExistsError:  # another run has just made it
            continue
        return take(folder)


def take(folder: Path) -> Path:
    """Makes the folder of a new run, or takes an empty one. Of two runs that ask at once, one gets it.

    Raises:
        InputError: The folder holds something, or cannot be made.
    """
    make_parent(folder)
    what = "a run" if (folder / CONFIG).exists() or (folder / CHECKPOINTS).exists() else "other files"
    if folder.is_dir() and any(folder.iterdir()):
        go_on = "To continue that run, add `--ckpt_path last`. " if what == "a run" else ""
        raise InputError(
            f"Expected --output to be a new or empty folder, but {folder} holds {what}. {go_on}For a new run, give "
            "another --output."
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"Expected --output to be a new folder, but another run has just begun in {folder}. Give another --output."
        ) from None
    return folder


def leave(folder: Path) -> None:
    """Removes the folder of a run that has written nothing, or its empty folder for checkpoints."""
    for path in (folder / CHECKPOINTS, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def find_run(name: str, config: Mapping[str, Any], sections: tuple[str, ...]) -> Path:
    """The newest run below `runs/NAME` that was started with the same configuration and has a checkpoint.

    Args:
        name: The name.
        config: The configuration.
        sections: The parts of it that have to be equal.

    Raises:
        InputError: There is none. The message names what differs in the newest run.
    """
    started = [folder for _, folder in _versions(ROOT / name) if (folder / CONFIG).exists()]
    folders = [folder for folder in started if any((folder / CHECKPOINTS).rglob("[!.]*.ckpt"))]
    differences = {folder: differing(folder, config, sections) for folder in folders}
    for folder in reversed(folders):
        if not differences[folder]:
            return folder
    if not folders:
        raise InputError(
            f"Expected a run in {ROOT / name} for `--ckpt_path last`, but "
            f"{'none has a checkpoint' if started else 'there is none'}. Leave `--ckpt_path` out to start one, or give "
            "the folder of the run with --output."
        )
    newest = folders[-1]
    raise InputError(
        f"Expected a run in {ROOT / name} with the same configuration for `--ckpt_path last`, but there is none. In "
        f"the newest, {newest}, {differences[newest][0]}. To continue that run all the same, add `--output {newest}`."
    )


def differing(folder: Path, config: Mapping[str, Any], sections: tuple[str, ...] = ()) -> list[str]:
    """What differs between the configuration of the run in a folder and this one, in words."""
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else config
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, Mapping):
        raise InputError(
            f"Expected {path} to be the configuration of a run, but it is no YAML with options as keys. To continue "
            f"the run with the configuration of this command, delete that file and add `--output {folder}`."
        )
    saved, own = _flat(content), _flat(config)
    return [
        f"{key} is {saved.get(key)!r}, and not {own.get(key)!r}"
        for key in dict.fromkeys([*saved, *own])
        if saved.get(key) != own.get(key) and (not sections or key.split(".")[0] in sections)
    ]


def find_checkpoint(path: str, folder: Path | None, trains: bool) -> Checkpoint:
    """The checkpoint that `--ckpt_path` names.

    Args:
        path: A path, or "last" or "best" in the run's folder. If a run's last checkpoint is not whole, the newest whole
            one is used instead, with a warning.
        folder: The run's folder.
        trains: Whether training continues from it, which needs the optimiser's state.

    Raises:
        InputError: There is no such checkpoint, it is not whole, or training cannot continue from it.
    """
    if path == "last" and folder is not None:
        return _last(folder, trains)
    named = Path(path).expanduser() if path != "best" or folder is None else folder / CHECKPOINTS / "best.ckpt"
    if not named.exists():
        found = sorted(str(p) for p in (named.parent.glob("[!.]*.ckpt") if named.parent.is_dir() else ()))
        others = f" There are {', '.join(found)}." if found else ""
        raise InputError(f"Expected `ckpt_path` to be a checkpoint, but {named} does not exist.{others}")
    try:
        checkpoint = read_whole(named)
    except NotWhole as error:
        raise InputError(f"Expected `ckpt_path` to be a whole checkpoint, but {named} is not: {error.why}.") from error
    if trains and not checkpoint.continues:
        raise InputError(f"Expected `ckpt_path` to be a checkpoint to train from, but {named} {_WEIGHTS_ONLY}.")
    return checkpoint


_WEIGHTS_ONLY = "was saved with `save_weights_only`, without the optimiser's state"


def _last(folder: Path, trains: bool) -> Checkpoint:
    """The newest checkpoint of a run, from which training can continue if it `trains`."""
    other = "Give the folder of another run with --output, or start a new one without `--ckpt_path`"
    whole, broken = whole_checkpoints(folder / CHECKPOINTS)
    faults = ", ".join(f"{error.path} ({error.why})" for error in broken)
    if not whole:
        what = f"a whole checkpoint, but none loads: {faults}" if broken else "a checkpoint, but it holds none"
        raise InputError(f"Expected {folder} for `--ckpt_path last` to hold {what}. {other}.")
    fit = [checkpoint for checkpoint in whole if checkpoint.continues or not trains]
    if not fit:
        raise InputError(f"Expected {folder} to hold a checkpoint to train from, but each {_WEIGHTS_ONLY}. {other}.")
    if broken:
        warnings.warn(
            f"A checkpoint is not whole, perhaps because the disk was full or the run was killed while it was written: "
            f"{faults}. The newest whole one is used instead: {fit[0].path}, after {fit[0].step} steps.",
            stacklevel=2,
        )
    return fit[0]


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
