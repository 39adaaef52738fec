"""WeightedMeans against NumPy, and the contract of a torchmetrics metric."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lit_did.metrics import WeightedMeans


def batches(count: int = 5):
    generator = torch.Generator().manual_seed(0)
    for size in range(1, count + 1):
        yield {
            name: (torch.randn(size, generator=generator), torch.randint(0, 4, (size,), generator=generator))
            for name in ("a", "b")
        }


def expected(seen) -> dict[str, float]:
    joined = {
        name: [np.concatenate([batch[name][part].numpy() for batch in seen]) for part in (0, 1)] for name in ("a", "b")
    }
    return {name: np.average(values, weights=weights) for name, (values, weights) in joined.items()}


def test_uneven_batches():
    means = WeightedMeans(["a", "b"])
    for batch in batches():
        means.update(batch)
    result = means.compute()
    for name, value in expected(list(batches())).items():
        assert result[name].item() == pytest.approx(value, rel=1e-6)


def test_reset_pickle_clone_and_state():
    means = WeightedMeans(["a", "b"])
    first, *_, last = batches()
    means.update(last)
    again = pickle.loads(pickle.dumps(means)).clone()
    assert again.compute() == means.compute()
    assert means.state_dict() == {}  # nothing of it in a model's checkpoint
    means.reset()
    assert all(value.isnan() for value in means.compute().values())  # no data yet
    means.update(first | {"a": (torch.tensor([2.0]), torch.tensor([1]))})
    assert means.compute()["a"] == 2


def test_weight_zero_leaves_nan_out():
    means = WeightedMeans(["a"])
    means.update({"a": (torch.tensor([torch.nan, 3.0]), torch.tensor([0, 2]))})
    assert means.compute()["a"] == 3


def test_counts_beyond_float32():
    means = WeightedMeans(["a"])
    means.update({"a": (torch.tensor([1.0]), torch.tensor([2**24]))})
    for _ in range(3):
        means.update({"a": (torch.tensor([0.0]), torch.tensor([1]))})  # float32 would lose each of these
    assert means.weights.item() == 2**24 + 3
    assert means.to(torch.float16).weights.dtype == torch.float64  # a model cast to half precision keeps its means
