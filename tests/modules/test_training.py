"""LitDPO under the Trainer: accumulation, logging, schedules, precision, checkpoints."""

from __future__ import annotations

import copy
import math
import warnings

import lightning
import peft
import pytest
import torch
from torch.utils.data import DataLoader

from lit_did import LitDPO
from tests.modules.tiny import collate, loader, make_pairs, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear"}


class Record(lightning.Callback):
    """Gradients and logged values at every optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.learning_rates: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.policy.parameters() if p.requires_grad])
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.logged) < trainer.global_step:
            self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def test_micro_batches_give_the_gradient_and_the_metrics_of_one_batch():
    pairs = make_pairs(12)
    runs = {}
    for size, accumulate in ((6, 1), (2, 3)):
        record = Record()
        module = LitDPO(tiny_llama(0), tiny_llama(1))
        run = trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[record])
        run.fit(module, loader(pairs, size))
        assert run.global_step == 2
        runs[size] = record
    for large, small in zip(runs[6].gradients[0], runs[2].gradients[0], strict=True):
        torch.testing.assert_close(small, large, atol=1e-6, rtol=1e-4)
    assert runs[6].logged[0].keys() >= {"train/loss", "train/token_did_entropy", "train/kl", "train/reward_accuracy"}
    for name, value in runs[6].logged[0].items():
        assert runs[2].logged[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert runs[6].logged[1]["train/loss"] != pytest.approx(runs[6].logged[0]["train/loss"])  # nothing is carried over


def test_logged_means_are_weighted_by_pairs_and_by_tokens():
    pairs = make_pairs(7)
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    run = trainer()
    run.validate(module, loader(pairs, 4), verbose=False)  # 4 pairs, then 3
    one = module.pair_statistics(collate(pairs))
    logged = run.callback_metrics
    assert logged["val/loss"].item() == pytest.approx(one.loss.mean().item(), rel=1e-5)
    assert logged["val/reward_accuracy"].item() == pytest.approx((one.reward_margin > 0).double().mean().item())
    tokens = torch.cat([one.chosen.num_tokens, one.rejected.num_tokens])
    entropy = torch.cat([one.chosen.token_did_entropy, one.rejected.token_did_entropy])
    assert logged["val/token_did_entropy"].item() == pytest.approx(
        ((entropy * tokens).sum() / tokens.sum()).item(), rel=1e-5
    )
    partition = (
        torch.cat([one.chosen.token_did_log_partition, one.rejected.token_did_log_partition]).sum() / tokens.sum()
    )
    assert logged["val/token_did_log_partition"].item() == pytest.approx(partition.item(), rel=1e-5)
    assert entropy.mean().item() != pytest.approx(logged["val/token_did_entropy"].item(), rel=1e-6)  # the premise


def test_pairs_that_only_fill_a_batch_do_not_count():
    pairs = make_pairs(4)
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    run = trainer()
    weighted = collate(pairs) | {"weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    run.validate(module, DataLoader([weighted], batch_size=None), verbose=False)
    logged = dict(run.callback_metrics)
    run.validate(module, loader(pairs[:3], 3), verbose=False)
    assert logged.keys() == run.callback_metrics.keys()
    for name, value in run.callback_metrics.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_several_validation_loaders_are_logged_apart():
    first, second = make_pairs(3, seed=1), make_pairs(5, seed=2)
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    run = trainer()
    run.validate(module, [loader(first, 2), loader(second, 2)], verbose=False)
    for i, pairs in enumerate((first, second)):
        expected = module.pair_statistics(collate(pairs)).loss.mean().item()
        assert run.callback_metrics[f"val/loss/dataloader_idx_{i}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 0.25, "schedule": "linear"}, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
    ],
)
def test_learning_rate_changes_every_optimiser_step(arguments, expected):
    record = Record()
    module = LitDPO(tiny_llama(), learning_rate=1e-3, **arguments)
    # 2 epochs of 8 micro-batches, 2 a step: 8 optimiser steps
    trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[record]).fit(module, loader(make_pairs(8), 1))
    assert record.learning_rates == pytest.approx([1e-3 * factor for factor in expected])


def test_lora_as_a_configuration_is_that_of_its_arguments():
    given = (LORA, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    shapes = [{n: p.shape for n, p in LitDPO(tiny_llama(), lora=lora).named_parameters()} for lora in given]
    assert shapes[0] == shapes[1]
    assert any("lora_A" in name for name in shapes[0])


def test_optimiser_settings_arrive():
    module = LitDPO(
        tiny_llama(), lora=LORA, learning_rate=3e-4, adam_betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.2
    )
    run = trainer(max_steps=1)
    run.fit(module, loader(make_pairs(2), 2))
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.2)
    names = {id(p): name for name, p in module.policy.named_parameters()}
    assert all("lora" in names[id(p)] for g in optimizer.param_groups for p in g["params"])
    full = trainer(max_steps=1)
    full.fit(LitDPO(tiny_llama(), weight_decay=0.2), loader(make_pairs(2), 2))
    matrices, vectors = full.optimizers[0].param_groups
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert vectors["weight_decay"] == 0


@pytest.mark.parametrize("lora", [None, LORA])
def test_training_raises_the_margin(lora):
    module = LitDPO(tiny_llama(), lora=lora, learning_rate=1e-2)
    pairs = make_pairs(6)
    run = trainer(max_epochs=8)
    run.fit(module, loader(pairs, 3), loader(pairs, 6))
    assert run.callback_metrics["val/reward_margin"] > 0.1
    assert run.callback_metrics["val/loss"] < 0.65
    assert run.callback_metrics["val/kl"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision):
    record = Record()
    module = LitDPO(tiny_llama(0), tiny_llama(1), learning_rate=1e-2)
    trainer(max_epochs=3, precision=precision, callbacks=[record]).fit(module, loader(make_pairs(6), 3))
    exact = Record()
    trainer(max_epochs=3, callbacks=[exact]).fit(
        LitDPO(tiny_llama(0), tiny_llama(1), learning_rate=1e-2), loader(make_pairs(6), 3)
    )
    assert all(torch.isfinite(g).all() for step in record.gradients for g in step)
    # bfloat16 keeps 8 bits: 0.4% a logit, which sums of some 5 tokens and beta = 0.1 make a few hundredths
    assert record.logged[0]["train/loss"] == pytest.approx(exact.logged[0]["train/loss"], abs=0.05)
    assert record.logged[-1]["train/loss"] < record.logged[0]["train/loss"]


@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpoint_holds_what_is_trained_and_resumes_to_the_same_weights(tmp_path, monkeypatch, lora):
    # The schedule's length is the whole run's, as in a run that was interrupted.
    monkeypatch.setattr(lightning.Trainer, "estimated_stepping_batches", property(lambda self: 12))

    def module() -> LitDPO:
        torch.manual_seed(5)  # of the adapter
        return LitDPO(tiny_llama(), lora=lora, learning_rate=1e-2, warmup_steps=2, schedule="linear")

    data = loader(make_pairs(6), 2)
    whole = module()
    trainer(max_epochs=4).fit(whole, data)

    def half_way(epochs: int, **options) -> LitDPO:
        part = module()
        run = trainer(max_epochs=epochs, **options)
        run.fit(part, data, ckpt_path=tmp_path / "half.ckpt" if epochs == 4 else None)
        if epochs == 2:
            run.save_checkpoint(tmp_path / "half.ckpt")
        return part

    half_way(2)
    resumed = half_way(4)
    for a, b in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(a, b)

    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    trained = {n for n, p in whole.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert trained <= state.keys()
    assert not any(name.startswith("models.reference.") for name in state)
    if lora:
        assert all("lora_" in name for name in state)


def test_load_from_checkpoint_by_name_and_by_object(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    module = LitDPO(tmp_path / "model", lora=LORA, learning_rate=1e-2)
    assert module.policy is None  # a sharded strategy creates it where it belongs
    run = trainer(max_steps=2)
    run.fit(module, loader(make_pairs(4), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    batch = collate(make_pairs(3))
    expected = module.eval().pair_statistics(batch).reward_margin
    assert expected.abs().max() > 1e-3

    by_name = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(by_name.pair_statistics(batch).reward_margin, expected)
    by_object = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=tiny_llama()).eval()
    assert torch.equal(by_object.pair_statistics(batch).reward_margin, expected)


def test_a_reference_that_was_given_is_wanted_again(tmp_path):
    batch, run = collate(make_pairs(3)), trainer(max_steps=2)
    module = LitDPO(tiny_llama(0), tiny_llama(1), learning_rate=1e-2)
    run.fit(module, loader(make_pairs(4), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    expected = module.eval().pair_statistics(batch).reward_margin
    with pytest.raises(ValueError, match=r"`reference` to be passed again, because it was a module .*, but got None"):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=tiny_llama(0))
    with pytest.raises(TypeError, match=r"`policy` to be passed again, .*from_checkpoint\(path, policy=\.\.\.\)"):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(TypeError, match="`policy` to be a model or its name, but got int"):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=3)
    loaded = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=tiny_llama(0), reference=tiny_llama(1)).eval()
    assert torch.equal(loaded.pair_statistics(batch).reward_margin, expected)


@pytest.mark.parametrize("kind", ["full", "lora", "reference", "bf16-true"])
def test_loading_warns_of_another_reference_and_of_nothing_else(tmp_path, kind):
    def again(seed: int = 0) -> dict:
        reference = {"reference": tiny_llama(1 + seed)} if kind == "reference" else {}
        return {"policy": tiny_llama(seed), "lora": LORA if kind == "lora" else None, **reference}

    given = again()
    run = trainer(max_steps=2, precision="bf16-true" if kind == "bf16-true" else "32-true")
    run.fit(LitDPO(learning_rate=1e-2, **given), loader(make_pairs(4), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for every LoRA policy
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", **again())
    with pytest.warns(UserWarning, match="reference's weights differ from those of the run"):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", **again(5))
    if kind == "reference":
        with pytest.warns(UserWarning, match="reference's weights differ from those of the run"):
            LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", **{**again(), "reference": tiny_llama(5)})
    if kind in ("full", "bf16-true"):  # trained in place
        with pytest.warns(UserWarning, match="load them again, because training modifies"):
            LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", **given)


def test_a_deeper_policys_checkpoint_is_refused(tmp_path):
    run = trainer(max_steps=1)
    run.fit(LitDPO(tiny_llama()), loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "deep.ckpt")
    with pytest.raises(
        ValueError, match=r"parameters of this policy only, but .* 9 of them.* first is models.policy.model.layers.1"
    ):
        LitDPO.load_from_checkpoint(tmp_path / "deep.ckpt", policy=tiny_llama(num_hidden_layers=1))


def test_a_policy_by_name_is_loaded_when_it_is_first_needed(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    batch = collate(make_pairs(2))
    assert torch.equal(LitDPO(tmp_path)(batch).policy_logprob, LitDPO(tiny_llama())(batch).policy_logprob)


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_model_is_set_after_loading_or_instead_of_the_name(name, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    module, other = LitDPO(tmp_path), tiny_llama(1)
    with pytest.raises(RuntimeError, match=rf"to be loaded before `{name}` is set.* set `given\['{name}'\]`"):
        setattr(module, name, other)
    module.given[name] = other
    module.configure_model()
    assert getattr(module, name) is other
    setattr(module, name, last := tiny_llama(2))
    assert getattr(module, name) is getattr(module.models, name) is last


def test_another_policys_checkpoint_is_refused(tmp_path):
    run = trainer(max_steps=1)
    run.fit(LitDPO(tiny_llama(), lora=LORA), loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(ValueError, match=r"hold the \d+ trained parameters of this policy, but \d+ are missing"):
        trainer(max_steps=2).fit(LitDPO(tiny_llama()), loader(make_pairs(2), 2), ckpt_path=tmp_path / "lora.ckpt")


def test_the_policy_given_is_not_frozen_by_its_reference():
    policy = tiny_llama()
    module = LitDPO(policy)
    assert module.policy is policy
    assert module.reference is not policy
    assert all(p.requires_grad for p in policy.parameters())
    reference = tiny_llama(1)
    before = copy.deepcopy(reference.state_dict())
    trainer(max_epochs=1).fit(LitDPO(tiny_llama(), reference, learning_rate=1e-2), loader(make_pairs(4), 2))
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())


def test_training_without_an_end():
    data = loader(make_pairs(2), 2)
    run = trainer(max_epochs=-1, max_time={"seconds": 1})
    run.fit(LitDPO(tiny_llama(), warmup_steps=2), data)
    assert run.global_step > 0
    for arguments in ({"warmup_steps": 0.1}, {"schedule": "cosine"}):
        with pytest.raises(ValueError, match="but the end of training is not known"):
            trainer(max_epochs=-1, max_time={"seconds": 1}).fit(LitDPO(tiny_llama(), **arguments), data)


def test_nothing_to_train_is_told():
    frozen = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear")).requires_grad_(False)
    with pytest.raises(ValueError, match=r"`policy` to have trainable parameters.*is_trainable=True"):
        trainer(max_steps=1).fit(LitDPO(frozen), loader(make_pairs(2), 2))


def test_configuration_objects_stay_out_of_the_checkpoint(tmp_path):
    lora = {**LORA, "task_type": peft.TaskType.CAUSAL_LM}
    run = trainer(max_steps=1)
    run.fit(LitDPO(tiny_llama(), lora=lora, model_kwargs={"dtype": torch.bfloat16}), loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert "lora" not in saved
    assert saved["model_kwargs"] == {"dtype": "bfloat16"}
    trainer(max_steps=2).fit(
        LitDPO(tiny_llama(), lora=lora), loader(make_pairs(2), 2), ckpt_path=tmp_path / "last.ckpt"
    )


def test_every_step_logs_its_own_loss():
    class Compare(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert trainer.logged_metrics["train/loss"].item() == pytest.approx(outputs["loss"].item(), rel=1e-5)

    run = trainer(max_epochs=2, callbacks=[Compare()])
    run.fit(LitDPO(tiny_llama(0), tiny_llama(1), learning_rate=1e-2), loader(make_pairs(6), 2))
    assert run.global_step == 6


def test_buffers_of_the_reference_stay_out_of_the_checkpoint(tmp_path):
    policy = tiny_llama()
    policy.register_buffer("calibration", torch.ones(3))
    run = trainer(max_steps=1)
    run.fit(LitDPO(policy), loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "models.policy.calibration" in state
    assert not any(name.startswith("models.reference.") for name in state)


def test_an_override_of_configure_model_runs_when_lightning_and_the_module_load_models_only():
    calls = []

    class Sharded(LitDPO):
        def configure_model(self):
            super().configure_model()
            calls.append(self._trainer is not None)

    module = Sharded(tiny_llama())
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, loader(make_pairs(2), 2), loader(make_pairs(2), 2))
    assert calls == [False, True]
