"""Names of the hub reach `datasets`; local paths win, and what cannot be loaded is said in words, and soon."""

from __future__ import annotations

import sys

import pytest

from lit_did.data import hub
from lit_did.data.pairs import PreferencePair
from lit_did.data.reading import read_pairs

datasets = pytest.importorskip("datasets")

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}
SPLITS = {"train": datasets.Dataset.from_list([ROW, ROW]), "test": datasets.Dataset.from_list([ROW])}


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """A hub that has the data set org/name with two splits; returns what `datasets` is asked for."""
    asked = []

    def load_dataset(path, config=None, *, split=None):
        asked.append((path, config, split))
        if path != "org/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.\nMore")
        if split == "train[:1]":
            return SPLITS["train"].select([0])
        if split not in (None, *SPLITS):
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train', 'test'].\nMore")
        return datasets.DatasetDict(SPLITS) if split is None else SPLITS[split]

    monkeypatch.setattr(hub, "_problem", lambda path: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("source", "asked", "count"),
    [
        ("org/name:train", ("org/name", None, "train"), 2),
        ("org/name:test", ("org/name", None, "test"), 1),
        ("org/name/config:test", ("org/name", "config", "test"), 1),
    ],
)
def test_names(answering, source, asked, count):
    rows = read_pairs(source)
    assert answering == [asked]
    assert [row.pair for row in rows] == [PreferencePair(**ROW)] * count
    assert rows[0].where == f"{source}, row 0"
    assert len(read_pairs([source, "org/name:train[:1]"])) == count + 1


def test_the_only_split_need_not_be_named(answering, monkeypatch):
    with pytest.raises(ValueError, match=r'org/name: Expected one split, but got train, test\. Pass "org/name:train"'):
        read_pairs("org/name")
    monkeypatch.delitem(SPLITS, "test")
    assert len(read_pairs("org/name")) == 2


def test_local_paths_win(answering, tmp_path):
    (tmp_path / "org").mkdir()
    with pytest.raises(FileNotFoundError, match="org/name does not exist"):
        read_pairs("org/name")  # a folder's name and a missing file: a slip of the pen
    (tmp_path / "org" / "name").mkdir()
    (tmp_path / "org" / "name" / "a.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}')
    assert read_pairs("org/name")[0].pair.prompt == "x"
    for path in ("nowhere/pairs.jsonl", "./nowhere/name", "/nowhere/name", "name"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_pairs(path)
    assert answering == []


def test_what_the_hub_does_not_have(answering):
    with pytest.raises(FileNotFoundError, match=r"org/other:train does not exist here, and the hub has none.*Hub\.$"):
        read_pairs("org/other:train")
    with pytest.raises(ValueError, match=r"^org/name:dev: Expected a data set that can be loaded.*'test'\]\.$"):
        read_pairs("org/name:dev")


def test_a_hub_that_cannot_be_reached_is_not_tried_again(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    def no_answer(self, *args, **kwargs):
        raise OSError("Name or service not known")

    def load_dataset(*args, **kwargs):
        assert datasets.config.HF_HUB_OFFLINE  # the cache alone
        raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")

    monkeypatch.setattr(HfApi, "dataset_info", no_answer)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match=r"org/name does not exist here, and the hub cannot .* Name or service"):
        read_pairs("org/name")
    assert before == datasets.config.HF_HUB_OFFLINE


def test_without_datasets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"Loading org/name from the hub needs datasets. Install it with: pip install"
    ):
        read_pairs("org/name")
