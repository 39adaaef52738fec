"""The reference's hidden states on disk: written once, memory-mapped by later epochs, refused unless whole and its own.

A cache is a folder of one safetensors file a process, reference-00001-of-00002.safetensors and so on, with `hidden`
[completion tokens, H], `lengths` [sequences] and `keys` [sequences, 16]. Sequences are found by what is in them, so
that neither order, nor batches, nor padding, nor the number of processes matters; and since that is token ids, another
chat template, tokenizer or maximal length shows as other data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_did.batches import IGNORE_INDEX
from lit_did.models.unfinished import UnfinishedFile, remove_unfinished
from lit_did.models.wrappers import is_peft, unwrapped

VERSION = "1"
KEY_BYTES = 16
# The header stands first in the file but is known last: it gets the first page, which a few short strings never fill.
HEADER_BYTES = 4096
_NO_CRC = "00000000"
_CHUNK_BYTES = 2**20
_FILES = "reference-*-of-*.safetensors"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_blake2b = partial(hashlib.blake2b, digest_size=KEY_BYTES)
# Of a configuration, what may change without the model: where it came from, and what its weights say themselves.
_NOT_ARCHITECTURE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}


def sequence_keys(input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor) -> list[bytes]:
    """What names a sequence in the cache: BLAKE2b of its tokens and labels, 16 bytes, whatever batch it is in.

    Only what its hidden states depend on counts: the tokens up to the last position that has a label. So padding on the
    right does not change it, and a sequence is the same as chosen and as rejected completion. Its first token is taken
    to be at position 0.

    Args:
        input_ids: [tokens] int64, the sequences end to end, on any device.
        labels: [tokens] int64, shifted: what each position predicts, or -100.
        cu_seqlens: [sequences + 1], where each sequence begins, and the end.

    Returns:
        One key a sequence.

    Example:
        >>> padded = torch.tensor([5, 6, 7, 0, 0]), torch.tensor([-100, 7, -100, -100, -100]), torch.tensor([0, 5])
        >>> packed = torch.tensor([5, 6]), torch.tensor([-100, 7]), torch.tensor([0, 2])
        >>> sequence_keys(*padded) == sequence_keys(*packed)
        True
    """
    count = input_ids.shape[0]
    flat = torch.cat([input_ids.long(), labels.long(), cu_seqlens.to(input_ids.device).long()]).cpu().numpy()
    tokens, starts = flat[: 2 * count].reshape(2, count), flat[2 * count :]
    ends = np.append(0, np.flatnonzero(tokens[1] != IGNORE_INDEX) + 1)  # after each label; 0 stands for none
    ends = ends[np.searchsorted(ends, starts[1:], side="right") - 1]
    return [_blake2b(tokens[:, start:end].tobytes()).digest() for start, end in zip(starts[:-1], ends, strict=True)]


def fingerprint(model: nn.Module, keys: Iterable[bytes]) -> dict[str, str]:
    """What a cache is of: the reference and its data, as hexadecimal BLAKE2b digests.

    Args:
        model: The reference. Names, dtypes, shapes and bytes of all parameters and buffers count, and the fields of its
            configuration; device and order do not. Of a PeftModel, whose adapter is off as a reference, the base model
            alone counts: it has the fingerprint that it had before.
        keys: The keys of all sequences, of all processes, in any order.

    Returns:
        `model` and `data`.

    Example:
        >>> one, other = (fingerprint(nn.Linear(2, 2), [b"key"]) for _ in range(2))
        >>> [part for part in one if one[part] != other[part]]
        ['model']
    """
    return {"model": _model_digest(model), "data": _blake2b(b"".join(sorted(set(keys)))).hexdigest()}


class CacheWriter:
    """Writes one shard of a cache; what is held in memory is a key and a length a sequence.

    The file appears whole or not at all: `finish` moves it into place, and leaving the `with` block without it, or any
    error, leaves nothing behind.

    Args:
        path: The folder of the cache, which is made if it is not there.
        shard, shards: The number of this process, from 0, and of all processes that write.
        num_tokens: Completion tokens to come, if known: the first `add` then checks that there is room for all.

    Raises:
        NotADirectoryError: `path` is a file.
        OSError: From `add` and `finish`, the disk is full: the error names the folder and the bytes that are needed.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp()
        >>> with CacheWriter(path) as writer:
        ...     writer.add([b"one".zfill(16), b"two".zfill(16)], torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 3]))
        ...     writer.finish({"model": "a", "data": "b"})
        >>> os.listdir(path)
        ['reference-00001-of-00001.safetensors']
    """

    def __init__(
        self, path: str | os.PathLike, *, shard: int = 0, shards: int = 1, num_tokens: int | None = None
    ) -> None:
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"Expected `cache_reference` to be a folder, but got the file {path}.")
        path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path)
        self._path, self._num_tokens = path, num_tokens
        self._unfinished = UnfinishedFile(path / _file_name(shard, shards))
        self._file = self._unfinished.stream
        self._file.seek(HEADER_BYTES)
        self._crc = 0
        self._lengths: dict[bytes, int] = {}
        self._form: tuple[torch.dtype, int] | None = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._unfinished.close()

    def add(self, keys: Sequence[bytes], hidden: Tensor, cu_labels: Tensor) -> None:
        """Appends the sequences that are not there yet.

        Args:
            keys: Of `sequence_keys`.
            hidden: [completion tokens, H] float64, float32, bfloat16 or float16, on any device: the final hidden states
                of the positions that have labels.
            cu_labels: [sequences + 1]: sequence i owns the rows cu_labels[i] to cu_labels[i + 1].

        Raises:
            TypeError: `hidden` is of another dtype.
            ValueError: `hidden` is no matrix or not like the first call's, or `cu_labels` does not fit.
        """
        if hidden.dtype not in _DTYPES:
            raise TypeError(f"Expected `hidden` to be float64, float32, bfloat16 or float16, but got {hidden.dtype}.")
        if hidden.dim() != 2:
            raise ValueError(f"Expected `hidden` to have the shape [tokens, H], but got {tuple(hidden.shape)}.")
        form = (hidden.dtype, hidden.shape[1])
        if self._form is None:
            self._form = form
            self._check_room()
        if form != self._form:
            raise ValueError(f"Expected `hidden` to have the first one's dtype and H, {self._form}, but got {form}.")
        bounds = cu_labels.tolist()
        ends = bounds[:1] + bounds[-1:]
        if len(bounds) != len(keys) + 1 or ends != [0, hidden.shape[0]] or bounds != sorted(bounds):
            raise ValueError(
                f"Expected `cu_labels` to be {len(keys) + 1} numbers that rise from 0 to {hidden.shape[0]}, but got "
                f"{bounds}."
            )
        rows = _bytes(hidden)
        with self._room_named():
            for key, (start, end) in zip(keys, pairwise(bounds), strict=True):
                if key not in self._lengths:
                    self._lengths[key] = end - start
                    self._write(rows[start:end])

    def finish(self, fingerprint: Mapping[str, str]) -> None:
        """Puts the shard in its place.

        Args:
            fingerprint: Of `fingerprint`, the same on all processes; the caller may add what else a cache must agree
                with, such as the precision.

        Raises:
            ValueError: Nothing was added, or the fingerprint is longer than a header.
        """
        with self, self._room_named():  # whatever happens
            if self._form is None:
                raise ValueError("Expected a sequence at least in every shard of the cached reference, but got none.")
            dtype, size = self._form
            count = len(self._lengths)
            self._write(np.fromiter(self._lengths.values(), "<i8", count))
            self._write(b"".join(self._lengths))
            header: dict[str, Any] = {}
            end = 0
            for name, code, itemsize, shape in (
                ("hidden", _DTYPES[dtype], dtype.itemsize, [sum(self._lengths.values()), size]),
                ("lengths", "I64", 8, [count]),
                ("keys", "U8", 1, [count, KEY_BYTES]),
            ):
                start, end = end, end + itemsize * math.prod(shape)
                header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
            metadata = {"version": VERSION, "fingerprint": json.dumps(dict(fingerprint)), "crc32": _NO_CRC}
            header["__metadata__"] = metadata
            metadata["crc32"] = f"{zlib.crc32(_pad_header(header), self._crc):08x}"
            self._file.seek(0)
            self._file.write(_pad_header(header))
            self._unfinished.finish()

    def _check_room(self) -> None:
        needed = self._needed_bytes()
        if needed is not None and needed > shutil.disk_usage(self._path).free:
            with self._room_named():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _needed_bytes(self) -> int | None:
        dtype, size = self._form
        return None if self._num_tokens is None else HEADER_BYTES + self._num_tokens * size * dtype.itemsize

    @contextmanager
    def _room_named(self) -> Iterator[None]:
        """Names the folder, and what it needs room for, in the error of a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            needed = self._needed_bytes()
            what = "the hidden states" if needed is None else f"{needed:,} bytes of hidden states"
            raise OSError(
                error.errno,
                f"Expected room in the folder of `cache_reference`, {self._path}, for {what}, but got "
                f"{error.strerror.lower()!r} with {shutil.disk_usage(self._path).free:,} bytes free. Nothing half-"
                "written is left there. Make room, or give a folder on another disk.",
            ) from error

    def _write(self, data: np.ndarray | bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)


class ReferenceCache:
    """The hidden states of a reference by sequence, from a folder that `CacheWriter` wrote; `open` makes one.

    The files are mapped into memory: what is read is in the system's page cache, which it takes back when it must.

    Example:
        >>> import tempfile
        >>> path, key = tempfile.mkdtemp(), b"sequence".zfill(16)
        >>> with CacheWriter(path) as writer:
        ...     writer.add([key], torch.arange(4.0).view(2, 2), torch.tensor([0, 2]))
        ...     writer.finish({"model": "a", "data": "b"})
        >>> cache = ReferenceCache.open(path, {"model": "a", "data": "b"})
        >>> cache.hidden([key])
        tensor([[0., 1.],
                [2., 3.]])
    """

    def __init__(self, path: Path, shards: Sequence[_Shard]) -> None:
        self._path = path
        self._hidden = [shard.hidden for shard in shards]
        self._places = {key: (i, *rows) for i, shard in enumerate(shards) for key, rows in shard.places.items()}

    @staticmethod
    def exists(path: str | os.PathLike) -> bool:
        """Whether the folder holds any finished shard."""
        return any(Path(path).glob(_FILES))

    @classmethod
    def open(
        cls, path: str | os.PathLike, fingerprint: Mapping[str, str], keys: Iterable[bytes] = (), data_hint: str = ""
    ) -> ReferenceCache:
        """Maps the shards of a cache after reading them through once for damage.

        Args:
            path: The folder.
            fingerprint: What the cache must be of.
            keys: Of the sequences that are wanted, for an error to tell how other data differ.
            data_hint: A sentence for that error on what may make the data differ.

        Raises:
            ValueError: A shard is missing, truncated, damaged, of another version of this format, or of another model
                or other data.
        """
        path = Path(path)
        files = sorted(path.glob(_FILES))
        counts = sorted({int(number) for file in files for number in re.findall(r"-of-(\d+)", file.name)})
        if len(counts) != 1:
            found = f"shards of {' and of '.join(map(str, counts))}" if counts else "none"
            raise ValueError(f"Expected `cache_reference` {path} to hold the shards of one cache, but got {found}.")
        missing = {_file_name(shard, counts[0]) for shard in range(counts[0])} - {file.name for file in files}
        if missing:
            raise ValueError(
                f"Expected `cache_reference` {path} to hold {counts[0]} shards, but {min(missing)} is missing. Was the "
                "run interrupted? Delete the folder. Do not all processes see one folder? Give one that they share."
            )
        shards = [_open_shard(file) for file in files]
        for file, shard in zip(files, shards, strict=True):
            got = shard.fingerprint
            differs = [part for part in {**fingerprint, **got} if fingerprint.get(part) != got.get(part)]
            if differs:
                wanted, held = set(keys), set().union(*(shard.places for shard in shards))
                common = f", with {len(wanted & held)} of these {len(wanted)} sequences among its {len(held)}"
                raise ValueError(
                    f"Expected `cache_reference` {file} to be of this {' and '.join(differs)} "
                    f"({_values(fingerprint, differs)}), but got another's ({_values(got, differs)})"
                    f"{common if wanted and 'data' in differs else ''}: it is stale, give another folder, or delete "
                    f"this one.{data_hint if 'data' in differs else ''}"
                )
        return cls(path, shards)

    def hidden(
        self, keys: Sequence[bytes], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The hidden states [tokens, H] of these sequences end to end, a copy; as stored where nothing else is asked.

        Raises:
            ValueError: The cache does not hold one of them.
        """
        places = self._find(keys)
        rows = [self._hidden[shard][start:end] for shard, start, end in places]
        return torch.cat([self._hidden[0][:0], *rows]).to(device=device, dtype=dtype)

    def keys(self) -> KeysView[bytes]:
        """The keys of all sequences."""
        return self._places.keys()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def _find(self, keys: Sequence[bytes]) -> list[tuple[int, int, int]]:
        places = [self._places[key] for key in keys if key in self._places]
        if len(places) != len(keys):
            raise ValueError(
                f"Expected `cache_reference` {self._path} to hold every sequence, but got {len(keys) - len(places)} of "
                f"{len(keys)} that the cache does not hold: other data, template or max_length."
            )
        return places


class _Shard(NamedTuple):
    """What a file holds: `hidden` mapped, and the rows of every sequence."""

    fingerprint: dict[str, str]
    hidden: Tensor
    places: dict[bytes, tuple[int, int]]


def _open_shard(file: Path) -> _Shard:
    refused = f"Expected `cache_reference` {file} to be"
    try:
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {}
            version, written = metadata.get("version"), metadata.get("crc32", "")
            if version != VERSION:  # first: another version may be checked otherwise
                raise ValueError(f"{refused} of version {VERSION}, but got version {version}: delete the folder.")
            crc = _crc32(file, written)
            if crc != written:
                raise ValueError(
                    f"{refused} whole, with checksum {written}, but got {crc}: it is damaged, delete the folder."
                )
            hidden = shard.get_tensor("hidden")
            bounds = [0, *accumulate(shard.get_tensor("lengths").tolist())]
            keys = shard.get_tensor("keys").numpy().tobytes()
    except SafetensorError as error:
        raise ValueError(
            f"{refused} whole, but got a truncated or damaged file ({error}): delete the folder."
        ) from error
    names = (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
    return _Shard(json.loads(metadata["fingerprint"]), hidden, dict(zip(names, pairwise(bounds), strict=True)))


def _values(fingerprint: Mapping[str, str], parts: Iterable[str]) -> str:
    return ", ".join(str(fingerprint.get(part)) for part in parts)


def _crc32(file: Path, written: str) -> str:
    """The checksum of all that follows the header, then of the header with zeros for the checksum `written` in it."""
    crc, chunk = 0, memoryview(bytearray(_CHUNK_BYTES))
    with open(file, "rb", buffering=0) as stream:  # read, not mapped: a mapping would count as this process's memory
        header = stream.read(HEADER_BYTES)
        while size := stream.readinto(chunk):
            crc = zlib.crc32(chunk[:size], crc)
    field = '"crc32":"{}"'
    header = header.replace(field.format(written).encode(), field.format(_NO_CRC).encode())
    return f"{zlib.crc32(header, crc):08x}"


def _pad_header(header: Mapping[str, Any]) -> bytes:
    """A safetensors header: its length, 8 bytes, then JSON, which may end in spaces."""
    text = json.dumps(header, separators=(",", ":")).encode()
    room = HEADER_BYTES - 8
    if len(text) > room:
        raise ValueError(f"Expected `fingerprint` to leave the header within {room} bytes, but got {len(text)}.")
    return room.to_bytes(8, "little") + text.ljust(room)


def _file_name(shard: int, shards: int) -> str:
    return f"reference-{shard + 1:05}-of-{shards:05}.safetensors"


def _bytes(tensor: Tensor) -> np.ndarray:
    """Its bytes, uint8 [..., bytes of the last dimension]: numpy has no bfloat16."""
    tensor = tensor.cpu().contiguous()
    return (tensor if tensor.dim() else tensor[None]).view(torch.uint8).numpy()


def quick_digest(model: nn.Module, values: int = 64) -> str | None:
    """Tells a model from others, and from itself after training, by `values` numbers of each tensor.

    None where its tensors hold no values, or not all of them, here.
    """
    tensors = _tensors(unwrapped(model))
    if any(t.is_meta or not t.numel() or type(t) not in (nn.Parameter, Tensor) for t in tensors.values()):
        return None
    digest = _blake2b()
    for name, tensor in sorted(tensors.items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // values)][:values]
        digest.update(json.dumps([name, tensor.shape]).encode())
        digest.update(_bytes(some.double()))
    return digest.hexdigest()


def _model_digest(model: nn.Module) -> str:
    model = unwrapped(model)
    inner = model.get_base_model() if is_peft(model) else model
    config = inner.config.to_diff_dict() if hasattr(inner, "config") else {}
    digest = _blake2b(json.dumps(_architecture(config), sort_keys=True, default=str).encode())
    for name, tensor in sorted(_tensors(model).items()):
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; of a PeftModel the base model's, by the names that they had before."""
    adapter: tuple[str, ...] = ()
    if is_peft(model):
        adapter = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
        model = model.get_base_model()
    # peft moves what it wraps one level down.
    wrapped = re.compile(r"\b(base_layer|original_module|token_adapter)\.")
    return {
        wrapped.sub("", name): tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not any(mark in name for mark in adapter)
    }


def _architecture(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {str(name): _architecture(value) for name, value in config.items() if name not in _NOT_ARCHITECTURE}
