"""The tokens in a shared folder: the same batches and warnings, another key for anything else, whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
import warnings
from types import SimpleNamespace

import pytest

from lit_did import file_digests
from lit_did.data import PreferenceDataModule, UnusableRowError, token_cache
from lit_did.data.processes import ask_processes
from lit_did.data.splits import Splits
from lit_did.data.token_cache import source_digests, write_once

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROWS = [
    {"prompt": "The", "chosen": " ", "rejected": "b"},  # skipped
    {"prompt": "The", "chosen": " dog", "rejected": " dog"},  # carries no preference
    {"prompt": "The <|im_end|>", "chosen": " dog", "rejected": " fox"},  # spells a control token
    {"prompt": "The", "chosen": " quick" * 50, "rejected": " fox"},  # truncated
    {"chosen": [*TURNS, *TURNS], "rejected": [TURNS[0], {"role": "assistant", "content": "no"}]},  # with other turns
    *({"prompt": "The quick", "chosen": " fox" * (n % 5 + 1), "rejected": " dog" * (n % 3 + 1)} for n in range(13)),
]
OPTIONS = {"as_chat": True, "max_length": 48, "seed": 3, "batch_size": 2, "columns": {"tag": None}}


@pytest.fixture
def pairs(write_jsonl):
    path = write_jsonl(*ROWS)
    os.utime(path, (1e9, 1e9))
    return path


def _started(data, stage="fit") -> list[str]:
    """What `setup` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    return [str(warning.message) for warning in caught]


def _batches(data, rank: int) -> list[dict]:
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, progress_bar_callback=None
    )
    loaders = (data.train_dataloader(), data.val_dataloader())
    return [{key: values.tolist() for key, values in batch.items()} for loader in loaders for batch in loader]


def _entries(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("more", [{}, {"tokens_per_batch": 200}], ids=["rows", "tokens"])
def test_batches_and_warnings_are_those_without_a_cache(chatml, pairs, tmp_path, more):
    more |= {"val_fraction": 0.2, "chat_template_kwargs": {"note": "a"}}
    modules = [
        PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS, **more)
        for cache in (None, tmp_path / "tokens", tmp_path / "tokens")
    ]
    warned = [_started(data) for data in modules]
    parts = ("does not use `note`", "1 of 15 rows cannot", "1 of 14 pairs are longer", "same tokens", "spells control")
    for part, text in zip(parts, warned[0], strict=True):
        assert part in text
    assert warned[1] == warned[2] == warned[0]
    assert {name.partition("-")[0] for name in _entries(tmp_path / "tokens")} == {"train", "val"}
    for rank in range(2):
        plain, *cached = (_batches(data, rank) for data in modules)
        assert len(plain) > 4
        assert cached == [plain, plain]
    for name in ("train_dataset", "val_dataset"):
        plain, _, cached = (getattr(data, name) for data in modules)
        assert cached.to_json() == plain.to_json()
        assert (cached.num_tokens == plain.num_tokens).all()
    assert modules[0].train_dataset.num_with_context == 1  # the premise


def test_a_later_run_reads_neither_rows_nor_texts(chatml, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "_YOUNG", -1)
    for read in (True, False):
        if not read:
            monkeypatch.delattr("lit_did.data.splits.read_rows")
            monkeypatch.delattr("hashlib.file_digest")
        _started(PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path / "tokens", **OPTIONS))


def test_worker_processes_open_the_files_again(chatml, pairs, tmp_path):
    data = PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path / "tokens", **OPTIONS)
    _started(data)
    pickled = pickle.dumps(data.train_dataset)
    assert len(pickled) < 500
    assert [e.chosen_ids.tolist() for e in pickle.loads(pickled)] == [e.chosen_ids.tolist() for e in data.train_dataset]


@pytest.mark.parametrize(
    "other",
    [
        {"max_length": 47},
        {"truncation": "prompt"},
        {"min_completion_tokens": 3},
        {"chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"},
        {"chat_template_kwargs": {"note": "a"}},
        {"parse_special_tokens": True},
        {"columns": {"system": None}},
        {"val_fraction": 0.1},
        {"tokenizer": "llama3"},
        {"source": ("fox", "dog")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_has_another_key(chatml, llama3, pairs, tmp_path, other):
    cache = tmp_path / "tokens"
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS))
    before = _entries(cache)
    status = pairs.stat()
    if source := other.pop("source", None):  # the same size and time, and even the same inode
        pairs.write_text(pairs.read_text().replace(*source))
        os.utime(pairs, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert pairs.stat().st_size == status.st_size
    tokenizer = {"llama3": llama3}.get(other.pop("tokenizer", None), chatml)
    _started(PreferenceDataModule(pairs, tokenizer, cache_tokens=cache, **{**OPTIONS, **other}))
    assert len(_entries(cache)) == len(before) + 1 + ("val_fraction" in other)
    # And the first tokens are still there.
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=cache, **{**OPTIONS, **({} if not source else other)}))
    assert before < _entries(cache)


def test_the_content_of_a_file_counts_and_not_its_time(chatml, pairs, tmp_path):
    cache = tmp_path / "tokens"
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS))
    before = _entries(cache)
    os.utime(pairs, (2e9, 2e9))
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS))
    assert _entries(cache) == before


def test_digests_are_kept_unless_the_file_is_young(pairs, tmp_path, monkeypatch):
    kept = tmp_path / token_cache._DIGESTS
    first = source_digests([pairs], "train", tmp_path)
    assert not kept.exists()
    monkeypatch.setattr(file_digests, "_YOUNG", -1)
    assert source_digests([[pairs]], "train", tmp_path) == first
    assert len(list(kept.iterdir())) == 1
    monkeypatch.delattr("hashlib.file_digest")
    assert source_digests([str(pairs)], "train", tmp_path) == first


def test_a_kept_digest_is_not_that_of_a_changed_file(pairs, tmp_path, monkeypatch):
    """Its size, inode and time of change are as before: the operating system knows better."""
    monkeypatch.setattr(file_digests, "_YOUNG", -1)
    first, status = source_digests([pairs], "train", tmp_path), pairs.stat()
    time.sleep(0.05)  # the clock of a file system ticks slowly
    pairs.write_text(pairs.read_text().replace("fox", "dog"))
    os.utime(pairs, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (pairs.stat().st_ino, pairs.stat().st_size) == (status.st_ino, status.st_size)
    assert source_digests([pairs], "train", tmp_path) != first


def test_a_template_that_writes_the_date_has_another_key_on_another_day(chatml, monkeypatch):
    keys = []
    for template in ("{{ strftime_now('%Y') }}", "{{ messages }}"):
        for day in ("2026-01-01", "2026-01-02"):
            monkeypatch.setattr(time, "strftime", lambda form, day=day: day)
            keys.append(token_cache.key_of(token_cache.what_tokens_depend_on(chatml, template)))
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]


def test_how_a_tokenizer_was_called_last_does_not_count(chatml):
    keys = []
    for options in ({}, {"padding": "max_length", "truncation": True, "max_length": 2}):
        chatml("The quick fox", **options)
        keys.append(token_cache.key_of(token_cache.what_tokens_depend_on(chatml, None)))
    assert keys[0] == keys[1]


def test_other_code_and_other_libraries_have_another_key(chatml, tmp_path, monkeypatch):
    def key() -> str:
        return token_cache.key_of(token_cache.what_tokens_depend_on(chatml, None))

    keys = [key()]
    monkeypatch.setattr(token_cache, "version", lambda name: "0")
    keys.append(key())
    monkeypatch.setattr(token_cache, "__file__", str(tmp_path / "token_cache.py"))
    for content in ("one = 1", "one = 2"):
        (tmp_path / "rendering.py").write_text(content)
        keys.append(key())
    assert len(set(keys)) == 4


def test_bad_rows_raise_in_every_run(chatml, pairs, tmp_path):
    for _ in range(2):
        data = PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path, on_bad_rows="raise", **OPTIONS)
        with pytest.raises(UnusableRowError, match=r"pairs\.jsonl, line 1: Expected `chosen` to be non-empty"):
            data.setup("fit")
    assert not [name for name in os.listdir(tmp_path) if "train-" in name and not name.endswith(".lock")]


def test_rows_that_another_run_skipped_raise_if_they_shall(chatml, pairs, tmp_path):
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path, **OPTIONS))
    with pytest.raises(UnusableRowError, match=r"pairs\.jsonl, line 1"):
        PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path, on_bad_rows="raise", **OPTIONS).setup("fit")


def test_sources_are_files(chatml, tmp_path):
    with pytest.raises(TypeError, match="Expected `train` to be files or names of the hub with `cache_tokens`, but"):
        PreferenceDataModule(ROWS, chatml, cache_tokens=tmp_path, **OPTIONS).setup("fit")
    with pytest.raises(TypeError, match="Expected `cache_tokens` to be a folder or None, but got True"):
        PreferenceDataModule(ROWS, chatml, cache_tokens=True)


def test_a_file_that_changes_while_it_is_read_is_an_error(chatml, pairs, tmp_path, monkeypatch):
    read = Splits._tokenize

    def change(*arguments, **options):
        pairs.write_text(json.dumps(ROWS[0]))
        return read(*arguments, **options)

    monkeypatch.setattr(Splits, "_tokenize", change)
    data = PreferenceDataModule(pairs, chatml, cache_tokens=tmp_path / "tokens", **OPTIONS)
    with pytest.raises(ValueError, match="Expected the files of `train` not to change while they are read"):
        _started(data)
    assert not _entries(tmp_path / "tokens")


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "row_numbers.npy", "counts.json", "made_from.json"])
@pytest.mark.parametrize("damage", ["gone", "half", "empty"])
def test_damaged_files_are_named(chatml, pairs, tmp_path, name, damage):
    cache = tmp_path / "tokens"
    _started(PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS))
    [entry] = _entries(cache)
    file = cache / entry / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.raises(ValueError, match=rf"Expected whole files of tokens in {cache / entry}, .* Delete this folder"):
        PreferenceDataModule(pairs, chatml, cache_tokens=cache, **OPTIONS).setup("fit")


def _in_child(work) -> int:
    """Forks a process that only calls `work`."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_what_a_killed_writer_leaves_is_not_trusted(tmp_path):
    target = tmp_path / "tokens" / "train-1"

    def write_and_die(folder):
        (folder / "tokens.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(_in_child(lambda: write_once(target, write_and_die)), 0)
    [left] = target.parent.glob(".train-1.part*/train-1/tokens.bin")  # the premise
    assert write_once(target, lambda folder: (folder / "tokens.bin").write_bytes(b"whole"))
    assert [path.read_bytes() for path in target.iterdir()] == [b"whole"]
    assert not left.exists()
    assert not write_once(target, None)


def test_a_writer_that_raises_leaves_nothing(tmp_path):
    target = tmp_path / "train-1"
    with pytest.raises(ZeroDivisionError):
        write_once(target, lambda folder: 1 / 0)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_first_of_two_that_write_without_a_common_lock_is_kept(tmp_path):
    target = tmp_path / "train-1"

    def write(folder):
        target.mkdir()
        (target / "tokens.bin").write_bytes(b"first")
        (folder / "tokens.bin").write_bytes(b"second")

    write_once(target, write)
    assert [path.read_bytes() for path in target.iterdir()] == [b"first"]
    assert not list(tmp_path.glob("*.part*"))


def test_one_of_several_processes_writes_and_the_others_wait(tmp_path, monkeypatch):
    target, log, waited, parent = tmp_path / "train-1", tmp_path / "log", tmp_path / "waited", os.getpid()
    lines = []

    def note(line):
        lines.append(line)
        if os.getpid() == parent:
            waited.touch()

    monkeypatch.setattr(token_cache, "rank_zero_info", note)

    def write(folder):
        (folder / "tokens.bin").write_bytes(b"whole")
        deadline = time.monotonic() + 60
        while not waited.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with open(log, "a") as file:
            file.write("written\n")

    def work():
        write_once(target, write)
        with open(log, "a") as file:
            file.write((target / "tokens.bin").read_text() + "\n")

    children = [_in_child(work) for _ in range(3)]
    while not list(tmp_path.glob(".train-1.part*")):
        time.sleep(0.01)
    assert not write_once(target, write)
    for child in children:
        os.waitpid(child, 0)
    assert log.read_text().split() == ["written", "whole", "whole", "whole"]
    assert lines[:1] == [f"Waits for another process, which tokenises into {target}: 0 MB are written after 0 minutes."]


def test_processes_tokenise_as_one_does(chatml, pairs):
    one, two = (PreferenceDataModule(pairs, chatml, num_proc=number, **OPTIONS) for number in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_did.data.chunks._CHUNK", 4)
        assert _started(one) == _started(two)
    assert _batches(one, 0) == _batches(two, 0)
    assert one.train_dataset.to_json() == two.train_dataset.to_json()


def test_errors_of_processes():
    answers = ask_processes(int, ["1", "two", "3"], 1)
    assert next(answers) == 1
    with pytest.raises(ValueError, match=r"invalid literal for int.* 'two'"):
        next(answers)
    message = r"process that tokenises to answer, .* ended with code 5\. .*smaller `num_proc`"
    with pytest.raises(RuntimeError, match=message):
        list(ask_processes(os._exit, [5, 5, 5], 1))
