"""Weights of sources: the shares of each epoch, every pair in its turn, the same on all ranks and after resuming."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from lit_did.data import PreferenceDataModule
from lit_did.data.mixing import Mixture
from tests.data.test_resuming import _fit

SIZES = {"a": 16, "b": 40, "c": 4}
BY = [{"batch_size": 3}, {"tokens_per_batch": 60, "max_length": 12}]


@pytest.fixture
def files(tmp_path):
    """Three files whose pairs have 4 to 10 tokens."""
    for name, size in SIZES.items():
        rows = [{"prompt": "a", "chosen": "b" * (n % 7 + 1), "rejected": "c"} for n in range(size)]
        rows.insert(size // 2, {"prompt": "a", "chosen": " ", "rejected": "c"})  # skipped
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in SIZES}


def _module(files, weights, tokenizer, rank=0, ranks=1, **options) -> PreferenceDataModule:
    data = PreferenceDataModule({files[name]: weight for name, weight in weights.items()}, tokenizer, **options)
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank}, progress_bar_callback=None
    )
    data.setup("fit")
    return data


def _epochs(loader, count) -> list[list[list[int]]]:
    epochs = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch["index"].tolist() for batch in loader])
    return epochs


pytestmark = pytest.mark.filterwarnings("ignore:.*rows cannot be trained on", "ignore:.*of 63 rows")


@pytest.mark.parametrize("by", BY, ids=["rows", "tokens"])
def test_shares_of_an_epoch(no_specials, files, by):
    weights = {"a": 2, "b": 1, "c": 1}
    data = _module(files, weights, no_specials, **by)
    epochs = [[*chain(*batches)] for batches in _epochs(data.train_dataloader(), 40)]
    totals = Counter()
    for rows in epochs:
        of = Counter("abc"[(row >= 17) + (row >= 17 + 41)] for row in rows)
        assert of == {"a": 30, "b": 15, "c": 15}  # of the 60 pairs of all files
        counts = Counter(rows)
        assert {counts[row] for row in range(17) if row != 8} == {1, 2}  # 30 of 16 pairs
        assert {counts[row] for row in range(58, 63) if row != 60} == {3, 4}  # 15 of 4 pairs
        assert not {8, 17 + 20, 58 + 2} & counts.keys()  # skipped
        totals += counts
    # All pairs of a file come about equally often: 40 * 15 / 40 times in the second one.
    assert all(abs(totals[row] - 15) <= 3 for row in range(17, 58) if row != 37)
    assert epochs[0] != epochs[1]
    assert len({len(batches) for batches in _epochs(data.train_dataloader(), 9)}) == 1


@pytest.mark.parametrize("by", BY, ids=["rows", "tokens"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_what_one_process_sees(no_specials, files, by, drop_last):
    weights = {"a": 0.4, "b": 0.5, "c": 0.1}
    ranks = [
        _epochs(_module(files, weights, no_specials, rank, 2, **by, drop_last=drop_last).train_dataloader(), 2)
        for rank in range(2)
    ]
    one = _epochs(_module(files, weights, no_specials, **by).train_dataloader(), 2)
    for epoch in range(2):
        assert [len(batch) for batch in ranks[0][epoch]] == [len(batch) for batch in ranks[1][epoch]]
        together = sorted(chain(*ranks[0][epoch], *ranks[1][epoch]))
        if drop_last and "batch_size" in by:  # 30 pairs a rank, all whole batches
            assert len(together) == 60
        assert together == sorted(chain(*one[epoch]))


def test_no_batch_has_more_tokens_than_allowed_whatever_the_lengths(no_specials):
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(3, 60, 2)
        lengths = generator.integers(1, 50, sizes.sum())
        weights = {"a": generator.random() + 0.1, "b": generator.random() + 0.1}
        mixture = Mixture(weights, lengths, np.arange(sizes.sum()), [0, int(sizes[0])])
        bound = np.sort(lengths[mixture.longest()])
        for epoch in range(30):
            chosen = mixture.positions(epoch, seed=1)
            assert len(chosen) == sizes.sum()
            assert (np.sort(lengths[chosen]) <= bound).all()


@pytest.mark.parametrize("by", BY, ids=["rows", "tokens"])
def test_resuming(no_specials, files, tmp_path, monkeypatch, by):
    monkeypatch.setattr("tests.data.test_resuming.ROWS", {files["a"]: 1, files["b"]: 2, files["c"]: 0.5})
    kwargs = {"by": by, "max_epochs": 2}
    whole = _fit(no_specials, tmp_path, save={"every_n_train_steps": 5}, **kwargs)
    assert len(whole) > 12
    for step in (5, 10):
        assert _fit(no_specials, tmp_path, checkpoint=tmp_path / f"step={step}.ckpt", **kwargs) == whole[step:]
    monkeypatch.setattr("tests.data.test_resuming.ROWS", {files["a"]: 1, files["b"]: 3, files["c"]: 0.5})
    with pytest.raises(ValueError, match="these changed: weights="):
        _fit(no_specials, tmp_path, checkpoint=tmp_path / "step=5.ckpt", **kwargs)


def test_a_cache_keeps_the_sources_and_weights_may_change(no_specials, files, tmp_path):
    options = {"cache_tokens": tmp_path / "tokens", **BY[0]}
    for weights in ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 5, "c": 1}):
        cached, plain = (_module(files, weights, no_specials, **more) for more in (options, BY[0]))
        assert _epochs(cached.train_dataloader(), 2) == _epochs(plain.train_dataloader(), 2)
    assert len(list(options["cache_tokens"].glob("[!.]*"))) == 1
    # A list of the same files is read as one source.
    PreferenceDataModule([files[name] for name in "abc"], no_specials, **options).setup("fit")
    assert len(list(options["cache_tokens"].glob("[!.]*"))) == 2


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"a": 0.5, "b": -1}, ValueError, r"Expected `train\['b'\]` to be in \(0, inf\), but got -1\."),
        ({"a": 0.5, "b": 0}, ValueError, r"Expected `train\['b'\]` to be in \(0, inf\), but got 0\."),
        ({"a": float("nan")}, ValueError, r"Expected `train\['a'\]` to be in \(0, inf\), but got nan\."),
        ({"a": float("inf")}, ValueError, r"Expected `train\['a'\]` to be in \(0, inf\), but got inf\."),
        ({"a": "half"}, TypeError, r"Expected `train\['a'\]` to be an int or a float, but got 'half'\."),
        ({"a": None}, TypeError, r"Expected `train\['a'\]` to be an int or a float, but got None\."),
        ({"a": True}, TypeError, r"Expected `train\['a'\]` to be an int or a float, but got True\."),
        ({}, ValueError, r"Expected `train` to have at least one source, but got \{\}\."),
    ],
)
def test_weights_are_checked(no_specials, weights, error, message):
    with pytest.raises(error, match=message):
        PreferenceDataModule(weights, no_specials)


def test_what_does_not_go_with_weights(no_specials, files):
    weights = {files["a"]: 1, files["b"]: 1e-3}
    with pytest.raises(ValueError, match=r"Expected `val` instead of val_fraction=0\.1 with weights of sources"):
        PreferenceDataModule(weights, no_specials, val_fraction=0.1)
    with pytest.raises(ValueError, match="Expected `shuffle=True` with weights of sources"):
        PreferenceDataModule(weights, no_specials, shuffle=False)
    with pytest.raises(TypeError, match=r"Expected `val` to be a path, .* but got dict"):
        PreferenceDataModule(files["a"], no_specials, val={files["a"]: 1}).setup("validate")
    data = _module(files, {"a": 1, "b": 1e-3}, no_specials)
    with pytest.raises(ValueError, match=r"of 56 pairs to have some of .*b\.jsonl, but it has 40 pairs and the weight"):
        data.train_dataloader()
