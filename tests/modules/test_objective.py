"""What LitDPO minimises: mixtures, the SFT term, functions and methods of the user's, and what is logged of each."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from lit_did import LitDPO
from lit_did.functional import preference_loss
from lit_did.models.wrappers import is_peft
from lit_did.modules.objective import Objective
from tests.modules.steps import OPTIMISER, assert_same, loader, make, train
from tests.modules.tiny import collate, make_pairs, tiny_llama, trainer
from tests.modules.tiny import loader as tiny_loader

LORA = {"r": 4, "target_modules": "all-linear"}
MIXTURE = {"sigmoid": 0.8, "sft": 0.2}


def squared(chosen, rejected):
    """A loss that no name stands for, of more than log-ratios."""
    margin = (chosen.log_ratio - rejected.log_ratio) / (chosen.num_tokens + rejected.num_tokens)
    return (margin - 1) ** 2 + 0.01 * chosen.kl


def hinge(chosen, rejected):
    return (1 - 0.1 * (chosen.log_ratio - rejected.log_ratio)).clamp(min=0)


def test_the_short_form_is_the_mixture():
    expected = train(make(loss={"ipo": 1, "sft": 0.3}), loader(8, 4))
    assert_same(train(make(loss="ipo", nll_weight=0.3), loader(8, 4)), expected)


@pytest.mark.parametrize("loss", [MIXTURE, {"simpo": 0.5, "orpo": 0.1, "sft": 0.2}, squared])
def test_validation_weighs_chosen_tokens_alike_whatever_the_batches(loss):
    pairs, free = make_pairs(7), loss is not squared and "simpo" in loss
    module = LitDPO(
        tiny_llama(0), None if free else tiny_llama(1), loss=loss, nll_weight=0.3 if loss is squared else None
    )
    statistics = module.pair_statistics(collate(pairs))
    sft = 0.3 if loss is squared else 0.2
    nll = -statistics.chosen.policy_logprob.sum() / statistics.chosen.num_tokens.sum()
    expected = statistics.preference_loss.mean() + sft * nll
    torch.testing.assert_close(statistics.loss.mean(), expected)
    for size in (7, 3):
        run = trainer()
        run.validate(module, tiny_loader(pairs, size), verbose=False)
        assert run.callback_metrics["val/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("switches", [{}, {"micro_batch_tokens": 1}])
def test_a_function_is_the_loss_by_name(switches):
    expected = train(make(loss="hinge", nll_weight=0.2))
    got = train(make(loss=hinge, nll_weight=0.2, **switches))
    assert expected.logged[0]["train/loss"] != pytest.approx(expected.logged[0]["train/reward_margin"])
    assert_same(got, expected)


class Squared(Objective):
    def __init__(self, **options) -> None:
        super().__init__(**{**options, "loss": squared})


class Overridden(LitDPO):
    objective_class = Squared


@pytest.mark.parametrize("make_module", [lambda **o: make(loss=squared, **o), lambda **o: make(Overridden, **o)])
def test_what_is_logged_is_what_is_minimised(make_module):
    module = make_module(learning_rate=0.0)
    record = train(module, accumulate_grad_batches=2, max_epochs=2)
    pairs = [module.pair_statistics(batch) for batch in loader()]
    expected = torch.cat([squared(p.chosen, p.rejected) for p in pairs]).mean().item()
    assert record.logged[0]["train/loss"] == pytest.approx(expected, rel=1e-5)
    run = trainer()
    run.validate(module, loader(), verbose=False)
    assert run.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)
    module.zero_grad()
    (sum(squared(p.chosen, p.rejected).mean() for p in pairs) / len(pairs)).backward()
    for gradient, parameter in zip(record.gradients[0], module.policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_training_step_that_leaves_litdpos_out_is_refused():
    class Own(LitDPO):
        def training_step(self, batch, batch_idx):
            pairs = self.pair_statistics(batch)
            return -logsigmoid(pairs.reward_margin).mean()

    with pytest.raises(RuntimeError, match=r"`training_step` .*super\(\).training_step.*Pass a function as `loss`"):
        train(make(Own))


def test_a_training_step_may_add_to_litdpos():
    class Doubled(LitDPO):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else 2 * super().training_step(batch, batch_idx)

    plain = train(make(learning_rate=0.0), loader(12))
    for switches in ({}, {"micro_batch_tokens": 1}):
        doubled = train(make(Doubled, learning_rate=0.0, **switches), loader(12))
        for step in (0, 2):
            assert doubled.logged[step]["train/loss"] == pytest.approx(plain.logged[step]["train/loss"], rel=1e-4)
        for one, two in zip(plain.gradients[2], doubled.gradients[2], strict=True):
            torch.testing.assert_close(2 * one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda chosen, rejected: 0.5, TypeError, r"`loss` to return a tensor \[pairs\], but got float"),
        (lambda chosen, rejected: chosen.log_ratio.mean(), ValueError, r"of the shape \(3,\), but got \(\)"),
        (lambda chosen, rejected: chosen.num_tokens * 1.0, ValueError, "with a gradient in the policy, but got one"),
    ],
)
def test_a_function_that_returns_something_else(function, error, message):
    with pytest.raises(error, match=message):
        LitDPO(tiny_llama(), loss=function).pair_statistics(collate(make_pairs(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.1}, "`label_smoothing` to be 0 with a function as `loss`, but got 0.1"),
        ({"gamma": 0.1}, "`gamma` to be None with a function as `loss`, but got 0.1"),
        ({"nll_weight": -1}, "`nll_weight` to be finite and at least 0, but got -1"),
        ({"beta": 0}, "`beta` to be above 0, but got 0"),
    ],
)
def test_options_that_a_function_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        LitDPO(tiny_llama(), loss=squared, **options)


def test_a_mixture_without_a_reference_has_none():
    loss = {"cpo": 0.5, "slic": 0.5}
    module = LitDPO(tiny_llama(), loss=loss)
    assert module.reference is None
    statistics = module.pair_statistics(collate(make_pairs(3)))
    torch.testing.assert_close(
        statistics.loss,
        preference_loss(
            statistics.chosen.policy_logprob,
            statistics.rejected.policy_logprob,
            loss=loss,
            chosen_num_tokens=statistics.chosen.num_tokens,
        ),
    )
    for arguments in ({"reference": tiny_llama(1)}, {"token_did_entropy_weight": 0.1}, {"cache_reference": "folder"}):
        with pytest.raises(ValueError, match=rf"`{next(iter(arguments))}` to be .* with `loss={{'cpo': 0.5"):
            LitDPO(tiny_llama(), loss=loss, **arguments)


def save(path, **options) -> None:
    tiny_llama().save_pretrained(path / "model")
    run = trainer(max_steps=1)
    run.fit(LitDPO(path / "model", lora=LORA, **{**OPTIMISER, **options}), tiny_loader(make_pairs(2), 2))
    run.save_checkpoint(path / "last.ckpt")


def test_a_checkpoint_brings_a_mixture_back(tmp_path):
    save(tmp_path, loss={"sigmoid": 1, "sft": 0.5})
    module = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.hparams.loss == {"sigmoid": 1.0, "sft": 0.5}
    statistics = module.pair_statistics(collate(make_pairs(3)))
    nll = -statistics.chosen.policy_logprob.sum() / statistics.chosen.num_tokens.sum()
    torch.testing.assert_close((statistics.loss - statistics.preference_loss).mean(), 0.5 * nll)
    assert is_peft(module.policy)


def test_a_function_as_loss_is_wanted_again(tmp_path):
    save(tmp_path, loss=squared)
    assert "loss" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    with pytest.raises(ValueError, match=r"`loss` to be the function of the run .*, but got None.*loss=\.\.\."):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt")
    module = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", loss=squared)
    statistics = module.pair_statistics(collate(make_pairs(3)))
    torch.testing.assert_close(statistics.loss, squared(statistics.chosen, statistics.rejected))
