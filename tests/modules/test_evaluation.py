"""LitDPO under `trainer.test`, and hyperparameters that are plain YAML."""

from __future__ import annotations

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lit_did import LitDPO, LitDPOPG
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
def test_testing_measures_what_validation_does(kind):
    module, pairs = kind(tiny_llama(0), tiny_llama(1)), make_pairs(5)
    run = trainer()
    (tested,) = run.test(module, loader(pairs, 2), verbose=False)
    (validated,) = run.validate(module, loader(pairs, 2), verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == validated
    assert {"test/loss", "test/reward_accuracy", "test/token_did_entropy"} <= tested.keys()


def test_each_test_loader_has_its_own_metrics():
    module, pairs = LitDPO(tiny_llama(0), tiny_llama(1)), make_pairs(5)
    parts = [loader(pairs[:2], 2), loader(pairs[2:], 2)]
    both = trainer().test(module, parts, verbose=False)
    for i, part in enumerate(parts):
        (alone,) = trainer().test(module, part, verbose=False)
        assert both[i]["test/loss/dataloader_idx_" + str(i)] == pytest.approx(alone["test/loss"])


def test_hyperparameters_are_plain_yaml(tmp_path, tiny_model):
    lora = {"r": 2, "target_modules": ("q_proj", "v_proj"), "layers_to_transform": {1, 0}}
    options = {"adam_betas": (0.9, 0.99), "loss": {"sigmoid": 0.8, "sft": 0.2}, "lora": lora, "reference": None}
    module = LitDPO(str(tiny_model), model_kwargs={"dtype": torch.float64}, **options)
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_hyperparams(module.hparams_initial)
    logger.save()
    saved = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert saved["adam_betas"] == [0.9, 0.99]
    assert saved["model_kwargs"] == {"dtype": "float64"}
    assert saved["lora"] == {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]}
    again = LitDPO(**saved)
    again.configure_model()
    assert next(again.policy.parameters()).dtype == torch.float64
    assert again.policy.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert dict(again.hparams) == dict(module.hparams)
