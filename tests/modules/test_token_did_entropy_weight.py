"""LitDPO's `token_did_entropy_weight`: its gradient, and whether it moves the entropy as asked."""

from __future__ import annotations

import math

import lightning
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lit_did import LitDPO, PreferenceDataModule
from lit_did.data import read_pairs
from lit_did.demo import PAIRS
from lit_did.models.smollm2 import smollm2
from tests.modules.tiny import VOCABULARY, collate, loader, make_pairs, tiny_gpt2, tiny_llama, trainer


def rows(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """The log-probabilities [tokens, V] with which `model` predicts a completion."""
    return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.filterwarnings("ignore:At the first step the policy should equal its reference")  # it is not, on purpose
@pytest.mark.parametrize("weight", [-0.5, 2.0])
def test_gradient_is_that_of_the_loss_and_the_entropy(weight):
    pairs, beta = make_pairs(6), 0.3
    policy, reference = tiny_gpt2(0).double(), tiny_gpt2(1).double()
    module = LitDPO(policy, reference, beta=beta, token_did_entropy_weight=weight)
    module.training_step(collate(pairs), 0).backward()
    gradient = [p.grad.clone() for p in policy.parameters()]

    losses, entropies = [], []
    for prompt, *completions in pairs:
        log_ratios = []
        for completion in completions:
            pi, rho = rows(policy, prompt, completion), rows(reference, prompt, completion).detach()
            log_ratios.append((pi - rho).gather(1, torch.tensor(completion)[:, None]).sum())
            log_q = (pi - rho).log_softmax(-1)
            entropies.extend(-(log_q.exp() * log_q).sum(-1))  # one a token: long completions count more
        losses.append((1 + torch.exp(-beta * (log_ratios[0] - log_ratios[1]))).log())
    objective = torch.stack(losses).mean() - weight * torch.stack(entropies).mean()
    for mine, expected in zip(gradient, torch.autograd.grad(objective, list(policy.parameters())), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-9)  # float64 throughout


def test_the_sign_of_the_weight_is_the_direction_of_the_entropy():
    pairs = make_pairs(6)
    final = {}
    for weight in (-0.3, 0.0, 0.3):
        module = LitDPO(tiny_llama(), learning_rate=1e-3, token_did_entropy_weight=weight)
        run = trainer(max_epochs=25)
        run.fit(module, loader(pairs, 6))
        run.validate(module, loader(pairs, 6), verbose=False)
        final[weight] = {name: float(value) for name, value in run.callback_metrics.items()}
    entropies = [values["val/token_did_entropy"] for values in final.values()]
    # 2.57, 3.45 and 3.95 nats when this was written; log 67 = 4.20 at the start
    assert entropies[1] - entropies[0] > 0.1
    assert entropies[2] - entropies[1] > 0.1
    assert entropies[-1] < math.log(VOCABULARY)
    assert all(values["val/loss"] < 0.2 for values in final.values())  # the preferences are learnt all the same


def test_the_logged_loss_stays_the_preference_loss():
    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.minimised = float(outputs["loss"])
            self.logged = {name: float(value) for name, value in trainer.logged_metrics.items()}

    keep = Keep()
    module = LitDPO(tiny_llama(), token_did_entropy_weight=2.0)
    trainer(max_steps=1, callbacks=[keep]).fit(module, loader(make_pairs(3), 3))
    assert keep.logged["train/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert keep.logged["train/token_did_entropy"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert keep.minimised == pytest.approx(math.log(2) - 2 * math.log(VOCABULARY), rel=1e-5)


@pytest.mark.slow
def test_it_moves_a_real_models_entropy():
    rows = [row.pair._asdict() for row in read_pairs(PAIRS)[:4]]
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    final = []
    for weight in (-3.0, 0.0, 3.0):
        data = PreferenceDataModule(rows, tokenizer, val_fraction=0.5, batch_size=2, max_length=64, as_chat=True)
        torch.manual_seed(0)  # of the adapter
        lora = {"r": 8, "target_modules": "all-linear"}
        module = LitDPO(smollm2(), lora=lora, learning_rate=3e-4, token_did_entropy_weight=weight)
        run = trainer(max_steps=8, max_epochs=8, limit_val_batches=0)
        run.fit(module, data)
        final.append(float(run.callback_metrics["train/token_did_entropy"]))
    # 10.713, 10.749 and 10.778 nats when this was written; log V = 10.803 at the start
    assert final[1] - final[0] > 0.01
    assert final[2] - final[1] > 0.01


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"token_did_entropy_weight": math.inf}, "`token_did_entropy_weight` to be finite, but got inf"),
        (ValueError, {"token_did_entropy_weight": math.nan}, "`token_did_entropy_weight` to be finite, but got nan"),
        (
            TypeError,
            {"token_did_entropy_weight": "0.1"},
            "`token_did_entropy_weight` to be an int or a float, but got '0.1'",
        ),
        (
            TypeError,
            {"token_did_entropy_weight": True},
            "`token_did_entropy_weight` to be an int or a float, but got True",
        ),
        (
            ValueError,
            {"token_did_entropy_weight": 0.1, "loss": "simpo"},
            "`token_did_entropy_weight` to be 0 with `loss='simpo'`",
        ),
    ],
)
def test_weights_that_make_no_objective_are_refused(error, options, message):
    with pytest.raises(error, match=message):
        LitDPO(tiny_llama(), **options)
