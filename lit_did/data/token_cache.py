"""Tokenised pairs in a folder that processes and runs share: one process writes them, all others read them.

cache_tokens/
    train-0123456789abcdef/           appears when all of it is written
        tokens.bin, ends.npy, row_numbers.npy, counts.json      a PreferenceDataset
        made_from.json                what its key was made from, and the warnings of its source
    .train-0123456789abcdef.lock      held by the process that writes
    .digests/                         digests of source files, each named by the file's path, size and times
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_did.data import hub
from lit_did.data.dataset import PreferenceDataset
from lit_did.data.files import find_files
from lit_did.file_digests import file_digest

_ABOUT, _DIGESTS = "made_from.json", ".digests"
_EVERY = 60.0  # seconds between lines about waiting


def cached_dataset(
    folder: Path, name: str, made_from: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]
) -> tuple[PreferenceDataset, dict[str, Any]]:
    """Opens the tokens of a split. If the folder has none that were made from the same, they are written first.

    Args:
        folder: The folder that all processes share.
        name: The split.
        made_from: Plain values that all tokens depend on.
        write: Writes a PreferenceDataset to an empty folder, and returns plain values to keep beside it.

    Returns:
        The dataset, and the values that `write` returned.

    Raises:
        ValueError: The files were damaged.
    """
    target = folder / f"{name}-{key_of(made_from)}"

    def write_all(part: Path) -> None:
        about = write(part)
        (part / _ABOUT).write_text(json.dumps({**about, "made_from": made_from}, indent=1, default=repr))

    write_once(target, write_all)
    try:
        return PreferenceDataset.open(target), json.loads((target / _ABOUT).read_text())
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"Expected whole files of tokens in {target}, but got: {error}. Delete this folder to tokenise again."
        ) from error


def key_of(made_from: Mapping[str, Any]) -> str:
    """The key of plain values."""
    return _digest(json.dumps(made_from, sort_keys=True, default=repr).encode())


def what_tokens_depend_on(tokenizer: Any, chat_template: str | None) -> dict[str, Any]:
    """Plain values that differ if equal pairs and options may give other tokens."""
    tokenizer("a", padding=False, truncation=False)  # which a tokenizer saves, as the last call set them
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        digests = {path.name: _digest(path.read_bytes()) for path in files}
    template = str(chat_template or getattr(tokenizer, "chat_template", None))
    return {
        "tokenizer": digests,
        "day": time.strftime("%Y-%m-%d") if "strftime_now" in template else None,  # the template may write it
        "code": _digest(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }


def source_digests(sources: Sequence[Any], name: str, folder: Path) -> list[tuple[str, str]]:
    """The files of sources, each with a digest of its content.

    Args:
        sources: Paths, folders, patterns, names of the Hugging Face hub, or lists of these.
        name: What errors call the sources.
        folder: The folder of the cache, where digests are kept too.

    Raises:
        TypeError: If a source is something else, such as a list of dicts.
    """
    found: list[tuple[str, str]] = []
    for source in sources:
        parts = source if isinstance(source, list | tuple) else [source]
        if not all(isinstance(part, str | os.PathLike) for part in parts):
            raise TypeError(
                f"Expected `{name}` to be files or names of the hub with `cache_tokens`, but got "
                f"{type(source).__name__}. Write the rows to a file, or leave `cache_tokens` out."
            )
        for path in (os.path.expanduser(os.fspath(part)) for part in parts):
            if hub.is_hub_name(path):
                files = [Path(entry["filename"]) for entry in hub.load(path).cache_files]
                found.append((path, key_of({"files": [file_digest(file, folder / _DIGESTS) for file in files]})))
            else:
                found += [(str(file), file_digest(file, folder / _DIGESTS)) for file in find_files(path)]
    return found


def write_once(target: Path, write: Callable[[Path], None]) -> bool:
    """Makes a folder unless it is there. Of several processes one writes it, and the others wait.

    Args:
        target: The folder. It appears when `write` has returned.
        write: Writes into an empty folder.

    Returns:
        Whether this process wrote it.
    """
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if target.exists():
            return False
        for left in target.parent.glob(f".{target.name}.part*"):  # of writers that were killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.part") as work:
            folder = Path(work) / target.name  # with the usual permissions, which the temporary folder lacks
            folder.mkdir()
            write(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():  # otherwise a process was faster that the lock does not reach
                    raise
    return True


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Holds the lock of a folder. The operating system frees it when a process ends, even if it is killed."""
    lock = FileLock(target.parent / f".{target.name}.lock")
    start, wait = time.monotonic(), 1.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=wait, poll_interval=0.2)
        except Timeout:
            wait = _EVERY
            written = sum(file.stat().st_size for file in target.parent.glob(f".{target.name}.part*/*/tokens.bin"))
            rank_zero_info(
                f"Waits for another process, which tokenises into {target}: {written / 1e6:,.0f} MB are written after "
                f"{(time.monotonic() - start) / 60:.0f} minutes."
            )
    try:
        yield
    finally:
        lock.release()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
