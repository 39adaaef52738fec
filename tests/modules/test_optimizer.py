"""The optimiser and the schedule of LitDPO: the default rate, and functions in their places."""

from __future__ import annotations

import warnings
from functools import partial

import peft
import pytest
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from lit_did import LitDPO
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear"}


def fitted(module: LitDPO, **options):
    run = trainer(**{"max_steps": 1, **options})
    run.fit(module, loader(make_pairs(4), 2), loader(make_pairs(2), 2))
    return run


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-6),
        ({"lora": LORA}, 5e-5),
        ({"loss": "cpo", "lora": LORA}, 5e-5),
        ({"lora": LORA, "learning_rate": 3e-6}, 3e-6),
        ({"learning_rate": 0}, 0.0),
    ],
)
def test_the_learning_rate_fits_what_is_trained(options, rate):
    assert fitted(LitDPO(tiny_llama(), **options)).optimizers[0].param_groups[0]["lr"] == rate


def test_an_adapter_that_is_given_has_an_adapters_rate():
    policy = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**LORA))
    assert fitted(LitDPO(policy)).optimizers[0].param_groups[0]["lr"] == 5e-5


def test_functions_make_the_optimiser_and_its_schedule():
    module = LitDPO(
        tiny_llama(),
        lora=LORA,
        optimizer=partial(SGD, lr=0.5, momentum=0.9),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
    )
    run = fitted(module, max_steps=3, max_epochs=3, accumulate_grad_batches=1)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, SGD)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for n, p in module.policy.named_parameters() if "lora" in n
    }
    assert optimizer.param_groups[0]["lr"] == 0.5**4  # stepped every step, of which an epoch has two


@pytest.mark.filterwarnings("ignore:The learning rate still rises when training ends")
def test_each_may_be_given_without_the_other():
    run = fitted(LitDPO(tiny_llama(), optimizer=partial(SGD, lr=0.5), warmup_steps=4))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25  # before the second step
    run = fitted(LitDPO(tiny_llama(), learning_rate=0.5, lr_scheduler=partial(ConstantLR, factor=0.5)))
    assert isinstance(run.optimizers[0], AdamW)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


def test_a_plateau_is_one_of_what_validation_logs():
    plateau = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=10.0)  # nothing is ever better
    module = LitDPO(tiny_llama(), learning_rate=1e-3, lr_scheduler=plateau)
    run = fitted(module, max_epochs=3, max_steps=-1)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adam"}, TypeError, "`optimizer` to be a function of parameters or None, but got 'adam'"),
        ({"lr_scheduler": 3}, TypeError, "`lr_scheduler` to be a function of the optimiser or None, but got 3"),
        *(
            ({"optimizer": SGD, name: value}, ValueError, f"`{name}` to be .*, because `optimizer` replaces it, but")
            for name, value in (
                ("learning_rate", 1e-3), ("adam_betas", (0.8, 0.9)), ("adam_eps", 1e-6), ("weight_decay", 0.1)
            )
        ),
        *(
            ({"lr_scheduler": ConstantLR, name: value}, ValueError, f"`{name}` to be .*, because `lr_scheduler` repl")
            for name, value in (("warmup_steps", 2), ("schedule", "cosine"))
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        LitDPO(tiny_llama(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda parameters: [parameters]}, "`optimizer` to return a torch.optim.Optimizer, but got"),
        ({"lr_scheduler": lambda optimizer: optimizer}, "`lr_scheduler` to return a torch.optim.lr_scheduler.LRSch"),
    ],
)
def test_functions_that_return_something_else(options, message):
    with pytest.raises(TypeError, match=message):
        fitted(LitDPO(tiny_llama(), **options))


def test_functions_are_wanted_again_to_train_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    functions = {"optimizer": partial(SGD, lr=1e-3), "lr_scheduler": partial(ConstantLR, factor=0.5)}

    def module(**options):
        return LitDPO(tmp_path / "model", lora=LORA, **options)

    run = fitted(module(**functions))
    run.save_checkpoint(tmp_path / "last.ckpt")
    told = r"does not hold the `{}` function of the run .* To resume training, pass it again"
    with (
        pytest.warns(UserWarning, match=told.format("optimizer")),
        pytest.warns(UserWarning, match=told.format("lr_scheduler")),
    ):
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*function of the run.*")
        LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", **functions)
    resumed, data = trainer(max_steps=2), loader(make_pairs(4), 2)
    resumed.fit(module(**functions), data, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 2
    with pytest.raises(ValueError, match="`lr_scheduler` to be the function of the run"):
        trainer(max_steps=2).fit(module(optimizer=functions["optimizer"]), data, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("other", [partial(SGD, lr=1e-3, momentum=0.9), partial(AdamW, lr=1e-3)])
def test_another_optimiser_does_not_resume(tmp_path, other):
    fitted(LitDPO(tiny_llama())).save_checkpoint(tmp_path / "last.ckpt")
    data, name = loader(make_pairs(4), 2), other.func.__name__
    message = rf"AdamW with 2 parameter groups, but got {name} with 1\. Pass the same `optimizer` to resume"
    with pytest.raises(ValueError, match=message):
        trainer(max_steps=2).fit(LitDPO(tiny_llama(), optimizer=other), data, ckpt_path=tmp_path / "last.ckpt")
    module = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=tiny_llama(), optimizer=other)
    trainer(max_steps=1).fit(module, data)  # the remedy


def test_data_without_a_length_are_not_warned_of():
    """Lightning then expects -1 optimiser steps, which are fewer than 0 steps of warmup."""

    class Stream(IterableDataset):
        def __iter__(self):
            yield from loader(make_pairs(4), 2)

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer(max_epochs=1).fit(LitDPO(tiny_llama()), DataLoader(Stream(), batch_size=None))
    assert not [str(w.message) for w in record if "learning rate" in str(w.message)]
