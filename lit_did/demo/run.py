"""The demo's run: load, measure the held-out pairs, train and measure them again, show the difference."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_did.cli.errors import InputError
from lit_did.cli.output import make_parent
from lit_did.data import PreferenceDataModule, read_pairs
from lit_did.demo.held_out import HeldOut, print_table
from lit_did.demo.pictures import held_out_picture, training_picture
from lit_did.demo.progress import OneLineProgress
from lit_did.exporting.export import check_new, export_module
from lit_did.models.loading import load_model
from lit_did.models.names import load_tokenizer
from lit_did.modules import LitDPO, PairStatistics


class MeasuredDPO(LitDPO):
    """LitDPO that keeps the statistics of every held-out pair, each time that they are measured."""

    measured: list[tuple[int, list[PairStatistics]]]
    """(optimiser steps done, the batches' statistics); the run begins it."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.measured.append((self.trainer.global_step, []))

    def pair_statistics(self, batch: Mapping[str, Tensor]) -> PairStatistics:
        pairs = super().pair_statistics(batch)
        self.measured[-1][1].append(pairs)
        return pairs


def run(options: argparse.Namespace) -> int:
    """Trains and writes `metrics.csv`, `training.png` and `held_out.png` into `options.output`.

    With `options.save` it also saves the policy there.

    Raises:
        InputError: The data, the model or a folder cannot be used. Nothing is written then.
    """
    begun = time.perf_counter()
    try:
        make_parent(options.output)
        if options.save is not None:
            make_parent(options.save, "--save")
            check_new(options.save, argument="--save")
        rows = read_pairs(options.data)[: options.max_pairs]
        tokenizer, model = load_tokenizer(options.model, "--model"), load_model(options.model, "--model", {})
        _check_context(model, options.max_length)
        data = PreferenceDataModule(
            # The file itself where all of it is used: errors in tokenising then name its lines.
            options.data if options.max_pairs is None else [_fields(row.pair) for row in rows],
            tokenizer,
            val_fraction=options.val_fraction,
            batch_size=options.batch_size,
            max_length=options.max_length,
            as_chat=tokenizer.chat_template is not None,
            seed=options.seed,
        )
        data.setup("fit")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(error) from error
    assert data.train_dataset is not None
    assert data.val_dataset is not None
    # A pair's number in what the data module was given: the file, or the list of the first rows.
    numbers = (row.index for row in rows) if options.max_pairs is None else range(len(rows))
    tags = {number: row.pair.tag or "all pairs" for number, row in zip(numbers, rows, strict=True)}
    print(
        f"{len(data.train_dataset)} pairs to train on, {len(data.val_dataset)} held out, from {options.data.name}; "
        f"model {options.model}"
    )

    lightning.seed_everything(options.seed, verbose=False)
    module = MeasuredDPO(
        model,
        beta=options.beta,
        loss=options.loss,
        lora={"r": options.lora_rank, "lora_alpha": 2 * options.lora_rank, "target_modules": "all-linear"},
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        schedule="linear",
    )
    module.measured = []
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".lit_did_demo_") as work:
        trainer = lightning.Trainer(
            accelerator="cpu" if not torch.cuda.is_available() else "auto",
            devices=1,
            max_steps=options.max_steps,
            max_epochs=math.ceil(options.max_steps * options.accumulate * options.batch_size / len(data.train_dataset)),
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=1.0,
            val_check_interval=(options.val_every or math.ceil(options.max_steps / 4)) * options.accumulate,  # batches
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=CSVLogger(work, name="", version=""),
            callbacks=None if options.quiet else OneLineProgress(),
            enable_progress_bar=not options.quiet,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        if module.measured[-1][0] < options.max_steps:
            trainer.validate(module, data, verbose=False)
        measured = [HeldOut.collect(step, batches, tags) for step, batches in module.measured]
        written = _write(Path(work), options.output, measured)
        if options.save is not None:
            saved = export_module(module, options.save, tokenizer=tokenizer)
    print_table(measured[0], measured[-1])
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    if options.save is not None:
        print(saved.describe())
    print(f"{options.max_steps} steps; {time.perf_counter() - begun:.0f} s in all.")
    return 0


def _fields(pair: Any) -> dict[str, Any]:
    return {name: value for name, value in pair._asdict().items() if value is not None}


def _check_context(model: Any, max_length: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise InputError(f"Expected --max-length to be within the model's {context} positions, but got {max_length}.")


def _write(work: Path, output: Path, measured: list[HeldOut]) -> list[Path]:
    training_picture(work / "metrics.csv", measured, work / "training.png")
    held_out_picture(measured, work / "held_out.png")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("metrics.csv", "training.png", "held_out.png"):
        written.append(output / name)
        shutil.move(work / name, written[-1])
    return written
