"""LitDPO under `ddp_fork`, which `ddp_notebook` is too, and under `ddp_spawn`: run as a program of its own.

A process whose OpenMP threads have worked may not fork, and pytest's have.
"""

from __future__ import annotations

import sys

import torch

from lit_did import LitDPO
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer

LORA = {"r": 2, "target_modules": "all-linear"}


def main(folder: str) -> None:
    """A policy given by name has what another process trained, as if this one had."""
    torch.set_num_threads(1)
    tiny_llama().save_pretrained(folder)
    weights = []
    for strategy in ("ddp_fork", "ddp_spawn", "auto"):
        torch.manual_seed(5)
        module = LitDPO(folder, lora=LORA, learning_rate=1e-2)
        trainer(max_epochs=1, strategy=strategy).fit(module, loader(make_pairs(4), 2))
        assert module.policy is not None
        weights.append({name: p for name, p in module.policy.named_parameters() if "lora_" in name})
    for mine in weights[:2]:
        for name, weight in weights[2].items():
            torch.testing.assert_close(mine[name], weight, atol=1e-5, rtol=1e-4)
    assert max(p.abs().max() for name, p in weights[0].items() if "lora_B" in name) > 1e-3  # the premise


if __name__ == "__main__":
    main(sys.argv[1])
