"""`lit-did fit`, `validate`, `test` and `predict`: LightningCLI over LitDPO and PreferenceDataModule."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

from lit_did.callbacks import ScoreWriter
from lit_did.cli import runs
from lit_did.cli.errors import InputError, can_be_mended, is_interrupt
from lit_did.cli.recipes import with_recipes
from lit_did.cli.run_files import LastCheckpoint, MetricsFile, Progress, SaveConfig, Start, WholeCheckpoints
from lit_did.cli.training_errors import as_input_error, check_counts
from lit_did.cli.training_help import print_help
from lit_did.cli.wrong_keys import check_yaml_files, explain
from lit_did.data import PreferenceDataModule
from lit_did.models.names import local_folder
from lit_did.modules import LitDPO

TRAINER = {"enable_model_summary": False, "log_every_n_steps": 1}
"""the defaults of the Trainer that differ from Lightning's"""


def fit(arguments: list[str]) -> int:
    """Trains a policy."""
    return _run("fit", arguments)


def validate(arguments: list[str]) -> int:
    """Measures the validation pairs."""
    return _run("validate", arguments)


def test(arguments: list[str]) -> int:
    """Measures the test pairs."""
    return _run("test", arguments)


def predict(arguments: list[str]) -> int:
    """Measures every pair on its own."""
    return _run("predict", arguments)


class Training(LightningCLI):
    """The command line of one of the four commands. A run's defaults are filled in before its classes are made.

    Args:
        command: The command's name.
        arguments: The command line after that name.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        self.folder: Path | None = None
        """the folder of the run"""
        self.path: str | None = None
        """the checkpoint that the command begins with"""
        self.step = 0
        """the optimiser steps before it"""
        self.progress = Progress()
        self._taken = False
        try:
            super().__init__(
                LitDPO,
                PreferenceDataModule,
                subclass_mode_model=True,
                run=False,  # no subcommands: one parser for the command
                args=_with_torch_optimizers(with_recipes(arguments)),
                seed_everything_default=0,
                trainer_defaults=TRAINER,
                save_config_callback=None,
                parser_kwargs={"prog": f"lit-did {command}", "exit_on_error": False, "allow_abbrev": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # hyperparameters are LitDPO's own, as without the command line
            )
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Removes the folder of a new run if nothing is in it."""
        if self._taken and self.folder is not None:
            runs.leave(self.folder)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed."""
        parser.add_argument(
            "--seed_everything", "--seed", type=int, default=0, help="Seed of all random numbers but the data's order."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is neither the model's, the data's nor the Trainer's."""
        parser.add_optimizer_args((Optimizer,), "optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, "lr_scheduler")
        parser.add_argument("--output", type=str | None, default=None, help="Folder of the run.")  # type: ignore[arg-type]
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint, or last or best.")  # type: ignore[arg-type]
        parser.add_argument("--save_every", type=int, default=100, help="Optimiser steps between checkpoints.")
        parser.add_argument("--quiet", action="store_true", help="No progress bar and no messages.")
        if self.command != "fit":  # which alone needs training pairs
            (train,) = (action for action in parser._actions if action.dest == "data.train")
            train.required = False

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; errors are one line."""
        check_yaml_files(args)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise InputError(explain(str(error), parser)) from error
        if self.config.model is None:
            raise InputError("Expected `model.policy` to be given, in a recipe (-c FILE) or as --model.policy.")
        for name in ("trainer", "data"):
            if not isinstance(self.config[name], Namespace):
                raise InputError(f"Expected `{name}` to hold options, but got {self.config[name]}.")
        check_counts(self.config)

    def before_instantiate_classes(self) -> None:
        """Fills in what the user left open, and checks what can be checked before anything is loaded."""
        config, trainer = self.config, self.config.trainer
        model = config.model.init_args
        for name in ("policy", "reference"):
            if isinstance(model.get(name), str) and model[name] != "adapter":
                local_folder(model[name], name)
        for name in ("optimizer", "lr_scheduler"):
            if config[name] is not None:
                if model.get(name) is not None:
                    raise InputError(f"Expected only one of `{name}` and `model.{name}`, but got both.")
                model[name], config[name] = config[name], None
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            trainer.max_epochs = 1
        self._find_run()

    def instantiate_classes(self) -> None:
        """Makes the model, the data and the Trainer. What these refuse is one line."""
        try:
            super().instantiate_classes()
        except (ArgumentError, ImportError, MisconfigurationException, TypeError, ValueError) as error:
            if can_be_mended(error):
                raise
            raise InputError(explain(str(error), self.parser)) from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The Trainer. For `fit`, with what writes into the run's folder."""
        given = self.config_init.trainer
        callbacks, plugins = _as_list(given.callbacks), _as_list(given.plugins)
        options: dict[str, Any] = {"logger": given.logger or False, "enable_checkpointing": False}
        if given.enable_progress_bar is None:
            options["enable_progress_bar"] = sys.stderr.isatty() and not self.config.quiet
        if self.command == "fit":
            assert self.folder is not None
            self._check_monitors(callbacks)
            callbacks += self._writers(callbacks)
            options |= {"enable_checkpointing": given.enable_checkpointing, "default_root_dir": str(self.folder)}
            if given.logger in (None, True):
                options["logger"] = MetricsFile(self.folder, self.step)
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                plugins.append(WholeCheckpoints())
        elif self.command == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            table = (self.folder or Path()) / "scores.csv"
            if table.exists():
                raise InputError(
                    f"Expected --output to be a folder without scores.csv, but {table} exists. Rename that file, or "
                    "give another --output, and the checkpoint by its path with --ckpt_path."
                )
            callbacks.append(ScoreWriter(table))
        callbacks.append(self.progress)
        return super().instantiate_trainer(**options, callbacks=callbacks, plugins=plugins or None, **kwargs)

    # -----------------------------------------------------------------------------------------------------------

    def _find_run(self) -> None:
        """Sets the run's folder, and the checkpoint that the command begins with."""
        config = self.config
        name = Path(config.config[-1].relative).stem if config.config else "dpo"
        ckpt_path, config.ckpt_path = config.ckpt_path, None
        fits, looked_up = self.command == "fit", ckpt_path in ("last", "best")
        self.folder = Path(config.output).expanduser() if config.output else None
        if fits and ckpt_path == "best":
            raise InputError("Expected `ckpt_path` to be last or a path for `lit-did fit`, but got best.")
        if looked_up:
            plain = yaml.safe_load(self.parser.dump(config, skip_none=False))
            if self.folder is None:
                self.folder = runs.find_run(name, plain, () if fits else ("model",))
            elif fits and (differences := runs.differing(self.folder, plain)):
                warnings.warn(
                    f"The run in {self.folder} continues with another configuration than it began with. There, "
                    f"{'; '.join(differences)}. To go on unchanged, use -c {self.folder / runs.CONFIG}.",
                    stacklevel=2,
                )
        if ckpt_path is not None:
            checkpoint = runs.find_checkpoint(ckpt_path, self.folder, trains=fits)
            self.path, self.step = str(checkpoint.path), checkpoint.step
        if fits and not looked_up:
            self._taken = not _rank() and not config.trainer.fast_dev_run  # which writes nothing
            if self._taken:
                self.folder = runs.take(self.folder) if self.folder else runs.take_next(name)
            self.folder = self.folder or runs.next_folder(name)  # LastCheckpoint asks rank 0 for its own
        if fits:
            config.output = str(self.folder)

    def _check_monitors(self, callbacks: list[Any]) -> None:
        """Raises InputError if a callback waits for a metric whose name is nearly one of those that are logged."""
        names = [f"{prefix}/{name}" for prefix in ("val", "train") for name in self.model.train_metrics]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            near = get_close_matches(str(monitor), names, n=1, cutoff=0.8)
            if monitor not in names and near:
                raise InputError(
                    f"Expected `monitor` of {type(callback).__name__} to be a metric that is logged, but got "
                    f"{monitor}. Did you mean {near[0]}?"
                )

    def _writers(self, callbacks: list[Any]) -> list[Any]:
        """The callbacks that write into the run's folder, beside the user's."""
        assert self.folder is not None
        folder = self.folder / runs.CHECKPOINTS
        writers: list[Any] = [] if self.config.quiet else [Start(self.folder, self.step)]
        if self.config.trainer.fast_dev_run:  # which writes nothing
            return writers
        writers.append(SaveConfig(self.parser, self.config, self.folder))
        if self.config.trainer.enable_checkpointing is False:
            return writers
        own = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        for callback in own:
            callback.dirpath = callback.dirpath or str(folder)
        data = self.config.data
        if not own and (data.val is not None or data.val_fraction):
            best = ModelCheckpoint(
                folder, "best", "val/loss", save_on_train_epoch_end=False, enable_version_counter=False
            )
            writers.append(best)
        return [*writers, LastCheckpoint(folder / "last.ckpt", self.config.save_every)]


def _with_torch_optimizers(arguments: list[str]) -> list[str]:
    """`--optimizer SGD` means torch's, although bitsandbytes has one of this name too."""
    found, previous = [], ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if previous == "--optimizer" and hasattr(torch.optim, argument):
            argument = f"torch.optim.{argument}"
        elif equals and option == "--optimizer" and hasattr(torch.optim, value):
            argument = f"--optimizer=torch.optim.{value}"
        found.append(argument)
        previous = argument
    return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _rank() -> int:
    return getattr(rank_zero_only, "rank", None) or 0


def _run(command: str, arguments: list[str]) -> int:
    if print_help(command, arguments):
        return 0
    cli = None
    try:
        with _without_hints(command):
            cli = Training(command, arguments)
            trainer: Any = cli.trainer
            options: dict[str, Any] = {"ckpt_path": cli.path, "weights_only": True}
            if command == "predict":  # they are written
                options["return_predictions"] = False
            getattr(trainer, command)(cli.model, datamodule=cli.datamodule, **options)
    except Exception as error:
        shown = as_input_error(error, begun=cli is None or cli.progress.begun)
        if shown is not None and _rank():  # rank 0 has the same error and prints it
            return 2
        if shown in (None, error):
            raise
        raise shown from error
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        for line in _how_to_continue(cli):
            stop.add_note(line)
        raise
    finally:
        if cli is not None:
            cli.leave()
    if trainer.is_global_zero and not cli.config.quiet:
        if command == "fit":
            print(_summary(cli))
        for writer in (callback for callback in trainer.callbacks if isinstance(callback, ScoreWriter)):
            print(f"Written: {writer.output}")
    return 0


@contextmanager
def _without_hints(command: str) -> Iterator[None]:
    """Keeps Lightning's hints off the screen; warnings stay."""
    messages = ["(Checkpoint|Experiment logs) directory .* is not empty", "The dirpath has changed"]
    if command != "fit":  # which alone continues the callbacks of a checkpoint
        messages.append("Be aware that when using `ckpt_path`")
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():  # a run that continues writes into its folder again, which may have moved
            for message in messages:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _how_to_continue(cli: Training | None) -> list[str]:
    folder = None if cli is None or cli.command != "fit" else cli.folder
    if folder is None or not (folder / runs.CHECKPOINTS / "last.ckpt").exists():
        return []
    return [f"To continue: lit-did fit -c {folder / runs.CONFIG} --ckpt_path last"]


def _summary(cli: Training) -> str:
    """What a run has left, and what can be done with it."""
    assert cli.folder is not None
    trainer: Any = cli.trainer
    checkpoints = sorted((cli.folder / runs.CHECKPOINTS).glob("*.ckpt"))
    lines = [f"Finished after {trainer.global_step} steps: {cli.folder}"]
    limit = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
    if cli.path is not None and trainer.global_step == cli.step:
        lines = [f"Nothing was left to train: the run ended after {cli.step} steps, at trainer.{limit}: {cli.folder}"]
    elif cli.datamodule.val_dataset is not None and "val/loss" not in trainer.callback_metrics:
        lines.append("not validated: training ended before the first validation, see --trainer.val_check_interval")
    if checkpoints:
        lines += [
            f"checkpoints: {', '.join(path.name for path in checkpoints)}",
            f"to export:   lit-did export {cli.folder} FOLDER",
            f"to go on:    lit-did fit -c {cli.folder / runs.CONFIG} --ckpt_path last --trainer.{limit} N",
        ]
    return "\n".join(lines)
