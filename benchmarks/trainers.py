"""The runs that the step's benchmark compares: TRL's DPOTrainer and LitDPO on the same tokens with the same optimiser.

A run is one process. It measures seconds and loss of every step, and the peak resident memory after set-up.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from benchmarks import memory
from lit_did import LitDPO, PreferenceDataModule
from lit_did.data import read_pairs

BETA = 0.1
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}  # the demo's


@dataclass(frozen=True)
class Task:
    """What every trainer gets."""

    model: str
    pairs: str
    """A JSON Lines file of preference pairs."""
    steps: int
    batch_size: int
    """Pairs a step."""
    max_length: int
    """The most tokens of a prompt and its completion together."""
    learning_rate: float
    dtype: str
    """float32, or the dtype of autocast. The weights are float32."""
    lora: bool
    folder: str
    """For the files that a run writes. The runs of a contestant share it."""

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def policy(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def data(self) -> PreferenceDataModule:
        """The first steps * batch_size pairs in the file's order."""
        tokenizer = self.tokenizer()
        rows = [row.pair._asdict() for row in read_pairs(self.pairs)[: self.steps * self.batch_size]]
        if len(rows) < self.steps * self.batch_size:
            raise ValueError(
                f"Expected `pairs` to hold {self.steps} steps of {self.batch_size} pairs, but got {len(rows)}."
            )
        return PreferenceDataModule(
            rows,
            tokenizer,
            batch_size=self.batch_size,
            max_length=self.max_length,
            shuffle=False,
        )


@dataclass
class Run:
    """What was measured, one entry for each step."""

    seconds: list[float]
    """From the end of the step before to the end of this one. The first counts from the start of training."""
    cpu_seconds: list[float]
    """The same for the process's threads together. Other work on the machine affects it less."""
    losses: list[float]
    tokens: list[str]
    """A digest of the step's sequences: their ids, and how many of them are the completion's."""
    completion_tokens: list[int]
    real_tokens: list[int]
    padded_tokens: list[int]
    """All tokens of the batch, with padding."""
    setup_seconds: float
    """From the call that trains (or prepares for it) to the first step. It includes a cache of the reference."""
    peak_mib: float
    """Resident, in all."""


class Recorder:
    """Measures a run. A trainer's callback calls `start`, `batch` and `step`."""

    def __init__(self) -> None:
        self.run = Run([], [], [], [], [], [], [], setup_seconds=0.0, peak_mib=0.0)
        self._clock = self._now()

    def start(self) -> None:
        """Ends set-up. Memory that set-up used for a moment does not count."""
        self.run.setup_seconds, _ = self._lap()
        memory.reset_peak()
        self._lap()

    def batch(self, batch: Mapping[str, Tensor], loss: Tensor) -> None:
        sequences = list(_sequences(batch))
        text = repr(sequences).encode()
        self.run.losses.append(loss.item())
        self.run.tokens.append(blake2b(text, digest_size=8).hexdigest())
        self.run.completion_tokens.append(sum(completion for _, completion in sequences))
        self.run.real_tokens.append(sum(len(ids) for ids, _ in sequences))
        self.run.padded_tokens.append(batch["input_ids"].numel())

    def step(self) -> None:
        for times, seconds in zip((self.run.seconds, self.run.cpu_seconds), self._lap(), strict=True):
            times.append(seconds)

    def finish(self) -> Run:
        self.run.peak_mib = memory.highest() / 2**20
        return self.run

    def _lap(self) -> tuple[float, float]:
        before, self._clock = self._clock, self._now()
        return self._clock[0] - before[0], self._clock[1] - before[1]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def _sequences(batch: Mapping[str, Tensor]) -> Iterator[tuple[list[int], int]]:
    """The token ids of every sequence of a batch, and how many of them, at its end, are the completion's."""
    completion = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != -100
    if "cu_seqlens" in batch:
        ends = batch["cu_seqlens"].tolist()
        for start, end in pairwise(ends):
            yield batch["input_ids"][0, start:end].tolist(), int(completion[0, start:end].sum())
        return
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"].bool(), completion, strict=True):
        yield ids[mask].tolist(), int(row.sum())


# ---------------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------------


def trl(task: Task, *, checkpointing: bool = False, precompute: bool = False) -> Run:
    """DPOTrainer with its defaults, except for the task's options and `gradient_checkpointing`."""
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()

    class Recorded(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # They are LitDPO's token ids already.

        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            recorder.batch(inputs, loss.detach())
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.step()

    data = task.data()
    data.setup("fit")
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: getattr(example, name).tolist() for name in names} for example in data.train_dataset]
    policy = task.policy()
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder()
        trainer = Recorded(
            policy,
            args=DPOConfig(
                folder,
                beta=BETA,
                max_length=task.max_length,
                per_device_train_batch_size=task.batch_size,
                max_steps=task.steps,
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,  # no clipping
                train_sampling_strategy="sequential",
                gradient_checkpointing=checkpointing,
                precompute_ref_log_probs=precompute,
                bf16=task.dtype == "bfloat16",
                use_cpu=True,
                dataloader_pin_memory=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=data.tokenizer,
            callbacks=[Steps()],
            peft_config=LoraConfig(**LORA) if task.lora else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return recorder.finish()


# ---------------------------------------------------------------------------------------------------------------------
# LitDPO
# ---------------------------------------------------------------------------------------------------------------------


class Steps(lightning.Callback):
    """Passes LitDPO's steps to a recorder."""

    recorder: Recorder

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == 0:  # LitDPO's own `on_train_start`, which caches the reference, is over
            self.recorder.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # `training_step` may have returned the loss of one micro-batch.
        self.recorder.batch(batch, trainer.callback_metrics["train/loss"])
        self.recorder.step()


def lit_did(task: Task, *, cached: bool = False, callbacks: Sequence[lightning.Callback] = (), **options: Any) -> Run:
    """LitDPO with its defaults except for `options`, logging every step."""
    lightning.seed_everything(0, verbose=False)
    module = LitDPO(
        task.policy(),
        beta=BETA,
        lora=LORA if task.lora else None,
        learning_rate=task.learning_rate,
        cache_reference=Path(task.folder) / "reference" if cached else None,
        **options,
    )
    data = task.data()
    data.setup("fit")
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps()
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision={"float32": "32-true", "bfloat16": "bf16-mixed"}[task.dtype],
            max_steps=task.steps,
            log_every_n_steps=1,
            callbacks=[steps, *callbacks],
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        steps.recorder = Recorder()
        trainer.fit(module, data)
    return steps.recorder.finish()
