"""MicroBatches: the gradient of the whole, one part at a time."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lit_did.modules.micro_batches import MicroBatches


class Objective:
    """A share for each part: the part times a weight; says when it runs, and in which context."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)
        self.events: list[str] = []

    def __call__(self, part: float) -> Tensor:
        self.events.append(f"forward {part:g}")
        return part * self.weight

    def backward(self, loss: Tensor) -> None:
        self.events.append(f"backward {loss.item():g}")
        loss.backward()

    @contextmanager
    def context(self):
        self.events.append("enter")
        yield
        self.events.append("exit")


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_one_part_after_the_other_with_the_factors_of_the_first(factor):
    objective = Objective()
    micro_batches = MicroBatches([1.0, 2.0, 4.0], objective)
    loss = micro_batches.forward() * factor
    micro_batches.backward(loss, objective.backward, objective.context)
    assert objective.weight.grad == 7 * factor
    assert objective.events == [
        *("forward 1", f"backward {factor:g}"),
        *("enter", "forward 2", "exit", f"backward {2 * factor:g}"),
        *("enter", "forward 4", "exit", f"backward {4 * factor:g}"),
    ]


def test_the_last_part_after_both_passes_of_the_others():
    objective = Objective()
    micro_batches = MicroBatches([1.0, 2.0, 4.0], objective)
    loss = micro_batches.forward_last(8.0, objective.backward, objective.context)
    assert objective.weight.grad == (1 + 2) * 8
    micro_batches.backward(8 * loss, objective.backward, objective.context)
    assert objective.weight.grad == 7 * 8
    assert objective.events == [
        *("forward 1", "enter", "backward 8", "exit"),
        *("forward 2", "enter", "backward 16", "exit"),
        *("forward 4", "backward 32"),
    ]


def test_another_factor_than_that_of_the_other_parts_is_refused():
    micro_batches = MicroBatches([1.0, 2.0], Objective())
    loss = micro_batches.forward_last(0.5)
    with pytest.raises(ValueError, match=r"overridden `training_step` .* without a factor.* but got another factor, 6"):
        micro_batches.backward(3 * loss)


def test_one_part():
    objective = Objective()
    micro_batches = MicroBatches([3.0], objective)
    micro_batches.backward(micro_batches.forward(), objective.backward, objective.context)
    assert objective.weight.grad == 3
    assert objective.events == ["forward 3", "backward 3"]


def test_each_pass_runs_once():
    micro_batches = MicroBatches([3.0], Objective())
    with pytest.raises(RuntimeError, match="`forward` to be called before `backward`"):
        micro_batches.backward(torch.ones(()))
    micro_batches.backward(micro_batches.forward())
    with pytest.raises(RuntimeError, match="`forward` to be called before `backward`"):
        micro_batches.backward(torch.ones(()))


def test_no_part_at_all_is_refused():
    with pytest.raises(ValueError, match="`parts` to hold at least one micro-batch, but got none"):
        MicroBatches([], Objective())
