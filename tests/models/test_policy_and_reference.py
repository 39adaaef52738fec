"""PolicyAndReference against both models' own forward passes, for every kind of reference and form of batch."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers.distributed import DistributedConfig

from lit_did import PolicyAndReference, SequenceStatistics, sequence_statistics
from lit_did.batches.sequences import read_sequences
from lit_did.data.collating import collate_packed
from lit_did.models import policy_and_reference
from lit_did.models.quiet import adapter_off
from lit_did.models.trial import outputs_of
from tests.modules.steps import examples
from tests.modules.tiny import collate, make_pairs, tiny_gpt2, tiny_llama

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def measure(
    policy: nn.Module, reference: nn.Module | None, batch: dict[str, Tensor], *, adapter: str | None = None, **options
) -> SequenceStatistics:
    models = PolicyAndReference(policy, reference, adapter=adapter, freeze=False)
    return models.measure(read_sequences(batch), **options)


def adapted() -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**LORA))


def assert_same(one, other) -> None:
    for name, value in one._asdict().items():
        torch.testing.assert_close(value, getattr(other, name), rtol=1e-4, atol=1e-5, msg=name)


def moved(models: PolicyAndReference) -> PolicyAndReference:
    """A policy that has left its reference."""
    with torch.no_grad():
        for parameter in models.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return models


def kinds() -> dict[str, tuple[PolicyAndReference, nn.Module]]:
    """Each kind of reference, and the model that it is."""
    torch.manual_seed(1)
    own = tiny_llama(0)
    return {
        "a model": (PolicyAndReference(tiny_llama(0), tiny_llama(1)), tiny_llama(1)),
        "a frozen copy": (moved(PolicyAndReference(own)), tiny_llama(0)),
        "the adapter off": (PolicyAndReference(adapted()), tiny_llama(0)),
        "recorded": (PolicyAndReference(tiny_llama(0), Recorded(tiny_llama(1))), tiny_llama(1)),
        "the policy": (PolicyAndReference(own, own), own),
    }


class Recorded:
    """What a model answers, without the model's place in `PolicyAndReference`."""

    def __init__(self, model: nn.Module) -> None:
        self.models = PolicyAndReference(tiny_llama(0), model)

    def outputs(self, sequences, device):
        return self.models.reference_outputs(sequences)


def float64(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the model's own forward pass, padded."""
    return copy.deepcopy(model).double()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def batches() -> dict[str, dict[str, Tensor]]:
    """The same sequences in other forms; of the second, chosen and rejected ones have keys of their own."""
    padded = collate([(list(e.prompt_ids), list(e.chosen_ids), list(e.rejected_ids)) for e in examples(3)])
    unshifted = padded | {"labels": padded["labels"].roll(1, 1)}
    sides = {
        f"{side}_{name}": value[rows]
        for side, rows in (("chosen", slice(3)), ("rejected", slice(3, 6)))
        for name, value in unshifted.items()
    }
    return {"padded": padded, "as transformers": unshifted, "sides": sides, "packed": collate_packed(examples(3))}


@pytest.mark.parametrize("form", ["padded", "as transformers", "sides", "packed"])
@pytest.mark.parametrize("kind", ["a model", "a frozen copy", "the adapter off", "recorded", "the policy"])
def test_statistics_and_gradients_are_those_of_the_models_own_forward_passes(kind, form):
    models, reference = kinds()[kind]
    batch = batches()["padded"]
    policy = copy.deepcopy(models.policy).double()
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        others = float64(reference, batch)
    truth = sequence_statistics(logits, others, batch["labels"], backend="reference")
    statistics = models(batches()[form])
    for name, value in truth._asdict().items():
        torch.testing.assert_close(
            getattr(statistics, name), value, rtol=1e-4, atol=1e-4, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert kind == "the policy" or (statistics.log_ratio.abs() > 1e-2).all()  # the premise
    for one, margin in ((policy, truth.log_ratio), (models.policy, statistics.log_ratio)):
        chosen, rejected = margin.chunk(2)
        trained = [p for p in one.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(-logsigmoid(chosen - rejected).mean(), trained)
        if one is policy:
            expected = gradients
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item() + 1e-9)


def test_a_reference_is_frozen_and_stays_in_eval_mode_unless_it_is_to_stay_as_it_is():
    models = PolicyAndReference(tiny_llama(0).train(), tiny_llama(1).train())
    assert not models.reference.training
    models.train()
    assert models.policy.training
    assert not models.reference.training
    assert not any(p.requires_grad for p in models.reference.parameters())
    models = PolicyAndReference(tiny_gpt2(0), tiny_gpt2(1, resid_pdrop=0.5).train(), freeze=False)
    batch = collate(make_pairs(2))
    assert torch.equal(models(batch).reference_logprob, models(batch).reference_logprob)  # without dropout
    assert models.reference.training
    assert all(p.requires_grad for p in models.reference.parameters())


def test_it_moves_and_is_saved_with_the_module_around_it():
    own = nn.Module()
    own.models = PolicyAndReference(tiny_llama(0), tiny_llama(1))
    names = {name.split(".")[1] for name in own.state_dict()}
    assert names == {"policy", "reference"}
    assert {p.dtype for p in own.double().parameters()} == {torch.float64}
    again = copy.deepcopy(own)
    again.models.load_state_dict(own.models.state_dict())
    assert torch.equal(again.models(collate(make_pairs(2))).log_ratio, own.models(collate(make_pairs(2))).log_ratio)


def test_a_measurement_with_other_options():
    models = PolicyAndReference(tiny_llama(0), tiny_llama(1))
    batch = collate(make_pairs(2))
    labels = batch["labels"].masked_fill(batch["labels"] == -100, -1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (models.policy, models.reference)]
        warm, plain = (sequence_statistics(*logits, batch["labels"], temperature=t) for t in (2.0, 1.0))
    sequences = models.read(batch | {"labels": labels}, ignore_index=-1)
    assert_same(models.measure(sequences, temperature=2.0, backend="reference"), warm)
    assert_same(models.measure(sequences), plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_policy_with_gradient_checkpointing_has_its_attention_back_after_each_pass(use_reentrant):
    policy, seen = tiny_llama(0).train(), []
    policy.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    policy.enable_input_require_grads()
    policy.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: seen.append(policy.config._attn_implementation)
    )
    models = PolicyAndReference(policy, tiny_llama(1))
    plain = PolicyAndReference(tiny_llama(0).train(), tiny_llama(1))
    batch = collate(make_pairs(3))
    log_ratio = models(batch).log_ratio.sum()
    plain(batch).log_ratio.sum().backward()
    assert policy.config._attn_implementation == "sdpa"
    for times in (1, 2):  # a graph that is kept runs the layers again each time
        seen.clear()
        log_ratio.backward(retain_graph=True)
        assert seen == ["lit_did_sdpa"]
        assert policy.config._attn_implementation == "sdpa"
        for one, other in zip(policy.parameters(), plain.policy.parameters(), strict=True):
            torch.testing.assert_close(one.grad, times * other.grad)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PolicyAndReference("gpt2"),
            TypeError,
            "`policy` to be a model, but got str. Load",
        ),
        (lambda: PolicyAndReference(tiny_llama(0), "gpt2"), TypeError, "a method `outputs.*`, but got str. Load a mod"),
        (lambda: PolicyAndReference(tiny_llama(0), freeze=1), TypeError, "`freeze` to be a bool, but got 1"),
        (lambda: PolicyAndReference(tiny_llama(0), padding_free=None), TypeError, "`padding_free` to be a bool"),
        (lambda: PolicyAndReference(tiny_llama(0), share_prompts="no"), TypeError, "`share_prompts` to be a bool"),
        (lambda: PolicyAndReference(tiny_llama(0), ignore_index=0.5), TypeError, "`ignore_index` to be an integer"),
        (lambda: PolicyAndReference(tiny_llama(0), temperature=0), ValueError, "`temperature` to be in"),
        (lambda: PolicyAndReference(tiny_llama(0), backend="cuda"), ValueError, "`backend` to be one of 'auto'"),
        (
            lambda: PolicyAndReference(two_adapters(), adapter=1),
            TypeError,
            "name of an adapter or None, but got int",
        ),
        (lambda: PolicyAndReference(two_adapters(), adapter="old"), ValueError, "'default', 'ref', but got 'old'"),
        (lambda: PolicyAndReference(two_adapters(), adapter="default"), ValueError, "got 'default', which is active"),
        (lambda: PolicyAndReference(tiny_llama(0), tiny_llama(1, vocab_size=68)), ValueError, "vocabulary, 67 entries"),
        (lambda: PolicyAndReference(tiny_llama(0), adapter="ref"), ValueError, "`adapter` to be None unless"),
    ],
)
def test_arguments_out_of_range(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("limit", [1, 20_000])
def test_portions_of_a_batch(limit, monkeypatch):
    batch = collate(make_pairs(5))
    policy, reference = tiny_llama(0), tiny_llama(1)
    whole = measure(policy, reference, batch)
    sizes = []

    def watched(model, layout):
        sizes.append((len(layout.cu_labels) - 1, len(layout.rows) * model.config.vocab_size * 8))  # of both, float32
        return outputs_of(model, layout)

    monkeypatch.setattr(policy_and_reference, "outputs_of", watched)
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


def test_several_active_adapters_are_active_again():
    model = two_adapters()
    model.add_adapter("third", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "third"])
    with adapter_off(model, "ref"):
        assert model.active_adapters == ["ref"]
    assert model.active_adapters == ["default", "third"]


def test_a_wrapped_peft_model_is_its_own_reference():
    batch = collate(make_pairs(3))
    assert_same(PolicyAndReference(nn.DataParallel(adapted()))(batch), PolicyAndReference(adapted())(batch))


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


def test_weights_that_fsdp_keeps_on_the_cpu_do_not_move():
    models = PolicyAndReference(tiny_llama(0), tiny_llama(1))
    models.reference.config.distributed_config = DistributedConfig(fsdp_size=2, fsdp_cpu_offload=True)
    models.to("meta", torch.float64)
    assert {p.device.type for p in models.policy.parameters()} == {"meta"}
    assert {b.device.type for b in models.buffers()} == {"meta"}
    assert {p.device.type for p in models.reference.parameters()} == {"cpu"}
    assert {p.dtype for p in models.parameters()} == {torch.float64}
