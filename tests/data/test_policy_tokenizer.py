"""The tokenizer follows the policy: by its name, an adapter's base model, or the name that a model was loaded by."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
from lightning.pytorch import LightningModule

from lit_did import LitDPO, PreferenceDataModule
from tests.modules.tiny import tiny_llama, trainer

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """The folder of an adapter without a tokenizer."""
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(loaded(tiny_model), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def found(module):
    data = PreferenceDataModule(ROWS, max_length=64)
    trainer = {"distributed_sampler_kwargs": None, "progress_bar_callback": None}
    data.trainer = SimpleNamespace(lightning_module=module, **trainer)
    data.setup("fit")
    return data.tokenizer.name_or_path


def test_a_policy_by_name(tiny_model):
    assert found(LitDPO(str(tiny_model))) == str(tiny_model)


def test_a_model_that_was_loaded(tiny_model):
    assert found(LitDPO(loaded(tiny_model), lora=LORA)) == str(tiny_model)


def test_an_adapter_without_a_tokenizer_and_with_one(adapter, tiny_model, tmp_path):
    module = LitDPO(str(adapter))
    assert found(module) == str(tiny_model)
    for file in (*adapter.iterdir(), *tiny_model.glob("tok*")):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert found(LitDPO(str(tmp_path))) == str(tmp_path)


def test_a_given_tokenizer_wins(no_specials, tiny_model):
    data = PreferenceDataModule(ROWS, no_specials)
    data.trainer = SimpleNamespace(lightning_module=LitDPO(str(tiny_model)))
    assert data.tokenizer is no_specials


def test_under_a_trainer(tiny_model):
    data = PreferenceDataModule(ROWS, val=ROWS[:2], test=ROWS[:3], max_length=64, batch_size=2)
    assert "tokenizer=None" in repr(data)
    trainer(max_steps=1).fit(LitDPO(str(tiny_model)), data)
    assert data.tokenizer.name_or_path == str(tiny_model)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "because no Trainer has shown yet which policy it runs"),
        (LightningModule, "because LightningModule has no `policy`"),
        (lambda: LitDPO(tiny_llama()), "because `policy` is a model that was loaded from nowhere"),
    ],
)
def test_where_there_is_none_to_follow(module, message):
    data = PreferenceDataModule(ROWS)
    if module is not None:
        data.trainer = SimpleNamespace(lightning_module=module())
    with pytest.raises(ValueError, match=rf"Expected `tokenizer` to be given, {message}.* Pass `tokenizer`"):
        data.setup("fit")
