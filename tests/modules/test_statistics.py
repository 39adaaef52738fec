"""LitDPO's statistics against a float64 loop over single, unpadded sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

from lit_did import LitDPO
from tests.modules.tiny import collate, make_pairs, tiny_gpt2, tiny_llama, trainer


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


def test_every_batch_is_checked_in_every_step():
    """Not only the first one. tests/batches/test_checks.py has all that is checked."""
    batches = [collate(make_pairs(2)) for _ in range(3)]
    batches[2]["labels"] = batches[2]["labels"].roll(1, 1)
    module = LitDPO(tiny_llama())
    for step in (module, module.pair_statistics, lambda b: module.training_step(b, 0)):
        with pytest.raises(ValueError, match="labels that are not shifted"):
            step(batches[2])
        with pytest.raises(ValueError, match="below the policy's 67 embeddings, but got 70"):
            step(collate([([70], [2], [3])]))
    seen = []

    class Watched(LitDPO):
        def training_step(self, batch, batch_idx):
            result = super().training_step(batch, batch_idx)
            seen.append(batch_idx)
            return result

    with pytest.raises(ValueError, match="labels that are not shifted"):
        trainer(max_epochs=1).fit(Watched(tiny_llama()), DataLoader(batches, batch_size=None))
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, "`weight` of the batch to be a tensor, but got list"),
        ({"weight": torch.ones(4)}, ValueError, r"`weight` to have the shape \[pairs\], \(2,\), but got \(4,\)"),
        ({"index": ["a", "b"]}, TypeError, "`index` of the batch to be a tensor, but got list"),
        ({"index": torch.ones(1)}, ValueError, r"`index` to have the shape \[pairs\], \(2,\), but got \(1,\)"),
    ],
)
def test_weight_and_index_are_checked_where_they_are_used(added, error, message):
    batch = collate(make_pairs(2)) | added
    module = LitDPO(tiny_llama())
    with pytest.raises(error, match=message):
        module.predict_step(batch, 0)
    assert module.training_step(batch, 0).isfinite()


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_pairs_that_do_not_count_need_no_labels_where_weights_are_read(loss):
    batch = collate(make_pairs(2))
    batch["labels"][[1, 3]] = -100
    batch["weight"] = torch.tensor([1.0, 0.0])
    module = LitDPO(tiny_llama(), loss=loss)
    (kept,) = module.predict_step(batch, 0).loss
    assert kept.isfinite()
    with pytest.raises(ValueError, match=r"2 of 4 sequences have none.* The first is sequence"):
        module.training_step(batch, 0)
    batch["weight"] = batch["weight"].flip(0)
    with pytest.raises(ValueError, match=r"2 of 4 sequences have none.* The first is sequence"):
        module.predict_step(batch, 0)


@pytest.mark.parametrize("fill", [-1, -100, 67])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_anything(fill, side):
    batch = collate(make_pairs(3))
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    expected = module(batch)
    if side == "left":
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        batch = {n: torch.stack([row.roll(by) for row, by in zip(v, shifts, strict=True)]) for n, v in batch.items()}
    padding = batch["attention_mask"] == 0
    assert padding.any()
    batch = {n: v if n == "attention_mask" else v.masked_fill(padding, fill) for n, v in batch.items()}
    for one, other in zip(module(batch), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("row", [lambda p: p, lambda p: p[None], lambda p: p.expand(4, -1)])
def test_position_ids_of_one_row_count_for_all(row):
    batch = collate(make_pairs(2))
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    positions = 3 + torch.arange(batch["input_ids"].shape[1])
    counted = module(batch).log_ratio
    expected = module(batch | {"position_ids": positions.repeat(4, 1)}).log_ratio
    assert not torch.equal(counted, expected)  # the premise: they are used
    assert torch.equal(module(batch | {"position_ids": row(positions)}).log_ratio, expected)


def test_positions_that_the_policy_does_not_know_are_warned_of(recwarn):
    batch = collate(make_pairs(1))
    longest = int(batch["attention_mask"].sum(1).max())  # the last token is no input
    LitDPO(tiny_llama(max_position_embeddings=longest - 1))(batch)
    assert not [w for w in recwarn if "max_position_embeddings" in str(w.message)]
    with pytest.warns(UserWarning, match=rf"more than {longest - 2} tokens, .* Lower `max_length` to {longest - 2}"):
        LitDPO(tiny_llama(max_position_embeddings=longest - 2))(batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "`beta` to be above 0, but got 0"),
        ({"loss": "dpo"}, "`loss` to be one of 'sigmoid', .*, but got 'dpo'"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` to be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "`label_smoothing` to be 0 with `loss='ipo'`"),
        ({"gamma": 1.0}, "`gamma` to be None with `loss='sigmoid'`"),
        ({"nll_weight": -1.0, "loss": "cpo"}, "`nll_weight` to be finite and at least 0"),
        ({"warmup_steps": -1}, "`warmup_steps`"),
        ({"warmup_steps": 1.5}, "`warmup_steps`"),
        ({"warmup_steps": float("inf")}, "`warmup_steps`"),
        ({"schedule": "step"}, "`schedule` to be one of"),
        ({"learning_rate": -1e-6}, "`learning_rate` to be finite and at least 0, but got -1e-06"),
        ({"adam_eps": float("nan")}, "`adam_eps` to be finite and at least 0, but got nan"),
        ({"learning_rate": float("inf")}, "`learning_rate` to be finite and at least 0, but got inf"),
        ({"weight_decay": -1}, "`weight_decay` to be finite and at least 0, but got -1"),
        ({"adam_betas": (0.9, 1.0)}, r"`adam_betas` to be in \[0, 1\), but got \(0.9, 1.0\)"),
        ({"cache_reference": ""}, "`cache_reference` to be a folder's path, but got an empty one"),
        ({"backend": "cuda"}, "`backend` to be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LitDPO(tiny_llama(), **arguments)


def test_unfit_models_are_refused():
    model = tiny_llama()
    batch = collate(make_pairs(1))
    for policy, message in (
        (tiny_llama().model, r"that returns `logits` .*, but LlamaModel returned no `logits`"),
        (nn.Linear(2, 2), "that takes `input_ids`, but got Linear"),
        (
            T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            "but got T5ForConditionalGeneration",
        ),
    ):
        with pytest.raises(TypeError, match=f"Expected a causal language model.*{message}"):
            LitDPO(policy)(batch)
    with pytest.raises(TypeError, match=r"`lora` to hold arguments of peft.LoraConfig, but got 'rank'"):
        LitDPO(model, lora={"rank": 4})
    with pytest.raises(FileNotFoundError, match=r"`policy` to be a folder .*, but /nowhere/model is not"):
        LitDPO("/nowhere/model")(batch)
    with pytest.raises(ValueError, match="another module than `policy`"):
        LitDPO(model, model)
    with pytest.raises(ValueError, match="policy's vocabulary, 67 entries, but got 68"):
        LitDPO(model, tiny_llama(vocab_size=68))
    with pytest.raises(TypeError, match="`policy` to be a model or its name, but got int"):
        LitDPO(3)
    with pytest.raises(TypeError, match="`reference` to be a model or its name, but got int"):
        LitDPO(model, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": "0.1"}, "`beta` to be an int or a float, but got '0.1'"),
        ({"label_smoothing": "0.1"}, "`label_smoothing` to be an int or a float, but got '0.1'"),
        ({"lora": True}, "`lora` to be a peft.LoraConfig, its arguments as a dict or None, but got True"),
        ({"lora": 8}, "`lora` to be a peft.LoraConfig"),
        ({"cache_reference": 5}, "`cache_reference` to be a folder's path or None, but got 5"),
        ({"cache_reference": True}, "`cache_reference` to be a folder's path or None, but got True"),
        ({"learning_rate": "1e-6"}, "`learning_rate` to be an int, a float or None, but got '1e-6'"),
        ({"adam_eps": None}, "`adam_eps` to be an int or a float, but got None"),
        ({"weight_decay": True}, "`weight_decay` to be an int or a float, but got True"),
        ({"warmup_steps": "3"}, "`warmup_steps` to be an int or a float, but got '3'"),
        ({"adam_betas": 0.9}, "`adam_betas` to be two numbers, int or float, but got 0.9"),
        ({"adam_betas": (0.9,)}, r"`adam_betas` to be two numbers, int or float, but got \(0.9,\)"),
        ({"adam_betas": (0.9, "x")}, "`adam_betas` to be two numbers, int or float, but got 'x'"),
        ({"disable_dropout": 1}, "`disable_dropout` to be a bool, but got 1"),
        ({"gradient_checkpointing": "yes"}, "`gradient_checkpointing` to be a bool, but got 'yes'"),
        ({"recompute_elementwise": None}, "`recompute_elementwise` to be a bool, but got None"),
        ({"model_kwargs": 3}, "`model_kwargs` to be a dict or None, but got 3"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        LitDPO(tiny_llama(), **arguments)
