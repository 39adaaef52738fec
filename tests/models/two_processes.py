"""Two processes measure different numbers of pairs with sharded models: run by test_two_processes.py.

python -m tests.models.two_processes
"""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from lit_did import PolicyAndReference
from tests.modules.tiny import collate, make_pairs, tiny_llama
from tests.processes import run_ranks


def main() -> None:
    sharded, whole = (PolicyAndReference(tiny_llama(0), tiny_llama(1)) for _ in range(2))
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    layers = [layer for model in (sharded.policy, sharded.reference) for layer in model.model.layers]
    for part in (*layers, sharded.policy, sharded.reference, sharded):
        fully_shard(part, mesh=mesh)
    sequences = sharded.read(collate(make_pairs(1 + 2 * distributed.get_rank())))
    measured = sharded.measure(sequences, temperature=2.0, max_logits_bytes=1)  # one sequence at a time
    for one, other in zip(measured, whole.measure(sequences, temperature=2.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    run_ranks(2, main)
