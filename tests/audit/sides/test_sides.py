"""examine_sides on a tiny model: cross-fitting, its figures, and the models that come back unchanged."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import lightning
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import lit_did.audit.sides as sides
from lit_did.audit.report import Estimate, Part
from lit_did.audit.settings import Settings
from lit_did.audit.sides import examine_sides, fitting, prediction
from lit_did.audit.source import AuditData
from lit_did.audit.tokenized import tokenized
from lit_did.models import trial
from lit_did.models.loading import add_lora
from tests.modules.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

SETTINGS = Settings(beta=0.5, num_prompts=2, max_new_tokens=3, progress=False, tokenization={"max_length": 48})


def data(count: int = 24, *, swapped: bool = False) -> AuditData:
    """Chosen completions of a, rejected ones of b: sides that any model tells apart. Or every sixth pair is swapped."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"q{i}", "chosen": "a" * int(rng.integers(4, 9)), "rejected": "b" * int(rng.integers(4, 9))}
        for i in range(count)
    ]
    for row in rows[::6] if swapped else ():
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return AuditData(rows, "pairs")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fitting, "EPOCHS", 4)
    monkeypatch.setattr(fitting, "LEARNING_RATE", 1e-2)


def reference():
    return tiny_llama(vocab_size=257 + 8, eos_token_id=None)


class DoubledLogits(LlamaForCausalLM):
    """A model whose logits are not its output layer's, which only a trial finds out."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 2 * output.logits
        return output


def doubled_logits():
    return DoubledLogits(reference().config).eval()


def examine(pairs, settings, model, policy):
    """examine_sides after the parts that it reads, whose columns come from `score`."""
    examples = list(tokenized(pairs.rows, settings, byte_tokenizer()))
    found = fitting.score(model if policy is None else policy, model, examples, 8)
    parts = {name: Part(name, "", "") for name in ("reference", "policy")}
    for column, side in enumerate(("chosen", "rejected")):
        parts["reference"].columns[f"{side}_reference_logprob"] = found.reference_logprob[:, column].numpy()
        parts["policy"].columns[f"{side}_log_ratio"] = found.log_ratio[:, column].numpy()
    return examine_sides(pairs, settings, byte_tokenizer(), model, policy, parts)


def state(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(type(m), m.training) for m in model.modules()],
        [(name, p.requires_grad, p.device) for name, p in model.named_parameters()],
        model.config.to_dict(),
    )


def same(one, other) -> bool:
    return one[1:] == other[1:] and all(torch.equal(one[0][name], other[0][name]) for name in {**one[0], **other[0]})


def test_folds_keep_prompts_together():
    groups = np.array([0, 1, 2, 0, 3, 1, 4, 5])
    folds = fitting.folds_of(groups, 0)
    assert all(len(set(folds[groups == group])) == 1 for group in range(6))
    assert np.bincount([folds[groups == group][0] for group in range(6)]).tolist() == [3, 3]


def test_an_adapter_never_scores_pairs_that_it_was_fitted_to(quick, monkeypatch):
    fitted, scored, drawn = {}, [], []
    fit, logprobs, sample_did = fitting._fit, fitting._logprobs, prediction.sample_did

    def recorded(module, examples, *rest):
        model = fit(module, examples, *rest)
        fitted[id(model)] = examples
        return model

    def scoring(model, examples, first):
        scored.append((id(model), {e.index for e in examples}))
        return logprobs(model, examples, first)

    def drawing(chosen, rejected, prompt, **options):
        drawn.extend((id(model), prompt) for model in (chosen, rejected))
        return sample_did(chosen, rejected, prompt, **options)

    monkeypatch.setattr(fitting, "_fit", recorded)
    monkeypatch.setattr(fitting, "_logprobs", scoring)
    monkeypatch.setattr(prediction, "sample_did", drawing)
    examine(data(swapped=True), SETTINGS, reference(), None)
    assert len(fitted) == 4
    assert not any(rows & {e.index for e in fitted[model]} for model, rows in scored)
    assert set().union(*(rows for _, rows in scored)) == set(range(24))
    assert len(drawn) == 2 * 2 * SETTINGS.num_prompts
    assert not any(prompt in [e.prompt_ids.tolist() for e in fitted[model]] for model, prompt in drawn)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_side_models_score_whole_completions_and_their_first_tokens(make):
    model = make(vocab_size=257 + 8).double().eval()
    examples = list(tokenized(data(5).rows, SETTINGS, byte_tokenizer()))
    models = [fitting.SideModels(model, model)] * 2
    whole, cut = fitting.held_out_scores(models, examples, np.array([0, 1, 0, 0, 1]), 2, 3)
    for place, example in enumerate(examples):
        for column, ids in enumerate((example.chosen_ids, example.rejected_ids)):
            tokens = torch.tensor([*example.prompt_ids, *ids]).long()
            logits = model(input_ids=tokens[None]).logits[0, len(example.prompt_ids) - 1 : -1]
            values = logits.log_softmax(-1).gather(1, tokens[len(example.prompt_ids) :, None])[:, 0]
            assert whole[:, place, column] == pytest.approx(values.sum().item(), abs=1e-5)
            assert cut[:, place, column] == pytest.approx(values[:3].sum().item(), abs=1e-5)


@pytest.mark.parametrize("with_policy", [False, True])
def test_figures_and_models(quick, with_policy):
    model = reference()
    policy = tiny_llama(1, vocab_size=257 + 8, eos_token_id=None) if with_policy else None
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    before, random = state(model), torch.random.get_rng_state()
    part = examine(data(), SETTINGS, model, policy)
    assert same(before, state(model))
    assert torch.equal(random, torch.random.get_rng_state())
    assert (part.columns["side_margin"] > 0).all()
    assert part.figures["side_accuracy"].value == 1
    # All margins have one sign: k is infinite, and the prediction says why there is none.
    assert part.figures["k"].value == np.inf
    assert part.blocks[-1].text.startswith("No prediction, because the side models are right on every pair cut at 3")
    [finding] = [finding for finding in part.findings if finding.name == "independent_sides"]
    assert finding.sentence.startswith("The side models are right on every pair, so the slope k is not finite")
    assert ("exponent" in part.figures) == with_policy


@pytest.mark.parametrize(("particles", "reliable"), [(64, 2), (16, 0)])  # below 25, no estimate is called reliable
def test_prediction(quick, monkeypatch, particles, reliable):
    monkeypatch.setattr(prediction, "NUM_SAMPLES", particles)
    peft = add_lora(reference(), {"r": 2, "target_modules": "all-linear"})
    before = state(peft)
    part = examine(data(swapped=True), SETTINGS, None, peft)
    assert same(before, state(peft))
    assert 0 < part.figures["k"].value < np.inf
    swapped = part.columns["side_margin"][::6]
    assert (swapped < 0).all()
    assert part.figures["predicted_chosen_change"].value > part.figures["predicted_rejected_change"].value
    assert part.figures["chosen_change"].value == pytest.approx(0, abs=1e-5)  # an adapter that is not trained
    assert 0 < part.figures["predicted_did_entropy"].value < 3 * np.log(265)
    assert {f.name for f in part.findings} >= {"side_accuracy", "independent_sides"}
    assert not any(finding.raised for finding in part.findings)
    assert part.figures["reliable_prompts"] == {"did_entropy": reliable, "log_partition": reliable, "of": 2}
    for block in part.blocks[-3:-1]:
        assert ("Do not rely on these figures" in block.note) == (not reliable)
    samples = part.blocks[-1]
    assert len(samples.items) == 2
    assert set(samples.items[0][1]) == {"predicted policy", "its DID"}


@pytest.mark.parametrize(
    ("k", "says"),
    [
        ((0.3, 0.1, 0.5), "The side models are noisy"),
        ((2.0, 1.1, 2.9), "The sides are not independent, or their models learned too little: k = 2.0"),
        ((0.9, 0.2, 1.6), "There is too little data"),
        ((0.9, 0.7, 1.1), "The sides may be independent"),
        ((-np.inf, np.nan, np.nan), "The side models are wrong on every pair"),
    ],
)
def test_what_the_slope_says(k, says):
    found = sides._findings(Estimate(0.6, 0.55, 0.65, 300), Estimate(*k, 300), {})
    assert found[1].sentence.startswith(says)


@pytest.mark.parametrize(("accuracy", "by_chance"), [((0.6, 0.55, 0.65), False), ((0.55, 0.5, 0.6), True)])
def test_an_accuracy_that_chance_explains_is_called_so(accuracy, by_chance):
    parts = {"data": Part("data", "", "", figures={"baselines": {"longer": Estimate(0.68, 0.6, 0.7, 300)}})}
    [finding] = sides._findings(Estimate(*accuracy, 300), Estimate(np.nan, count=300), parts)
    assert ("which chance explains" in finding.sentence) == by_chance == bool(finding.advice)
    assert "taking the longer side is right in 0.68" in finding.sentence


def test_intervals_stay_within_what_is_possible():
    assert sides._between(0, Estimate(15.0, -41.0, 70.0, 2), 50.0) == (15.0, 0, 50.0, 2)
    assert np.isnan(sides._between(0, Estimate(15.0), 50.0).lower)  # one prompt


def test_too_few_prompts():
    part = examine(data(19), SETTINGS, reference(), None)
    assert not part.figures
    assert "at least 20" in part.blocks[0].text


def test_the_prediction_has_the_slope_of_the_pairs_that_are_cut(quick, monkeypatch):
    """Margins of 3 tokens are smaller than those of whole completions, and right as often: their slope is larger."""
    used = {}
    for name in ("draw", "predicted_change"):
        monkeypatch.setattr(sides, name, recording(getattr(sides, name), used, name))
    part = examine(data(swapped=True), SETTINGS, reference(), None)
    whole, cut = part.figures["k"].value, part.figures["k_of_cut"].value
    assert cut > 1.3 * whole > 0
    assert used == {name: pytest.approx(cut / SETTINGS.beta) for name in ("draw", "predicted_change")}


def recording(function, used, name):
    def recorded(*args, exponent, **options):
        used[name] = exponent
        return function(*args, exponent=exponent, **options)

    return recorded


def test_prompts_without_room_are_not_completed(quick):
    """GPT-2 looks positions up in a table. Pairs that are cut fit, whereas a prompt and its new tokens do not."""
    model = tiny_gpt2(vocab_size=257 + 8, n_positions=20).eval()
    settings = replace(SETTINGS, max_new_tokens=20)
    part = examine(data(swapped=True), settings, model, None)
    assert part.figures["k"].value > 0
    assert "No prompt leaves room for 20 new tokens" in part.blocks[-1].text


@pytest.mark.parametrize(
    ("error", "why"), [(None, "their loss became NaN"), (torch.OutOfMemoryError("CUDA"), "memory ran out")]
)
def test_a_failed_fit_is_a_finding(monkeypatch, error, why):
    model = reference()
    if error is None:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(torch.nan)
    else:
        monkeypatch.setattr(fitting, "_fit", Mock(side_effect=error))
    part = examine(data(), SETTINGS, model, None)
    [finding] = part.findings
    assert finding.sentence.startswith(f"The side models could not be fitted, because {why}")
    assert part.blocks[0].text == finding.sentence
    assert not part.columns


@pytest.mark.parametrize(("make", "has_body"), [(reference, True), (doubled_logits, False)])
def test_one_trial_of_the_longest_batch_is_enough(make, has_body, monkeypatch):
    """Batches differ in length, and both sides together are longer than one."""
    tried = Mock(side_effect=trial._try)
    monkeypatch.setattr(trial, "_try", tried)
    rows = [{"prompt": "q", "chosen": "a" * (5 * i), "rejected": "b" * (40 - 3 * i)} for i in range(1, 13)]
    examples = list(tokenized(AuditData(rows, "pairs").rows, SETTINGS, byte_tokenizer()))
    folds = np.arange(12) % 2
    models = fitting.fit_side_models(make(), examples, folds, batch_size=2, seed=0, progress=False)
    whole, _ = fitting.held_out_scores(models, examples, folds, 2, 3)
    assert tried.call_count == 1
    assert np.isfinite(whole).all()
    for model in (model for fold in models for model in fold):
        assert (trial._known[model].body is not None) == has_body


def test_side_models_share_the_weights_of_the_base(monkeypatch):
    """Lightning moves a module to the CPU after training. Here that copies its weights, as from a GPU it would."""
    monkeypatch.setattr(lightning.LightningModule, "cpu", lambda module: module._apply(torch.clone))
    model = reference()
    examples = list(tokenized(data(4).rows, SETTINGS, byte_tokenizer()))
    models = fitting.fit_side_models(model, examples, np.array([0, 0, 1, 1]), batch_size=2, seed=0, progress=False)
    own = {p.data_ptr() for p in model.parameters()}
    for one in (model for fold in models for model in fold):
        assert {p.data_ptr() for name, p in one.named_parameters() if "lora_" not in name} == own
