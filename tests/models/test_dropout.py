"""Dropout and its like: off under every name, and what is left of it is found and named."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lit_did import LitDPO
from lit_did.models.dropout import active_dropout, random_modules, switch_off_dropout
from tests.models.architectures import build, make_batch

IDS = torch.tensor([[5, 6, 7, 8, 9]])
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 6, "init_std": 0.2}
MODELS = {
    "GPT2": {},
    "SeedOss": {"head_dim": 8},  # residual_dropout, of a module
    "GPTBigCode": {},  # attn_pdrop
    "Starcoder2": {"residual_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1},
    "Falcon": {"hidden_dropout": 0.1},  # read from the configuration
    "OPT": {**OPT, "layerdrop": 0.5, "dropout": 0.0, "attention_dropout": 0.0},
    "Mixtral": {"router_jitter_noise": 0.3},
    "GPTNeoX": {"hidden_dropout": 0.2},
    "Phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "Bloom": {"hidden_dropout": 0.2},
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_switched_off_under_every_name(name):
    model = build(name, **MODELS[name]).train()
    assert random_modules(model, IDS)  # the premise
    switch_off_dropout(model)
    assert random_modules(model, IDS) == []
    assert active_dropout(model) == []
    with torch.no_grad():
        one, other = (model(input_ids=IDS).logits for _ in range(2))
    assert torch.equal(one, other)


class Noisy(LlamaMLP):
    """Draws noise under no name at all."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return nn.functional.dropout(output, 0.5) if self.training else output


def noisy(kind: type[LlamaMLP] = Noisy) -> nn.Module:
    model = build("Llama")
    mlp = kind(model.config)
    mlp.load_state_dict(model.model.layers[1].mlp.state_dict())
    model.model.layers[1].mlp = mlp
    return model


def test_what_is_left_is_named():
    model = noisy().train()
    switch_off_dropout(model)
    assert random_modules(model, IDS) == ["model.layers.1.mlp"]
    assert random_modules(model.eval(), IDS) == []


class Stubborn(Noisy):
    """Keeps its mode."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


class NoisyGradient(LlamaMLP):
    """Draws random numbers in training mode that change its gradient alone."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if not self.training:
            return output
        return torch.where(torch.rand_like(output) > 0.5, output, output.detach())


@pytest.mark.parametrize(
    "lora", [None, {"target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": False}]
)
def test_litdpo_keeps_what_is_left_in_eval_mode(lora):
    def run(model: LlamaForCausalLM, **options) -> tuple[LitDPO, list[str]]:
        module = LitDPO(model, lora=lora, **options).train()
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for _ in range(2):
                module.training_step(make_batch(), 0)
        return module, [str(w.message) for w in record if "in training mode" in str(w.message)]

    for kind in (Noisy, NoisyGradient):
        module, (message,) = run(noisy(kind))
        assert re.search(r"modules of the policy \(1, such as .*\) draw random numbers in training mode", message)
        assert f"model.layers.1.mlp ({kind.__name__})" in message
        quiet = [m for m in module.policy.modules() if not m.training]
        assert [type(m) for m in quiet if isinstance(m, LlamaMLP)] == [kind]
        losses = {module.training_step(make_batch(), 0).item() for _ in range(3)}
        assert len(losses) == 1
    module, (message,) = run(noisy(Stubborn))
    assert re.search(r"modules of the policy \(1, such as .*\) return different outputs for the same input", message)
    assert all(m.training for m in module.policy.modules())
    assert run(build("Llama"))[1] == []
    assert run(noisy(), disable_dropout=False)[1] == []


def test_probing_leaves_random_numbers_and_hooks():
    model = build("GPT2", resid_pdrop=0.5).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    random_modules(model, IDS)
    assert torch.equal(torch.rand(3), expected)
    assert not any(module._forward_hooks for module in model.modules())
