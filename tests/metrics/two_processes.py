"""Every metric on several gloo processes: run by test_two_processes.py.

python -m tests.metrics.two_processes PROCESSES FILE
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from lit_did.metrics import DIDEntropy, DIDMetrics, PowerLawExponent
from tests.metrics import samples
from tests.metrics.oracle import make_batches
from tests.metrics.test_metrics import CASES, make
from tests.processes import run_ranks


def batches_of(rank: int, processes: int) -> list:
    """Dealt in turn: with two processes, 3 and 2 batches of uneven sizes."""
    return make_batches(sizes=(3, 1, 4, 2, 5))[rank::processes]


def counted(exchanges: list[str], function: Callable, *args, **kwargs):
    exchanges.append(function.__name__)
    return function(*args, **kwargs)


def work(path: str) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    exchanges = []
    for name in ("all_gather", "all_reduce", "barrier"):
        function = getattr(dist, name)
        setattr(dist, name, functools.partial(counted, exchanges, function))
    results = {}
    for name in CASES:
        metric = make(name)
        for batch in batches_of(rank, processes):
            metric.update(*batch)
        results[name] = [metric.compute().item()]
        local = [state.clone() for state in metric.metric_state.values()]
        metric.update(*batches_of(rank, processes)[0])  # goes on from the local state, not from the sum over processes
        assert all(new.sum() != old.sum() for new, old in zip(metric.metric_state.values(), local, strict=True))
        results[name].append(metric.compute().item())
    collection = DIDMetrics(beta=0.7, num_bins=4)
    for batch in batches_of(rank, processes):
        collection.update(*batch)
    exchanges.clear()
    results["collection"] = {name: value.item() for name, value in collection.compute().items()}
    results["exchanges"] = exchanges.copy()
    collection.update(*batches_of(rank, processes)[0])
    results["collection again"] = {name: value.item() for name, value in collection.compute().items()}
    on_step = DIDMetrics(beta=0.7, num_bins=4, dist_sync_on_step=True)
    results["on step"] = {name: value.item() for name, value in on_step(*batches_of(rank, processes)[0]).items()}
    apart = DIDMetrics(beta=0.7, num_bins=4, sync_on_compute=False)
    apart.update(*batches_of(rank, processes)[0])
    results["apart"] = {name: value.item() for name, value in apart.compute().items()}
    late = DIDMetrics(beta=0.7, num_bins=4)
    if rank == 0:  # a process that saw nothing takes part all the same
        late.update(*batches_of(rank, processes)[0])
    results["late"] = {name: value.item() for name, value in late.compute().items()}
    if rank == 0:  # and one that computed before another saw more
        late.update(*batches_of(rank, processes)[1])
    results["later"] = {name: value.item() for name, value in late.compute().items()}
    results["power law"] = []
    for with_prompts in (False, True):
        exponent = PowerLawExponent()
        for batch in samples.log_ratios(with_prompts)[rank::processes]:
            exponent.update(*batch)
            results["power law"].append(exponent.compute())
    idle = PowerLawExponent()
    if rank == 0:
        idle.update(*samples.log_ratios(True)[2])
    results["power law of one process"] = idle.compute()
    entropy = DIDEntropy()
    if rank == 1:  # the other has no samples yet
        entropy.update(**samples.completions())
    results["entropy of one process"] = [entropy.estimates(), entropy.compute()]
    entropy.reset()
    for batch in samples.batches_of(samples.completions())[rank::processes]:
        entropy.update(**batch)
    results["entropy"] = [entropy.estimates(), entropy.compute(), entropy.estimates()]
    torch.save(results, f"{path}.{rank}")


if __name__ == "__main__":
    run_ranks(int(sys.argv[1]), work, sys.argv[2])
