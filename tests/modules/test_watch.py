"""What a training run says of itself: the first step that is not finite, and chosen completions that fell."""

from __future__ import annotations

import math
import warnings

import lightning
import pytest
import torch

from lit_did import LitDPO, LitDPOPG
from lit_did.modules.watch import Watch, count_bad_gradients
from tests.modules.test_intervals import random_pairs
from tests.modules.tiny import loader, make_pairs, tiny_gpt2, tiny_llama, trainer

FELL = "fell steadily"


class Poison(lightning.Callback):
    """Makes something not finite in one optimiser step."""

    def __init__(self, step: int, what: str, value: float = float("nan")) -> None:
        self.step, self.what, self.value = step, what, value

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and self.what == "weights":
            with torch.no_grad():
                next(module.policy.parameters()).fill_(self.value)

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step and self.what == "gradient":
            next(p for p in module.policy.parameters() if p.grad is not None).grad[0] = self.value


class Seen(lightning.Callback):
    """How many steps have ended."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize(("what", "value"), [("weights", torch.nan), ("gradient", torch.nan), ("gradient", torch.inf)])
def test_the_first_step_that_is_not_finite_is_named_by_the_next_log(kind, every, what, value):
    seen = Seen()
    run = trainer(max_epochs=1, log_every_n_steps=every, callbacks=[Poison(1, what, value), seen])
    name = "loss" if what == "weights" else "gradient"
    message = (
        rf"Expected a finite {name} .* first in step 2 of the run \(`trainer.global_step` 1\).*learning rate.*-inf"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.fit(kind(tiny_gpt2(), learning_rate=1e-3), loader(make_pairs(10), 2))
    assert seen.steps == {1: 1, 3: 2, 100: 4}[every]  # steps that ended; the next one is that of the log


def test_nothing_is_read_between_logs(monkeypatch):
    reads = []
    monkeypatch.setattr(Watch, "check", lambda self, trainer: reads.append(trainer.global_step))
    options = {"max_epochs": 2, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    trainer(**options).fit(LitDPO(tiny_gpt2()), loader(make_pairs(12), 2))
    # In every second step and in the last of an epoch, before it is counted, and after the epochs' 3 steps.
    assert reads == [1, 2, 3, 3, 5, 6]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_gradients_of_every_precision(precision):
    run = trainer(max_epochs=1, precision=precision, callbacks=[Poison(1, "gradient")])
    with pytest.raises(FloatingPointError, match="first in step 2 "):
        run.fit(LitDPO(tiny_gpt2(), learning_rate=1e-3), loader(make_pairs(6), 2))


def test_a_logit_of_minus_infinity():
    """At a chosen token the policy's log-probability is -inf, and the loss infinite."""
    policy, data = tiny_llama(), loader(make_pairs(4), 2)
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(67))
    with torch.no_grad():
        policy.lm_head.bias[make_pairs(4)[3][1][0]] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"finite loss .* first in step 2 "):
        trainer(max_epochs=1).fit(LitDPO(policy, tiny_llama()), data)


def test_steps_that_a_gradient_scaler_skips_are_no_error():
    class Scaled(lightning.pytorch.plugins.MixedPrecision):
        """float32 with a scaler, which the CPU has too."""

        def __init__(self):
            super().__init__("bf16-mixed", "cpu")
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)

    run = trainer(max_epochs=1, plugins=[Scaled()], callbacks=[Poison(1, "gradient", torch.inf)])
    module = LitDPO(tiny_gpt2(), learning_rate=1e-3)
    run.fit(module, loader(make_pairs(6), 2))
    assert run.precision_plugin.scaler.get_scale() == 2.0**3  # the premise: the scaler saw it
    assert all(p.isfinite().all() for p in module.policy.parameters())
    run = trainer(max_epochs=1, plugins=[Scaled()], callbacks=[Poison(1, "weights")])
    with pytest.raises(FloatingPointError, match="first in step 2"):
        run.fit(LitDPO(tiny_gpt2(), learning_rate=1e-3), loader(make_pairs(6), 2))


def test_a_later_run_forgets_an_earlier_one():
    module, data = LitDPO(tiny_gpt2(), learning_rate=1e-3), loader(make_pairs(4), 2)
    with pytest.raises(FloatingPointError):
        trainer(max_epochs=1, callbacks=[Poison(0, "gradient", torch.inf)]).fit(module, data)
    for parameter, fresh in zip(module.policy.parameters(), tiny_gpt2().parameters(), strict=True):
        parameter.data.copy_(fresh)
    trainer(max_epochs=1).fit(module, data)


def test_gradients_beside_each_other():
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float16, torch.float32, torch.float64)]
    parameters += [torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.zeros(2))]
    assert count_bad_gradients(parameters) == 0
    for parameter in parameters[:4]:
        parameter.grad = torch.full_like(parameter, 6e4)  # whose norm float16 does not hold
    assert count_bad_gradients(parameters) == 0
    parameters[0].grad[1] = torch.inf
    parameters[2].grad[2] = torch.nan
    assert count_bad_gradients(parameters) == 2


def watched(values: list[float]) -> list[str]:
    watch, pairs = Watch(), random_pairs(2)
    for step, value in enumerate(values):
        for distance in (-1.0, 1.0):  # two micro-batches
            log_ratio = torch.tensor([value + distance, value - 2 * distance])
            watch.add(pairs._replace(chosen=pairs.chosen._replace(log_ratio=log_ratio)))
        watch.end_step(step, torch.tensor(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.warn_if_chosen_fell()
    return [str(w.message) for w in caught]


def test_a_loss_with_another_factor_is_named_by_the_next_log():
    watch, pairs = Watch(), random_pairs(2)
    for step, factor in enumerate([0.5, 0.5, 1.0, 0.5]):
        for _ in range(2):  # batches of a step
            watch.add_factor(torch.tensor(factor), 0.5)
            watch.add(pairs)
        watch.end_step(step, torch.tensor(0))
        assert watch.found() == (step >= 2)
    with pytest.raises(ValueError, match=r"without a factor.* another factor in step 3 of the run\. .*=None"):
        watch.check(trainer())


NOISE = (torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3).tolist()


@pytest.mark.parametrize(
    "values",
    [
        [0.0, -1.0, -2.0, -3.0, -4.0],
        [0.0, -2.0, -4.0, -4.4, -4.6, -4.5, -4.7, -4.9],  # most of it at the start
        [-0.03 * i + noise for i, noise in enumerate(NOISE)],  # under noise as large as the fall
        [1.0 - 0.05 * i for i in range(50)],
    ],
)
def test_a_steady_fall_is_told_once(values):
    (message,) = watched(values)
    assert FELL in message
    assert f"over {len(values)} optimiser steps" in message
    assert "come from the reference or from a similar model" in message
    assert "nll_weight" in message


def test_the_fall_is_that_of_a_straight_line():
    (message,) = watched([1.0 - 0.5 * i for i in range(11)])
    assert "by about 5 nats over 11 optimiser steps to about -4:" in message


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, -5.0],  # too few to call steady
        [0.1 * i for i in range(20)],
        NOISE,
        [-5.0] * 20,
        [-1e-5 * i for i in range(100)],  # rounding
        [20.0 - 0.5 * i for i in range(20)],  # still likelier than under the reference
        [0.0] * 10 + [-3.0] + [0.0] * 10,
        [float("nan")] * 10,
    ],
)
def test_quiet_where_nothing_fell(values):
    assert watched(values) == []


def test_training_that_lowers_both_sides_says_so():
    """Rejected completions that repeat the chosen one take it down with them."""
    pairs = [(prompt, chosen, chosen * 2) for prompt, chosen, _ in make_pairs(4)]

    def fit(**options):
        run = trainer(max_epochs=20)
        run.fit(LitDPO(tiny_gpt2(), learning_rate=1e-3, **options), loader(pairs, 4))
        return run.callback_metrics["train/chosen_log_ratio"]

    with pytest.warns(UserWarning, match=FELL):
        assert fit() < -1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FELL}.*")
        assert fit(nll_weight=1.0) > 0  # the remedy
        LitDPO(tiny_gpt2(), loss="simpo")  # which has no log-ratio
        trainer(max_epochs=6).fit(LitDPO(tiny_gpt2(), loss="simpo", learning_rate=1e-3), loader(pairs, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_warned_of(value):
    class Broken(LitDPO):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pairs = self.pair_statistics(batch)
            loss = torch.full_like(pairs.loss, value)
            self.val_metrics[dataloader_idx].update(pairs._replace(loss=loss, preference_loss=loss))

    data = loader(make_pairs(2), 2)
    with pytest.warns(UserWarning, match=r"`val/loss` is NaN or infinite.*`trainer.predict"):
        trainer(max_epochs=1, num_sanity_val_steps=0).fit(Broken(tiny_gpt2()), data, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*NaN or infinite.*")
        trainer(max_epochs=1, num_sanity_val_steps=0).fit(LitDPO(tiny_gpt2()), data, data)
