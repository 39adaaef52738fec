"""LitDPO and PreferenceDataModule under Lightning's Tuner: what is found, and the run that follows."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from lit_did import LitDPO, PreferenceDataModule
from tests.modules.tiny import byte_tokenizer, tiny_llama, trainer

ROWS = [{"prompt": "a" * (n % 3 + 1), "chosen": "b" * (n % 4 + 1), "rejected": "c"} for n in range(12)]
TOKENIZER = byte_tokenizer()

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers


@pytest.fixture(autouse=True)
def _checkpoints_of_the_tuner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def module(**options) -> LitDPO:
    return LitDPO(tiny_llama(vocab_size=len(TOKENIZER)), learning_rate=1e-3, **options)


def data(**options) -> PreferenceDataModule:
    return PreferenceDataModule(ROWS, TOKENIZER, **{"batch_size": 2, "val": ROWS[:6], "max_length": 20, **options})


def weights(model: LitDPO) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("options", [{}, {"tokens_per_batch": 60}], ids=["rows", "tokens"])
def test_batch_size_is_found_and_training_goes_on_as_without(mode, options):
    model, given, run = module(), data(**options), trainer(max_epochs=2)
    before = weights(model)
    size = Tuner(run).scale_batch_size(model, given, mode=mode, margin=0, max_trials=2, steps_per_trial=1)
    assert (size, given.batch_size) == (4, 4)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    run.fit(model, given)
    plain, run_of_plain = module(), trainer(max_epochs=2)
    run_of_plain.fit(plain, data(**{**options, "batch_size": 4}))
    assert run.global_step == run_of_plain.global_step == 6
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=0)
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("method", ["validate", "predict"])
def test_batch_size_of_evaluation_is_found(method):
    given = data()
    options = {"method": method, "batch_arg_name": "eval_batch_size", "max_trials": 2, "steps_per_trial": 1}
    assert Tuner(trainer()).scale_batch_size(module(), datamodule=given, **options) == 4
    assert given.eval_batch_size == 4


@pytest.mark.long
def test_batch_size_finder_is_a_callback_too(tmp_path):
    given, run = data(), trainer(max_epochs=2, callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=1)])
    run.fit(module(cache_reference=tmp_path / "cache"), given)
    assert (given.batch_size, run.global_step) == (4, 6)


def test_learning_rate_is_found_and_leaves_the_policy_as_it_was():
    model, run = module(), trainer(max_epochs=20)
    before = weights(model)
    found = Tuner(run).lr_find(model, data(), num_training=30, early_stop_threshold=None)
    assert len(found.results["lr"]) == 30
    assert model.hparams.learning_rate == found.suggestion() != 1e-3
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_rates_at_which_training_diverges_end_the_search():
    model, run = module(), trainer(max_epochs=20)
    before = weights(model)
    finder = Tuner(run).lr_find(model, data(), max_lr=1e30, num_training=40, early_stop_threshold=None)
    assert 10 < len(finder.results["lr"]) < 40
    assert 1e-8 < finder.suggestion() < 1e6
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    model.hparams.learning_rate = 1e-3
    run = trainer(max_epochs=1)
    run.fit(model, data())  # a run of its own, which the search does not end
    assert run.global_step == 6


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


SCHEDULE = {"schedule": "linear", "warmup_steps": 0.25}


def test_a_schedule_follows_the_batch_size_that_a_callback_finds():
    rates, plain = Rates(), Rates()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    trainer(max_epochs=4, callbacks=[finder, rates]).fit(module(**SCHEDULE), data())
    trainer(max_epochs=4, callbacks=[plain]).fit(module(**SCHEDULE), data(batch_size=4))
    assert len(plain.seen) == 12
    assert rates.seen == plain.seen


def test_a_schedule_follows_the_rate_that_a_callback_finds():
    rates, plain, model = Rates(), Rates(), module(**SCHEDULE)
    finder = LearningRateFinder(num_training_steps=24, early_stop_threshold=None)
    trainer(max_epochs=4, callbacks=[finder, rates]).fit(model, data())
    assert model.hparams.learning_rate == finder.optimal_lr.suggestion() != 1e-3
    trainer(max_epochs=4, callbacks=[plain]).fit(module(**SCHEDULE), data())
    ratio = model.hparams.learning_rate / 1e-3
    assert rates.seen == pytest.approx([ratio * rate for rate in plain.seen])


def test_without_finders_a_schedule_stays_as_it_was_made(tmp_path):
    """Also one that goes on from a checkpoint, with another rate given."""
    save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    rates, resumed = Rates(), Rates()
    trainer(max_epochs=2, callbacks=[save, rates], enable_checkpointing=True).fit(module(**SCHEDULE), data())
    again = LitDPO(tiny_llama(vocab_size=len(TOKENIZER)), learning_rate=7e-3, **SCHEDULE)
    trainer(max_epochs=2, callbacks=[resumed]).fit(again, data(), ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.seen == rates.seen[5:]
    assert len(resumed.seen) == 7
