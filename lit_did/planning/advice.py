"""What helps if a run does not fit: each switch that it may still turn, with the plan of the run with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lit_did.planning.running import Plan, plan_of
from lit_did.planning.settings import Run

CARDS = (24, 40, 80, 141)
"""the memory of usual GPUs, in GiB"""
USABLE = 0.9
"""The share of a GPU's memory that tensors may take. The rest is for CUDA, NCCL and gaps of the allocator."""
RANK = 16


class Switch(NamedTuple):
    """A change of a run, and the plan of the run with it."""

    name: str
    """what changes, and to what"""
    cost: str
    """what it costs otherwise"""
    trains_the_same: bool
    """whether the trained weights are the same, within rounding of sums"""
    plan: Plan


def fits(peak: int, gigabytes: float) -> bool:
    """Whether a peak fits into a GPU of `gigabytes` GiB, of which tensors may take 90%."""
    return peak <= USABLE * gigabytes * 2**30


def switches(config: Any, run: Run) -> Iterator[Switch]:
    """The switches that a run may turn, each by itself, with their plans.

    Args:
        config: The model's configuration, see `read_config`.
        run: The run.
    """
    for name, cost, trains_the_same, change in _changes(run):
        yield Switch(name, cost, trains_the_same, plan_of(config, replace(run, **change)))


def _changes(run: Run) -> Iterator[tuple[str, str, bool, dict[str, Any]]]:
    if not run.gradient_checkpointing:
        yield "gradient_checkpointing", "time: the policy runs forward twice", True, {"gradient_checkpointing": True}
        if not run.recompute_elementwise:
            yield "recompute_elementwise", "a little time", True, {"recompute_elementwise": True}
    if run.pairs > 1:
        half = run.pairs // 2 * 2 * run.length
        change: dict[str, Any] = {"tokens": half, "micro_batches": 2 * run.micro_batches}
        yield f"micro_batch_tokens={half}", "smaller matrix products", True, change
    if run.replicated:
        yield "ModelParallelStrategy", "time: weights are gathered in each pass", True, {"strategy": "fsdp"}
    if run.sharded:
        yield f"gpus={2 * run.gpus}", "twice the GPUs", True, {"gpus": 2 * run.gpus}
    halves = run.data_parallel % (2 * run.dp_replicate_size) == 0
    if run.sharded and run.lora is None and halves and (run.fsdp_cpu_offload is None or run.data_parallel > 2):
        size = 2 * run.tensor_parallel
        cost = "time: GPUs exchange activations in each layer"
        yield f"tensor_parallel_size={size}", cost, True, {"tensor_parallel": size}
    if run.has_reference_model:
        name = "cache_kind=logprobs" if run.sharded else "cache_reference"
        cost = f"{'no DID in the log' if run.sharded else 'disk'}, and a pass over all pairs at the start"
        yield name, cost, True, {"cached_reference": True, "fsdp_cpu_offload": None}
    if run.has_reference_model and run.sharded and run.data_parallel > 1 and run.fsdp_cpu_offload is None:
        cost = "time: its weights come from the CPU's memory"
        yield "fsdp_cpu_offload=reference", cost, True, {"fsdp_cpu_offload": "reference"}
    if run.has_reference_model and run.weights_dtype(reference=True).itemsize > 2:
        yield "reference_dtype=bfloat16", "the reference is rounded", False, {"reference_dtype": "bfloat16"}
    if run.lora is None and run.tensor_parallel == 1:
        change = {"lora": RANK, "reference_dtype": None, "fsdp_cpu_offload": None}
        yield f"lora={RANK}", "only an adapter is trained", False, change
    elif run.lora is not None and run.weights_dtype().itemsize > 2:
        yield "dtype=bfloat16 (frozen weights)", "they are rounded", False, {"dtype": "bfloat16"}
