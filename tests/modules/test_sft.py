"""LitSFT: the loss is transformers' own, on the side that is asked for; it logs, saves, loads and predicts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lit_did import LitSFT
from lit_did.data import collate_packed
from lit_did.data.dataset import Example
from tests.modules.tiny import collate, loader, make_pairs, tiny_llama, trainer

SIDES = ("chosen", "rejected", "both")


def transformers_loss(model, batch, side: str) -> torch.Tensor:
    pairs = len(batch["input_ids"]) // 2
    rows = {"chosen": slice(pairs), "rejected": slice(pairs, None), "both": slice(None)}[side]
    labels = batch["labels"][rows].roll(1, 1)  # transformers shifts them itself
    labels[:, 0] = -100
    output = model(batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows], labels=labels)
    # The same in float64: transformers computes its loss in float32.
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    return loss


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("tokens", [None, 24])
def test_loss_and_gradient_are_those_of_transformers(side, tokens):
    batch = collate(make_pairs(5))
    expected = tiny_llama().double()
    loss = transformers_loss(expected, batch, side)
    loss.backward()
    logged = {}
    step = torch.optim.SGD

    class Recording(LitSFT):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            logged.update({k: float(v) for k, v in self.trainer.callback_metrics.items()})
            self.gradient = [p.grad.clone() for p in self.policy.parameters()]

    module = Recording(tiny_llama().double(), side=side, micro_batch_tokens=tokens, optimizer=lambda p: step(p, lr=0.1))
    trainer(max_steps=1).fit(module, loader(make_pairs(5), 5))
    assert logged["train/nll"] == pytest.approx(loss.item(), rel=1e-6)  # logged in float32
    assert logged["train/loss"] == logged["train/nll"]
    assert logged["train/policy_entropy"] > 0
    for got, parameter in zip(module.gradient, expected.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-12)


def test_packed_batches_and_validation_give_the_same_loss():
    pairs = make_pairs(4)
    arrays = [[torch.tensor(ids).int().numpy() for ids in pair] for pair in pairs]
    # A row of weight 0 only fills the batch.
    arrays.append(arrays[0])
    packed = collate_packed([Example(*ids, index=i, weight=float(i < 4)) for i, ids in enumerate(arrays)])
    model = tiny_llama().double()
    loss = transformers_loss(model, collate(pairs), "rejected").item()
    runner = trainer()
    (metrics,) = runner.validate(LitSFT(model, side="rejected"), DataLoader([packed], batch_size=None), verbose=False)
    assert metrics["val/nll"] == pytest.approx(loss, rel=1e-6)
    assert set(metrics) == {"val/nll", "val/loss", "val/policy_entropy"}


def test_predict_runs_both_sides():
    pairs = make_pairs(3)
    module = LitSFT(tiny_llama(), side="chosen")
    (found,) = trainer().predict(module, loader(pairs, 3))
    both = module.loaded_models().statistics(module.read(collate(pairs)))[0].policy_logprob.detach()
    torch.testing.assert_close(found.chosen.policy_logprob, both[:3])
    torch.testing.assert_close(found.reward_margin, both[:3] - both[3:])


def test_adapter_learns_its_side_and_loads_again(tmp_path):
    pairs = make_pairs(4)
    torch.manual_seed(0)
    module = LitSFT(tiny_llama(), side="rejected", lora={"r": 4, "target_modules": "all-linear"}, learning_rate=1e-2)
    runner = trainer(max_epochs=30, default_root_dir=tmp_path)
    runner.fit(module, loader(pairs, 4))
    after = {side: transformers_loss(module.policy, collate(pairs), side).item() for side in ("chosen", "rejected")}
    assert after["rejected"] < 2.5 < 4 < after["chosen"]  # log 67 is 4.2
    runner.save_checkpoint(tmp_path / "sft.ckpt")
    again = LitSFT.load_from_checkpoint(tmp_path / "sft.ckpt", policy=tiny_llama())
    assert again.side == "rejected"
    assert transformers_loss(again.policy, collate(pairs), "rejected").item() == pytest.approx(after["rejected"])


def test_side_is_checked():
    with pytest.raises(ValueError, match=r"Expected `side` to be .*'chosen'.* but got 'left'"):
        LitSFT(tiny_llama(), side="left")


def test_validation_counts_pairs_for_the_model_card():
    runner = trainer(limit_val_batches=1)
    module = LitSFT(tiny_llama(), side="both")
    runner.validate(module, loader(make_pairs(3), 3), verbose=False)
    assert module._validation["metrics"]["num_pairs"] == [3]
