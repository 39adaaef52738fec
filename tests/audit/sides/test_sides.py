"""examine_sides on a tiny model: cross-fitting, its figures, and the models that come back unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_did.audit.settings import Settings
from lit_did.audit.sides import examine_sides, fitting
from lit_did.audit.source import AuditData
from lit_did.models.loading import add_lora
from tests.modules.tiny import byte_tokenizer, tiny_llama

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
    fitted, scored = {}, []
    fit, score = fitting._fit, fitting.score

    def recorded(start, side, examples, *rest):
        model = fit(start, side, examples, *rest)
        fitted[id(model)] = {e.index for e in examples}
        return model

    def scoring(model, other, examples, size):
        scored.append((id(model), {e.index for e in examples}))
        return score(model, other, examples, size)

    monkeypatch.setattr(fitting, "_fit", recorded)
    monkeypatch.setattr(fitting, "score", scoring)
    examine_sides(data(swapped=True), SETTINGS, byte_tokenizer(), reference(), None, {})
    assert len(fitted) == 4
    by_sides = [(model, rows) for model, rows in scored if model in fitted]
    assert len(by_sides) > 4  # whole pairs, and those that are cut
    assert not any(fitted[model] & rows for model, rows in by_sides)
    assert set().union(*(rows for _, rows in by_sides)) == set(range(24))


@pytest.mark.parametrize("with_policy", [False, True])
def test_figures_and_models(quick, with_policy):
    model = reference()
    policy = tiny_llama(1, vocab_size=257 + 8, eos_token_id=None) if with_policy else None
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    before, random = state(model), torch.random.get_rng_state()
    part = examine_sides(data(), SETTINGS, byte_tokenizer(), model, policy, {})
    assert same(before, state(model))
    assert torch.equal(random, torch.random.get_rng_state())
    assert (part.columns["side_margin"] > 0).all()
    assert part.figures["side_accuracy"].value == 1
    # All margins have one sign: k is infinite, and the prediction says why there is none.
    assert part.figures["k"].value == np.inf
    assert "No prediction" in part.blocks[-1].text
    assert ("exponent" in part.figures) == with_policy


def test_prediction(quick):
    peft = add_lora(reference(), {"r": 2, "target_modules": "all-linear"})
    before = state(peft)
    part = examine_sides(data(swapped=True), SETTINGS, byte_tokenizer(), None, peft, {})
    assert same(before, state(peft))
    assert 0 < part.figures["k"].value < np.inf
    swapped = part.columns["side_margin"][::6]
    assert (swapped < 0).all()
    assert part.figures["predicted_chosen_change"].value > part.figures["predicted_rejected_change"].value
    assert part.figures["chosen_change"].value == pytest.approx(0, abs=1e-5)  # an adapter that is not trained
    assert 0 < part.figures["predicted_did_entropy"].value < 3 * np.log(265)
    assert {f.name for f in part.findings} >= {"side_accuracy", "independent_sides"}
    assert not any(finding.raised for finding in part.findings)
    samples = part.blocks[-1]
    assert len(samples.items) == 2
    assert set(samples.items[0][1]) == {"predicted policy", "its DID"}


def test_too_few_prompts():
    part = examine_sides(data(4), SETTINGS, byte_tokenizer(), reference(), None, {})
    assert not part.figures
    assert "at least 8" in part.blocks[0].text
