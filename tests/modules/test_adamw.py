"""AdamW: groups by the shapes before sharding, float16's eps, and steps that half precision rounds away."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.utils.data import DataLoader

from lit_did import LitDPO
from lit_did.modules.optimizer import adamw
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer

OPTIONS = {"learning_rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5, "fused": False}


class Flattened(LitDPO):
    """What FSDP 1 makes of parameters before the optimiser sees them: flat shards, behind a wrapper's name."""

    def configure_optimizers(self):
        for module in list(self.policy.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, nn.Parameter(parameter.detach().flatten()[:3].clone()))
        inner = self.policy.model
        del self.policy.model
        wrapper = nn.Module()
        wrapper._fsdp_wrapped_module = inner
        self.policy.model = wrapper
        return super().configure_optimizers()


def groups(module: LitDPO) -> dict[str, float]:
    """The weight decay of every parameter, by name."""
    module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(), estimated_stepping_batches=4)
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(p): n.replace("_fsdp_wrapped_module.", "") for n, p in module.policy.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
def test_flat_shards_are_decayed_as_the_whole_parameters(lora):
    whole = groups(LitDPO(tiny_llama(), lora=lora, weight_decay=0.5))
    assert set(whole.values()) == ({0.5} if lora else {0.0, 0.5})
    assert all((decay == 0) == ("norm" in name) for name, decay in whole.items())
    if lora is None:
        assert groups(Flattened(tiny_llama(), weight_decay=0.5)) == whole


def test_parameters_that_were_joined_are_refused_with_decay():
    flat = FlatParameter(torch.randn(4))
    with pytest.raises(
        ValueError, match=r"FSDP to keep parameters separate with weight_decay=0.5.*use_orig_params=True"
    ):
        adamw({"_flat_param": flat}, dims={}, **OPTIONS)
    adamw({"_flat_param": flat}, dims={}, **{**OPTIONS, "weight_decay": 0.0})


def test_float16_has_an_eps_that_it_holds():
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    with pytest.warns(UserWarning, match=r"adam_eps=1e-08 is too small for float16 weights.*AdamW uses 2.4e-04"):
        optimizer = adamw({"weight": weight}, dims={}, **OPTIONS)
    weight.grad = torch.full_like(weight, 1e-4)  # its square is 0
    optimizer.step()
    assert (1 - weight).abs().max() <= 0.02  # two learning rates; without eps, thousands
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adamw({"w": weight}, dims={}, **{**OPTIONS, "eps": 1e-3}).param_groups[0]["eps"] == 1e-3
        full = adamw({"w": nn.Parameter(torch.ones(4))}, dims={}, **OPTIONS)
    assert full.param_groups[0]["eps"] == 1e-8


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "lora", "warned"),
    [
        (torch.bfloat16, 1e-6, None, True),
        (torch.bfloat16, 1e-3, None, False),
        (torch.float16, 1e-6, None, True),
        (torch.float16, 1e-3, None, False),
        (torch.float32, 1e-6, None, False),
        (torch.float64, 1e-6, None, False),
        (torch.bfloat16, 1e-6, {"r": 2, "target_modules": "all-linear"}, False),  # peft's adapters are float32
    ],
)
def test_steps_that_are_rounded_away_are_warned_of(dtype, learning_rate, lora, warned):
    policy = tiny_llama(initializer_range=0.02).to(dtype)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    module = LitDPO(policy, learning_rate=learning_rate, adam_eps=1e-3, lora=lora, warmup_steps=0.5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(max_steps=2).fit(module, loader(make_pairs(4), 2))
    told = [str(w.message) for w in told if "hardly trains" in str(w.message)]
    assert len(told) == warned
    if warned:
        assert f"weights are {str(dtype)[6:]}, and at the learning rate 1e-06 the updates of " in told[0]
    if not lora and dtype in (torch.bfloat16, torch.float16) and not warned:
        moved = sum((before[name] != p).sum().item() for name, p in policy.named_parameters())
        assert moved > 0.5 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"])
def test_every_precision_fits_validates_predicts_and_resumes(tmp_path, precision):
    def run(epochs: int, **options) -> LitDPO:
        module = LitDPO(tiny_llama(), learning_rate=1e-2, adam_eps=1e-3)
        own = trainer(max_epochs=epochs, precision=precision)
        own.fit(module, loader(make_pairs(4), 2), loader(make_pairs(4, seed=1), 2), **options)
        module.own = own
        return module

    straight, half = run(2), run(1)
    half.own.save_checkpoint(tmp_path / "half.ckpt")
    resumed = run(2, ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    assert not torch.equal(straight.policy.lm_head.weight, half.policy.lm_head.weight)  # the premise
    batches = [
        batch | {"weight": torch.tensor([1.0, 0.0]), "attention_mask": batch["attention_mask"].float()}
        for batch in loader(make_pairs(4, seed=1), 2)
    ]
    weighted = DataLoader(batches, batch_size=None)
    logged = resumed.own.validate(resumed, weighted, verbose=False)[0]
    assert all(torch.isfinite(torch.tensor(value)) for name, value in logged.items())
    predicted = resumed.own.predict(resumed, weighted)
    assert sum(len(pairs.loss) for pairs in predicted) == 2
    assert logged["val/loss"] == pytest.approx(sum(p.loss.mean().item() for p in predicted) / 2, rel=1e-3)
