"""What a run leaves behind in the process: warning filters, log levels, torch's switches, the environment: nothing."""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import warnings
from contextlib import nullcontext

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.connectors import data_connector

from lit_did import LitDPO, PreferenceDataModule
from lit_did.callbacks import DIDMonitor
from lit_did.sampling import sample_did
from tests.modules.tiny import byte_tokenizer, tiny_llama, trainer

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": "a", "chosen": "b" * (n % 3 + 1), "rejected": "c"} for n in range(6)]


def process_state() -> dict[str, object]:
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    return {
        "filters": list(warnings.filters),
        "levels": {
            name: level for name, level in loggers.items() if name.startswith(("lit_did", "lightning", "torch"))
        },
        "environment": dict(os.environ),
        "path": list(sys.path),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def module(**options) -> LitDPO:
    sizes = {"vocab_size": len(TOKENIZER)}
    return LitDPO(tiny_llama(0, **sizes), tiny_llama(1, **sizes), **options)


class Fails(lightning.Callback):
    """Raises at the hook of this name."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_):
        raise KeyError("on purpose")


@pytest.fixture(scope="module", autouse=True)
def _imports_are_done(tmp_path_factory):
    """What libraries set when a first run imports them is none of ours."""
    trainer(max_epochs=1).fit(module(), PreferenceDataModule(ROWS, TOKENIZER, val=ROWS))


@pytest.mark.parametrize("val", [ROWS, None], ids=["validated", "alone"])
@pytest.mark.parametrize("method", ["fit", "validate", "predict"])
def test_a_run_leaves_nothing_behind(method, val, tmp_path, monkeypatch):
    if method != "fit" and val is None:
        return
    before = process_state()
    data = PreferenceDataModule(ROWS, TOKENIZER, val=val, batch_size=2)
    cached = method == "fit" and val
    options = {"cache_reference": tmp_path / "cache"} if cached else {}
    run = trainer(max_epochs=1, callbacks=[] if cached else [DIDMonitor()])
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 8)  # as on a larger machine
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before_fit = list(warnings.filters)
        getattr(run, method)(module(**options), datamodule=data)
        assert list(warnings.filters) == before_fit
    hints = "in eval mode|LeafSpec|does not have many workers"
    assert not [str(w.message) for w in seen if re.search(hints, str(w.message))]
    assert process_state() == before


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_train_start", "on_train_batch_start"])
def test_a_run_that_fails_leaves_nothing_behind(hook):
    before = process_state()
    run = trainer(max_epochs=1, callbacks=[Fails(hook)])
    with pytest.raises(KeyError, match="on purpose"):
        run.fit(module(), PreferenceDataModule(ROWS, TOKENIZER, val=ROWS, batch_size=2))
    assert process_state() == before


def test_parts_of_the_policy_in_eval_mode_are_warned_of():
    model = module()
    model.policy.get_input_embeddings().eval()
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        trainer(max_epochs=1).fit(model, PreferenceDataModule(ROWS, TOKENIZER))


def test_a_second_run_adds_no_callback(capsys):
    run, model = trainer(max_epochs=1), module()
    run.fit(model, PreferenceDataModule(ROWS, TOKENIZER))
    callbacks = list(run.callbacks)
    run.fit(model, PreferenceDataModule(ROWS, TOKENIZER))
    assert run.callbacks == callbacks


@pytest.mark.parametrize("hook", [None, "on_train_start"], ids=["runs", "fails"])
def test_the_same_trainer_runs_another_module_with_its_warnings(hook):
    class Other(BoringModel):
        def on_fit_start(self):
            warnings.warn("is LeafSpec deprecated?", FutureWarning, stacklevel=1)

    run = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(module(), PreferenceDataModule(ROWS, TOKENIZER))
    run.fit_loop.epoch_progress.reset()
    run.callbacks += [Fails(hook)] if hook else []
    with pytest.warns(FutureWarning, match="LeafSpec"), pytest.raises(KeyError) if hook else nullcontext():
        run.fit(Other())


def test_filters_that_are_added_while_a_run_starts_are_kept():
    class Adds(lightning.Callback):
        def on_train_start(self, *_):
            warnings.filterwarnings("ignore", message="mine")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)

    with warnings.catch_warnings():
        before = list(warnings.filters)
        trainer(max_epochs=1, callbacks=[Adds()]).fit(module(), PreferenceDataModule(ROWS, TOKENIZER))
        added = warnings.filters[: -len(before)]
    assert [entry[1].pattern for entry in added] == [".*LeafSpec", "mine"]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("val", [None, ROWS])
def test_no_warning_of_lightnings_about_what_is_on_purpose(steps, val):
    data_connector.warning_cache.clear()  # Lightning's, which shows a warning once a process
    run = trainer(max_epochs=1, num_sanity_val_steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module(), PreferenceDataModule(ROWS, TOKENIZER, val=val))
        trainer().validate(module(), PreferenceDataModule(ROWS, TOKENIZER, val=ROWS), verbose=False)
    told = [str(warning.message) for warning in caught]
    assert not [text for text in told if "overridden" in text or "NoValidation" in text or "eval mode" in text]
    assert any("At the first step" in text for text in told)  # other warnings show


def test_sampling_leaves_nothing_behind():
    models = tiny_llama(0), tiny_llama(1)
    before, numbers = process_state(), torch.get_rng_state()
    sample_did(*models, [1, 2], max_new_tokens=2, num_samples=6, num_islands=3, progress=False)
    assert process_state() == before
    assert torch.equal(torch.get_rng_state(), numbers)
