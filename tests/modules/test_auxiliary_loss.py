"""Mixtures of experts: their load-balancing loss is added where the configuration asks for it, as transformers does."""

from __future__ import annotations

import warnings

import pytest
import torch

from lit_did import LitDPO, LitDPOPG
from tests.models.architectures import build, make_batch
from tests.modules.steps import OPTIMISER, loader, train

EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def mixture(name: str = "Mixtral", coefficient: float = 3.0, **more):
    options = {**EXPERTS[name], "output_router_logits": True, "router_aux_loss_coef": coefficient, **more}
    return build(name, **options)


def given(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}])
def test_value_and_gradient(name, lora):
    policy, batch = mixture(name), make_batch()
    reference = None if lora else build(name, seed=1, **EXPERTS[name])
    module, without, plain = (
        LitDPO(model, reference, lora=lora).eval() for model in (policy, mixture(name, 0.0), mixture(name))
    )
    for other in (without, plain):
        other.policy.load_state_dict(module.policy.state_dict())
    plain = plain.policy
    auxiliary = 3.0 * plain(**given(batch)).aux_loss
    assert auxiliary > 0.1  # the premise
    pairs, expected = module.pair_statistics(batch), without.pair_statistics(batch)
    torch.testing.assert_close(pairs.loss, expected.loss + auxiliary)
    torch.testing.assert_close(pairs.preference_loss, pairs.loss)
    torch.testing.assert_close(pairs.chosen.log_ratio, expected.chosen.log_ratio, rtol=1e-4, atol=1e-4)
    trained = [name for name, p in module.policy.named_parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(loss, [m.get_parameter(n) for n in trained], allow_unused=True, materialize_grads=True)
        for loss, m in ((pairs.loss.mean(), module.policy), (expected.loss.mean(), without.policy), (auxiliary, plain))
    ]
    for ours, preference, balance in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, preference + balance, rtol=1e-3, atol=1e-5)
    assert any(balance.abs().max() > 1e-4 for balance in gradients[2])


@pytest.mark.parametrize("micro_batch_tokens", [None, 60])
def test_it_is_logged_and_trained(micro_batch_tokens):
    runs = {}
    for coefficient in (0.0, 3.0):
        policy = build("Mixtral", vocab_size=67, output_router_logits=True, router_aux_loss_coef=coefficient)
        module = LitDPO(
            policy, build("Mixtral", vocab_size=67, seed=1), micro_batch_tokens=micro_batch_tokens, **OPTIMISER
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs[coefficient] = train(module, loader(4, 2))
    first, second = (run.logged[0]["train/loss"] for run in runs.values())
    assert 1.0 < second - first < 12.0  # 3 times a loss that is at least 1 for two experts of which one is taken
    gates = [i for i, g in enumerate(runs[0.0].gradients[0]) if not torch.equal(g, runs[3.0].gradients[0][i])]
    assert gates


def test_a_loss_of_the_model_that_has_no_coefficient_is_left_out():
    module = LitDPO(mixture(coefficient=0.0))
    assert module.pair_statistics(make_batch()).loss.mean().item() == pytest.approx(0.6931, abs=1e-3)


def test_projected_gradients_refuse_it():
    with pytest.raises(ValueError, match=r"without an auxiliary loss with LitDPOPG.*`output_router_logits=True`"):
        LitDPOPG(mixture()).pair_statistics(make_batch())
