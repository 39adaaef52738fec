"""LitDPO with the losses that have no reference: none is loaded, copied, run or pretended."""

from __future__ import annotations

import copy
import math
import warnings

import peft
import pytest
import torch
from torch.nn.functional import softplus

from lit_did import LitDPO
from lit_did.batches.sequences import read_sequences
from lit_did.callbacks import DIDMonitor
from lit_did.functional import REFERENCE_FREE_LOSSES
from lit_did.models import policy_and_reference
from lit_did.models.trial import find
from tests.modules.test_statistics import log_prob
from tests.modules.tiny import collate, loader, make_pairs, tiny_gpt2, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear"}
each = pytest.mark.parametrize("loss", REFERENCE_FREE_LOSSES)


def log_odds(log_p):
    return log_p - torch.log1p(-log_p.exp())


# of log pi of the two completions, their means over tokens, and beta; with the default of gamma
FORMULAS = {
    "slic": lambda c, r, mean_c, mean_r, b: (1 - b * (c - r)).clamp(min=0),
    "cpo": lambda c, r, mean_c, mean_r, b: softplus(-b * (c - r)),
    "simpo": lambda c, r, mean_c, mean_r, b: softplus(0.5 - b * (mean_c - mean_r)),
    "orpo": lambda c, r, mean_c, mean_r, b: b * softplus(log_odds(mean_r) - log_odds(mean_c)),
}


def loss_of(loss: str, beta: float, chosen, rejected, chosen_tokens, rejected_tokens):
    """[pairs] with the SFT term of all but "simpo": each pair's share of a mean over all chosen tokens."""
    preference = FORMULAS[loss](chosen, rejected, chosen / chosen_tokens, rejected / rejected_tokens, beta)
    return preference if loss == "simpo" else preference - chosen / chosen_tokens.double().mean()


def truth(model, pairs, loss: str, beta: float) -> dict[str, torch.Tensor]:
    """In float64, one unpadded sequence at a time: [pairs] each."""
    chosen, rejected = (
        torch.tensor([log_prob(model, pair[0], pair[side]) for pair in pairs], dtype=torch.float64) for side in (1, 2)
    )
    tokens = [torch.tensor([len(pair[side]) for pair in pairs]) for side in (1, 2)]
    compared = (chosen / tokens[0], rejected / tokens[1]) if loss in ("simpo", "orpo") else (chosen, rejected)
    return {
        "loss": loss_of(loss, beta, chosen, rejected, *tokens),
        "reward_margin": beta * (compared[0] - compared[1]),
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
    }


@each
def test_statistics_are_the_policys_and_all_else_is_nan(loss, pairs):
    module = LitDPO(tiny_llama(), loss=loss, beta=0.3).eval()
    statistics = module.pair_statistics(collate(pairs))
    expected = truth(tiny_llama(), pairs, loss, 0.3)
    got = {
        "loss": statistics.loss,
        "reward_margin": statistics.reward_margin,
        "chosen_logprob": statistics.chosen.policy_logprob,
        "rejected_logprob": statistics.rejected.policy_logprob,
    }
    for name, value in got.items():
        # float32 through two layers, sums of up to 8 log-probabilities
        torch.testing.assert_close(value.double(), expected[name], atol=1e-4, rtol=1e-5)
    measured = LitDPO(tiny_llama(), tiny_llama(1)).eval().pair_statistics(collate(pairs))
    for side, of_two in ((statistics.chosen, measured.chosen), (statistics.rejected, measured.rejected)):
        for name, value in side._asdict().items():
            if name in ("policy_logprob", "policy_entropy", "num_tokens"):
                torch.testing.assert_close(value, getattr(of_two, name))
            else:
                assert value.isnan().all(), name


@each
def test_gradients_are_those_of_the_formula(loss, pairs):
    module = LitDPO(tiny_llama(), loss=loss, beta=0.3)
    module.pair_statistics(collate(pairs)).loss.mean().backward()
    model = tiny_llama().double()
    batch = collate(pairs)
    log_probs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    counts = batch["labels"] != -100
    per_token = log_probs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0] * counts
    loss_of(loss, 0.3, *per_token.sum(1).chunk(2), *counts.sum(1).chunk(2)).mean().backward()
    for ours, theirs in zip(module.policy.parameters(), model.parameters(), strict=True):
        # float32 through two layers and back
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-3)


@each
@pytest.mark.parametrize("lora", [None, LORA])
def test_nothing_is_copied_and_one_forward_pass_is_run(loss, lora, pairs, monkeypatch):
    def never(*_):
        raise AssertionError("the adapter was switched off")

    monkeypatch.setattr(policy_and_reference, "adapter_off", never)
    # Without the two passes that look for noise.
    module = LitDPO(tiny_llama(), loss=loss, lora=lora, disable_dropout=False)
    assert module.reference is None
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.policy.parameters())
    for batch in loader(pairs, 3):
        find(module.policy, read_sequences(batch))  # tried in passes of its own
    passes = []
    module.policy.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*At the first step.*")
        trainer(max_epochs=1).fit(module, loader(pairs, 3))
    assert len(passes) == 2  # steps


def test_a_reference_is_refused():
    for reference, name in ((tiny_llama(1), "LlamaForCausalLM"), ("some/model", "some/model")):
        with pytest.raises(ValueError, match=rf"`reference` to be None with `loss='cpo'`, .* but got {name}"):
            LitDPO(tiny_llama(), reference, loss="cpo")


@each
def test_what_is_logged(loss, pairs):
    module = LitDPO(tiny_llama(), loss=loss, beta=0.3, learning_rate=0.0)
    run = trainer(max_steps=1)
    run.fit(module, loader(pairs, 6), loader(pairs, 4))  # validated in uneven batches
    expected = {name: value.mean().item() for name, value in truth(tiny_llama(), pairs, loss, 0.3).items()}
    margins = truth(tiny_llama(), pairs, loss, 0.3)["reward_margin"]
    expected["reward_accuracy"] = (margins > 0).double().mean().item()
    assert 0 < expected["reward_accuracy"] < 1  # the premise
    statistics = module.pair_statistics(collate(pairs))
    tokens = torch.cat([statistics.chosen.num_tokens, statistics.rejected.num_tokens])
    entropy = torch.cat([statistics.chosen.policy_entropy, statistics.rejected.policy_entropy])
    expected["policy_entropy"] = ((entropy * tokens).sum() / tokens.sum()).item()
    for prefix in ("train/", "val/"):
        logged = {n.removeprefix(prefix): v.item() for n, v in run.callback_metrics.items() if n.startswith(prefix)}
        # the margin is a difference of sums of some 15 nats, each good to 1e-5
        assert logged == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in expected.items()}


@each
@pytest.mark.parametrize("lora", [None, LORA])
def test_training_raises_the_margin(loss, lora):
    pairs = make_pairs(6)
    module = LitDPO(tiny_llama(), loss=loss, lora=lora, learning_rate=1e-2)
    run = trainer(max_epochs=8)
    run.validate(module, loader(pairs, 6), verbose=False)
    before = dict(run.callback_metrics)
    run.fit(module, loader(pairs, 3), loader(pairs, 6))
    after = run.callback_metrics
    assert after["val/loss"] < before["val/loss"]
    assert after["val/reward_margin"] > before["val/reward_margin"] + 0.05
    assert after["val/chosen_logprob"] > before["val/chosen_logprob"]


def test_options_arrive(pairs):
    batch = collate(pairs)
    plain = LitDPO(tiny_llama(), loss="simpo", beta=2.0, gamma=0.0).eval().pair_statistics(batch)
    torch.testing.assert_close(plain.loss, softplus(-plain.reward_margin))
    weighted = LitDPO(
        tiny_llama(), loss="simpo", beta=2.0, gamma=1.5, nll_weight=0.7, label_smoothing=0.1
    ).eval().pair_statistics(batch)  # fmt: skip
    m = weighted.reward_margin - 1.5
    nll = -weighted.chosen.policy_logprob / weighted.chosen.num_tokens.float().mean()
    torch.testing.assert_close(weighted.loss, 0.9 * softplus(-m) + 0.1 * softplus(m) + 0.7 * nll)


def test_predict_step_leaves_padding_rows_out(pairs):
    module = LitDPO(tiny_llama(), loss="orpo").eval()
    batch = collate(pairs)
    whole = module.predict_step(batch, 0)
    kept = module.predict_step(batch | {"index": torch.arange(6), "weight": torch.tensor([1.0, 0, 1, 1, 0, 1])}, 0)
    assert kept.index.tolist() == [0, 2, 3, 5]
    torch.testing.assert_close(kept.preference_loss, whole.preference_loss[[0, 2, 3, 5]])
    tokens = kept.chosen.num_tokens  # of the pairs that count
    nll = -kept.chosen.policy_logprob.sum() / tokens.sum()
    torch.testing.assert_close(kept.loss.mean(), kept.preference_loss.mean() + nll)
    assert tokens.float().mean() != whole.chosen.num_tokens.float().mean()  # the premise
    assert kept.rejected.kl.shape == (4,)


def test_a_checkpoint_brings_loss_and_options_back(tmp_path, pairs):
    tiny_llama().save_pretrained(tmp_path / "model")
    module = LitDPO(tmp_path / "model", loss="simpo", gamma=1.2, nll_weight=0.3, lora=LORA, learning_rate=1e-2)
    assert module.policy is None
    run = trainer(max_steps=2)
    run.fit(module, loader(pairs, 3))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert again.reference is None
    batch = collate(pairs)
    assert torch.equal(again.pair_statistics(batch).loss, module.eval().pair_statistics(batch).loss)


def test_an_adapter_may_be_what_no_reference_could_be(pairs):
    base = tiny_gpt2()
    lora = {"r": 2, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}
    module = LitDPO(base, loss="cpo", lora=lora, learning_rate=1e-2)
    biases = {n: p.clone() for n, p in module.policy.named_parameters() if n.endswith(".bias")}
    trainer(max_steps=1).fit(module, loader(pairs, 6))
    assert any(not torch.equal(p, biases[n]) for n, p in module.policy.named_parameters() if n in biases)


@pytest.mark.parametrize("options", [{"loss": "cpo"}, {"reference": tiny_llama(1)}])
def test_virtual_tokens_are_refused_with_or_without_a_reference(options):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="adapter inside its layers, such as LoRA, but got PROMPT_TUNING"):
        LitDPO(peft.get_peft_model(tiny_llama(), config), **options)


@pytest.mark.parametrize("lora", [None, LORA])
def test_did_monitor_measures_against_a_reference_all_the_same(lora, pairs):
    """Which the loss does not have: it is given, or the policy with its adapter off."""
    monitor = DIDMonitor(reference=None if lora else tiny_llama(), every_n_steps=1)
    module = LitDPO(tiny_llama(), loss="cpo", lora=lora, learning_rate=1e-2)
    run = trainer(max_epochs=2, callbacks=[monitor])
    run.fit(module, loader(pairs, 6), loader(pairs, 6))
    truth = LitDPO(module.policy, None if lora else tiny_llama()).eval().pair_statistics(collate(pairs))
    expected = truth.reward_margin.mean().item()
    assert expected > 0.05  # the premise: the policy has moved
    assert run.callback_metrics["did/val/reward_margin"].item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_with_a_reference_still_has_one(pairs):
    """The other side of `test_nothing_is_copied_and_one_forward_pass_is_run`."""
    policy = tiny_llama()
    module = LitDPO(copy.deepcopy(policy), loss="robust", label_smoothing=0.1)
    statistics = module.pair_statistics(collate(pairs))
    assert module.reference is not None
    assert statistics.loss.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-6)
