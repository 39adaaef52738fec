"""Processes that share rows of tokens train as one process does, under DDP and FSDP 2 (gloo, CPU)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from lit_did import LitDPO
from tests.modules.context_parallel import OTHERS, QUICK, refusals, strategies
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program


def train(folder: Path, processes: int, *names: str) -> None:
    run_program(sys.executable, "-m", "tests.modules.context_parallel", folder, processes, ";".join(names))


def assert_equal(folder: Path, name: str, processes: int, one: dict) -> list[dict]:
    """What the processes of all strategies saved, which has to equal what one process did."""
    ranks = [
        torch.load(folder / f"{name}.{strategy}.{processes}.{rank}")
        for strategy in strategies(name, processes)
        for rank in range(processes)
    ]
    for rank in ranks:
        assert rank["steps"] == one["steps"] == 4
        assert rank["weights"].keys() == one["weights"].keys()
        for weight, expected in one["weights"].items():
            assert (rank["weights"][weight] - expected).abs().max() < 1e-9, (name, weight)
        assert rank["metrics"].keys() == one["metrics"].keys()
        for metric, expected in one["metrics"].items():
            assert rank["metrics"][metric] == pytest.approx(expected, rel=1e-6, abs=1e-8), (name, metric)
    return ranks


@pytest.mark.parametrize(
    ("names", "processes"),
    [
        (QUICK, 2),
        pytest.param(OTHERS, 2, marks=pytest.mark.long),
        pytest.param((*QUICK, "clipped"), 4, marks=pytest.mark.long),
    ],
)
def test_processes_that_share_rows_train_as_one(tmp_path, names, processes):
    for number in (1, processes):
        train(tmp_path, number, *names)
    for name in names:
        one = torch.load(tmp_path / f"{name}.auto.1.0")
        for rank in assert_equal(tmp_path, name, processes, one):
            # Half of the tokens in layers, and half of the heads in attention. Rows are padded to an even length.
            if processes == 2 and name in ("full", "whole prompts"):  # otherwise FSDP's copies of weights are larger
                assert rank["largest"] <= 0.5 * one["largest"] + 48, name
    if "full" in names:
        tables = [(tmp_path / f"full.{s}.{n}.csv").read_text() for n in (1, processes) for s in strategies("full", n)]
        for table in tables[1:]:
            _assert_same_numbers(table, tables[0])
        validation, *others = (  # with intervals, which depend on the number of pairs
            torch.load(tmp_path / f"full.{s}.{n}.ckpt", weights_only=False)["run"]["validation"]["metrics"]
            for n in (1, processes)
            for s in strategies("full", n)
        )
        assert validation["num_pairs"] == [7]
        for other in others:
            assert other == {name: pytest.approx(values, rel=1e-6, abs=1e-8) for name, values in validation.items()}


def _assert_same_numbers(table: str, other: str) -> None:
    lines, others = table.splitlines(), other.splitlines()
    assert len(lines) == len(others) == 8
    for line, expected in zip(lines, others, strict=True):
        for cell, of_other in zip(line.split(","), expected.split(","), strict=True):
            try:
                assert float(cell) == pytest.approx(float(of_other), abs=1e-6)
            except ValueError:
                assert cell == of_other


@pytest.mark.long
def test_a_run_resumes_on_processes_that_share_rows_and_on_others(tmp_path):
    """In the middle of an epoch: no pair is seen twice or left out."""
    train(tmp_path, 1, "full")
    train(tmp_path, 2, "full", "resumed full")
    assert_equal(tmp_path, "resumed full", 2, torch.load(tmp_path / "full.auto.1.0"))


REFUSED = {
    "three heads": "`context_parallel_size` to divide the numbers of heads .* got 2 with 3 heads",
    "other batches": "the 2 processes of a group to get the same batches .*num_replicas=1 and rank=trainer.global_rank",
    "tensor parallelism": "with tensor_parallel_size=1, but got 2 and 2 processes under ModelParallelStrategy",
    "three processes": "divide the number of processes, .* but got 3 and 2 processes under DDPStrategy",
    "a cached reference": "`cache_kind` to be 'logprobs' with .*`context_parallel_size=2`, but got 'hidden_states'",
    "positions of the longest": "depend on the longest sequence.*got 2 with LlamaForCausalLM",
    "mixed tokens": "other layers than attention mix tokens, but got 2 with LlamaForCausalLM and attention 'sdpa'",
    "attention of its own": "packed batches .* got 2 with BloomForCausalLM and attention 'eager'",
}


def test_both_processes_refuse(tmp_path):
    train(tmp_path, 2, "refused")
    first, second = (torch.load(tmp_path / f"refused.ddp.2.{rank}") for rank in range(2))
    assert first == second
    assert first.keys() == REFUSED.keys() == refusals().keys()
    for name, error in first.items():
        assert error is not None, name
        assert re.search(REFUSED[name], error), (name, error)


def test_arguments():
    with pytest.raises(ValueError, match="`context_parallel_size` to be an integer of at least 1, but got 0"):
        LitDPO(tiny_llama(), context_parallel_size=0)
    with pytest.raises(ValueError, match="`padding_free` to be True with `context_parallel_size=2`"):
        LitDPO(tiny_llama(), context_parallel_size=2, padding_free=False)
    module = LitDPO(tiny_llama(), context_parallel_size=2)
    with pytest.raises(ValueError, match="but got 2 and 1 processes under SingleDeviceStrategy"):
        trainer(max_epochs=1).fit(module, loader(make_pairs(4), 2))
