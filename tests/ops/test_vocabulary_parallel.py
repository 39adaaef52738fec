"""The linear statistics with a slice of the vocabulary on each of 2 and 3 processes (gloo): as on one process."""

from __future__ import annotations

import gc
import itertools
import re
import sys

import pytest
import torch
import torch.distributed as dist

from lit_did import linear_sequence_statistics
from lit_did.ops.partials import NUM_PARTIALS
from tests.ops.linear_cases import TOKENS, gradients, in_float64, linear, make_case
from tests.ops.vocabulary_parallel import BOUNDS, CASES, OPTIONS
from tests.processes import run_program

# Relative to the largest entry. float32: sums in another order. bfloat16: each tile's share of a gradient is rounded,
# and the tiles differ.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory) -> list[dict]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    run_program(sys.executable, "-m", "tests.ops.vocabulary_parallel", request.param, folder)
    return [torch.load(folder / str(rank)) for rank in range(request.param)]


def assert_close(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (ours.double() - expected.double()).abs().max() if ours.numel() else torch.tensor(0.0)
    assert error <= TOLERANCE[dtype] * expected.abs().max(), error


@pytest.mark.parametrize("cuts", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name, cuts, results):
    case = CASES[name]()
    inputs = case.inputs()
    dtype = case.tensors["policy_hidden"].dtype
    expected = linear(case, inputs, **OPTIONS[cuts])
    for statistics, _, _ in (result[name, cuts] for result in results):
        for field, value in statistics.items():
            right = getattr(expected, field)
            assert value.dtype == right.dtype
            assert_close(value, right, right.dtype)
            assert torch.equal(value, results[0][name, cuts][0][field])  # the same bits everywhere
    bounds = BOUNDS[len(results)]
    for key, grad in gradients(case, expected, inputs).items():
        for rank, result in enumerate(results):
            right = grad if key.endswith("hidden") else grad[bounds[rank] : bounds[rank + 1]]
            ours = result[name, cuts][1][key]
            assert ours.shape == right.shape
            assert (ours.double() - right.double()).abs().max() <= TOLERANCE[dtype] * grad.abs().max()


@pytest.mark.parametrize("name", ["float64", "float32"])
def test_as_float64(name, results):
    case = CASES[name]()
    inputs = case.inputs(torch.float64)
    expected = in_float64(case, inputs)
    for field, value in results[0][name, "whole"][0].items():
        assert_close(value, getattr(expected, field), value.dtype)
    for key, grad in gradients(case, expected, inputs).items():
        ours = [result[name, "whole"][1][key] for result in results]
        assert_close(ours[0] if key.endswith("hidden") else torch.cat(ours), grad, ours[0].dtype)


def test_collectives(results):
    """One message between the hosts; a few numbers a token; and hidden states' gradients, in float32 at least."""
    for result in results:
        for cuts in OPTIONS:
            forward = [(6,), (TOKENS, NUM_PARTIALS)]
            assert result["float32", cuts][2] == [*forward, torch.float32, torch.float32]
            assert result["bfloat16", cuts][2] == [*forward, torch.float32, torch.float32]
            assert result["float64", cuts][2] == [*forward, torch.float64, torch.float64]
            assert result["frozen", cuts][2] == [*forward, torch.float32]
            assert result["nothing", cuts][2] == [(6,)]


def test_sequences(results):
    case = make_case(torch.float64)
    arguments = [value for value in case.tensors.values() if value is not None]
    expected = linear_sequence_statistics(*arguments, case.labels, cu_seqlens=torch.tensor([0, 4, TOKENS]))
    for result in results:
        for field, value in result["sequences"].items():
            assert_close(value, getattr(expected, field), torch.float64)


def test_a_group_of_some(results):
    case = make_case(torch.float64)
    expected = linear(case, case.inputs())
    for result in results[1:]:
        for field, value in result["subgroup"].items():
            assert_close(value, getattr(expected, field), torch.float64)


def test_slices_that_differ_are_refused(results):
    """By every process, in the same words: none waits for another."""
    bounds = BOUNDS[len(results)]
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    shorter = [size - (rank == 1) for rank, size in enumerate(sizes)]
    expected = (
        f"Expected `reference_weight` to have the slices of `policy_weight`, of {', '.join(map(str, sizes))} entries a "
        f"process, but got {', '.join(map(str, shorter))}."
    )
    assert [result["refusals"]["slice"] for result in results] == [expected] * len(results)


def test_labels_that_differ_are_refused(results):
    for spoiled, fewer, largest in (("labels", 1, "[0-9]+"), ("label", 0, "9999")):
        counts = ", ".join(str(TOKENS - fewer * (rank == 1)) for rank in range(len(results)))
        expected = (
            rf"Expected `labels` to be the same on all .*, but got {counts} tokens .*, the largest \d+, {largest}"
        )
        assert all(re.match(expected, result["refusals"][spoiled]) for result in results)


def test_what_all_processes_refuse_each_says_itself(results):
    for result in results:
        assert re.match(r"Expected `labels` to be in .*, but got -1 at row 0", result["refusals"]["negative, all"])


@pytest.mark.parametrize(
    ("spoiled", "own"),
    [
        ("shape", "`policy_weight`"),
        ("type", "`policy_hidden`"),
        ("option", "`max_extra_bytes`"),
        ("memory", "`max_extra_bytes`"),
        ("device", "`policy_hidden` on the device of `labels`"),
        ("no labels", "`labels`"),
        ("offsets", "`cu_seqlens`"),
    ],
)
def test_what_one_process_refuses_all_refuse(spoiled, own, results):
    for rank, result in enumerate(results):
        expected = f"Expected {own}" if rank == 1 else "Expected all processes .* but rank 1 of the group refused"
        assert re.match(expected, result["refusals"][spoiled])


def test_the_group_on_the_cpu_is_destroyed_with_the_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        linear(make_case(), make_case().inputs(), process_group=group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        # Where a group of the same processes were left over, torch would take the new one for it and raise.
        linear(make_case(), make_case().inputs(), process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_a_group_of_another_type_and_the_reference_backend_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Expected `process_group` to be a ProcessGroup or None, but got 'world'"):
        linear(make_case(), make_case().inputs(), process_group="world")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="Expected `backend` to be fused with `process_group`, but the reference"):
            linear(make_case(), make_case().inputs(), backend="reference", process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
