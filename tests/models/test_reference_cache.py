"""The reference cache: what is read is what was written, and nothing else is ever read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from lit_did.models import reference_cache, unfinished
from lit_did.models.reference_cache import CacheWriter, ReferenceCache, fingerprint, sequence_keys
from lit_did.models.unfinished import remove_unfinished
from tests.modules.tiny import collate, make_pairs, tiny_llama
from tests.processes import run_program

PRINT = {"model": "a" * 32, "data": "b" * 32}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [3, 1, 0, 5, 2]
KEYS = [bytes([i]) * 16 for i in range(len(LENGTHS))]
H = 7  # odd: what follows float16 rows is not aligned


def sequences(dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    """Hidden states of random bits, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(0)
    count = H * dtype.itemsize
    return [torch.randint(256, (n, count), generator=generator, dtype=torch.uint8).view(dtype) for n in lengths]


def add(writer: CacheWriter, numbers: list[int], hidden: list[torch.Tensor]) -> None:
    rows = [hidden[i] for i in numbers]
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    writer.add([KEYS[i] for i in numbers], torch.cat(rows), bounds)


def write(path: Path, dtype: torch.dtype = torch.float32, shards: tuple[list[int], ...] = ([0, 1, 2, 3, 4],)) -> None:
    for shard, numbers in enumerate(shards):
        with CacheWriter(path, shard=shard, shards=len(shards)) as writer:
            add(writer, numbers, sequences(dtype))
            writer.finish(PRINT)


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture
def file(tmp_path) -> Path:
    write(tmp_path)
    (file,) = tmp_path.iterdir()
    return file


# ---------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------


def keys_of(batch: dict[str, torch.Tensor], packed: bool = False) -> list[bytes]:
    rows, length = batch["input_ids"].shape
    if not packed:
        bounds = torch.arange(rows + 1) * length
        return sequence_keys(batch["input_ids"].flatten(), batch["labels"].flatten(), bounds)
    kept = batch["attention_mask"].bool()
    bounds = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
    return sequence_keys(batch["input_ids"][kept], batch["labels"][kept], bounds)


def test_keys_know_a_sequence_whatever_is_around_it():
    pairs = make_pairs(6)
    keys = keys_of(collate(pairs))
    assert len(set(keys)) == 12
    assert {len(key) for key in keys} == {16}
    assert keys_of(collate(pairs), packed=True) == keys
    alone = [keys_of(collate([pair])) for pair in pairs]
    assert [key for key, _ in alone] + [key for _, key in alone] == keys
    swapped = keys_of(collate([(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]))
    assert swapped == keys[6:] + keys[:6]
    batch = collate(pairs)
    assert keys_of(batch | {"input_ids": batch["input_ids"] + 60 * (1 - batch["attention_mask"])}) == keys


def test_keys_change_with_any_token_and_any_label():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[-100, 7, 8, 9, -100]]),
    }
    changed = [batch]
    for position in range(4):
        for name in ("input_ids", "labels"):
            changed.append({**batch, name: batch[name].index_fill(1, torch.tensor([position]), 40)})
    for position in (1, 2, 3):  # no longer a completion token
        changed.append({**batch, "labels": batch["labels"].index_fill(1, torch.tensor([position]), -100)})
    # As flat numbers these are the same: only where the sequence ends tells.
    changed.append({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, 8]])})
    changed.append({"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[6]])})
    keys = [key for one in changed for key in keys_of(one)]
    assert len(set(keys)) == len(changed)


def test_sequences_without_labels_need_no_rows_and_share_a_key():
    ids, labels = torch.tensor([5, 6, 7, 8]), torch.tensor([-100, -100, -100, 9])
    one, empty, other = sequence_keys(ids, labels, torch.tensor([0, 2, 2, 4]))
    assert one == empty != other
    assert [other] == sequence_keys(ids[2:], labels[2:], torch.tensor([0, 2]))


# ---------------------------------------------------------------------------------------------------------------
# What is read is what was written
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [([0, 1, 2, 3, 4],), ([4, 0, 2], [3, 1])])
def test_bit_for_bit_in_any_order(dtype, shards, tmp_path):
    write(tmp_path, dtype, shards)
    cache = ReferenceCache.open(tmp_path, PRINT)
    hidden = sequences(dtype)
    # The premise: NaN or infinity among them. Of float64's numbers too few are either.
    assert dtype == torch.float64 or not torch.cat(hidden).isfinite().all()
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [1, 1], [2], []):
        keys = [KEYS[i] for i in order]
        expected = torch.cat([hidden[i] for i in order]) if order else torch.empty(0, H, dtype=dtype)
        assert_same_bits(cache.hidden(keys), expected)
    assert set(cache.keys()) == set(KEYS)
    assert len(cache) == 5
    assert KEYS[0] in cache
    assert b"?" * 16 not in cache


def test_dtype_and_device(tmp_path):
    write(tmp_path, torch.bfloat16)
    hidden = ReferenceCache.open(tmp_path, PRINT).hidden(KEYS[:2], device="meta", dtype=torch.float32)
    assert (hidden.dtype, hidden.device.type, hidden.shape) == (torch.float32, "meta", (4, H))


def test_what_is_read_is_a_copy(tmp_path):
    write(tmp_path)
    cache = ReferenceCache.open(tmp_path, PRINT)
    cache.hidden(KEYS[:1]).zero_()
    assert_same_bits(cache.hidden(KEYS[:1]), sequences()[0])


def test_hidden_states_with_gradient_and_strides(tmp_path):
    hidden = torch.randn(H, 3, requires_grad=True).T
    with CacheWriter(tmp_path) as writer:
        writer.add(KEYS[:1], hidden, torch.tensor([0, 3], dtype=torch.int32))
        writer.finish(PRINT)
    assert torch.equal(ReferenceCache.open(tmp_path, PRINT).hidden(KEYS[:1]), hidden)


def test_a_sequence_is_stored_once(tmp_path):
    hidden = sequences()
    with CacheWriter(tmp_path) as writer:
        add(writer, [0, 1, 0], hidden)
        add(writer, [1, 3, 0], [2 * rows for rows in hidden])
        writer.finish(PRINT)
    cache = ReferenceCache.open(tmp_path, PRINT)
    assert len(cache) == 3
    assert_same_bits(cache.hidden([KEYS[3], KEYS[0]]), torch.cat([2 * hidden[3], hidden[0]]))
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as stored:
        assert stored.get_slice("hidden").get_shape() == [3 + 1 + 5, H]


def test_a_sequence_of_two_shards(tmp_path):
    write(tmp_path, shards=([0, 1], [1, 2, 3, 4]))
    assert_same_bits(ReferenceCache.open(tmp_path, PRINT).hidden(KEYS), torch.cat(sequences()))


def test_a_real_model(tmp_path):
    model, batch = tiny_llama(0).eval(), collate(make_pairs(3))
    with torch.no_grad():
        states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labelled = batch["labels"] != -100
    keys, bounds = keys_of(batch), torch.cat([torch.zeros(1).long(), labelled.sum(1).cumsum(0)])
    assert not ReferenceCache.exists(tmp_path)
    with CacheWriter(tmp_path / "new" / "cache") as writer:
        writer.add(keys, states[labelled], bounds)
        writer.finish(fingerprint(model, keys))
    assert ReferenceCache.exists(tmp_path / "new" / "cache")
    cache = ReferenceCache.open(tmp_path / "new" / "cache", fingerprint(tiny_llama(0), reversed(keys)))
    assert torch.equal(cache.hidden(keys), states[labelled])


# ---------------------------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------------------------


def test_fingerprint_of_data():
    def data(*keys):
        return fingerprint(nn.Identity(), keys)["data"]

    assert data(*KEYS) == data(*reversed(KEYS), KEYS[2])
    assert len({data(), data(*KEYS), data(*KEYS[1:]), data(*KEYS[1:], b"?" * 16)}) == 4


def model_part(model: nn.Module) -> str:
    return fingerprint(model, [])["model"]


def test_fingerprint_of_the_same_model(tmp_path):
    model = tiny_llama(0)
    expected = model_part(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for same in (tiny_llama(0), loaded, loaded.eval().requires_grad_(False), torch.compile(model, backend="eager")):
        assert model_part(same) == expected
    one, other = nn.ModuleDict(), nn.ModuleDict()
    for module, names in ((one, "ab"), (other, "ba")):
        for name in names:
            torch.manual_seed(ord(name))
            module[name] = nn.Linear(2, 2)
    assert model_part(one) == model_part(other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
)
def test_fingerprint_of_a_base_model_without_its_adapter(options):
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert model_part(model) == model_part(tiny_llama(0))
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-6
    assert model_part(model) != model_part(tiny_llama(0))


def test_fingerprints_of_other_models():
    models = [
        tiny_llama(0),
        tiny_llama(1),
        tiny_llama(0).bfloat16(),
        tiny_llama(0, rms_norm_eps=1e-5),
        tiny_llama(0, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    ]
    for change in range(5):
        models.append(tiny_llama(0))
        with torch.no_grad():
            if change == 0:  # one bit of one weight
                models[-1].lm_head.weight.view(torch.int32)[5, 5] ^= 1
            elif change == 1:
                models[-1].model.rotary_emb.inv_freq[1] *= 2
            elif change == 2:  # the same bytes of another dtype
                models[-1].lm_head.weight = nn.Parameter(models[-1].lm_head.weight.view(torch.int32), False)
            elif change == 3:  # in another shape
                models[-1].lm_head.weight = nn.Parameter(models[-1].lm_head.weight.view(32, 67))
            else:  # elsewhere
                layers = models[-1].model.layers
                layers[0].mlp.up_proj, layers[0].mlp.gate_proj = layers[0].mlp.gate_proj, layers[0].mlp.up_proj
    models += [nn.ModuleDict({name: models[0].lm_head}) for name in "ab"]
    assert len({model_part(model) for model in models}) == len(models)


# ---------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------


def test_truncated_files(file):
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, 4095, 4096, len(whole) - 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"`cache_reference` {file} to be whole, but got a truncated or damaged"):
            ReferenceCache.open(file.parent, PRINT)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        ReferenceCache.open(file.parent, PRINT)


def test_a_flipped_bit_anywhere(file):
    whole = file.read_bytes()
    header = whole.index(b"  ") + 2  # all that is not padding, and all of the data
    refused = set()
    for position in (*range(header), *range(header, 4096, 500), *range(4096, len(whole))):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"`cache_reference` {file} to be ") as error:
            ReferenceCache.open(file.parent, PRINT)
        # Never taken for another model's: only the version is read before the checksum.
        (reason,) = re.findall("be (of version|whole, with checksum|whole, but got a truncated)", str(error.value))
        assert position < 4096 or reason == "whole, with checksum"
        refused.add(reason)
    assert len(refused) == 3
    file.write_bytes(whole)
    assert_same_bits(ReferenceCache.open(file.parent, PRINT).hidden(KEYS), torch.cat(sequences()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PRINT | {"model": "c"}, r"of this model \(c\), but got another's \(a{32}\): it is stale"),
        (PRINT | {"data": "c"}, r"of this data \(c\), but got another's \(b{32}\)"),
        ({"model": "c", "data": "d"}, r"of this model and data \(c, d\), but got another's \(a{32}, b{32}\)"),
        (PRINT | {"precision": "16"}, r"of this precision \(16\), but got another's \(None\)"),
        ({"model": PRINT["model"]}, r"of this data \(None\)"),
    ],
)
def test_stale_caches(given, message, file):
    with pytest.raises(ValueError, match=f"`cache_reference` {file} to be {message}"):
        ReferenceCache.open(file.parent, given)


def test_how_other_data_differ(tmp_path):
    write(tmp_path, torch.float32, ([4, 0, 2], [3, 1]))
    with pytest.raises(ValueError, match=r"\), with 2 of these 3 sequences among its 5: it is stale, give another"):
        ReferenceCache.open(tmp_path, PRINT | {"data": "c"}, [*KEYS[1:3], b"new".zfill(16)])
    with pytest.raises(ValueError, match=r"this model \(c\), but got another's \(a{32}\): it is stale"):
        ReferenceCache.open(tmp_path, PRINT | {"model": "c"}, KEYS)


def test_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "VERSION", "0")
    write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="to be of version 1, but got version 0"):
        ReferenceCache.open(tmp_path, PRINT)


def test_other_safetensors(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "reference-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="to be of version 1, but got version None"):
        ReferenceCache.open(tmp_path, PRINT)


def test_missing_shards(tmp_path):
    with pytest.raises(ValueError, match=f"`cache_reference` {tmp_path} to hold the shards of one cache, but got none"):
        ReferenceCache.open(tmp_path, PRINT)
    write(tmp_path, shards=([0, 1], [2, 3, 4]))
    second = tmp_path / "reference-00002-of-00002.safetensors"
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{tmp_path} to hold 2 shards, but {second.name} is missing"):
        ReferenceCache.open(tmp_path, PRINT)
    write(tmp_path)
    with pytest.raises(ValueError, match="but got shards of 1 and of 2"):
        ReferenceCache.open(tmp_path, PRINT)


def test_unknown_sequences(file):
    cache = ReferenceCache.open(file.parent, PRINT)
    with pytest.raises(ValueError, match="hold every sequence, but got 1 of 2 that the cache does not hold: other"):
        cache.hidden([KEYS[0], b"?" * 16])


# ---------------------------------------------------------------------------------------------------------------
# Whole or not at all
# ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_it_is_finished(tmp_path):
    with CacheWriter(tmp_path) as writer:
        add(writer, [0, 1], sequences())
        assert not ReferenceCache.exists(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way(tmp_path):
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path) as writer:  # noqa: PT012
        add(writer, [0, 1], sequences())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["dumps", "replace"])
def test_an_error_at_the_end_keeps_what_was_there(where, tmp_path, monkeypatch):
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    writer = CacheWriter(tmp_path)
    add(writer, [0, 1], sequences())

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(*((json, "dumps", fail) if where == "dumps" else (os, "replace", fail)))
    with pytest.raises(OSError, match="disk full"):
        writer.finish(PRINT)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_killed_process(tmp_path):
    program = (
        "import os, sys, torch; from lit_did.models.reference_cache import CacheWriter\n"
        "writer = CacheWriter(sys.argv[1])\n"
        "writer.add([bytes(16)], torch.zeros(9, 9), torch.tensor([0, 9]))\n"
        "writer._file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == -9
    (left,) = tmp_path.iterdir()  # the premise
    assert sum(file.stat().st_size for file in left.iterdir()) > 9 * 9 * 4
    assert not ReferenceCache.exists(tmp_path)
    with pytest.raises(ValueError, match="but got none"):
        ReferenceCache.open(tmp_path, PRINT)
    write(tmp_path)
    assert len(ReferenceCache.open(tmp_path, PRINT)) == 5
    assert len(list(tmp_path.iterdir())) == 1  # what was left is removed


def test_what_is_left_of_dead_processes_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".unfinished_old").mkdir()
    (tmp_path / ".unfinished_old" / "reference-00001-of-00001.safetensors").write_bytes(b"begun")
    (tmp_path / ".unfinished_empty").mkdir()
    (tmp_path / "mine").write_text("kept")
    program = (
        "import sys, torch; from lit_did.models.reference_cache import CacheWriter\n"
        "writer = CacheWriter(sys.argv[1], shards=2)\n"
        "print(flush=True); sys.stdin.readline()\n"
        "writer.add([bytes(16)], torch.zeros(9, 9), torch.tensor([0, 9])); writer.finish({})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as alive:
        alive.stdout.readline()
        with CacheWriter(tmp_path, shard=1, shards=2) as writer:
            assert len(list(tmp_path.glob(".unfinished_*"))) == 2
            remove_unfinished(tmp_path)  # nor its own
            add(writer, [0, 1], sequences())
            writer.finish({})
        alive.communicate(b"\n")
    assert alive.returncode == 0
    names = ["mine", *(f"reference-0000{n}-of-00002.safetensors" for n in (1, 2))]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(unfinished.fcntl, "flock", no_locks)
    (tmp_path / ".unfinished_of_another").mkdir()
    (tmp_path / ".unfinished_of_another" / "file").touch()
    write(tmp_path)
    assert len(ReferenceCache.open(tmp_path, PRINT)) == 5
    assert (tmp_path / ".unfinished_of_another" / "file").exists()


@pytest.mark.parametrize("taken", ["between creation and lock", "before the file"])
def test_a_folder_that_another_run_takes_for_a_dead_ones_is_made_again(taken, tmp_path, monkeypatch):
    """Between two system calls a new folder looks like one that was left behind."""
    flock, mkdtemp, done = unfinished.fcntl.flock, tempfile.mkdtemp, []

    def taken_first(folder):
        if not done:
            done.append(folder)
            shutil.rmtree(folder)

    def late_lock(descriptor, flags):
        taken_first(next(tmp_path.glob(".unfinished_*")))
        return flock(descriptor, flags)

    def late_file(*args, **kwargs):
        folder = mkdtemp(*args, **kwargs)
        taken_first(folder)
        return folder

    if taken == "before the file":
        monkeypatch.setattr(tempfile, "mkdtemp", late_file)
    else:
        monkeypatch.setattr(unfinished.fcntl, "flock", late_lock)
    write(tmp_path)
    assert done
    assert len(ReferenceCache.open(tmp_path, PRINT)) == 5


def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    expected = rf"folder of `cache_reference`, {tmp_path}, for 32,096 bytes of hidden states.* with 5,000 bytes free"
    with CacheWriter(tmp_path, num_tokens=11) as writer:  # of 7 float32
        add(writer, [0, 1], sequences())
    with pytest.raises(OSError, match=expected) as raised, CacheWriter(tmp_path, num_tokens=1000) as writer:
        add(writer, [0, 1], sequences())
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("when", ["add", "finish"])
def test_a_disk_that_fills_up_is_named(when, tmp_path):
    def fill(writer):
        writer._file.close()
        writer._file = writer._unfinished.stream = open("/dev/full", "wb", buffering=0 if when == "add" else 2**20)  # noqa: SIM115
        add(writer, [0, 1], sequences())
        assert when == "finish"
        writer.finish(PRINT)

    named = f"`cache_reference`, {tmp_path}, for the hidden states"
    with pytest.raises(OSError, match=named), CacheWriter(tmp_path) as writer:
        fill(writer)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once(tmp_path):
    one, other = CacheWriter(tmp_path), CacheWriter(tmp_path)
    for numbers in ([0, 1, 2], [3, 4]):
        for writer in (one, other):
            add(writer, numbers, sequences())
    one.finish(PRINT)
    cache = ReferenceCache.open(tmp_path, PRINT)
    other.finish(PRINT)  # the first run goes on reading its own file
    assert_same_bits(cache.hidden(KEYS), torch.cat(sequences()))
    assert_same_bits(ReferenceCache.open(tmp_path, PRINT).hidden(KEYS), torch.cat(sequences()))
    assert len(list(tmp_path.iterdir())) == 1


BOUNDS = torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("hidden", "bounds", "error", "message"),
    [
        (
            torch.zeros(3, 2).long(),
            BOUNDS,
            TypeError,
            "float64, float32, bfloat16 or float16, but got torch.int64",
        ),
        (torch.zeros(3), BOUNDS, ValueError, r"`hidden` to have the shape \[tokens, H\], but got \(3,\)"),
        (torch.zeros(3, 2), BOUNDS, ValueError, r"the first one's dtype and H, \(torch.float32, 7\), but got .*, 2\)"),
        (torch.zeros(3, H).half(), BOUNDS, ValueError, r"\(torch.float32, 7\), but got \(torch.float16, 7\)"),
        (
            torch.zeros(4, H),
            BOUNDS,
            ValueError,
            r"`cu_labels` to be 3 numbers that rise from 0 to 4, but got \[0",
        ),
        (torch.zeros(3, H), BOUNDS[1:], ValueError, "`cu_labels` to be 3 numbers"),
        (torch.zeros(3, H), torch.tensor([0, 4, 3]), ValueError, "that rise from 0 to 3"),
        (torch.zeros(3, H), torch.tensor([1, 2, 3]), ValueError, "that rise from 0 to 3"),
    ],
)
def test_other_hidden_states_are_refused(hidden, bounds, error, message, tmp_path):
    with CacheWriter(tmp_path) as writer:
        add(writer, [0], sequences())
        with pytest.raises(error, match=message):
            writer.add(KEYS[1:3], hidden, bounds)


def test_what_cannot_be_finished(tmp_path):
    with pytest.raises(ValueError, match="Expected a sequence at least in every shard"):
        CacheWriter(tmp_path).finish(PRINT)
    writer = CacheWriter(tmp_path)
    add(writer, [0], sequences())
    with pytest.raises(ValueError, match="`fingerprint` to leave the header within 4088 bytes, but got 5"):
        writer.finish({"model": "a" * 5000})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place(file):
    with pytest.raises(NotADirectoryError, match=f"`cache_reference` to be a folder, but got the file {file}"):
        CacheWriter(file)


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from lit_did.models.reference_cache import CacheWriter, ReferenceCache

def own():  # MiB that cannot be taken back: pages of the file itself can
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def keys(batch):
    return [(4 * batch + i).to_bytes(16, "big") for i in range(4)]

# 4 MiB a batch, 128 in all
bounds = torch.arange(5) * 256
hidden = torch.zeros(1024, 1024)
print_ = {"model": "a"}
def run(path, batches):
    with CacheWriter(path) as writer:
        for batch in range(batches):
            writer.add(keys(batch), hidden.fill_(batch), bounds)
        writer.finish(print_)
    after_writing = own()
    cache = ReferenceCache.open(path, print_)
    after_opening = own()
    for batch in range(batches):
        assert (cache.hidden(keys(batch)) == batch).all()
    return after_writing, after_opening, own()

run(sys.argv[1] + "/small", 2)  # whatever is allocated once
before = own()
print(*(after - before for after in run(sys.argv[1] + "/large", 32)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    grown = [float(value) for value in run_program(sys.executable, "-c", MEASURE, tmp_path).split()]
    assert sum(file.stat().st_size for file in (tmp_path / "large").iterdir()) > 128 * 2**20
    # 128 MiB of data went through; what was read and compared of a few batches, 4 MiB each, the allocator may keep.
    assert max(grown) < 32, grown
