"""The reference: which model it is, its mode, and the check that training starts from it."""

from __future__ import annotations

import copy
import math
import warnings

import peft
import pytest
import torch

from lit_did import LitDPO, PreferenceDataModule
from tests.modules.tiny import byte_tokenizer, collate, loader, make_pairs, tiny_gpt2, tiny_llama, trainer

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}


def scramble_adapter(module: LitDPO) -> None:
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


def test_lora_reference_is_the_base_model(pairs):
    base = tiny_llama()
    module = LitDPO(copy.deepcopy(base), lora=LORA, disable_dropout=False)
    scramble_adapter(module)
    statistics = module.train().pair_statistics(collate(pairs))
    truth = LitDPO(copy.deepcopy(base), copy.deepcopy(base)).eval().pair_statistics(collate(pairs))
    # Equal to the bit although the policy is training with dropout: the reference pass is the base model's.
    assert torch.equal(statistics.chosen.reference_logprob, truth.chosen.policy_logprob)
    assert (statistics.chosen.log_ratio.abs() > 1e-2).all()  # the premise: the adapter does something


def test_reference_pass_leaves_every_mode_as_it_was(pairs):
    module = LitDPO(tiny_llama(), lora=LORA).train()
    module.policy.get_input_embeddings().eval()  # a part that its owner wants in eval mode
    before = {name: m.training for name, m in module.policy.named_modules()}
    assert len(set(before.values())) == 2
    loss = module.pair_statistics(collate(pairs)).loss.mean()
    assert {name: m.training for name, m in module.policy.named_modules()} == before
    loss.backward()  # the adapter is on again, with its gradients
    assert all(p.grad is not None for n, p in module.policy.named_parameters() if "lora" in n)


def test_full_policys_reference_is_a_frozen_copy_of_the_start(pairs):
    start = tiny_llama()
    module = LitDPO(copy.deepcopy(start), learning_rate=1e-2)
    trainer(max_epochs=2).fit(module, loader(pairs, 3))
    for now, then in zip(module.reference.parameters(), start.parameters(), strict=True):
        assert torch.equal(now, then)
    assert not any(
        torch.equal(now, then) for now, then in zip(module.policy.parameters(), start.parameters(), strict=True)
    )


@pytest.mark.parametrize("lora", [None, LORA])
def test_modes_during_training_and_after_validation(pairs, lora):
    seen = set()

    class Watch(LitDPO):
        def run_sides(self, *arguments):
            reference = self.reference and self.reference.training
            seen.add((self.trainer.state.stage.value, self.policy.training, reference))
            return super().run_sides(*arguments)

    module = Watch(tiny_gpt2().eval(), lora=lora)  # from_pretrained gives models in eval mode
    trainer(max_epochs=2, num_sanity_val_steps=1, val_check_interval=1).fit(module, loader(pairs, 3), loader(pairs, 6))
    reference = None if lora else False
    assert seen == {
        ("sanity_check", False, reference),
        ("train", True, reference),
        ("validate", False, reference),
    }


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_starts_at_ln_2_without_a_warning(pairs, lora, make):
    module = LitDPO(make(), lora=lora)
    run = trainer(max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*At the first step.*")
        run.fit(module, loader(pairs, 6))
    assert run.callback_metrics["train/loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert run.callback_metrics["train/reward_margin"].item() == pytest.approx(0, abs=1e-6)


def dropping() -> LitDPO:
    return LitDPO(tiny_gpt2(resid_pdrop=0.5), disable_dropout=False)


def other_reference() -> LitDPO:
    return LitDPO(tiny_llama(0), tiny_llama(1))


def trained_adapter() -> LitDPO:
    module = LitDPO(tiny_llama(), lora={"r": 4, "target_modules": "all-linear"})
    scramble_adapter(module)
    return module


def broken_weights() -> LitDPO:
    module = LitDPO(tiny_llama())
    with torch.no_grad():
        module.policy.lm_head.weight[3] = torch.nan
    return module


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (dropping, "dropout is active in .* `disable_dropout=True`, the default, removes it"),
        (other_reference, "the reference has other weights than the policy.* leave `reference` out"),
        (trained_adapter, 'the adapter does not start at zero.* pass `reference="adapter"`'),
    ],
)
def test_another_start_is_warned_of_with_its_cause(pairs, make, cause):
    with pytest.warns(UserWarning, match=f"At the first step the policy should equal its reference, .*{cause}"):
        trainer(max_steps=1).fit(make(), loader(pairs, 6))


def test_the_cause_is_the_same_with_a_reference_cache(tmp_path):
    adapter = {"r": 4, "target_modules": "all-linear"}
    module = LitDPO(tiny_llama(vocab_size=len(TOKENIZER)), lora=adapter, cache_reference=tmp_path / "cache")
    scramble_adapter(module)
    with pytest.warns(UserWarning, match="At the first step .* the adapter does not start at zero"):
        trainer(max_steps=1).fit(module, PreferenceDataModule(ROWS, TOKENIZER, as_chat=False))


def test_weights_that_are_not_finite_are_warned_of_before_the_step_and_end_training(pairs):
    raises = pytest.raises(FloatingPointError, match=r"first in step 1 .*before training")
    with raises, pytest.warns(UserWarning, match=r"every log-ratio is 0, .* hold NaN\. Stop, because (?!.*[Ii]gnore)"):
        trainer(max_steps=1).fit(broken_weights(), loader(pairs, 6))


def test_resuming_does_not_warn(pairs, tmp_path):
    module = LitDPO(tiny_llama(), learning_rate=1e-2)
    run = trainer(max_steps=2)
    run.fit(module, loader(pairs, 3))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*At the first step.*")
        trainer(max_steps=4).fit(LitDPO(tiny_llama()), loader(pairs, 3), ckpt_path=tmp_path / "last.ckpt")


def test_bfloat16_start_is_no_false_alarm(pairs):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*At the first step.*")
        trainer(max_steps=1, precision="bf16-mixed").fit(LitDPO(tiny_llama()), loader(make_pairs(8, seed=3), 8))


def test_an_adapter_whose_reference_would_move_is_refused():
    with pytest.raises(ValueError, match=r"only the adapter of `policy` to be trained.*bias="):
        LitDPO(tiny_gpt2(), lora={"r": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True})
    thawed = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear"))
    thawed.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"other parameters are trained too.*embed_tokens"):
        LitDPO(thawed)
    LitDPO(thawed, tiny_llama())  # with a reference of its own it may
    saved = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    LitDPO(peft.get_peft_model(tiny_llama(), saved))  # peft keeps the original of these


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="adapter inside its layers, such as LoRA, but got PROMPT_TUNING"):
        LitDPO(peft.get_peft_model(tiny_llama(), config))


def test_reference_that_shares_parameters_is_refused():
    base = tiny_llama()
    policy = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="they share parameters"):
        LitDPO(policy, base)
    assert any(p.requires_grad for p in policy.parameters())  # and nothing was frozen on the way


def test_reference_never_drops_anything(pairs):
    base = tiny_gpt2(resid_pdrop=0.5)
    truth = LitDPO(copy.deepcopy(base), copy.deepcopy(base)).eval().pair_statistics(collate(pairs))
    for lora in (None, {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}):
        module = LitDPO(copy.deepcopy(base), lora=lora, disable_dropout=False).train()
        assert module.reference is None or not module.reference.training
        statistics = module.pair_statistics(collate(pairs))
        assert torch.equal(statistics.chosen.reference_logprob, truth.chosen.policy_logprob)
        assert not torch.equal(statistics.chosen.policy_logprob, truth.chosen.policy_logprob)  # the premise
