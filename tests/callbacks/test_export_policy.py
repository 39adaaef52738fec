"""ExportPolicy: the folders of the best and of the last weights, whom it replaces, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did import LitDPO, PreferenceDataModule
from lit_did.callbacks import ExportPolicy
from lit_did.exporting import export_policy
from tests.exporting.runs import LORA, ROWS
from tests.modules.tiny import loader, make_pairs, trainer
from tests.processes import run_program


def data(model: Path) -> PreferenceDataModule:
    return PreferenceDataModule(ROWS, str(model), val_fraction=0.25, batch_size=3, max_length=64, as_chat=True)


def fit(model: Path, folder: Path, *callbacks: Callback, checkpoint: Path | None = None, **options) -> LitDPO:
    lora, options = options.pop("lora", LORA), {"max_epochs": 3, **options}
    torch.manual_seed(3)
    policy = options.pop("policy", str(model))
    module = LitDPO(policy, lora=lora, learning_rate=1e-2)
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "default_root_dir": folder, **options}
    trainer(callbacks=list(callbacks), **options).fit(
        module, data(model), ckpt_path=checkpoint, weights_only=False if checkpoint else None
    )
    return module


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saver(folder: Path, mode: str = "max", monitor: str = "val/reward_margin", **options) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", filename=f"{mode}-{{epoch}}", monitor=monitor, mode=mode, **options)


@pytest.mark.parametrize("average", ["", "EMA", "SWA"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_best_and_the_last_weights_are_those_of_their_checkpoints(tiny_model, tmp_path, lora, average):
    save = saver(tmp_path, "max" if average else "min")  # of a margin that grows: the last epoch's, or the first's
    averages = {
        "": [],
        "EMA": [EMAWeightAveraging(decay=0.5)],
        "SWA": [StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
    }
    options = {"policy": AutoModelForCausalLM.from_pretrained(tiny_model)} if average == "SWA" else {}
    callbacks = [*averages[average], ExportPolicy(tmp_path / "out"), save]
    module = fit(tiny_model, tmp_path, *callbacks, lora=lora, **options)
    export_policy(save.best_model_path, tmp_path / "expected", policy=str(tiny_model), quiet=True)
    best, last = weights(tmp_path / "out" / "best"), weights(tmp_path / "out" / "last")
    assert equal(best, weights(tmp_path / "expected"))
    trained = {name: value for name, value in module.policy.state_dict().items() if not lora or "lora_" in name}
    own = {name: value for name, value in last.items() if not lora or "lora_" in name}
    assert all(torch.equal(*two) for two in zip(trained.values(), own.values(), strict=True))
    assert not equal(best, last) or average
    for name in ("best", "last"):
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / name).chat_template
        card = (tmp_path / "out" / name / "README.md").read_text()
        assert "| Optimiser steps |" in card
        assert "`reward_margin`" in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best", "last"]


def test_its_own_folders_are_replaced_and_no_others(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, ExportPolicy(tmp_path / "out"), max_steps=1)
    first = weights(tmp_path / "out" / "last")
    fit(tiny_model, tmp_path, ExportPolicy(tmp_path / "out"), max_steps=2)
    assert not equal(weights(tmp_path / "out" / "last"), first)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last"]  # no ModelCheckpoint says what is best
    (tmp_path / "out" / "last" / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="last is a folder with files"):
        fit(tiny_model, tmp_path, ExportPolicy(tmp_path / "out"), max_steps=1)
    assert (tmp_path / "out" / "last" / "README.md").read_text() == "mine"


def test_a_relative_folder_is_below_the_runs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("one", "two"):
        fit(tiny_model, tmp_path / run, ExportPolicy("exported"), max_steps=1)
        assert (tmp_path / run / "exported" / "last" / "README.md").exists()
    assert not (tmp_path / "exported").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_training(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Expected `folder` of ExportPolicy to be"):
        fit(tiny_model, tmp_path, ExportPolicy(tmp_path / "file"), max_steps=1)


def test_a_folder_of_export_policy_is_not_replaced(tiny_model, tmp_path):
    save = saver(tmp_path)
    fit(tiny_model, tmp_path, save, max_epochs=1)
    export_policy(save.best_model_path, tmp_path / "out" / "best", quiet=True)
    with pytest.raises(FileExistsError, match="best is a folder with files"):
        fit(tiny_model, tmp_path, saver(tmp_path), ExportPolicy(tmp_path / "out"))


class Exports(ExportPolicy):
    """Counts."""

    def _export(self, trainer, module, name, saved=None):
        self.names = [*getattr(self, "names", []), f"{name} {trainer.global_step}"]
        super()._export(trainer, module, name, saved)


def test_every_new_best_one_is_exported_once_and_a_resumed_run_goes_on(tiny_model, tmp_path):
    export, save = Exports(tmp_path / "out"), saver(tmp_path, save_last=True)
    fit(tiny_model, tmp_path, save, ModelCheckpoint(tmp_path / "others", save_top_k=-1), export, max_epochs=2)
    assert export.names == ["best 3", "best 6", "last 6"]
    again = Exports(tmp_path / "out")
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tiny_model, tmp_path, saver(tmp_path, save_last=True), again, max_epochs=3, checkpoint=last)
    assert again.names == ["best 9", "last 9"]


def test_a_resumed_run_does_not_take_its_first_checkpoint_for_the_best(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, saver(tmp_path, "min", save_last=True), max_epochs=1)  # of a margin that grows
    again, last = Exports(tmp_path / "out"), tmp_path / "checkpoints" / "last.ckpt"
    fit(tiny_model, tmp_path, saver(tmp_path, "min", save_last=True), again, checkpoint=last)
    assert again.names == ["last 9"]


def test_which_checkpoint_is_the_best(tiny_model, tmp_path):
    def savers() -> list[ModelCheckpoint]:
        return [saver(tmp_path), saver(tmp_path, "min", "val/loss")]

    with pytest.raises(
        ValueError, match=r"`monitor` of ExportPolicy to name the metric .*: val/reward_margin, val/loss"
    ):
        fit(tiny_model, tmp_path, *savers(), ExportPolicy(tmp_path / "out"))
    with pytest.raises(ValueError, match="Expected one ModelCheckpoint to monitor val/kl"):
        fit(tiny_model, tmp_path, *savers(), ExportPolicy(tmp_path / "out", monitor="val/kl"))
    fit(tiny_model, tmp_path, *savers(), ExportPolicy(tmp_path / "out", monitor="val/loss"), max_epochs=1)
    assert (tmp_path / "out" / "best").is_dir()


def test_what_is_refused_before_training(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="to be a LitDPO, but got BoringModel"):
        trainer(callbacks=[ExportPolicy(tmp_path)], max_steps=1).fit(BoringModel())
    with pytest.raises(ValueError, match="ExportPolicy to come after WeightAveraging"):
        fit(tiny_model, tmp_path, ExportPolicy(tmp_path), EMAWeightAveraging())
    with pytest.raises(ValueError, match="`save_weights_only=False` with ExportPolicy"):
        fit(tiny_model, tmp_path, ExportPolicy(tmp_path), saver(tmp_path, save_weights_only=True))
    with pytest.raises(ValueError, match="Expected `tokenizer` of ExportPolicy"):
        trainer(callbacks=[ExportPolicy(tmp_path)], max_steps=1).fit(LitDPO(str(tiny_model)), loader(make_pairs(2), 2))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        fit(tiny_model, tmp_path, ExportPolicy(tmp_path, tokenizer="./nowhere"))
    trainer(callbacks=[ExportPolicy(tmp_path / "out", tokenizer=str(tiny_model))], max_steps=1).fit(
        LitDPO(str(tiny_model)), loader(make_pairs(2), 2)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "last").chat_template


def test_a_trial_run_writes_nothing(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, ExportPolicy(tmp_path / "out"), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


def test_it_is_written_in_yaml(tmp_path):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callback", type=Callback)
    (tmp_path / "c.yaml").write_text(
        "callback:\n  class_path: lit_did.callbacks.ExportPolicy\n  init_args: {folder: exported, monitor: val/loss}\n"
    )
    callback = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "c.yaml")])).callback
    assert isinstance(callback, ExportPolicy)
    assert (callback.folder, callback.monitor) == (Path("exported"), "val/loss")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) for kind in ("ddp", "sharded", "sharded lora", "tensor parallel")],
)
def test_two_processes_write_what_one_does(tiny_model, tmp_path, kind):
    run_program(sys.executable, "-m", "tests.callbacks.exporting_processes", kind, tiny_model, tmp_path)
    one, two = tmp_path / "1", tmp_path / "2"
    for name in ("best", "last"):
        mine, expected = weights(two / name), weights(one / name)
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, atol=1e-5, rtol=1e-4)
        config = "adapter_config.json" if "lora" in kind else "config.json"
        assert (two / name / config).read_text() == (one / name / config).read_text()
        assert {p.name for p in (one / name).iterdir()} == {p.name for p in (two / name).iterdir()}
    values = [(folder / "best" / "README.md").read_text() for folder in (one, two)]
    rows = [[line.split("|")[1:4] for line in card.splitlines() if line.startswith("| `")] for card in values]
    assert len(rows[0]) == len(rows[1]) == 15
    for mine, expected in zip(*rows, strict=True):
        assert mine[0] == expected[0]
        for a, b in zip(" ".join(mine[1:]).split(), " ".join(expected[1:]).split(), strict=True):
            assert a == b == "to" or float(a) == pytest.approx(float(b), rel=2e-2, abs=2e-4), mine[0]
    assert not weights(one / "last").keys() ^ weights(tiny_model).keys() or "lora" in kind
