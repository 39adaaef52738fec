"""measure: the statistics of whole batches, in portions that fit, and both models as they were."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lit_did import LitDPO
from lit_did.models import measuring
from lit_did.models.measuring import measure
from lit_did.models.quiet import adapter_off
from lit_did.models.trial import outputs_of
from tests.modules.tiny import collate, make_pairs, tiny_gpt2, tiny_llama


def assert_same(one, other) -> None:
    for name, value in one._asdict().items():
        torch.testing.assert_close(value, getattr(other, name), rtol=1e-4, atol=1e-5, msg=name)


def test_it_is_what_litdpo_computes():
    batch = collate(make_pairs(5))
    expected = LitDPO(tiny_llama(0), tiny_llama(1)).eval()(batch)
    assert_same(measure(tiny_llama(0), tiny_llama(1), batch), expected)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_portions_of_a_batch(limit, monkeypatch):
    batch = collate(make_pairs(5))
    policy, reference = tiny_llama(0), tiny_llama(1)
    whole = measure(policy, reference, batch)
    sizes = []

    def watched(model, layout):
        sizes.append((len(layout.cu_labels) - 1, len(layout.rows) * model.config.vocab_size * 8))  # of both, float32
        return outputs_of(model, layout)

    monkeypatch.setattr(measuring, "outputs_of", watched)
    assert_same(measure(policy, reference, batch, max_logits_bytes=limit), whole)
    assert all(rows == 1 or size <= limit for rows, size in sizes)
    assert len(sizes) > 2  # the premise


def test_modes_and_random_numbers_are_kept():
    policy, reference = tiny_gpt2(0, resid_pdrop=0.5).train(), tiny_gpt2(1, resid_pdrop=0.5).train()
    policy.transformer.h[0].eval()
    modes = [[module.training for module in model.modules()] for model in (policy, reference)]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batch = collate(make_pairs(3))
    first = measure(policy, reference, batch)
    assert torch.equal(torch.rand(3), expected)
    assert [[module.training for module in model.modules()] for model in (policy, reference)] == modes
    assert_same(first, measure(policy.eval(), reference.eval(), batch))  # no dropout in either
    assert not any(value.requires_grad for value in first)


def test_position_ids_reach_the_models():
    batch = collate(make_pairs(3))
    moved = batch | {"position_ids": 5 + torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}
    model = tiny_gpt2(0).eval()
    with torch.no_grad():
        logits = model(**{name: value for name, value in moved.items() if name != "labels"}).logits
    expected = logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    expected = (expected * (batch["labels"] != -100)).sum(1)
    torch.testing.assert_close(measure(model, tiny_gpt2(1), moved).policy_logprob, expected)
    assert (measure(model, tiny_gpt2(1), batch).policy_logprob - expected).abs().min() > 1e-3


def test_modes_are_kept_after_an_error():
    policy = tiny_llama(0).train()
    with pytest.raises(IndexError):
        measure(policy, tiny_llama(1), collate(make_pairs(2)) | {"input_ids": torch.full((4, 11), 10**6)})
    assert all(module.training for module in policy.modules())


def two_adapters() -> peft.PeftModel:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(0), config)
    model.add_adapter("ref", config)
    return model


def test_adapters_as_reference():
    batch = collate(make_pairs(3))
    model = two_adapters()
    next(p for n, p in model.named_parameters() if "lora_A.default" in n).requires_grad_(False)  # its owner's choice
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    without, other = measure(model, None, batch), measure(model, None, batch, adapter="ref")
    assert model.active_adapter == "default"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert_same(without, measure(model, tiny_llama(0), batch))
    assert torch.equal(without.policy_logprob, other.policy_logprob)
    with adapter_off(model, "ref"):
        assert model.active_adapter == "ref"
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    expected = logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(other.reference_logprob, (expected * (batch["labels"] != -100)).sum(1))
    assert (without.reference_logprob - other.reference_logprob).abs().min() > 1e-3


def test_wrapped_models_are_seen_through():
    batch = collate(make_pairs(3))
    expected = measure(tiny_llama(0), tiny_llama(1), batch)
    wrapped = nn.DataParallel(tiny_llama(0))  # on a machine without a GPU it only passes on
    assert_same(measure(wrapped, tiny_llama(1), batch), expected)
    compiled = torch.compile(tiny_llama(0), backend="eager")
    assert_same(measure(compiled, tiny_llama(1), batch), expected)


def test_a_batch_without_labels():
    batch = collate(make_pairs(2))
    statistics = measure(tiny_llama(0), tiny_llama(1), batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert statistics.num_tokens.tolist() == [0, 0, 0, 0]


def test_nothing_can_be_the_reference():
    with pytest.raises(ValueError, match="Expected `reference`, or a PeftModel as `policy`"):
        measure(tiny_llama(0), None, collate(make_pairs(2)))
