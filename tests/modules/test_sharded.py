"""Sharded training equals that of one process: FSDP 2, tensor parallelism and both, on 2 and 4 processes (gloo, CPU).

Cases are trained together, because a process needs seconds to start.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_did.exporting import export_policy
from tests.modules.sharded import LAYOUTS, LORA_CASES, OFFLOADED, ON_FOUR, OTHERS, QUICK
from tests.modules.tiny import byte_tokenizer
from tests.processes import run_program

RESUMED = ("tied", "lora")


def train(folder: Path, processes: int, *names: str) -> None:
    run_program(sys.executable, "-m", "tests.modules.sharded", folder, processes, ";".join(names))


def saved(folder: Path, name: str, layout: str) -> list[dict]:
    data, tensor = map(int, layout.split("x"))
    return [torch.load(folder / f"{name}.{layout}.{rank}") for rank in range(data * tensor)]


def layouts(name: str, *numbers: int) -> list[str]:
    """The layouts that a case is trained in. An adapter is not sharded by tensor parallelism."""
    return [layout for n in numbers for layout in LAYOUTS[n] if not (name in LORA_CASES and "x2" in layout)]


def assert_equal(folder: Path, name: str, layout: str, one: dict) -> None:
    double = all(weight.dtype == torch.float64 for weight in one["weights"].values())
    for rank in saved(folder, name, layout):
        assert rank["steps"] == one["steps"] == 4
        assert rank["weights"].keys() == one["weights"].keys()
        for weight, expected in one["weights"].items():
            error = (rank["weights"][weight] - expected).abs().max()
            assert error < (1e-9 if double else 1e-5), (name, layout, weight, error)
        assert rank["metrics"].keys() == one["metrics"].keys()
        for metric, expected in one["metrics"].items():
            assert rank["metrics"][metric] == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, layout, metric)


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (QUICK, (2,)),
        *(pytest.param(names, (2,), marks=pytest.mark.long) for names in OTHERS),
        *(pytest.param(names, (4,), marks=pytest.mark.long) for names in ON_FOUR),
    ],
)
def test_sharded_training_equals_one_process(tmp_path, names, numbers):
    for number in (1, *numbers):
        train(tmp_path, number, *names)
    for name in names:
        (one,) = saved(tmp_path, name, "1x1")
        assert (one["held"], one["fused"]) == (1, [True] * len(one["fused"]))
        for layout in layouts(name, *numbers):
            for rank in saved(tmp_path, name, layout):
                assert rank["held"] < 0.7  # its shards of all models, and small vectors
                assert rank["fused"] == one["fused"]
                assert any(rank["on_cpu"]) == rank["on_cpu"][-1] == (name == OFFLOADED and layout != "1x2")
                if max(numbers) == 2:  # of four processes each has few logits: the weights that FSDP gathers are larger
                    assert rank["largest"] < 0.75  # of the logits of the completion tokens
            assert_equal(tmp_path, name, layout, one)


@pytest.mark.long
def test_bfloat16(tmp_path):
    """FSDP gathers weights in bfloat16, and a reference by name is in bfloat16: they agree at the first step."""
    for number in (1, 2):
        train(tmp_path, number, "bfloat16")
    (one,) = saved(tmp_path, "bfloat16", "1x1")
    for rank in saved(tmp_path, "bfloat16", "2x1"):
        assert rank["dtypes"] == [torch.float32, torch.bfloat16]
        assert rank["first"] == pytest.approx(math.log(2), abs=1e-6)
        assert rank["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], rel=0.05)
        errors = [(rank["weights"][name] - weight).norm() / weight.norm() for name, weight in one["weights"].items()]
        assert 0 < max(errors) < 0.02


@pytest.mark.long
def test_runs_resume_on_another_layout_and_are_exported(tmp_path):
    """A run is stopped in the middle of an epoch, and no pair is seen twice or left out."""
    resumed = [f"resumed {name}" for name in RESUMED]
    train(tmp_path, 1, *RESUMED)
    train(tmp_path, 2, *RESUMED, *resumed)
    train(tmp_path, 4, *resumed)
    train(tmp_path, 1, *resumed)
    for name in RESUMED:
        (one,) = saved(tmp_path, name, "1x1")
        for layout in layouts(name, 1, 2, 4):
            assert_equal(tmp_path, f"resumed {name}", layout, one)
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    weights = []
    for layout in ("1x1", "2x1", "1x2"):
        folder = tmp_path / f"exported {layout}"
        export_policy(tmp_path / f"tied.{layout}.ckpt", folder, tokenizer=str(tmp_path / "tied"), quiet=True)
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all((other[name] - weight).abs().max() < 1e-9 for name, weight in weights[0].items())
