"""Starts training in ways that two processes cannot train right: run by test_strategies.py.

python -m tests.modules.refusals FOLDER

Writes FOLDER/RANK.json: of each way the error, or None and a number that stands for the trained weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed import get_rank
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from lit_did import LitDPO
from tests.modules.tiny import loader, make_pairs, tiny_gpt2, tiny_llama, trainer
from tests.processes import run_ranks

LORA = {"r": 4, "target_modules": "all-linear"}


class HalfSharded(LitDPO):
    """Shards a layer and forgets the rest."""

    def configure_model(self) -> None:
        if self._trainer is not None:
            fully_shard(self.policy.model.layers[0], mesh=self.device_mesh["data_parallel"])
        super().configure_model()


def ways(folder: Path) -> dict:
    tp = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}
    fsdp = {"distributed_config": DistributedConfig(fsdp_size=2)}
    return {
        "one layer sharded": (lambda: HalfSharded(tiny_llama()), data_parallel),
        "an adapter and tensor parallelism": (lambda: LitDPO(folder, lora=LORA), tensor_parallel),
        "an adapter of embeddings": (
            lambda: LitDPO(folder, lora={**LORA, "target_modules": ["embed_tokens"]}),
            data_parallel,
        ),
        "tensor parallelism with two batches": (lambda: LitDPO(folder, model_kwargs=tp), data_parallel),
        "shards under DDP": (lambda: LitDPO(folder, lora=LORA, model_kwargs=fsdp), DDPStrategy),
        "a sharded module to copy": (
            lambda: LitDPO(AutoModelForCausalLM.from_pretrained(folder, **tp)),
            tensor_parallel,
        ),
        "other weights on the other process": (lambda: LitDPO(tiny_llama(seed=get_rank())), data_parallel),
        "tied embeddings in uneven shards": (lambda: LitDPO(tiny_llama(tie_word_embeddings=True)), data_parallel),
        "layers without a plan": (lambda: LitDPO(tiny_gpt2(vocab_size=68)), data_parallel),
        "a policy on the CPU": (lambda: LitDPO(folder, model_kwargs=on_cpu(True)), data_parallel),
        "no reference to keep on the CPU": (
            lambda: LitDPO(folder, lora=LORA, model_kwargs=on_cpu("reference")),
            data_parallel,
        ),
        "a reference on the CPU in one shard": (
            lambda: LitDPO(folder, model_kwargs=on_cpu("reference")),
            tensor_parallel,
        ),
        "a cached reference": (lambda: LitDPO(folder, cache_reference=folder / "cache"), data_parallel),
        "a cached object": (
            lambda: LitDPO(
                tiny_llama(), tiny_llama(1), cache_reference=folder / "cache", cache_kind="logprobs", learning_rate=1e-2
            ),
            data_parallel,
        ),
        "tensor parallelism": (lambda: LitDPO(folder, learning_rate=1e-2), tensor_parallel),
        "FSDP 2": (lambda: LitDPO(folder, learning_rate=1e-2), data_parallel),
        "FSDP 2 with settings": (lambda: LitDPO(folder, learning_rate=1e-2, model_kwargs=fsdp), data_parallel),
    }


def on_cpu(offload: bool | str) -> dict:
    return {"distributed_config": {"fsdp_cpu_offload": offload}}


def data_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def tensor_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)


def weights(module: LitDPO) -> float:
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in module.policy.parameters())
    return sum(p.double().abs().sum().item() for p in whole)


def main(folder: Path) -> None:
    results = {}
    for name, (make, strategy) in ways(folder).items():
        run = trainer(devices=2, strategy=strategy(), max_epochs=2)
        weighed = []
        try:
            module = make()
            module.on_train_end = lambda module=module, weighed=weighed: weighed.append(weights(module))
            run.fit(module, loader(make_pairs(4), 4 if strategy is tensor_parallel else 2))
            results[name] = [None, weighed[0]]
        except ValueError as error:
            results[name] = [str(error), None]
    (folder / f"{run.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_ranks(2, main, Path(sys.argv[1]))
