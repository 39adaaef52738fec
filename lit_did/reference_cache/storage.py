"""Storage: rows of numbers of each sequence in safetensors files of bounded size, with an index in JSON.

The rows of a sequence are its hidden states, one at each completion token, or a single log-probability.

cache_reference/
    .lock                             held by processes that write
    reference/                        appears when all of it is written
        index.json                    fingerprint; name, size and checksum of each shard
        00000-00000.safetensors       process 0's first shard: rows [rows, H], lengths [n], keys [n, 16]
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
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
SHARD_SEQUENCES = 2**16
_FOLDER, _INDEX, _PART, _UNFINISHED = "reference", "index.json", "{:05}.json", ".unfinished_"
_CHUNK_BYTES = 2**20
_KEY = np.dtype(f"S{KEY_BYTES}")
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
        num_rows: The number of rows to come, if it is known. The first `add` then checks that the disk has room for
            them.
        shard_bytes: The size of a shard's rows. Only a single longer sequence exceeds it.
        shard_sequences: The most sequences of a shard.

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
        ...     cache.rows([b"two".zfill(16)])
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: int = 0,
        num_rows: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        shard_sequences: int = SHARD_SEQUENCES,
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Expected `cache_reference` to be a folder that all processes share, but process {process} does not "
                f"see {folder}. Pass a folder on a shared file system."
            )
        self._folder, self._process = folder, process
        self._expected, self._shard_bytes, self._shard_sequences = num_rows, shard_bytes, shard_sequences
        self._form: tuple[torch.dtype, int] | None = None
        self._known: set[bytes] = set()
        self._rows: dict[bytes, Tensor] = {}  # of the next shard
        self._num_rows = 0
        self._shards: list[Shard] = []

    def add(self, keys: Sequence[bytes], rows: Tensor, bounds: np.ndarray) -> None:
        """Adds the sequences that were not added before.

        Args:
            keys: The keys of `sequence_keys`.
            rows: [rows, H] float64, float32, bfloat16 or float16, on any device.
            bounds: [sequences + 1] int64. Sequence i owns the rows bounds[i] to bounds[i + 1].

        Raises:
            TypeError: `rows` has another dtype.
            ValueError: `rows` is not a matrix, or it differs in dtype or H from the first call's, or `bounds` does not
                fit.
            OSError: The disk is full. The message names the folder and the bytes needed.
        """
        if rows.dtype not in _DTYPES:
            raise TypeError(f"Expected `rows` to be float64, float32, bfloat16 or float16, but got {rows.dtype}.")
        if rows.dim() != 2:
            raise ValueError(f"Expected `rows` to have the shape [rows, H], but got {tuple(rows.shape)}.")
        form = (rows.dtype, rows.shape[1])
        row_bytes = rows.dtype.itemsize * rows.shape[1]
        if self._form is None:
            self._form = form
            needed = (self._expected or 0) * row_bytes
            if needed > shutil.disk_usage(self._folder).free:
                raise self._not_written(f"{needed:,} bytes", os.strerror(errno.ENOSPC))
        if form != self._form:
            raise ValueError(f"Expected `rows` to have the first call's dtype and H, {self._form}, but got {form}.")
        places = bounds.tolist()
        if len(places) != len(keys) + 1 or places != sorted(places) or (places[0], places[-1]) != (0, len(rows)):
            raise ValueError(
                f"Expected `bounds` to be {len(keys) + 1} numbers that rise from 0 to {len(rows)}, but got {places}."
            )
        copied = rows.detach().to("cpu", copy=True)
        for key, (start, end) in zip(keys, pairwise(places), strict=True):
            if key in self._known:
                continue
            too_large = (self._num_rows + end - start) * row_bytes > self._shard_bytes
            if self._rows and (too_large or len(self._rows) == self._shard_sequences):
                self._write_shard()
            self._rows[key] = copied[start:end]
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
            "rows": torch.cat(list(self._rows.values())),
            "lengths": torch.tensor([len(rows) for rows in self._rows.values()]),
            "keys": torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.uint8).view(-1, KEY_BYTES),
        }
        try:
            save_file(tensors, file)
        except (SafetensorError, OSError) as error:
            raise self._not_written("the reference's answers", str(error)) from error
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
    """What a reference answered, by sequence. `open` makes one from a folder.

    The files are mapped into memory: the system's page cache holds what is read, and drops it when memory is needed.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder, self._shards = folder, shards
        self._unchecked = set(range(len(shards)))
        opened = [_open_shard(folder, shard) for shard in shards]
        self._rows = [rows for rows, _, _ in opened]
        keys = np.concatenate([np.empty(0, _KEY), *(own for _, own, _ in opened)])
        places = [np.empty((0, 3), dtype=np.int64)]  # shard, first row, and the row after the last one
        for number, (_, _, bounds) in enumerate(opened):
            places.append(np.stack([np.full(len(bounds) - 1, number), bounds[:-1], bounds[1:]], axis=1))
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], np.concatenate(places)[order]

    @staticmethod
    def exists(path: str | os.PathLike) -> bool:
        """Returns whether the folder holds a cache."""
        return (Path(path) / _FOLDER).exists()

    @staticmethod
    def fingerprint(path: str | os.PathLike) -> dict[str, str] | None:
        """Returns the fingerprint of the cache in a folder. None: there is none, or its index is damaged."""
        try:
            return dict(json.loads((Path(path) / _FOLDER / _INDEX).read_text())["fingerprint"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

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
                pairs or another precision, or is of another kind.
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

    def rows(self, keys: Sequence[bytes], device: torch.device | str | None = None) -> Tensor:
        """Returns a copy of the rows [rows, H] of sequences, one after the other.

        Args:
            keys: The keys of `sequence_keys`.
            device: The device of the result. None: the CPU.

        Raises:
            ValueError: A sequence is not in the cache, or a file was changed since it was written.
        """
        wanted = np.frombuffer(b"".join(keys), dtype=_KEY) if keys else np.empty(0, _KEY)
        found = np.searchsorted(self._keys, wanted)
        missing = len(keys) - int((self._keys[np.minimum(found, len(self._keys) - 1)] == wanted).sum())
        places = self._places[found].tolist() if not missing else []
        for number in sorted(self._unchecked if missing else self._unchecked & {shard for shard, _, _ in places}):
            self._check(number)
        if missing:
            raise ValueError(
                f"Expected `cache_reference` {self._folder.parent} to hold every sequence, but {missing} of "
                f"{len(keys)} are missing. Use the pairs, template and `max_length` of the run that wrote it."
            )
        rows = [self._rows[shard][start:end] for shard, start, end in places]
        return to_device(torch.cat([self._rows[0][:0], *rows]), torch.device(device or "cpu"))

    def _check(self, number: int) -> None:
        """Compares the checksum of a shard, once."""
        shard = self._shards[number]
        crc = _crc32(self._folder / shard.file)
        if crc != shard.crc32:
            raise _unusable(self._folder, f"{shard.file} has the checksum {crc} instead of {shard.crc32}")
        self._unchecked.discard(number)

    def keys(self) -> set[bytes]:
        """Returns the keys of all sequences."""
        return split_keys(self._keys.tobytes())


def split_keys(joined: bytes) -> set[bytes]:
    """Returns the keys that lie one after the other."""
    return {joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)}


def _open_shard(folder: Path, shard: Shard) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Returns the mapped rows of a shard, the keys of its sequences [n] and the bounds of their rows [n + 1]."""
    file = folder / shard.file
    size = file.stat().st_size if file.exists() else None
    if size != shard.bytes:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
        raise _unusable(folder, f"{shard.file} {found}")
    try:
        with safe_open(file, framework="pt") as opened:
            rows, lengths = opened.get_tensor("rows"), opened.get_tensor("lengths").numpy()
            keys = np.frombuffer(opened.get_tensor("keys").numpy().tobytes(), dtype=_KEY)
        bounds = np.cumsum([0, *lengths.tolist()])
        if len(keys) != len(lengths) or (lengths < 0).any() or bounds[-1] != len(rows):
            raise ValueError(f"{len(keys)} keys, {len(lengths)} lengths, {bounds[-1]} of {len(rows)} rows")
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _unusable(folder, f"{shard.file} cannot be read ({error})") from error
    return rows, keys, bounds


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
