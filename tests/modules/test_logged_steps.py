"""Training metrics are computed in the steps that are logged, and in no others."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_did import LitDPO
from lit_did.modules.pairs import PairMetrics
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer


class Counted(PairMetrics):
    """Lists the losses that are logged, by step, and the steps of the batches that are added."""

    losses: dict[int, float]
    added: list[int]
    step = 0

    def update(self, *arguments):
        self.added.append(self.step)
        super().update(*arguments)

    def log_all(self, module, *arguments):
        values = super().log_all(module, *arguments)
        self.losses[self.step] = float(values["loss"])
        return values


class Module(LitDPO):
    metrics_class = Counted

    def training_step(self, batch, batch_idx):
        self.train_metrics.step = self.trainer.global_step
        return super().training_step(batch, batch_idx)


def fit(**options) -> tuple[dict[int, float], list[int]]:
    """Two epochs of 7 batches."""
    Counted.losses, Counted.added = {}, []
    module = Module(tiny_llama(), tiny_llama(1), learning_rate=1e-2)
    trainer(**{"max_epochs": 2, **options}).fit(module, loader(make_pairs(14), 2))
    return Counted.losses, Counted.added


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"log_every_n_steps": 3}, [2, 5, 6, 8, 11, 13]),
        ({"log_every_n_steps": 0}, [6, 13]),
        ({"log_every_n_steps": 50, "max_steps": 5}, [4]),
        ({"log_every_n_steps": 50, "fast_dev_run": True}, [0]),
    ],
)
def test_which_steps_are_logged(options, steps):
    every, _ = fit(log_every_n_steps=1)
    losses, added = fit(**options)
    assert list(losses) == added == steps
    assert losses == pytest.approx({step: every[step] for step in steps})


def test_all_micro_batches_of_a_step():
    losses, added = fit(log_every_n_steps=50, accumulate_grad_batches=2)
    assert list(losses) == [3, 7]  # the last ones of the epochs, which have one batch
    assert added == [3, 7]
    losses, added = fit(log_every_n_steps=3, accumulate_grad_batches=2)
    assert list(losses) == [2, 3, 5, 7]
    assert added == [2, 2, 3, 5, 5, 7]


def test_monitored_metrics_are_logged_in_every_step(tmp_path):
    monitor = ModelCheckpoint(tmp_path, monitor="train/loss")
    options = {"log_every_n_steps": 50, "enable_checkpointing": True}
    assert len(fit(callbacks=[monitor], **options)[0]) == 14
    assert len(fit(callbacks=[ModelCheckpoint(tmp_path, monitor=None)], **options)[0]) == 2
