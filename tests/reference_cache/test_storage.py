"""The reference cache: what is read is what was written, and nothing else is ever read."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lit_did.batches.sequences import read_sequences
from lit_did.reference_cache import storage
from lit_did.reference_cache.fingerprint import fingerprint, sequence_keys
from lit_did.reference_cache.storage import CacheWriter, ReferenceCache, publish, unfinished_cache
from tests.modules.tiny import collate, make_pairs, tiny_llama
from tests.processes import run_program

PRINT = {"reference": "a" * 32, "pairs": "b" * 32}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [3, 1, 0, 5, 2]
KEYS = [bytes([i]) * 16 for i in range(len(LENGTHS))]
ALL = [0, 1, 2, 3, 4]
H = 7  # odd: what follows float16 rows is not aligned


def sequences(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Hidden states of random bits, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(0)
    count = H * dtype.itemsize
    return [torch.randint(256, (n, count), generator=generator, dtype=torch.uint8).view(dtype) for n in LENGTHS]


def rows(numbers: list[int], hidden: list[torch.Tensor] | None = None) -> tuple[list[bytes], torch.Tensor, np.ndarray]:
    """What `CacheWriter.add` takes, of these sequences."""
    chosen = [(hidden or sequences())[i] for i in numbers]
    return [KEYS[i] for i in numbers], torch.cat(chosen), np.cumsum([0, *map(len, chosen)])


def write(path: Path, *processes: list[tuple], mark: dict[str, str] = PRINT, **options) -> None:
    """Writes a cache: of each process what is added, all sequences without any."""
    with unfinished_cache(path) as folder:
        for process, added in enumerate(processes or [[rows(ALL)]]):
            writer = CacheWriter(folder, process=process, **options)
            for arguments in added:
                writer.add(*arguments)
            writer.finish()
        publish(folder, mark, len(processes) or 1)


def opened(path: Path, mark: dict[str, str] = PRINT) -> ReferenceCache:
    return ReferenceCache.open(path, mark)


def files(path: Path) -> list[str]:
    """All files of a cache's folder but the lock."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != ".lock")


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A cache of two shards."""
    write(tmp_path, shard_bytes=4 * H * 7)
    assert files(tmp_path / "reference") == ["00000-00000.safetensors", "00000-00001.safetensors", "index.json"]
    return tmp_path / "reference"


# ---------------------------------------------------------------------------------------------------------------
# What is read is what was written
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processes", [(ALL,), ([4, 0, 2], [], [3, 1])])
@pytest.mark.parametrize("shard_bytes", [2**20, 1])
def test_bit_for_bit_in_any_order(dtype, processes, shard_bytes, tmp_path):
    hidden = sequences(dtype)
    write(tmp_path, *([rows(n, hidden)] if n else [] for n in processes), shard_bytes=shard_bytes)
    cache = opened(tmp_path)
    # The premise: NaN or infinity among them. Of float64's numbers too few are either.
    assert dtype == torch.float64 or not torch.cat(hidden).isfinite().all()
    for order in (ALL, [3, 0, 4, 2, 1], [1, 1], [2], []):
        keys = [KEYS[i] for i in order]
        expected = torch.cat([hidden[i] for i in order]) if order else torch.empty(0, H, dtype=dtype)
        assert_same_bits(cache.rows(keys), expected)
    assert cache.keys() == set(KEYS)
    assert len(files(tmp_path)) == 1 + (len(ALL) if shard_bytes == 1 else sum(map(bool, processes)))


def test_shards_are_as_large_as_they_may_be_and_a_long_sequence_has_its_own(tmp_path):
    write(tmp_path, shard_bytes=4 * H * 4)
    sizes = []
    for file in files(tmp_path)[:-1]:
        with safe_open(tmp_path / file, framework="pt") as shard:
            sizes.append(shard.get_tensor("lengths").tolist())
    assert sizes == [[3, 1, 0], [5], [2]]


def test_device(folder):
    hidden = opened(folder.parent).rows(KEYS[:2], device="meta")
    assert (hidden.dtype, hidden.device.type, hidden.shape) == (torch.float32, "meta", (4, H))


def test_what_is_read_and_what_is_given_are_copies(tmp_path):
    hidden = torch.randn(3, H)
    expected = hidden.clone()
    with unfinished_cache(tmp_path) as folder:
        writer = CacheWriter(folder)
        writer.add(KEYS[:1], hidden, np.array([0, 3]))
        hidden.zero_()
        writer.finish()
        publish(folder, PRINT)
    cache = opened(tmp_path)
    cache.rows(KEYS[:1]).zero_()
    assert torch.equal(cache.rows(KEYS[:1]), expected)


def test_hidden_states_with_gradient_and_strides(tmp_path):
    hidden = torch.randn(H, 3, requires_grad=True).T
    write(tmp_path, [(KEYS[:1], hidden, np.array([0, 3]))])
    assert torch.equal(opened(tmp_path).rows(KEYS[:1]), hidden)


@pytest.mark.parametrize("shard_bytes", [2**20, 1])
def test_a_sequence_is_stored_once(tmp_path, shard_bytes):
    hidden = sequences()
    doubled = [2 * states for states in hidden]
    write(tmp_path, [rows([0, 1, 0]), rows([1, 3, 0], doubled)], shard_bytes=shard_bytes)
    cache = opened(tmp_path)
    assert len(cache.keys()) == 3
    assert_same_bits(cache.rows([KEYS[3], KEYS[0]]), torch.cat([doubled[3], hidden[0]]))
    assert sum(map(len, cache._rows)) == 3 + 1 + 5


def test_a_sequence_of_two_processes(tmp_path):
    write(tmp_path, [rows([0, 1])], [rows([1, 2, 3, 4])])
    assert_same_bits(opened(tmp_path).rows(KEYS), torch.cat(sequences()))


def test_a_real_model(tmp_path):
    model, batch = tiny_llama(0).eval(), collate(make_pairs(3))
    with torch.no_grad():
        states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    read, labelled, path = read_sequences(batch), batch["labels"] != -100, tmp_path / "new" / "cache"
    keys = sequence_keys(read)
    assert not ReferenceCache.exists(path)
    write(path, [(keys, states[labelled], read.cu_labels)], mark=fingerprint(model, keys))
    assert ReferenceCache.exists(path)
    cache = opened(path, fingerprint(tiny_llama(0), reversed(keys)))
    assert torch.equal(cache.rows(keys), states[labelled])


# ---------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------


DELETE = "Delete this folder to run the reference again"


def test_files_of_another_size(folder):
    for name in files(folder):
        file = folder / name
        whole = file.read_bytes()
        for content in (b"", whole[:100], whole[:-1], whole + b"\0", None):
            file.unlink() if content is None else file.write_bytes(content)
            error = FileNotFoundError if content is None and name == "index.json" else ValueError
            damaged = "cannot be read|does not exist" if name == "index.json" else "bytes instead of|is missing"
            with pytest.raises(error, match=rf"{name} .*({damaged}).*([Dd]elete)"):
                opened(folder.parent)
            file.write_bytes(whole)
    assert_same_bits(opened(folder.parent).rows(KEYS), torch.cat(sequences()))


@pytest.mark.parametrize("name", ["00000-00001.safetensors", "index.json"])
def test_a_flipped_bit_anywhere(name, folder):
    file = folder / name
    whole = file.read_bytes()
    refused = set()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"Expected the cache {folder} to ") as error:
            opened(folder.parent).rows(KEYS)
        kinds = "version, but .*(cannot be read|instead of|is missing)|belong"
        (reason,) = re.findall(kinds, str(error.value))
        refused.add(reason)
    assert refused >= {"cannot be read", "instead of"}
    file.write_bytes(whole)
    assert_same_bits(opened(folder.parent).rows(KEYS), torch.cat(sequences()))


def test_shards_are_checked_when_they_are_first_used(folder, monkeypatch):
    checked = []
    monkeypatch.setattr(storage, "_crc32", lambda file, crc32=storage._crc32: checked.append(file.name) or crc32(file))
    file = folder / "00000-00001.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    cache = opened(folder.parent)
    assert not checked
    for _ in range(2):
        cache.rows(KEYS[:1])
    assert checked == ["00000-00000.safetensors"]
    message = f"{file.name} has the checksum .{{8}} instead of .*. {DELETE}"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            cache.rows(KEYS)
    with pytest.raises(ValueError, match=message):  # rather than that a sequence is missing
        cache.rows([b"other".zfill(16)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            PRINT | {"reference": "c"},
            r"reference \(a{32} instead of c\)\. Pass another folder as `cache_reference`, or",
        ),
        (PRINT | {"pairs": "c"}, r"pairs \(b{32} instead of c\)\. Pass"),
        ({"reference": "c", "pairs": "d"}, r"reference \(a{32} instead of c\) and pairs \(b{32} instead of d\)"),
        (PRINT | {"precision": "16"}, r"precision \(None instead of 16\)"),
        ({"reference": PRINT["reference"]}, r"pairs \(b{32} instead of None\)"),
    ],
)
def test_caches_of_another_run(given, message, folder):
    with pytest.raises(ValueError, match=f"the cache {folder} to belong to this run, but it differs in {message}"):
        ReferenceCache.open(folder.parent, given)


def test_how_other_pairs_differ(folder):
    with pytest.raises(ValueError, match=r"\)\. 2 of the run's 3 sequences are among its 5\. Pass another"):
        ReferenceCache.open(folder.parent, PRINT | {"pairs": "c"}, [*KEYS[1:3], b"new".zfill(16)])
    with pytest.raises(ValueError, match=r"in reference \(a{32} instead of c\)\. Pass another"):
        ReferenceCache.open(folder.parent, PRINT | {"reference": "c"}, KEYS)


def test_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "VERSION", 0)
    write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"its format has version 0 instead of 1. {DELETE}"):
        opened(tmp_path)


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`cache_reference` {tmp_path} to hold a cache, but .*index.json does"):
        opened(tmp_path)


def test_a_folder_that_not_all_processes_share(tmp_path):
    with unfinished_cache(tmp_path) as folder:
        CacheWriter(folder).finish()
        with pytest.raises(FileNotFoundError, match=r"all processes share, but .* has no shards of process 1"):
            publish(folder, PRINT, processes=2)
    with pytest.raises(FileNotFoundError, match=f"all processes share, but process 3 does not see {folder}"):
        CacheWriter(folder, process=3)
    assert files(tmp_path) == []


def test_unknown_sequences(folder):
    with pytest.raises(ValueError, match=r"hold every sequence, but 1 of 2 are missing. Use the pairs, template and"):
        opened(folder.parent).rows([KEYS[0], b"?" * 16])


# ---------------------------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["add", "finish", "publish", "replace"])
def test_an_error_on_the_way_leaves_nothing(when, tmp_path, monkeypatch):
    monkeypatch.setattr(*((os, "rename", fail) if when == "replace" else (storage, "save_file", fail)))
    with pytest.raises((KeyboardInterrupt, OSError)), unfinished_cache(tmp_path) as folder:  # noqa: PT012
        writer = CacheWriter(folder, shard_bytes=1 if when == "add" else 2**20)
        writer.add(*rows([0, 1]))
        assert when != "add"
        writer.finish()
        assert when == "replace"
        publish(folder, PRINT)
    assert files(tmp_path) == []
    assert not ReferenceCache.exists(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def fail(*_, **__):
    raise KeyboardInterrupt


def test_a_killed_process(tmp_path):
    program = (
        "import os, sys, torch, numpy as np\n"
        "from lit_did.reference_cache.storage import CacheWriter, unfinished_cache\n"
        "with unfinished_cache(sys.argv[1]) as folder:\n"
        "    writer = CacheWriter(folder)\n"
        "    writer.add([bytes(16)], torch.zeros(9, 9), np.array([0, 9]))\n"
        "    writer.finish(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == -9
    assert len(files(tmp_path)) == 2  # the premise
    assert not ReferenceCache.exists(tmp_path)
    write(tmp_path)
    assert len(opened(tmp_path).keys()) == 5
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "reference"}


def test_what_is_left_of_dead_processes_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / ".unfinished_old" / "reference"
    (tmp_path / ".unfinished_empty").mkdir()
    (tmp_path / "mine").write_text("kept")
    with ExitStack() as first:
        first.enter_context(unfinished_cache(tmp_path))
        with unfinished_cache(tmp_path) as second:
            first.close()
            left.mkdir(parents=True)
            with unfinished_cache(tmp_path):
                assert left.exists()
                assert second.exists()  # it is still being written
    write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "mine", "reference"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".unfinished_of_another").mkdir()
    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    write(tmp_path / "one")
    monkeypatch.setattr(storage, "fcntl", None)  # Windows
    write(tmp_path)
    assert len(opened(tmp_path).keys()) == 5
    assert (tmp_path / ".unfinished_of_another").exists()


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    expected = rf"room for 28,000 bytes in the folder of .*, {tmp_path}, but .* with 5,000 bytes free"
    with unfinished_cache(tmp_path) as folder:
        CacheWriter(folder, num_rows=11).add(*rows([0, 1]))  # of 7 float32
        with pytest.raises(OSError, match=expected):
            CacheWriter(folder, num_rows=1000).add(*rows([0, 1]))
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with unfinished_cache(tmp_path) as folder:
        writer = CacheWriter(folder)
        writer.add(*rows([0, 1]))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            with pytest.raises(
                OSError, match=f"room for the reference's answers in the folder .*, {tmp_path}, but .*too large"
            ):
                writer.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []


def test_two_runs_at_once(tmp_path):
    """The first to finish is kept."""
    with unfinished_cache(tmp_path) as one, unfinished_cache(tmp_path) as other:
        for folder, scale in ((one, 1), (other, 2)):
            writer = CacheWriter(folder)
            writer.add(*rows(ALL, [scale * states for states in sequences()]))
            writer.finish()
        publish(other, PRINT)
        cache = opened(tmp_path)
        publish(one, PRINT)
    assert_same_bits(cache.rows(KEYS), torch.cat([2 * states for states in sequences()]))
    assert_same_bits(opened(tmp_path).rows(KEYS), cache.rows(KEYS))
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "reference"}


BOUNDS = np.array([0, 2, 3])


@pytest.mark.parametrize(
    ("hidden", "bounds", "error", "message"),
    [
        (
            torch.zeros(3, 2).long(),
            BOUNDS,
            TypeError,
            "float64, float32, bfloat16 or float16, but got torch.int64",
        ),
        (torch.zeros(3), BOUNDS, ValueError, r"`rows` to have the shape \[rows, H\], but got \(3,\)"),
        (torch.zeros(3, 2), BOUNDS, ValueError, r"the first call's dtype and H, \(torch.float32, 7\), but got .*, 2\)"),
        (torch.zeros(3, H).half(), BOUNDS, ValueError, r"\(torch.float32, 7\), but got \(torch.float16, 7\)"),
        (
            torch.zeros(4, H),
            BOUNDS,
            ValueError,
            r"`bounds` to be 3 numbers that rise from 0 to 4, but got \[0",
        ),
        (torch.zeros(3, H), BOUNDS[1:], ValueError, "`bounds` to be 3 numbers"),
        (torch.zeros(3, H), np.array([0, 4, 3]), ValueError, "that rise from 0 to 3"),
        (torch.zeros(3, H), np.array([1, 2, 3]), ValueError, "that rise from 0 to 3"),
    ],
)
def test_other_hidden_states_are_refused(hidden, bounds, error, message, tmp_path):
    writer = CacheWriter(tmp_path)
    writer.add(*rows([0]))
    with pytest.raises(error, match=message):
        writer.add(KEYS[1:3], hidden, bounds)


def test_what_cannot_be_published(tmp_path):
    with pytest.raises(ValueError, match="Expected at least one sequence"):
        write(tmp_path, [], [])
    assert files(tmp_path) == []


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"`cache_reference` to be a folder, but got the file {tmp_path}/file"):
        write(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import numpy as np, sys, torch
from lit_did.reference_cache.storage import CacheWriter, ReferenceCache, publish, unfinished_cache

def own():  # MiB that cannot be taken back: pages of the file itself can
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def keys(batch):
    return [(4 * batch + i).to_bytes(16, "big") for i in range(4)]

# 4 MiB a batch, 128 in all, shards of 8
bounds = np.arange(5) * 256
hidden = torch.zeros(1024, 1024)
print_ = {"model": "a"}
def run(path, batches):
    with unfinished_cache(path) as folder:
        writer = CacheWriter(folder, shard_bytes=2**23)
        for batch in range(batches):
            writer.add(keys(batch), hidden.fill_(batch), bounds)
            after_writing = max(own(), batch and after_writing)
        writer.finish()
        publish(folder, print_)
    cache = ReferenceCache.open(path, print_)
    after_opening = own()
    for batch in range(batches):
        assert (cache.rows(keys(batch)) == batch).all()
    return after_writing, after_opening, own()

run(sys.argv[1] + "/small", 4)  # allocates what is allocated only once
before = own()
print(*(after - before for after in run(sys.argv[1] + "/large", 32)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    grown = [float(value) for value in run_program(sys.executable, "-c", MEASURE, tmp_path).split()]
    assert sum(file.stat().st_size for file in (tmp_path / "large" / "reference").iterdir()) > 128 * 2**20
    # 128 MiB of data went through: a shard of 8 MiB twice and a few batches of 4 MiB. The allocator keeps some 30 to 50
    # MiB of them, depending on when the pages of the files are written.
    assert max(grown) < 64, grown
