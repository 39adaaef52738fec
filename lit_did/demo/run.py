"""The demo's run: load, measure held-out pairs, train, measure them again, show the difference."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_did.command_line import InputError, make_parent
from lit_did.data import PreferenceDataModule, read_pairs
from lit_did.demo.model import smollm2
from lit_did.modules import LitDPO
from lit_did.report import HeldOut, held_out_picture, print_table, training_picture


def run(options: argparse.Namespace) -> None:
    """Trains and writes `metrics.csv`, `training.png` and `held_out.png` into `options.output`.

    Raises:
        InputError: The data, the model or the output folder cannot be used. Nothing is written then.
    """
    begun = time.perf_counter()
    try:
        make_parent(options.output)
        rows = read_pairs(options.data)[: options.max_pairs]
        tokenizer, model = load_model(options.model)
        _check_context(model, options.max_length)
        data = PreferenceDataModule(
            # The file itself where all of it is used: errors in tokenising then name its lines.
            options.data if options.max_pairs is None else [row.pair._asdict() for row in rows],
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
    # A row's number in what the data module was given: the file, or the list of the first rows.
    numbers = (row.index for row in rows) if options.max_pairs is None else range(len(rows))
    tags = {number: row.pair.tag or "all pairs" for number, row in zip(numbers, rows, strict=True)}
    print(
        f"{len(data.train_dataset)} pairs to train on, {len(data.val_dataset)} held out, "
        f"from {options.data.name}; model {options.model or 'SmolLM2-135M-Instruct'}"
    )

    lightning.seed_everything(options.seed, verbose=False)
    module = LitDPO(
        model,
        beta=options.beta,
        loss=options.loss,
        lora={"r": options.lora_rank, "lora_alpha": 2 * options.lora_rank, "target_modules": "all-linear"},
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        schedule="linear",
    )
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".lit_did_demo_") as work:
        trainer = lightning.Trainer(
            accelerator="cpu" if not torch.cuda.is_available() else "auto",
            devices=1,
            max_steps=options.max_steps,
            max_epochs=math.ceil(options.max_steps * options.accumulate * options.batch_size / len(data.train_dataset)),
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=1.0,
            limit_val_batches=0 if options.val_every is None else 1.0,
            val_check_interval=(options.val_every or 1) * options.accumulate,  # in batches
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=CSVLogger(work, name="", version=""),
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        print("The held-out pairs before training, the training, and the held-out pairs after it:")
        before = _held_out(trainer, module, data, tags)
        if options.val_every is not None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        after = _held_out(trainer, module, data, tags)
        written = _write(Path(work), options.output, before, after)
    print_table(before, after)
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    print(f"{options.max_steps} steps; {time.perf_counter() - begun:.0f} s in all.")


def load_model(name: str | None) -> tuple[Any, Any]:
    """The tokenizer and the model `name`, or SmolLM2-135M-Instruct.

    Raises:
        InputError: It is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = smollm2() if name is None else name
    looks_like_a_path = name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1)
    if name is not None and (looks_like_a_path or os.path.exists(name)):
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"Expected --model to be a folder with a transformers model, but {path} "
                f"{'holds no config.json' if path.is_dir() else 'is not a folder'}."
            )
    local = {"local_files_only": isinstance(path, Path) or not _hub_answers()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        return tokenizer, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **local)
    except Exception as error:  # transformers raises OSError, ValueError, HTTP and JSON errors alike for a bad model
        if isinstance(path, Path):
            raise InputError(f"The model in {path} does not load: {_first_line(error)}") from error
        raise InputError(
            f"Expected --model {name} to be a folder on this machine or a model on the Hugging Face hub, but there is "
            f"no such folder, and the hub gave none: {_first_line(error)}"
        ) from error


def _hub_answers() -> bool:
    """Whether the hub can be reached: without a network, its client tries for most of a minute."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows names that this machine does not
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _held_out(trainer: lightning.Trainer, module: LitDPO, data: PreferenceDataModule, tags: dict[int, str]) -> HeldOut:
    return HeldOut.collect(trainer.predict(module, data), tags)


def _check_context(model: Any, max_length: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise InputError(f"Expected --max-length to be within the model's {context} positions, but got {max_length}.")


def _write(work: Path, output: Path, before: HeldOut, after: HeldOut) -> list[Path]:
    training_picture(work / "metrics.csv", work / "training.png")
    held_out_picture(before, after, work / "held_out.png")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("metrics.csv", "training.png", "held_out.png"):
        written.append(output / name)
        shutil.move(work / name, written[-1])
    return written
