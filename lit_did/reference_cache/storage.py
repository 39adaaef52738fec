"""Storage: hidden states of sequences in safetensors files of bounded size, with an index in JSON.

cache_reference/
    .lock                             held by processes that write
    reference/                        appears when all of it is written
        index.json                    fingerprint; name, size and checksum of each shard
        00000-00000.safetensors       process 0's first shard: hidden [tokens, H], lengths [n], keys [n, 16]
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_did.batches.moving import to_device

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 1
KEY_BYTES = 16
SHARD_BYTES = 2**28
_FOLDER, _INDEX, _PART, _UNFINISHED = "reference", "index.json", "{:05}.json", ".unfinished_"
_CHUNK_BYTES = 2**20
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shard(NamedTuple):
    """A shard's entry in the index."""

    file: str
    bytes: int
    crc32: str


@contextmanager
def unfinished_cache(path: str | os.PathLike) -> Iterator[Path]:
    """Makes a hidden folder in which processes write a cache, and removes it in the end unless it was published.

    First it removes what killed runs left, if no other process is writing.

    Args:
        path: The folder of the cache. It is made if it does not exist.

    Yields:
        The folder for `CacheWriter` and `publish`.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Expected `cache_reference` to be a folder, but got the file {path}.")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+b") as lock:
        # Nothing is removed while another process writes, nor if there are no locks (Windows, some file systems).
        with suppress(OSError, AttributeError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in path.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left)
        with suppress(OSError, AttributeError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(dir=path, prefix=_UNFINISHED, ignore_cleanup_errors=True) as parent:
            folder = Path(parent) / _FOLDER  # with the usual permissions, which the temporary folder lacks
            folder.mkdir()
            yield folder


class CacheWriter:
    """Writes the shards of one process. It holds one shard in memory, and a key for each sequence.

    Args:
        folder: The folder of `unfinished_cache`.
        process: The number of this process, from 0.
        num_tokens: The number of completion tokens to come, if it is known. The first `add` then checks that the disk
            has room for them.
        shard_bytes: The size of a shard's hidden states. Only a single longer sequence exceeds it.

    Raises:
        FileNotFoundError: This process does not see the folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as path:
        ...     with unfinished_cache(path) as folder:
        ...         writer = CacheWriter(folder)
        ...         writer.add([b"one".zfill(16), b"two".zfill(16)], torch.ones(3, 2), np.array([0, 1, 3]))
        ...         writer.finish()
        ...         publish(folder, {"reference": "a", "pairs": "b"})
        ...     cache = ReferenceCache.open(path, {"reference": "a", "pairs": "b"})
        ...     cache.hidden([b"two".zfill(16)])
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(
        self, folder: Path, *, process: int = 0, num_tokens: int | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Expected `cache_reference` to be a folder that all processes share, but process {process} does not "
                f"see {folder}. Pass a folder on a shared file system."
            )
        self._folder, self._process = folder, process
        self._num_tokens, self._shard_bytes = num_tokens, shard_bytes
        self._form: tuple[torch.dtype, int] | None = None
        self._known: set[bytes] = set()
        self._rows: dict[bytes, Tensor] = {}  # of the next shard
        self._num_rows = 0
        self._shards: list[Shard] = []

    def add(self, keys: Sequence[bytes], hidden: Tensor, cu_labels: np.ndarray) -> None:
        """Adds the sequences that were not added before.

        Args:
            keys: The keys of `sequence_keys`.
            hidden: [completion tokens, H] float64, float32, bfloat16 or float16, on any device: the last hidden states
                of the positions that have labels.
            cu_labels: [sequences + 1] int64. Sequence i owns the rows cu_labels[i] to cu_labels[i + 1].

        Raises:
            TypeError: `hidden` has another dtype.
            ValueError: `hidden` is not a matrix, or it differs in dtype or H from the first call's, or `cu_labels` does
                not fit.
            OSError: The disk is full. The message names the folder and the bytes needed.
        """
        if hidden.dtype not in _DTYPES:
            raise TypeError(f"Expected `hidden` to be float64, float32, bfloat16 or float16, but got {hidden.dtype}.")
        if hidden.dim() != 2:
            raise ValueError(f"Expected `hidden` to have the shape [tokens, H], but got {tuple(hidden.shape)}.")
        form = (hidden.dtype, hidden.shape[1])
        row_bytes = hidden.dtype.itemsize * hidden.shape[1]
        if self._form is None:
            self._form = form
            needed = (self._num_tokens or 0) * row_bytes
            if needed > shutil.disk_usage(self._folder).free:
                raise self._not_written(f"{needed:,} bytes of hidden states", os.strerror(errno.ENOSPC))
        if form != self._form:
            raise ValueError(f"Expected `hidden` to have the first call's dtype and H, {self._form}, but got {form}.")
        bounds = cu_labels.tolist()
        if len(bounds) != len(keys) + 1 or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, len(hidden)):
            raise ValueError(
                f"Expected `cu_labels` to be {len(keys) + 1} numbers that rise from 0 to {len(hidden)}, but got "
                f"{bounds}."
            )
        rows = hidden.detach().to("cpu", copy=True)
        for key, (start, end) in zip(keys, pairwise(bounds), strict=True):
            if key in self._known:
                continue
            if self._rows and (self._num_rows + end - start) * row_bytes > self._shard_bytes:
                self._write_shard()
            self._rows[key] = rows[start:end]
            self._num_rows += end - start
            self._known.add(key)

    def finish(self) -> None:
        """Writes the last shard and this process's list of shards."""
        if self._rows:
            self._write_shard()
        (self._folder / _PART.format(self._process)).write_text(json.dumps(self._shards))

    def _write_shard(self) -> None:
        file = self._folder / f"{self._process:05}-{len(self._shards):05}.safetensors"
        tensors = {
            "hidden": torch.cat(list(self._rows.values())),
            "lengths": torch.tensor([len(rows) for rows in self._rows.values()]),
            "keys": torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.uint8).view(-1, KEY_BYTES),
        }
        try:
            save_file(tensors, file)
        except (SafetensorError, OSError) as error:
            raise self._not_written("hidden states", str(error)) from error
        self._shards.append(Shard(file.name, file.stat().st_size, _crc32(file)))
        self._rows, self._num_rows = {}, 0

    def _not_written(self, what: str, reason: str) -> OSError:
        free = shutil.disk_usage(self._folder).free
        return OSError(
            f"Expected room for {what} in the folder of `cache_reference`, {self._folder.parents[1]}, but got "
            f"{reason!r}, with {free:,} bytes free. No unfinished file is left there. Make room, or pass a folder on "
            "another disk."
        )


def publish(folder: Path, fingerprint: Mapping[str, str], processes: int = 1) -> None:
    """Writes the index and moves a complete cache to its place. A cache that is there already is kept.

    Args:
        folder: The folder of `unfinished_cache`.
        fingerprint: The digests of `fingerprint`, and other properties that a cache must share with a run, such as
            the precision.
        processes: The number of processes that wrote.

    Raises:
        ValueError: No process added a sequence.
        FileNotFoundError: The shards of a process are not in the folder.
    """
    shards = []
    for process in range(processes):
        part = folder / _PART.format(process)
        if not part.exists():
            raise FileNotFoundError(
                f"Expected `cache_reference` to be a folder that all processes share, but {folder} has no shards of "
                f"process {process}. Pass a folder on a shared file system."
            )
        shards += [Shard(*shard)._asdict() for shard in json.loads(part.read_text())]
        part.unlink()
    if not shards:
        raise ValueError("Expected at least one sequence for `cache_reference`, but got none.")
    index = {"version": VERSION, "fingerprint": dict(fingerprint), "shards": shards}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))
    target = folder.parents[1] / _FOLDER
    try:
        os.rename(folder, target)
    except OSError:
        if not target.exists():  # otherwise another run was faster
            raise


class ReferenceCache:
    """The hidden states of a reference, by sequence. `open` makes one from a folder.

    The files are mapped into memory: the system's page cache holds what is read, and drops it when memory is needed.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder, self._shards = folder, shards
        self._unchecked = set(range(len(shards)))
        self._hidden: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, shard in enumerate(shards):
            hidden, rows = _open_shard(folder, shard)
            self._hidden.append(hidden)
            self._places.update({key: (number, *bounds) for key, bounds in rows.items()})

    @staticmethod
    def exists(path: str | os.PathLike) -> bool:
        """Returns whether the folder holds a cache."""
        return (Path(path) / _FOLDER).exists()

    @classmethod
    def open(
        cls, path: str | os.PathLike, fingerprint: Mapping[str, str], keys: Iterable[bytes] = (), data_hint: str = ""
    ) -> ReferenceCache:
        """Opens a cache. The sizes of its files are checked, and the content of each when it is first used.

        Args:
            path: The folder.
            fingerprint: The fingerprint that the cache must have.
            keys: The keys of the sequences that are needed, from which an error says how the pairs differ.
            data_hint: A sentence for that error: why the pairs may differ.

        Raises:
            FileNotFoundError: The folder holds no cache.
            ValueError: The cache is damaged, has another version of this format, or belongs to another reference, other
                pairs or another precision.
        """
        folder = Path(path) / _FOLDER
        try:
            index = json.loads((folder / _INDEX).read_text())
            version, got = index["version"], dict(index["fingerprint"])
            shards = [Shard(**shard) for shard in index["shards"]] if version == VERSION else []
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Expected `cache_reference` {path} to hold a cache, but {error.filename} does not exist. Pass a "
                f"folder that all processes share. If they share this one, delete {folder}."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise _unusable(folder, f"{_INDEX} cannot be read ({error!r})") from error
        if version != VERSION:
            raise _unusable(folder, f"its format has version {version} instead of {VERSION}")
        cache = cls(folder, shards)
        differing = [part for part in {**fingerprint, **got} if fingerprint.get(part) != got.get(part)]
        if differing:
            wanted, held = set(keys), cache.keys()
            common = f" {len(wanted & held)} of the run's {len(wanted)} sequences are among its {len(held)}."
            raise ValueError(
                f"Expected the cache {folder} to belong to this run, but it differs in "
                f"{' and '.join(f'{part} ({got.get(part)} instead of {fingerprint.get(part)})' for part in differing)}."
                f"{common if wanted and 'pairs' in differing else ''} Pass another folder as `cache_reference`, or "
                f"delete this one to run the reference again.{data_hint if 'pairs' in differing else ''}"
            )
        return cache

    def hidden(self, keys: Sequence[bytes], device: torch.device | str | None = None) -> Tensor:
        """Returns a copy of the hidden states [tokens, H] of sequences, one after the other.

        Args:
            keys: The keys of `sequence_keys`.
            device: The device of the result. None: the CPU.

        Raises:
            ValueError: A sequence is not in the cache, or a file was changed since it was written.
        """
        missing = sum(key not in self._places for key in keys)
        used = {self._places[key][0] for key in keys} if not missing else self._unchecked
        for number in sorted(used & self._unchecked):
            self._check(number)
        if missing:
            raise ValueError(
                f"Expected `cache_reference` {self._folder.parent} to hold every sequence, but {missing} of "
                f"{len(keys)} are missing. Use the pairs, template and `max_length` of the run that wrote it."
            )
        rows = [self._hidden[shard][start:end] for shard, start, end in map(self._places.__getitem__, keys)]
        return to_device(torch.cat([self._hidden[0][:0], *rows]), torch.device(device or "cpu"))

    def _check(self, number: int) -> None:
        """Compares the checksum of a shard, once."""
        shard = self._shards[number]
        crc = _crc32(self._folder / shard.file)
        if crc != shard.crc32:
            raise _unusable(self._folder, f"{shard.file} has the checksum {crc} instead of {shard.crc32}")
        self._unchecked.discard(number)

    def keys(self) -> KeysView[bytes]:
        """Returns the keys of all sequences."""
        return self._places.keys()


def _open_shard(folder: Path, shard: Shard) -> tuple[Tensor, dict[bytes, tuple[int, int]]]:
    """Returns the mapped hidden states of a shard, and the rows of each sequence."""
    file = folder / shard.file
    size = file.stat().st_size if file.exists() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
        raise _unusable(folder, f"{shard.file} {found}")
    try:
        with safe_open(file, framework="pt") as opened:
            hidden = opened.get_tensor("hidden")
            bounds = pairwise([0, *accumulate(opened.get_tensor("lengths").tolist())])
            keys = (row.tobytes() for row in opened.get_tensor("keys").numpy())
            return hidden, dict(zip(keys, bounds, strict=True))
    except (SafetensorError, ValueError) as error:
        raise _unusable(folder, f"{shard.file} cannot be read ({error})") from error


def _unusable(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"Expected the cache {folder} to be whole and of this version, but {reason}. Delete this folder to run the "
        "reference again."
    )


def _crc32(file: Path) -> str:
    crc, chunk = 0, memoryview(bytearray(_CHUNK_BYTES))
    with open(file, "rb", buffering=0) as stream:  # mapped pages would count as this process's memory
        while size := stream.readinto(chunk):
            crc = zlib.crc32(chunk[:size], crc)
    return f"{crc:08x}"
