"""LitDPO with `reference="adapter"`: training starts at ln 2, and checkpoints keep the adapter that it started from."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lit_did import LitDPO, LitDPOPG, PreferenceDataModule
from lit_did.models.adapters import REFERENCE_ADAPTER, save_policy
from tests.modules.tiny import byte_tokenizer, collate, loader, make_pairs, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with an SFT adapter, and beside it its base model."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama(0).save_pretrained(folder / "base")
    save_policy(sft(folder / "base"), folder / "sft")
    return folder / "sft"


def sft(base: Path | None = None) -> peft.PeftModel:
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**LORA, lora_dropout=0.5))
    model.peft_config["default"].base_model_name_or_path = str(base)
    return model


def adapters(module: LitDPO, name: str) -> dict[str, torch.Tensor]:
    named = module.loaded_models().policy.named_parameters()
    return {n.replace(name, "*"): p.detach().clone() for n, p in named if name in n.split(".")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
def test_training_starts_at_ln_2_and_moves_away_from_the_adapter(saved, kind):
    module = kind(str(saved), "adapter", learning_rate=1e-2)
    run = trainer(max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*At the first step.*")
        run.fit(module, loader(make_pairs(4), 4))
    assert run.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    start = adapters(LitDPO(sft()), "default")
    assert equal(adapters(module, REFERENCE_ADAPTER), start)
    assert not any(torch.equal(value, start[name]) for name, value in adapters(module, "default").items())
    # A second model with the SFT adapter merged into it gives the same.
    merged = sft().merge_and_unload()
    second = LitDPO(copy.deepcopy(module.policy).merge_and_unload(), merged)
    batch = collate(make_pairs(4))
    ours, theirs = (m.eval().pair_statistics(batch).chosen.log_ratio for m in (module, second))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert ours.abs().min() > 1e-3  # the premise
    run.validate(module, loader(make_pairs(4), 4), verbose=False)
    assert run.callback_metrics["val/loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_a_model_has_its_reference_at_once_and_a_path_is_never_an_adapter(tmp_path, monkeypatch):
    assert LitDPO(sft(), "adapter").models.reference_kind == "adapter"
    monkeypatch.chdir(tmp_path)
    tiny_llama(5).save_pretrained("adapter")
    assert LitDPO(sft(), "adapter").reference is None
    for path in (Path("adapter"), "./adapter"):
        module = LitDPO(sft(), path)
        module.configure_model()
        assert torch.equal(module.reference.lm_head.weight, tiny_llama(5).lm_head.weight)


def fit(saved: Path | peft.PeftModel, epochs: int, checkpoint: Path | None = None, **options) -> LitDPO:
    policy = saved if isinstance(saved, peft.PeftModel) else str(saved)
    module = LitDPO(policy, "adapter", learning_rate=1e-2)
    trainer(max_epochs=epochs, **options).fit(module, loader(make_pairs(4), 2), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_run_resumes_with_the_reference_that_it_started_from(saved, tmp_path, overwritten):
    folder = tmp_path / "sft"
    shutil.copytree(saved, folder)
    torch.manual_seed(1)
    straight = fit(folder, 2)
    torch.manual_seed(1)
    half = fit(folder, 1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    names = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in names)
    if overwritten:  # as by an export of the trained policy
        save_policy(half.policy, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The reference's weights differ")
        resumed = fit(folder, 2, tmp_path / "half.ckpt")
        read = LitDPO.load_from_checkpoint(tmp_path / "half.ckpt")
    start = adapters(LitDPO(sft()), "default")
    for module in (straight, half, resumed, read):
        assert equal(adapters(module, REFERENCE_ADAPTER), start)
    assert equal(adapters(read, "default"), adapters(half, "default"))
    assert equal(adapters(resumed, "default"), adapters(straight, "default"))
    assert not equal(adapters(resumed, "default"), adapters(half, "default"))  # the premise


def test_averages_of_weights_leave_the_reference_as_it_was():
    module = fit(sft(), 1, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert equal(adapters(module, REFERENCE_ADAPTER), adapters(LitDPO(sft()), "default"))


def test_a_model_that_was_trained_before_does_not_become_the_reference(saved, tmp_path):
    first = fit(sft(), 1)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    again = LitDPO.load_from_checkpoint(tmp_path / "first.ckpt", policy=first.policy)
    assert equal(adapters(again, REFERENCE_ADAPTER), adapters(LitDPO(sft()), "default"))


@pytest.mark.parametrize(("of_run", "of_module"), [("adapter", None), (None, "adapter")])
def test_another_kind_of_reference_is_warned_of(saved, tmp_path, of_run, of_module):
    module = LitDPO(str(saved), of_run)
    run = trainer(max_steps=1)
    run.fit(module, loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="The reference's weights differ"):
        read = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", reference=of_module)
    assert equal(adapters(read, "default"), adapters(module, "default"))


def test_the_remedy_for_a_trained_adapter_is_named(saved):
    with pytest.warns(UserWarning, match=r"the adapter does not start at zero.*pass `reference=\"adapter\"`"):
        trainer(max_steps=1).fit(LitDPO(str(saved)), loader(make_pairs(2), 2))


def test_a_cached_reference_is_the_adapters(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "ef", "rejected": "g"}]

    def policy(seed: int) -> peft.PeftModel:
        base = tiny_llama(0, vocab_size=len(tokenizer))
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(**LORA))

    def run(seed: int, cache: Path | None, reference: str | None = "adapter") -> float:
        data = PreferenceDataModule(rows, tokenizer, as_chat=False, batch_size=1)
        torch.manual_seed(9)
        run = trainer(max_steps=3)
        run.fit(LitDPO(policy(seed), reference, learning_rate=1e-2, cache_reference=cache), data)
        return run.callback_metrics["train/loss"].item()

    expected = run(1, None)
    assert expected != pytest.approx(math.log(2), abs=1e-3)  # the premise
    for _ in range(2):  # written, and found again
        assert run(1, tmp_path / "cache") == pytest.approx(expected, rel=1e-5)
    for seed, reference in ((2, "adapter"), (1, None)):
        with pytest.raises(ValueError, match="reference"):
            run(seed, tmp_path / "cache", reference)
