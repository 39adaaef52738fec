"""SampleCompletions: writes what the policy answers to fixed prompts, before and during training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lit_did.arguments import check_bools, check_integer
from lit_did.callbacks.run_folder import run_folder
from lit_did.data.prompt_files import encode_prompts, read_prompts
from lit_did.models.finding import find_policy
from lit_did.models.names import load_tokenizer
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.quiet import adapter_off
from lit_did.models.sharding import is_sharded
from lit_did.sampling.completing import complete
from lit_did.writing import whole_file

FILE = "completions.jsonl"


class SampleCompletions(Callback):
    """Writes completions of fixed prompts: the policy's before, during and after training, and the reference's once.

    Each row has the step, the prompt, the policy's completion and, if there is a reference, the reference's. Rows are
    written to `completions.jsonl` in the run's folder: the version's folder of a `CSVLogger` or `TensorBoardLogger`, or
    else the Trainer's `default_root_dir`. A run that is resumed there goes on with the file, and a new run replaces it.
    A file with something else is refused. W&B and MLflow (with pandas) get a table "completions" too, and TensorBoard
    gets it as text.

    Completions are greedy. The models run in eval mode and without gradients, and modes, gradients and random numbers
    are restored. So training is the same to the bit with and without it.

    The reference answers before the first step. It is left out if the loss has none, and if an earlier run of this
    module has freed it for `cache_reference`.

    Args:
        prompts: What `lit_did.data.read_prompts` reads: a list of texts, a `.txt` file with one prompt a line, a file
            of preference pairs, and more. Or a number: the prompts of that many pairs, the first that the Trainer's
            `PreferenceDataModule` validates on.
        every_n_steps: Optimiser steps from one table to the next. None: a table after each validation.
        max_new_tokens: The most tokens of a completion.
        as_chat: Whether the tokenizer's chat template wraps prompts that are text. None: as in the pairs that the
            Trainer's `PreferenceDataModule` trains on, or else where the tokenizer has a chat template.
        tokenizer: A transformers tokenizer, or the name or path of one. None: the data module's.

    Raises:
        TypeError, ValueError: An argument is out of range; or at the start of training, there is no tokenizer, no
            prompt, or a prompt that is too long for the model.
        FileExistsError: At the start of training, `completions.jsonl` is not from this callback.

    Example:
        >>> from lightning import Trainer
        >>> from lit_did.callbacks import SampleCompletions
        >>> trainer = Trainer(callbacks=[SampleCompletions(["What is a prime?"], every_n_steps=10)], logger=False)
    """

    def __init__(
        self,
        prompts: int | list[Any] | str | os.PathLike = 4,
        *,
        every_n_steps: int | None = None,
        max_new_tokens: int = 64,
        as_chat: bool | None = None,
        tokenizer: Any = None,
    ) -> None:
        if isinstance(prompts, int):
            check_integer("prompts", prompts, 1)
        elif not isinstance(prompts, str | os.PathLike | Sequence):
            raise TypeError(f"Expected `prompts` to be a number, a file or a list of prompts, but got {prompts!r}.")
        if every_n_steps is not None:
            check_integer("every_n_steps", every_n_steps, 1)
        check_integer("max_new_tokens", max_new_tokens, 1)
        if as_chat is not None:
            check_bools(as_chat=as_chat)
        self.prompts, self.every_n_steps, self.max_new_tokens = prompts, every_n_steps, max_new_tokens
        self.as_chat, self.tokenizer = as_chat, tokenizer
        self._texts: list[str] = []
        self._token_ids: list[list[int]] = []
        self._references: list[str] | None = None
        self._folder: Path | None = None
        self._last_step: int | None = None

    # -----------------------------------------------------------------------------------------------------------
    # When
    # -----------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._folder = run_folder(trainer)
        self._read_prompts(getattr(trainer, "datamodule", None))
        self._last_step = self._kept_steps(trainer)
        self._references = self._answer_as_reference(trainer, pl_module)
        if self._last_step is None or self._is_due(trainer):
            self._write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due(trainer):
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.every_n_steps is None and fits:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        return self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0

    # -----------------------------------------------------------------------------------------------------------
    # What
    # -----------------------------------------------------------------------------------------------------------

    def _read_prompts(self, data: Any) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer = getattr(data, "tokenizer", None)
        elif isinstance(tokenizer, str | os.PathLike):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer is None:
            raise ValueError("Expected `tokenizer` to be given without a data module that has one, but got None.")
        self._tokenizer = tokenizer
        if isinstance(self.prompts, int):
            pairs = getattr(data, "val_dataset", None)
            if not pairs:
                raise ValueError(
                    f"Expected a `PreferenceDataModule` that validates with `prompts={self.prompts}`, but got no "
                    "validation pairs. Pass `val` or `val_fraction` to the data module, or prompts here."
                )
            self._token_ids = [pairs[i].prompt_ids.tolist() for i in range(min(self.prompts, len(pairs)))]
            self._texts = [self._decode(token_ids) for token_ids in self._token_ids]
            return
        as_chat = self.as_chat
        if as_chat is None and getattr(data, "train_dataset", None) is not None:
            as_chat = data.train_dataset.num_chats > 0
        options = ("chat_template", "chat_template_kwargs", "parse_special_tokens")
        template = {name: getattr(data, name) for name in options if hasattr(data, name)}
        rows = read_prompts(self.prompts)
        self._token_ids = encode_prompts(rows, tokenizer, as_chat=as_chat, **template)
        self._texts = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in (r.prompt for r in rows)]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _answers(self, trainer: lightning.Trainer, model: nn.Module) -> list[str]:
        """The model's completions. Empty on processes that need not take part."""
        if not trainer.is_global_zero and not is_sharded(model):
            return []
        with trainer.precision_plugin.forward_context():
            completions = complete(model, self._token_ids, max_new_tokens=self.max_new_tokens)
        return [self._decode(completion) for completion in completions]

    def _answer_as_reference(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> list[str] | None:
        models = _models(pl_module)
        if models is None or models.reference_kind in ("policy", "recorded"):
            return None
        if models.reference is not None:
            return self._answers(trainer, models.reference)
        with adapter_off(models.policy, models.adapter):
            return self._answers(trainer, models.policy)

    def _kept_steps(self, trainer: lightning.Trainer) -> int | None:
        """The last step in the file, from which it first removes what the run does again. None: there is none."""
        assert self._folder is not None
        path, kept = self._folder / FILE, []
        rows = _own_rows(path) if trainer.is_global_zero and path.exists() else []
        if trainer.strategy.broadcast(rows is None):  # all processes raise
            raise FileExistsError(
                f"Expected {path} to be from SampleCompletions, because it would be replaced, but it holds something "
                "else. Move it, or give the Trainer another `default_root_dir`."
            )
        if rows:
            kept = [row for row in rows if trainer.global_step and row["step"] <= trainer.global_step]
        if trainer.is_global_zero and path.exists():
            with whole_file(path) as beside:
                beside.write_text("".join(map(_line, kept)), encoding="utf-8")
        return trainer.strategy.broadcast(kept[-1]["step"] if kept else None)

    def _write(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes a table, unless there is one of this step."""
        if self._last_step == trainer.global_step:
            return
        self._last_step = step = trainer.global_step
        models = _models(pl_module)
        policy = find_policy(pl_module, None) if models is None else models.policy
        columns: dict[str, list[Any]] = {"prompt": self._texts, "policy": self._answers(trainer, policy)}
        if self._references is not None:
            columns["reference"] = self._references
        if trainer.is_global_zero:
            table = {"step": [step] * len(self._texts), **columns}
            assert self._folder is not None
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / FILE).open("a", encoding="utf-8") as file:
                for row in _rows(table):
                    file.write(_line(dict(zip(table, row, strict=True))))
            for logger in trainer.loggers:
                _log_table(logger, table, step)


def _models(pl_module: lightning.LightningModule) -> PolicyAndReference | None:
    return next((child for child in pl_module.children() if isinstance(child, PolicyAndReference)), None)


def _own_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file, without one that a kill cut off. None: something else wrote the file."""
    start = '{"step": '
    try:
        *lines, cut_off = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
    except ValueError:  # no text, or no JSON
        return None
    own = all(isinstance(row, dict) and {"step", "prompt", "policy"} <= row.keys() for row in rows)
    return rows if own and cut_off.startswith(start[: len(cut_off)]) else None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(table: dict[str, list[Any]]) -> list[tuple]:
    return list(zip(*table.values(), strict=True))


def _log_table(logger: Logger, table: dict[str, list[Any]], step: int) -> None:
    """Gives a table to a logger that takes tables or text. Others have the file."""
    if isinstance(logger, WandbLogger):
        logger.log_table("completions", columns=list(table), data=[list(row) for row in _rows(table)], step=step)
    elif isinstance(logger, MLFlowLogger):  # appends the rows
        logger.experiment.log_table(logger.run_id, table, "completions.json")
    elif isinstance(logger, TensorBoardLogger):  # shows Markdown
        rows = [tuple(table), ("---",) * len(table), *_rows(table)]
        lines = [f"| {' | '.join(map(_markdown, row))} |" for row in rows]
        logger.experiment.add_text("completions", "\n".join(lines), step)


def _markdown(cell: Any) -> str:
    text = str(cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return text.replace("\n", "<br>")
