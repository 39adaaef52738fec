"""LitDPO's statistics against a float64 loop over single, unpadded sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lit_did import LitDPO
from tests.modules.tiny import collate, make_pairs, tiny_gpt2, tiny_llama


def log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> float:
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    log_probs = logits.log_softmax(-1)
    start = len(prompt) - 1
    return sum(float(log_probs[start + i, token]) for i, token in enumerate(completion))


class NoLogitsToKeep(nn.Module):
    """A causal model whose forward takes nothing beyond ids and mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_statistics_match_single_unpadded_sequences(make, pairs):
    policy, reference = make(0), make(1)
    module = LitDPO(policy, reference).eval()
    statistics = module.pair_statistics(collate(pairs))
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        for side, completion in ((statistics.chosen, chosen), (statistics.rejected, rejected)):
            assert side.num_tokens[i] == len(completion)
            # float32 through two layers, sums of up to 8 log-probabilities
            expected = log_prob(policy, prompt, completion), log_prob(reference, prompt, completion)
            torch.testing.assert_close(
                torch.stack([side.policy_logprob[i], side.reference_logprob[i]]),
                torch.tensor(expected),
                atol=1e-4,
                rtol=1e-5,
            )
    assert statistics.reward_margin.abs().min() > 1e-3  # the premise: the two models differ on every pair


def test_a_pair_does_not_depend_on_the_batch_around_it(pairs):
    module = LitDPO(tiny_llama(0), tiny_llama(1)).eval()
    together = module.pair_statistics(collate(pairs))
    for i, pair in enumerate(pairs):
        alone = module.pair_statistics(collate([pair]))
        torch.testing.assert_close(alone.chosen.log_ratio[0], together.chosen.log_ratio[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.rejected.kl[0], together.rejected.kl[i], atol=1e-5, rtol=1e-5)


def test_model_without_logits_to_keep(pairs):
    plain = LitDPO(tiny_llama(0), tiny_llama(1)).eval()
    wrapped = LitDPO(NoLogitsToKeep(tiny_llama(0)), NoLogitsToKeep(tiny_llama(1))).eval()
    torch.testing.assert_close(
        wrapped.pair_statistics(collate(pairs)).reward_margin, plain.pair_statistics(collate(pairs)).reward_margin
    )


def test_losses_follow_their_formulas(pairs):
    batch = collate(pairs)
    chosen_tokens, rejected_tokens = ((batch["labels"] != -100).sum(1)).chunk(2)
    for options, formula in (
        ({"loss": "sigmoid"}, lambda c, r: (1 + (-0.3 * (c - r)).exp()).log()),
        (
            {"loss": "robust", "label_smoothing": 0.2},
            lambda c, r: (0.8 * (1 + (-0.3 * (c - r)).exp()).log() - 0.2 * (1 + (0.3 * (c - r)).exp()).log()) / 0.6,
        ),
        ({"loss": "ipo"}, lambda c, r: (c / chosen_tokens - r / rejected_tokens - 1 / 0.6) ** 2),
        ({"loss": "hinge"}, lambda c, r: (1 - 0.3 * (c - r)).clamp(min=0)),
    ):
        module = LitDPO(tiny_llama(0), tiny_llama(1), beta=0.3, **options).eval()
        statistics = module.pair_statistics(batch)
        chosen, rejected = statistics.chosen.log_ratio.double(), statistics.rejected.log_ratio.double()
        torch.testing.assert_close(statistics.loss.double(), formula(chosen, rejected), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(statistics.reward_margin.double(), 0.3 * (chosen - rejected), atol=1e-6, rtol=1e-6)


def test_only_the_policy_gets_a_gradient(pairs):
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    module.pair_statistics(collate(pairs)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.policy.parameters())
    assert all(p.grad is None and not p.requires_grad for p in module.reference.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(pairs):
    gradients = []
    for checkpointing in (False, True):
        module = LitDPO(tiny_llama(0), tiny_llama(1), gradient_checkpointing=checkpointing)
        module.pair_statistics(collate(pairs)).loss.mean().backward()
        assert module.policy.is_gradient_checkpointing == checkpointing
        gradients.append([p.grad for p in module.policy.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


def test_predict_step_leaves_padding_rows_out(pairs):
    module = LitDPO(tiny_llama(0), tiny_llama(1)).eval()
    batch = collate(pairs)
    whole = module.predict_step(batch, 0)
    assert whole.index.tolist() == [-1] * 6
    batch |= {"index": torch.arange(10, 16), "weight": torch.tensor([1.0, 0, 1, 1, 0, 1])}
    kept = module.predict_step(batch, 0)
    assert kept.index.tolist() == [10, 12, 13, 15]
    torch.testing.assert_close(kept.chosen.log_ratio, whole.chosen.log_ratio[[0, 2, 3, 5]])
    torch.testing.assert_close(kept.reward_margin, whole.reward_margin[[0, 2, 3, 5]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("labels"), "hold `labels`"),
        (lambda b: b.update(labels=b["labels"].roll(1, 1)), r"labels that are not shifted"),
        (lambda b: b.update(labels=b["labels"][:, 1:]), r"`labels` to have the shape"),
        (lambda b: b["labels"].fill_(-100), "completion tokens"),
        (lambda b: b.update({k: v[:3] for k, v in b.items()}), r"\[2 pairs, T\]"),
    ],
)
def test_a_batch_in_another_layout_is_refused(spoil, message):
    batch = collate(make_pairs(2))
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        LitDPO(tiny_llama()).pair_statistics(batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "`beta` to be above 0, but got 0"),
        ({"loss": "dpo"}, "`loss` to be one of 'sigmoid', 'robust', .*, but got 'dpo'"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` to be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "`label_smoothing` to be 0 with `loss='ipo'`"),
        ({"gamma": 1.0}, "`gamma` to be None with `loss='sigmoid'`"),
        ({"nll_weight": -1.0, "loss": "cpo"}, "`nll_weight` to be finite and at least 0"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"warmup_steps": 1.5}, "`warmup_steps`"),
        ({"schedule": "step"}, "`schedule` to be one of"),
        ({"backend": "cuda"}, "`backend` to be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LitDPO(tiny_llama(), **arguments)


def test_unfit_models_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="another module than `policy`"):
        LitDPO(model, model)
    with pytest.raises(ValueError, match="policy's vocabulary, 67 entries, but got 68"):
        LitDPO(model, tiny_llama(vocab_size=68))
    with pytest.raises(TypeError, match="`policy` to be a model or its name, but got int"):
        LitDPO(3)
    with pytest.raises(TypeError, match="`reference` to be a model or its name, but got int"):
        LitDPO(model, 3)


def test_tokens_of_another_vocabulary_are_told():
    batch = collate(make_pairs(1))
    batch["input_ids"][0, 0] = 67
    with pytest.raises(ValueError, match="`input_ids` to be below the policy's 67 embeddings, but got 67"):
        LitDPO(tiny_llama()).pair_statistics(batch)
