"""Measures training steps on the CPU: run by test_planning.py in its own process, or on two processes as a program.

python -m tests.planning.real_run FOLDER OPTIONS

OPTIONS is a JSON list of options of `Run`. Writes FOLDER/RANK, a JSON list of what `measured` returned for each.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_did import LitDPO
from lit_did.modules.gradients import local
from lit_did.planning import Run
from lit_did.planning.counting import WEIGHTS, TensorBytes
from lit_did.planning.step import pairs_of
from tests.processes import run_ranks

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
RUN: dict[str, Any] = {"tokens": 1024, "length": 128, "prompt_length": 32, "precision": "32-true"}
MARK = 77_777  # bytes that nothing else allocates


class _SecondStep(lightning.Callback):
    """Marks the second step, in which the optimiser has its states, and counts the bytes of tensors in it."""

    def __init__(self) -> None:
        self.before = _alive()  # of earlier runs

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            torch.empty(MARK, dtype=torch.uint8)
            self.counted = TensorBytes()
            self.counted.claim(_alive(self.before), WEIGHTS)
            self.counted.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.counted.__exit__(None, None, None)


def _alive(without: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """Tensors with a storage of their own, apart from those that share one with `without`."""
    gc.collect()
    found = [value for value in gc.get_objects() if isinstance(value, torch.Tensor) and not value.is_meta]
    # An earlier test of the same process may have left tensors of torch.func, which have no storage.
    without_storage = torch._C._functorch.is_functorch_wrapped_tensor
    plain = [tensor for tensor in found if not isinstance(tensor, DTensor) and not without_storage(tensor)]
    left_out = {tensor.untyped_storage()._cdata for tensor in without}
    return [tensor for tensor in plain if tensor.untyped_storage()._cdata not in left_out]


def measured(config: LlamaConfig, run: Run) -> dict[str, int]:
    """The peak of all that torch's allocator gave out in a second step of LitDPO, and the bytes of what stays."""
    lora = {"r": run.lora, "target_modules": "all-linear"} if run.lora else None
    second = _SecondStep()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.manual_seed(0)
        module = LitDPO(
            AutoModelForCausalLM.from_config(config, dtype=run.weights_dtype()),
            lora=lora,
            loss="simpo" if run.reference_free else "sigmoid",
            micro_batch_tokens=run.tokens,
            gradient_checkpointing=run.gradient_checkpointing,
            recompute_elementwise=run.recompute_elementwise,
        )
        batch = pairs_of(dataclasses.replace(run, tokens=run.tokens * run.micro_batches), config.vocab_size)
        sharding = ModelParallelStrategy(run.data_parallel, run.tensor_parallel)
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            devices=run.gpus,
            strategy="auto" if run.gpus == 1 else "ddp" if run.replicated else sharding,
            precision=run.precision,
            use_distributed_sampler=False,
            barebones=True,
            callbacks=[second],
        )
        trainer.fit(module, DataLoader([batch] * 2, batch_size=None))
        (optimizer,) = trainer.optimizers
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak, marked = 0, 0, False
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        marked = marked or size == MARK
        peak = max(peak, now) if marked else 0
    states = [value for state in optimizer.state.values() for value in state.values()]
    weights = [*module.policy.parameters(), *module.policy.buffers()]
    storages = {(s := local(w.detach()).untyped_storage()).data_ptr(): s.nbytes() for w in weights}
    return {
        "allocated": peak,
        "tensors": max(peak.total for peak in second.counted.peaks.values()),
        "weights": sum(storages.values()),
        "optimizer": sum(local(state).untyped_storage().nbytes() for state in states),
    }


def work(folder: Path, cases: list[dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")
    found = [measured(LlamaConfig(**CONFIG), Run(**RUN | options)) for options in cases]
    (folder / str(torch.distributed.get_rank())).write_text(json.dumps(found))


if __name__ == "__main__":
    run_ranks(2, work, Path(sys.argv[1]), json.loads(sys.argv[2]))
