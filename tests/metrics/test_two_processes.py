"""Two gloo processes: every metric is what one process with all the data finds, on both ranks."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from lit_did.metrics import DIDEntropy
from tests.metrics import test_did_entropy, test_power_law
from tests.metrics.oracle import expected, make_batches
from tests.metrics.samples import batches_of, completions, log_ratios
from tests.metrics.test_metrics import CASES, make
from tests.processes import run_program

ORACLE = functools.partial(expected, beta=0.7, num_bins=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("two") / "out"
    run_program(sys.executable, "-m", "tests.metrics.two_processes", 2, path)
    return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(2)]


def all_batches() -> list:
    return make_batches(sizes=(3, 1, 4, 2, 5))


def test_every_metric(results):
    batches = all_batches()
    for name in CASES:
        metric = make(name)
        for batch in batches:
            metric.update(*batch)
        first = metric.compute().item()
        for batch in batches[:2]:  # each rank's first one once more
            metric.update(*batch)
        for of_rank in results:
            assert of_rank[name] == pytest.approx([first, metric.compute().item()], abs=1e-6, rel=0), name
        assert first == pytest.approx(ORACLE(batches, loss=True)[name], rel=1e-5, abs=2e-6)


def test_the_collection(results):
    batches = all_batches()
    for key, seen in {
        "collection": batches,
        "collection again": [*batches, *batches[:2]],
        "on step": batches[:2],
        "late": batches[:1],
        "later": [batches[0], batches[2]],
    }.items():
        for of_rank in results:
            assert of_rank[key] == pytest.approx(ORACLE(seen), rel=1e-5, abs=2e-6), key


def test_one_exchange_for_all_metrics(results):
    assert [of_rank["exchanges"] for of_rank in results] == [["all_reduce"]] * 2


def test_processes_apart_on_request(results):
    for rank, of_rank in enumerate(results):
        assert of_rank["apart"] == pytest.approx(ORACLE(all_batches()[rank : rank + 1]), rel=1e-5, abs=2e-6)


def test_the_power_law(results):
    truth = []
    for with_prompts in (False, True):
        batches = log_ratios(with_prompts)
        truth += [test_power_law.whole(batches[:2]), test_power_law.whole(batches)]
    alone = test_power_law.whole(log_ratios(True)[2:3])
    for of_rank in results:
        assert [test_power_law.floats(values) for values in of_rank["power law"]] == [
            test_power_law.close(values) for values in truth
        ]
        assert test_power_law.floats(of_rank["power law of one process"]) == test_power_law.close(alone)


def test_the_entropy_of_completions(results):
    """Prompts with samples on both, on one, and a process that has none of any."""
    samples = completions()
    expected, whole = test_did_entropy.estimates_of(samples), DIDEntropy()(**samples)
    both = [set(batch["group"].tolist()) for batch in batches_of(samples)]
    assert 7 in (both[0] | both[2] | both[4]) & (both[1] | both[3])  # the premise
    for of_rank in results:
        for values in (of_rank["entropy of one process"][1], of_rank["entropy"][1]):
            assert {name: value.item() for name, value in values.items()} == pytest.approx(
                {name: value.item() for name, value in whole.items()}, rel=1e-9
            )
        for estimates in (of_rank["entropy of one process"][0], of_rank["entropy"][0], of_rank["entropy"][2]):
            assert estimates.keys() == expected.keys()
            for prompt, estimate in estimates.items():
                assert (estimate and estimate[:-1]) == test_did_entropy.close(expected[prompt])
