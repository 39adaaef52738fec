"""The runs that the step's benchmark compares: TRL's DPOTrainer and LitDPO, each on the same tokens with one optimiser.

A run is one process's: seconds and loss of every step, and the highest resident memory after set-up.
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
    """What every trainer is given."""

    model: str
    pairs: str
    """a JSON Lines file of preference pairs"""
    steps: int
    batch_size: int
    """pairs a step"""
    max_length: int
    """tokens of a prompt and its completion, at most"""
    learning_rate: float
    dtype: str
    """float32, or what autocast computes in; the weights are float32"""
    lora: bool
    folder: str
    """for what a run writes: a contestant's runs share it"""

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
    """What was measured: a line a step."""

    seconds: list[float]
    """from the end of the step before to the end of this one; of the first, from the start of training"""
    cpu_seconds: list[float]
    """the same of the process's threads together: what others do on the machine blurs it less"""
    losses: list[float]
    tokens: list[str]
    """a digest of the step's sequences: their ids, and how many of them are the completion's"""
    completion_tokens: list[int]
    real_tokens: list[int]
    padded_tokens: list[int]
    """in all, as the batch comes"""
    setup_seconds: float
    """from the call that trains (or prepares for it) to the first step: a cache of the reference is made there"""
    peak_mib: float
    """resident, in all"""


class Recorder:
    """Told of a run's start and steps, it measures."""

    def __init__(self) -> None:
        self.run = Run([], [], [], [], [], [], [], setup_seconds=0.0, peak_mib=0.0)
        self._clock = self._now()

    def start(self) -> None:
        """Set-up is over: what it held for a moment does not count."""
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
    """The token ids of every sequence of a batch, and how many of the last of them are its completion."""
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
    """DPOTrainer with its defaults, but for what the task says and `gradient_checkpointing`."""
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()

    class Recorded(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # token ids already: LitDPO's

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
    """Tells a recorder of LitDPO's steps."""

    recorder: Recorder

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == 0:  # LitDPO's own `on_train_start`, which caches the reference, is over
            self.recorder.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not what `training_step` returned: it may be of a part of the batch.
        self.recorder.batch(batch, trainer.callback_metrics["train/loss"])
        self.recorder.step()


def lit_did(task: Task, *, cached: bool = False, callbacks: Sequence[lightning.Callback] = (), **options: Any) -> Run:
    """LitDPO with its defaults but for `options`, logging every step."""
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
