"""Two processes (DDP or FSDP 2; gloo, CPU) train to the weights and metrics of one with the same pairs a step.

FSDP 2 does so from a checkpoint of one process, or of its own shards; one process reads what it saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lit_did import LitDPO
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

KINDS = ("lora", "lora start", "projected", "sharded lora", "sharded lora start")  # start: the reference is its copy
BY_FSDP = ("all_gather_into_tensor", "reduce_scatter_tensor")  # of weights and gradients
LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]


@pytest.mark.parametrize("kind", ["full", "sharded", *LONG])
def test_two_processes_equal_one(tmp_path, kind):
    run_program(sys.executable, "-m", "tests.modules.two_processes", kind, tmp_path)
    results = {n: [torch.load(tmp_path / f"{n}.{rank}") for rank in range(n)] for n in (1, 2)}
    one = results[1][0]
    assert len(one["steps"]) == 4
    assert kind != "projected" or all(step["train/gradient_cosine"] > 0 for step in one["steps"])  # the premise
    assert [rank["sharded"] > 0 for rank in results[2]] == ["sharded" in kind] * 2  # the premise
    for rank in results[2]:  # both ranks hold the same truth, not their own share of it
        for name, weight in one["weights"].items():
            # float32 sums in another order, through four steps of Adam
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=1e-4)
        steps = one["steps"]
        if "sharded" in kind:  # resumed after the first epoch, with no validation behind it
            steps = [{name: value for name, value in step.items() if "val/" not in name} for step in steps[2:]]
            rank["steps"] = [{n: value for n, value in step.items() if "val/" not in n} for step in rank["steps"]]
        for mine, expected in zip([*rank["steps"], rank["val"]], [*steps, one["val"]], strict=True):
            assert mine.keys() == expected.keys()
            assert len(expected) >= 14 + 13  # LitDPO's own and the monitor's
            for name, value in expected.items():
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
        # The intervals are over the pairs of both ranks.
        assert rank["validation"]["step"] == one["validation"]["step"] == 4
        assert rank["validation"]["metrics"]["num_pairs"] == [8]
        for name, value in one["validation"]["metrics"].items():
            assert len(value) == (1 if name in ("num_pairs", "calibration_error") else 3)
            assert rank["validation"]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    if kind in ("full", "sharded"):
        assert_one_exchange_where_logged(tmp_path, kind)
        assert_processes_find_the_same(tmp_path)
    completions = [(tmp_path / str(n) / "completions.jsonl").read_text().splitlines() for n in (1, 2)]
    # What is resumed after the first epoch has fewer rows, and two runs of one process have some twice.
    assert set(completions[1]) <= set(completions[0])
    assert completions[1][-2:] == completions[0][-2:] != completions[0][:2]
    if kind == "sharded":
        last = [torch.load(tmp_path / f"{processes}.last", weights_only=True) for processes in (1, 2)]
        assert_close(*(checkpoint["state_dict"] for checkpoint in last))
        assert_close(*(checkpoint["optimizer_states"][0]["state"] for checkpoint in last))
        groups = [checkpoint["optimizer_states"][0]["param_groups"] for checkpoint in last]
        assert [set(group["params"]) for group in groups[0]] == [set(group["params"]) for group in groups[1]]
        module = LitDPO(tiny_llama(), learning_rate=1e-2, weight_decay=0.1)
        run = trainer(max_epochs=3)
        run.fit(module, loader(make_pairs(2), 1), ckpt_path=tmp_path / "2.last", weights_only=True)
        assert run.global_step == 4 + 2


def assert_one_exchange_where_logged(folder: Path, kind: str) -> None:
    """Lightning asks in each batch whether to stop. The fourth step is logged, and the last one, which is the sixth."""
    always = [("broadcast", 8)] + [("all_reduce", 16)] * (kind == "sharded")  # the number of micro-batches
    for rank in range(2):
        of_batches = torch.load(folder / f"2.exchanges.{rank}")
        assert len(of_batches) == 12
        for batch, exchanges in enumerate(of_batches):
            if batch or kind == "full":  # sharded models are tried together in the first batch
                others = [exchange for exchange in exchanges if exchange[0] not in BY_FSDP]
                assert others == always + [("all_reduce", 69 * 8)] * (batch in (7, 11)), batch


def assert_processes_find_the_same(folder: Path) -> None:
    """What one process saw."""
    (found, error, warned), (other_found, other_error, other_warned) = (
        torch.load(folder / f"2.watch.{rank}") for rank in range(2)
    )
    assert (found, other_found) == (0, 1)
    assert error == other_error
    assert "Expected a finite loss in every optimiser step" in error
    assert "first in step 2 of" in error
    assert len(warned) == 1
    assert "by about 10.5 nats over 8 optimiser steps to about -10.5:" in warned[0]
    assert other_warned == []


def assert_close(mine: dict, expected: dict) -> None:
    """Nested dicts of the same keys, and tensors that are the same within rounding."""
    assert mine.keys() == expected.keys()
    for name, value in mine.items():
        if isinstance(value, dict):
            assert_close(value, expected[name])
        else:
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
