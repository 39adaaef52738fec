"""ScoreWriter: writes the pairs that a Trainer predicts as a table, as `lit-did score` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from lit_did.arguments import check_bools
from lit_did.data.columns import read_columns
from lit_did.data.datamodule import PreferenceDataModule
from lit_did.data.dataset import PreferenceDataset
from lit_did.modules.pairs import PairStatistics
from lit_did.ops import SequenceStatistics
from lit_did.scoring.table import Row, check_table_path, rows_of, with_columns, write_table


class ScoreWriter(BasePredictionWriter):
    """Writes what `trainer.predict` says about preference pairs as a table, see `lit-did docs scoring`.

    The rows are in the order of the source, each once, also with several processes. `reward_margin` is that of
    the module's loss. The first process writes the table at the end of the prediction.

    Args:
        output: The table, a `.csv` or `.parquet` file.
        texts: Whether the table has the columns with the pairs' texts too.
        overwrite: Whether to replace a table that is there already.

    Raises:
        TypeError, ValueError: An argument is out of range; or at the start of a prediction, the module is not `LitDPO`
            or the data is not a `PreferenceDataModule`.
        FileExistsError: At the start of a prediction, `output` exists.

    Example:
        >>> from lightning import Trainer
        >>> from lit_did.callbacks import ScoreWriter
        >>> trainer = Trainer(callbacks=[ScoreWriter("scores.csv")], logger=False)
    """

    def __init__(
        self, output: str | os.PathLike = "scores.csv", *, texts: bool = False, overwrite: bool = False
    ) -> None:
        super().__init__("batch")
        check_bools(texts=texts, overwrite=overwrite)
        self.output, self.texts, self.overwrite = Path(output).expanduser(), texts, overwrite
        check_table_path(self.output)
        self._rows: list[Row] = []
        self._columns: dict[int, dict[str, Any]] = {}
        self._dataset: PreferenceDataset | None = None  # while predicting

    def on_predict_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(
                f"Expected `output` to be a new file, but {self.output} exists. Choose another name, or pass "
                "`overwrite=True`."
            )
        data = _data(trainer)
        dataset = data.predict_dataset
        assert isinstance(dataset, PreferenceDataset)  # after its `setup`
        if trainer.is_global_zero:  # now, because the source may change while models run
            source = next(s for s in (data.predict, data.val, data.train) if s is not None)
            self._columns = read_columns(source, "pairs", columns=data.columns, texts=self.texts)
        self._rows, self._dataset = [], dataset

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not isinstance(prediction, PairStatistics):
            raise TypeError(
                f"Expected `predict_step` to return PairStatistics, as LitDPO's does, but got "
                f"{type(prediction).__name__} from {type(pl_module).__name__}."
            )
        chosen, rejected = (
            SequenceStatistics(*(value.cpu() for value in side)) for side in (prediction.chosen, prediction.rejected)
        )
        assert self._dataset is not None
        positions = np.searchsorted(self._dataset.row_numbers, prediction.index.tolist())  # row numbers rise
        self._rows += rows_of(
            [self._dataset[position] for position in positions.tolist()],
            chosen,
            rejected,
            truncated=self._dataset.truncated,
            reward_margin=prediction.reward_margin.cpu(),
        )

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        rows = {row["index"]: row for share in _gathered(trainer, self._rows) for row in share}
        self._rows, self._dataset = [], None
        if trainer.is_global_zero and rows:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_table(with_columns([rows[index] for index in sorted(rows)], self._columns), self.output)
        trainer.strategy.barrier()


def _data(trainer: lightning.Trainer) -> PreferenceDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, PreferenceDataModule):
        raise TypeError(
            "Expected `trainer.predict` to be called with a PreferenceDataModule, whose source has the pairs' other "
            f"columns, but got {type(data).__name__}."
        )
    return data


def _gathered(trainer: lightning.Trainer, rows: list[Row]) -> list[list[Row]]:
    """The rows of every process, on the first one."""
    if trainer.world_size == 1:
        return [rows]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, rows)
    return shares
