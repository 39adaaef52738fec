"""The linear statistics on several gloo processes, each with a slice of the vocabulary: run by its test.

python -m tests.ops.vocabulary_parallel PROCESSES FOLDER
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist

from lit_did import linear_sequence_statistics
from tests.ops.linear_cases import TOKENS, VOCABULARY, Case, gradients, linear, make_case
from tests.processes import run_ranks

# Where the slices begin and end, by the number of processes.
BOUNDS = {2: (0, 700, VOCABULARY), 3: (0, 1, 900, VOCABULARY)}


def padded() -> Case:
    """The third process's slice, and some of the second's, are padding."""
    case = make_case(torch.float64, bias=True)
    case.labels %= 800
    for side in ("policy", "reference"):
        case.tensors[f"{side}_bias"].data[800:] = -torch.inf
    return case


def ignored() -> Case:
    case = make_case(torch.float64)
    case.labels[[0, 3]] = -100
    return case


def frozen() -> Case:
    case = make_case(torch.float32)
    for name in ("policy_weight", "reference_hidden", "reference_weight"):
        case.tensors[name].requires_grad_(False)
    return case


def nothing() -> Case:
    case = make_case(torch.float64)
    case.labels[:] = -100
    return case


CASES = {
    "float64": lambda: make_case(torch.float64, bias=True, softcap=(5.0, None), scale=(1.0, 0.5), temperature=1.3),
    "float32": make_case,
    "bfloat16": lambda: make_case(torch.bfloat16),
    "padded": padded,
    "ignored": ignored,
    "frozen": frozen,
    "nothing": nothing,
}
OPTIONS = {"whole": {}, "blocks": {"max_extra_bytes": 60_000, "chunk_tokens": 4}}


def shard(inputs: dict[str, torch.Tensor | None], begin: int, end: int) -> dict[str, torch.Tensor | None]:
    """This process's: leaves of its own, all of the hidden states and a slice of weights and biases."""
    return {
        name: value
        if value is None
        else (value if name.endswith("hidden") else value[begin:end])
        .detach()
        .clone()
        .requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


def refusals(inputs: dict[str, torch.Tensor | None], case: Case, group: dist.ProcessGroup) -> dict[str, str]:
    """What is said where one process passes something else."""
    spoiled = dist.get_rank(group) == 1
    shorter = {"reference_weight": inputs["reference_weight"][:-1]}
    fewer, beyond, none, negative = (copy.copy(case) for _ in range(4))
    negative.labels = case.labels.index_fill(0, torch.tensor([0]), -1)
    fewer.labels = case.labels.index_fill(0, torch.tensor([0]), -100)
    beyond.labels = case.labels.index_fill(0, torch.tensor([0]), 9999)
    none.labels = None
    other = {
        "slice": (case, inputs | shorter, {}),
        "labels": (fewer, inputs, {}),
        "shape": (case, inputs | {"policy_weight": inputs["policy_weight"][0]}, {}),
        "type": (case, dict.fromkeys(inputs), {}),
        "option": (case, inputs, {"max_extra_bytes": 0}),
        "memory": (case, inputs, {"max_extra_bytes": 16}),
        "label": (beyond, inputs, {}),
        "device": (case, inputs | {"policy_hidden": inputs["policy_hidden"].to("meta")}, {}),
        "no labels": (none, inputs, {}),
        "negative, all": (negative, inputs, {}),
    }
    said = {}
    for name, given in other.items():
        passed, tensors, options = given if spoiled or name.endswith("all") else (case, inputs, {})
        try:
            linear(passed, tensors, process_group=group, **options)
            said[name] = "nothing"
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    return said


def work(folder: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    calls = []
    gather, reduce = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda *args, **kwargs: (calls.append(tuple(args[1].shape)), gather(*args, **kwargs))[1]
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args[0].dtype), reduce(*args, **kwargs))[1]
    begin, end = BOUNDS[processes][rank : rank + 2]
    results = {}
    for name, make in CASES.items():
        for cuts, options in OPTIONS.items():
            case = make()
            inputs = shard(case.tensors, begin, end)
            calls.clear()
            statistics = linear(case, inputs, process_group=group, **options)
            results[name, cuts] = statistics._asdict(), gradients(case, statistics, inputs), list(calls)
    case = make_case(torch.float64)
    tensors = shard(case.tensors, begin, end)
    arguments = [value for value in tensors.values() if value is not None]
    offsets = torch.tensor([0, 4, TOKENS])
    results["sequences"] = linear_sequence_statistics(
        *arguments, case.labels, cu_seqlens=offsets, process_group=group
    )._asdict()
    results["refusals"] = refusals(tensors, case, group)
    try:
        given = torch.tensor([0, 3, 7]) if rank == 1 else offsets
        linear_sequence_statistics(*arguments, case.labels, cu_seqlens=given, process_group=group)
    except ValueError as error:
        results["refusals"]["offsets"] = str(error)
    # The group is not that of all processes, and its ranks are others.
    if rank > 0:
        others = dist.new_group(list(range(1, processes)), use_local_synchronization=True)
        part = shard(case.tensors, *((0, VOCABULARY) if processes == 2 else ((0, 900), (900, VOCABULARY))[rank - 1]))
        results["subgroup"] = linear(case, part, process_group=others)._asdict()
    torch.save(results, f"{folder}/{rank}")


if __name__ == "__main__":
    run_ranks(int(sys.argv[1]), work, sys.argv[2])
