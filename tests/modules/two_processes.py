"""Trains and validates a module, monitored, on one CPU process and then on two: run by test_two_processes.py.

python -m tests.modules.two_processes KIND FOLDER

Writes FOLDER/PROCESSES.RANK, and checkpoints beside them.
"""

from __future__ import annotations

import functools
import gc
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from lit_did import DIDMonitor, LitDPO, LitDPOPG, SequenceStatistics
from lit_did.callbacks import SampleCompletions
from lit_did.modules.watch import Watch
from tests.modules.test_intervals import random_pairs
from tests.modules.tiny import byte_tokenizer, collate, make_pairs, tiny_llama, trainer
from tests.processes import run_ranks


def of(metrics: dict, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}


def statistics(module: LitDPO, batch: dict[str, torch.Tensor]) -> SequenceStatistics:
    return module(batch)


class Save(lightning.Callback):
    """Writes the trained weights, the validation metrics and every optimiser step's metrics, on each rank."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.steps) < trainer.global_step:
            logged = trainer.logged_metrics | of(trainer.callback_metrics, "did/train/")
            self.steps.append({name: float(value) for name, value in logged.items()})

    def on_train_end(self, trainer, module):  # later, nothing would be distributed any more
        self.parameters = sum(type(value) is torch.nn.Parameter for value in gc.get_objects())

    def on_fit_end(self, trainer, module):
        torch.save(
            {
                "weights": {
                    n: _whole(p.detach()).clone() for n, p in module.policy.named_parameters() if p.requires_grad
                },
                "sharded": sum(isinstance(p, DTensor) for p in module.parameters()),
                "steps": self.steps,
                "parameters": self.parameters,
                "validation": module._validation,
                "val": of(trainer.callback_metrics, "val/") | of(trainer.callback_metrics, "did/val/"),
            },
            f"{self.path}.{trainer.global_rank}",
        )


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Pairs(lightning.LightningDataModule):
    """Fixed pairs, dealt to the ranks in turn: every step sees the same pairs however many ranks there are."""

    def train_dataloader(self) -> DataLoader:
        return self._loader(make_pairs(12), 6 // self.trainer.world_size)

    def val_dataloader(self) -> DataLoader:
        return self._loader(make_pairs(8, seed=1), 4)

    def _loader(self, pairs: list, batch_size: int) -> DataLoader:
        sampler = DistributedSampler(pairs, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(pairs, batch_size, sampler=sampler, collate_fn=collate)


class Exchanges(lightning.Callback):
    """What each batch exchanges through torch.distributed, beside gradients: names of functions, and bytes.

    A batch is counted until the next one begins, or until the epoch ends.
    """

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")
    names += ("broadcast_object_list", "gather", "reduce", "reduce_scatter_tensor", "monitored_barrier", "all_to_all")

    def __init__(self) -> None:
        self.of_batches: list[list[tuple[str, int]]] = []
        self.counts = False
        for name in self.names:
            setattr(dist, name, functools.partial(self._call, getattr(dist, name)))

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        if self.counts:
            sent = next((value for value in arguments if isinstance(value, torch.Tensor)), None)
            self.of_batches[-1].append((function.__name__, 0 if sent is None else sent.nbytes))
        return function(*arguments, **options)

    def on_train_epoch_start(self, trainer, module):
        self.counts = True
        self.of_batches.append([])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.of_batches.append([])

    def on_train_epoch_end(self, trainer, module):
        self.counts = False
        self.of_batches.pop()


class Checkpoints(lightning.Callback):
    """Checkpoints after the first epoch and after the last."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        name = "last" if trainer.current_epoch == trainer.max_epochs - 1 > 0 else "half"
        trainer.save_checkpoint(f"{self.path}.{name}")


def fit(processes: int, kind: str, path: str, *, epochs: int = 2, checkpoint: str | None = None) -> None:
    torch.manual_seed(7)
    sharded = kind.startswith("sharded") and processes > 1
    module = (LitDPOPG if kind == "projected" else LitDPO)(
        tiny_llama(),
        "adapter" if "lora start" in kind else None,
        lora={"r": 4, "target_modules": "all-linear", "init_lora_weights": False} if "lora" in kind else None,
        learning_rate=1e-2,
        weight_decay=0.1,  # two groups of parameters
        adam_eps=1e-3,  # keeps Adam from turning rounding of small gradients into whole steps
        micro_batch_tokens=1,  # a pair at a time
        cache_reference=f"{path}.cache" if kind == "cached" else None,
    )
    accumulate = 2 if kind == "projected" else 1  # its product is of gradients over micro-batches and processes
    run = trainer(
        devices=processes,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint="lora" in kind)
        if sharded
        else "ddp"
        if processes > 1
        else "auto",
        max_epochs=epochs * accumulate,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=path,
        callbacks=[
            DIDMonitor(statistics if kind == "cached" else None, every_n_steps=1),
            Save(path),
            SampleCompletions(
                ["ABC", "A"], every_n_steps=1, tokenizer=byte_tokenizer(), as_chat=False, max_new_tokens=6
            ),
            *[Checkpoints(path)] * kind.startswith("sharded"),
        ],
    )
    run.fit(module, datamodule=Pairs(), ckpt_path=checkpoint)


def count_exchanges(kind: str, path: str) -> None:
    """Trains 12 batches of a pair, two a step, and logs every fourth step."""
    exchanges = Exchanges()
    run = trainer(
        devices=2,
        strategy=ModelParallelStrategy(2, 1) if kind == "sharded" else "ddp",
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=4,
        callbacks=[exchanges],
    )
    torch.manual_seed(7)
    run.fit(LitDPO(tiny_llama(), learning_rate=1e-2), DataLoader(make_pairs(24), 1, collate_fn=collate))
    torch.save(exchanges.of_batches, f"{path}.exchanges.{run.global_rank}")


def watch(path: str) -> None:
    """The second step is bad on one process only, and chosen completions fall at another rate on each."""
    seen, rank, pairs = Watch(), dist.get_rank(), random_pairs(2)
    for step in range(8):
        loss = pairs.loss * (torch.nan if (rank, step) == (1, 1) else 1.0)
        log_ratio = torch.full((2,), -step * (rank + 1.0))
        seen.add(pairs._replace(loss=loss, chosen=pairs.chosen._replace(log_ratio=log_ratio)))
        seen.end_step(step, 0)
    run = SimpleNamespace(lr_scheduler_configs=[], optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])])
    run.precision = "32-true"
    found, error = int(seen.found()), ""
    try:
        seen.check(run)
    except FloatingPointError as raised:
        error = str(raised)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen.warn_if_chosen_fell(2)
    torch.save((found, error, [str(warning.message) for warning in caught]), f"{path}.watch.{rank}")


def main(processes: int, kind: str, folder: Path) -> None:
    path = str(folder / str(processes))
    if processes == 2 and kind in ("full", "sharded"):
        count_exchanges(kind, path)
        watch(path)
    if kind == "cached" and processes == 1:  # two processes with a cache train as one without
        fit(1, "full", path)
    elif processes > 1 and kind == "sharded":  # goes on where one process was
        fit(processes, kind, path, checkpoint=str(folder / "1.half"))
    elif processes > 1 and kind.startswith("sharded lora"):  # goes on where it was, from shards
        fit(processes, kind, path, epochs=1)
        fit(processes, kind, path, checkpoint=f"{path}.half")
    else:
        fit(processes, kind, path)


if __name__ == "__main__":
    for number in (1, 2):
        run_ranks(number, main, number, sys.argv[1], Path(sys.argv[2]))
