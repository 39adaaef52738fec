"""Through a real Trainer: a resumed run sees the batches that the uninterrupted run saw, and no others."""

from __future__ import annotations

import sys
import warnings
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_did.data import PreferenceDataModule
from lit_did.modules.optimizer import resume_data
from tests.processes import run_program

ROWS = [{"prompt": "a", "chosen": "b" * (n % 5 + 1), "rejected": "c"} for n in range(11)]
BY_TOKENS = {"batch_size": None, "tokens_per_batch": 15, "max_length": 6}
# Either way 6 batches an epoch.
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, precision and the like


class Recorder(LightningModule):
    """Writes down the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[int]]] = []
        self.evaluated: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch["index"].tolist())

    def predict_step(self, batch, batch_idx):
        return batch["index"], batch["weight"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Following(Recorder):
    """With what LitDPO does to resume."""

    def on_train_start(self):
        resume_data(self.trainer)


def _fit(tokenizer, folder, *, checkpoint=None, save=None, num_workers=0, val=None, by=None, **kwargs):
    """Trains and returns what the module saw; `save` are the arguments of ModelCheckpoint."""
    module = Recorder()
    data = PreferenceDataModule(ROWS, tokenizer, val=val, num_workers=num_workers, seed=3, **(by or {"batch_size": 2}))
    callbacks = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **save)] if save else []
    kwargs = {"callbacks": callbacks, "enable_checkpointing": bool(save), "default_root_dir": folder, **kwargs}
    trainer = Trainer(accelerator="cpu", **QUIET, **kwargs)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.seen


@pytest.mark.parametrize(
    ("limit", "num_workers", "by"),
    [
        ({"max_epochs": 3}, 0, None),
        ({"max_epochs": 3}, 2, None),
        ({"max_epochs": 3}, 0, BY_TOKENS),
        ({"max_epochs": 3}, 2, BY_TOKENS),
        ({"max_steps": 18, "max_epochs": -1}, 0, None),
        ({"max_steps": 18, "max_epochs": -1}, 2, None),
        ({"max_steps": 18, "max_epochs": -1}, 0, BY_TOKENS),
    ],
)
def test_resuming_after_any_batch(no_specials, tmp_path, limit, num_workers, by):
    kwargs = {"num_workers": num_workers, "by": by, **limit}
    whole = _fit(no_specials, tmp_path, save={"every_n_train_steps": 1}, **kwargs)
    assert [len(whole), whole[8][:2]] == [18, (1, 2)]
    orders = [[*chain(*(rows for epoch, _, rows in whole if epoch == number))] for number in range(3)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]  # the premise: reshuffled every epoch
    # The middle of epochs 1 and 2, and exactly their ends.
    for step in (2, 6, 8, 12, 17) if num_workers == 0 else (6, 8):
        checkpoint = tmp_path / f"step={step}.ckpt"
        resumed = _fit(no_specials, tmp_path, checkpoint=checkpoint, **kwargs)
        assert resumed == whole[step:], f"after {step} batches"


@pytest.mark.parametrize("by", [None, BY_TOKENS], ids=["rows", "tokens"])
def test_resuming_between_accumulated_batches(no_specials, tmp_path, by):
    # 6 batches are an epoch's two optimizer steps, of 4 and 2.
    kwargs = {"max_epochs": 2, "accumulate_grad_batches": 4, "by": by}
    whole = _fit(no_specials, tmp_path, save={"every_n_train_steps": 1}, **kwargs)
    assert len(whole) == 12
    for step, batches in ((1, 4), (3, 10)):
        assert _fit(no_specials, tmp_path, checkpoint=tmp_path / f"step={step}.ckpt", **kwargs) == whole[batches:]


def test_resuming_with_another_token_budget_is_an_error(no_specials, tmp_path):
    _fit(no_specials, tmp_path, save={"every_n_train_steps": 1}, max_epochs=1, by=BY_TOKENS)
    other = {"checkpoint": tmp_path / "step=2.ckpt", "by": {**BY_TOKENS, "tokens_per_batch": 16}}
    with pytest.raises(ValueError, match=r"these changed: tokens_per_batch=15 \(now 16\)"):
        _fit(no_specials, tmp_path, max_epochs=1, **other)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 18, "max_epochs": -1}])
@pytest.mark.parametrize("when", [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}])
def test_resuming_after_an_epoch(no_specials, tmp_path, limit, when):
    # Saved by the hooks at the end of an epoch, or after validation.
    whole = _fit(no_specials, tmp_path, save={"every_n_epochs": 1, **when}, val=ROWS[:2], **limit)
    # Resumed a second time, from the middle of the next epoch of the resumed run.
    again = {"checkpoint": tmp_path / "step=6.ckpt", "save": {"every_n_train_steps": 1}, "val": ROWS[:2], **limit}
    assert _fit(no_specials, tmp_path / "again", **again) == whole[6:]
    checkpoint = tmp_path / "again" / "step=15.ckpt"
    assert _fit(no_specials, tmp_path, checkpoint=checkpoint, val=ROWS[:2], **limit) == whole[15:]


def test_stopped_run_resumes(no_specials, tmp_path):
    # Not only from a checkpoint along the way: really stopped in the middle of the second epoch.
    whole = _fit(no_specials, tmp_path, max_epochs=3)
    head = _fit(no_specials, tmp_path, save={"every_n_train_steps": 1}, max_steps=9, max_epochs=3)
    tail = _fit(no_specials, tmp_path, checkpoint=tmp_path / "step=9.ckpt", max_epochs=3)
    assert head + tail == whole


@pytest.mark.parametrize("save_by", ["hand", "the Trainer"])
@pytest.mark.parametrize(
    ("end", "then", "warned"),
    [
        ({"max_steps": 3}, {}, True),
        ({"max_epochs": 1, "limit_train_batches": 3}, {"limit_train_batches": 3}, False),
        ({"max_epochs": 1}, {}, False),
    ],
)
def test_batches_left_out_are_said(no_specials, tmp_path, end, then, warned, save_by):
    # Lightning counts an epoch that `max_steps` ends as finished, and has no way to say otherwise.
    data = PreferenceDataModule(ROWS, no_specials, batch_size=2)
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, **QUIET}
    trainer = Trainer(**options, **end)
    trainer.fit(Following(), data)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    if save_by == "hand":
        checkpoint = tmp_path / "by_hand.ckpt"
        trainer.save_checkpoint(checkpoint)
    module = Following()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(**options, max_epochs=2, **then, enable_checkpointing=False).fit(module, data, ckpt_path=checkpoint)
    said = [str(warning.message) for warning in caught if "The run that is resumed" in str(warning.message)]
    assert [text[:62] for text in said] == ["The run that is resumed ended after batch 3 of 6 of epoch 0, a"] * warned
    assert {epoch for epoch, _, _ in module.seen} == {1}  # the premise: the first epoch is over


def test_overfit_batches_and_no_validation(no_specials, tmp_path):
    # The Trainer rebuilds our loader around its own sampler.
    seen = _fit(no_specials, tmp_path, max_epochs=2, overfit_batches=2)
    assert [rows for _, _, rows in seen] == [[0, 1], [2, 3]] * 2
    # Rows 0 to 4 have 4 to 8 tokens, and so have 5 to 9.
    seen = _fit(no_specials, tmp_path, max_epochs=2, overfit_batches=3, by=BY_TOKENS)
    assert [rows for _, _, rows in seen] == [[0, 1, 2], [3, 4], [5, 6, 7]] * 2


@pytest.mark.parametrize("by", [{"batch_size": 2}, {**BY_TOKENS, "eval_batch_size": 2}], ids=["rows", "tokens"])
def test_evaluation_and_prediction_through_the_trainer(no_specials, tmp_path, by):
    module = Recorder()
    data = PreferenceDataModule(ROWS, no_specials, val=ROWS[:5], predict=ROWS[:3], **by)
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    trainer.validate(module, data)
    assert module.evaluated == [[0, 1], [2, 3], [4]]
    assert [index.tolist() for index, _ in trainer.predict(module, data)] == [[0, 1], [2]]


def test_two_processes(tmp_path):
    """DDP: the ranks share each epoch, a resumed run continues it, evaluation sees each row once."""
    run_program(sys.executable, "-m", "tests.data.ddp_script", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert len(rank["whole"]) == 6
        assert rank["resumed"] == rank["whole"][4:]
    for epoch in range(2):
        rows = [*chain(*(batch for rank in ranks for batch in rank["whole"][3 * epoch : 3 * epoch + 3]))]
        assert len(rows) == 12
        assert sorted(set(rows)) == list(range(11))
    for evaluated in ("validated", "predicted"):
        pairs = [pair for rank in ranks for pair in rank[evaluated]]
        assert sorted(index for index, weight in pairs if weight) == [0, 1, 2, 3, 4]
        assert [len(rank[evaluated]) for rank in ranks] == [3, 3]
    written = sorted(path.name.partition("-")[0] for path in (tmp_path / "tokens").glob("[!.]*"))
    assert written == ["train", "train", "val", "val"]  # once for each `max_length`
    # By tokens.
    whole, resumed, overfitted = (
        [rank[f"{name} by tokens"] for rank in ranks] for name in ("whole", "resumed", "overfitted")
    )
    for rank in range(2):
        assert resumed[rank] == whole[rank][4:]
    steps = [*zip(*whole, strict=True)]
    assert all(len(one) == len(other) for one, other in steps)
    assert all(sum(4 + row % 5 for row in batch) <= 16 for step in steps for batch in step)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        rows = [*chain(*chain(*epoch))]
        assert len(rows) == 12
        assert sorted(set(rows)) == list(range(11))
    assert [sorted(chain(*step)) for step in zip(*overfitted, strict=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
