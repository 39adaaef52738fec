"""A wrong contestant is refused before it is timed: wrong values, and right values with wrong gradients."""

import pytest
import torch

from benchmarks import memory
from benchmarks.contestants import Contestant, eager, make
from benchmarks.harness import Size, race
from benchmarks.token_statistics import Inputs, Plan

on_linux = pytest.mark.skipif(not memory.MEASURED_ON_CPU, reason="memory is measured on Linux")


def run(function, dtype: torch.dtype = torch.float32, ignored: float = 0.0) -> None:
    contestant = Contestant(function)
    device = torch.device("cpu")
    plan = Plan(device, 16, [512], [dtype], {}, repeats=1, seconds=1, read=None)
    race("table", Inputs(plan, Size(16, 512, dtype, device, ignored)).runners("suspect", contestant), repeats=1)


def with_gradient_of(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The value of one with the gradient of the other."""
    return value.detach() + other - other.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_right_contestant_is_timed(dtype):
    run(eager, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", eager(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=int))._fields)
def test_a_wrong_value_or_gradient_of_any_statistic_is_refused(name, dtype):
    def wrong_value(z, r, y):
        statistics = eager(z, r, y)
        return statistics._replace(**{name: getattr(statistics, name) * 1.1})

    def wrong_gradient(z, r, y):
        statistics = eager(z, r, y)
        value = getattr(statistics, name)
        return statistics._replace(**{name: with_gradient_of(value, 1.2 * value)})

    with pytest.raises(RuntimeError, match=f"suspect is wrong: {name} differs"):
        run(wrong_value, dtype)
    with pytest.raises(RuntimeError, match=r"suspect is wrong: the gradient of the \w+ logits differs"):
        run(wrong_gradient, dtype)


def test_nan_is_refused():
    with pytest.raises(RuntimeError, match="suspect is wrong: kl differs"):
        run(lambda z, r, y: eager(z, r, y)._replace(kl=eager(z, r, y).kl * torch.nan))


def test_a_gradient_in_ignored_rows_is_refused():
    def ignoring(z, r, y, leak):
        statistics = eager(z, r, y.clamp(min=0))
        return type(statistics)(*(torch.where(y >= 0, value, leak * (value - value.detach())) for value in statistics))

    run(lambda z, r, y: ignoring(z, r, y, leak=0), ignored=0.6)
    with pytest.raises(RuntimeError, match="suspect is wrong: the gradient of the policy logits differs"):
        run(lambda z, r, y: ignoring(z, r, y, leak=1), ignored=0.6)


@on_linux
def test_in_place_needs_no_memory_for_gradients_and_leaves_the_inputs():
    device = torch.device("cpu")
    contestants = make(["fused", "fused in place"])
    plan = Plan(device, 64, [16384], [torch.float32], contestants, repeats=2, seconds=1, read=None)
    inputs = Inputs(plan, Size(64, 16384, torch.float32, device))
    before = inputs.policy.clone()
    (in_place,) = inputs.runners("fused in place", contestants["fused in place"])
    results = race("table", [*inputs.runners("fused", contestants["fused"]), in_place], repeats=2)
    peaks = {r.contestant: r.peak_mib for r in results if r.direction == "both"}
    assert peaks["fused"] > 8 - 1
    assert peaks["fused in place"] < 1
    assert inputs.policy.equal(before)
