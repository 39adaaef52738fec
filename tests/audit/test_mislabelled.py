"""examine_labels: planted swaps are ranked and counted, clean labels raise nothing; noise model against brute force."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import optimize, special
from scipy.stats import chi2

from lit_did.audit.label_noise import fit_label_noise
from lit_did.audit.mislabelled import examine_labels
from lit_did.audit.reference import cost, examine_reference
from lit_did.audit.report import Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import area_under_curve
from lit_did.audit.wording import percent
from tests.modules.tiny import byte_tokenizer, tiny_llama

SETTINGS = Settings(batch_size=64, progress=False)
VOCABULARY = ["red", "hot", "old", "big", "sad", "fun", "dry", "wet", "shy", "raw", "odd", "new"]
VOCABULARY += sorted({a + b + c for a in "bdgklm" for b in "aeiou" for c in "npst"})


def noisy_scores(seed, count=1000, share=0.05, noise=0.5):
    generator = np.random.default_rng(seed)
    scores = np.abs(generator.normal(size=count)) * 3 + noise * generator.normal(size=count)
    return np.where(generator.random(count) < share, -scores, scores)


# ------------------------------------------------------------------------------------------------ the noise model


def negative_log_likelihood(scores, eps, log_slope, log_power):
    scaled = scores / np.sqrt(np.mean(scores**2))
    logits = np.exp(log_slope) * np.sign(scaled) * np.abs(scaled) ** np.exp(log_power)
    return -np.log(eps + (1 - 2 * eps) / (1 + np.exp(-np.clip(logits, -600, 600)))).sum()


def brute_force(scores, eps=None):
    """The lowest negative log-likelihood from many starts, without gradients."""
    low, high = np.log(0.75), np.log(2.5)

    def loss(at):
        value, slope, power = (eps, *at) if eps is not None else (special.expit(at[0]) * 0.45, *at[1:])
        return negative_log_likelihood(scores, value, slope, np.clip(power, low, high))

    starts = [[*([e] if eps is None else []), k, a] for e in (-4, -1) for k in (0, 2) for a in (-0.2, 0, 0.5)]
    options = {"xatol": 1e-7, "fatol": 1e-9, "maxiter": 4000, "maxfev": 4000}
    return min(
        (optimize.minimize(loss, start, method="Nelder-Mead", options=options) for start in starts),
        key=lambda found: found.fun,
    )


@pytest.mark.parametrize(("seed", "share"), [(0, 0.05), (1, 0.15)])
def test_the_fit_equals_brute_force(seed, share):
    scores = noisy_scores(seed, 400, share)
    fit = fit_label_noise(scores, np.arange(len(scores)))
    best = brute_force(scores)
    at = (fit.share.value, np.log(fit.slope), np.log(fit.power))
    assert negative_log_likelihood(scores, *at) == pytest.approx(best.fun, abs=1e-4)
    assert fit.share.value == pytest.approx(0.45 * special.expit(best.x[0]), abs=2e-3)
    half = chi2.ppf(0.95, 1) / 2
    for end in fit.share[1:3]:
        if end == 0:
            assert brute_force(scores, end).fun - best.fun <= half
            continue
        assert brute_force(scores, end).fun - best.fun == pytest.approx(half, abs=0.01)
    statistic = 2 * (brute_force(scores, 0.0).fun - best.fun)
    assert fit.p_value == pytest.approx(chi2.sf(statistic, 1) / 2, rel=0.01)


def test_swap_probability_is_bayes_rule():
    fit = fit_label_noise(noisy_scores(0), np.arange(1000))
    scores = np.array([-3.0, -1.0, 0.0, 1.0, 3.0])
    scaled = scores / fit.scale
    right = 1 / (1 + np.exp(-fit.slope * np.sign(scaled) * np.abs(scaled) ** fit.power))
    eps = fit.share.value
    given = eps * (1 - right) + (1 - eps) * right
    assert np.allclose(fit.label_probability(scores), given)
    assert np.allclose(fit.swap_probability(scores), eps * (1 - right) / given)


def test_swap_probability_ranks_without_a_sign_of_swaps():
    scores = np.concatenate([np.linspace(0.1, 5, 100), [-0.01]])
    fit = fit_label_noise(scores, np.arange(len(scores)))
    assert fit.share.value < 0.5 / len(scores)
    chances = fit.swap_probability(scores)
    assert (np.diff(chances[:20]) < 0).all()
    assert chances[-1] == chances.max()


def test_the_interval_covers_the_share():
    covered = sum(
        fit.share.lower <= 0.08 <= fit.share.upper
        for fit in (fit_label_noise(noisy_scores(s, 600, 0.08), np.arange(600)) for s in range(40))
    )
    assert covered >= 35  # 38 expected


@pytest.mark.long
def test_the_interval_covers_where_whole_prompts_are_swapped():
    """60 prompts of 15 pairs: without regard to prompts, the interval covers in a fifth of the sets."""
    covered = 0
    for seed in range(40):
        generator, prompts = np.random.default_rng(seed), np.repeat(np.arange(60), 15)
        scores = noisy_scores(seed, 900, 0.0) * np.where(generator.random(60) < 0.08, -1, 1)[prompts]
        fit = fit_label_noise(scores, prompts)
        covered += fit.share.lower <= 0.08 <= fit.share.upper
        assert fit.share.count == 60
    assert covered >= 33


def test_copies_of_pairs_say_no_more_than_the_pairs():
    """Each prompt has 4 times the same pair, so interval and tests are those of one pair a prompt."""
    scores = noisy_scores(1, 300, 0.1)
    once, copied = fit_label_noise(scores, np.arange(300)), fit_label_noise(np.repeat(scores, 4), np.arange(1200) // 4)
    assert np.allclose(once.share, copied.share, atol=2e-3)
    assert once.p_value == pytest.approx(copied.p_value, rel=0.05)
    assert np.log(once.p_unrelated) == pytest.approx(np.log(copied.p_unrelated), rel=0.05)


@pytest.mark.parametrize("scores", [np.zeros(100), np.full(100, 2.0), np.repeat([1.0, -1.0], 50)])
def test_scores_without_a_slope(scores):
    fit = fit_label_noise(scores, np.arange(len(scores)))
    assert np.isfinite(fit.share[:3]).all()
    assert fit.p_value > 0.005 or fit.share.lower < 0.01


# ------------------------------------------------------------------------------------------------------------ data sets


def states(model, tokenizer, texts):
    """Of each text after the prompt "say": log p, the mean last hidden state, and the one that predicts its end."""
    ids = [tokenizer("say" + text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    start = len(tokenizer("say")["input_ids"]) - 1
    found = []
    for first in range(0, len(ids), 64):
        batch = torch.zeros(64, max(map(len, ids)), dtype=torch.long)
        for row, own in enumerate(ids[first : first + 64]):
            batch[row, : len(own)] = torch.tensor(own)
        with torch.no_grad():
            output = model(batch, output_hidden_states=True)
        logp = output.logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None])[:, :, 0].numpy()
        hidden = output.hidden_states[-1].numpy()
        for row, own in enumerate(ids[first : first + 64]):
            of = slice(start, len(own) - 1)
            found.append((logp[row, of].sum(), hidden[row, of].mean(0), hidden[row, len(own) - 2]))
    return [np.array(values) for values in zip(*found, strict=True)]


@cache
def models():
    tokenizer = byte_tokenizer()
    return tokenizer, *(
        tiny_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=256).eval() for seed in (0, 1, 2)
    )


def rewards(reward, texts, generator):
    tokenizer, policy, reference, third = models()
    words = [text.split() for text in texts]
    if reward == "words":
        weights = dict(zip(VOCABULARY, generator.normal(size=len(VOCABULARY)), strict=True))
        return np.array([sum(weights[word] for word in of) for of in words])
    if reward == "a few good words":
        good = set(generator.choice(VOCABULARY, 25, replace=False))
        return np.array([np.mean([word in good for word in of]) for of in words])
    if reward == "length":
        return -np.abs(np.array([len(of) for of in words]) - 6.2)
    if reward == "models":
        return states(policy, tokenizer, texts)[0] - states(reference, tokenizer, texts)[0]
    if reward == "other models":
        return states(policy, tokenizer, texts)[0] - states(third, tokenizer, texts)[0]
    kept = states(reference, tokenizer, texts)[("mean state", "end state").index(reward) + 1]
    return kept @ generator.normal(size=kept.shape[1])


@cache
def judged(reward, steepness, share, count, seed=0):
    """Pairs, which are swapped, the difference of rewards in favour of the label, and the parts so far."""
    generator = np.random.default_rng(seed)
    vocabulary, most = (VOCABULARY, 30) if reward == "a few good words" else (VOCABULARY[:12], 9)
    texts = [" ".join(generator.choice(vocabulary, generator.integers(4, most))) for _ in range(2 * count)]
    tokenizer, _, reference, _ = models()
    value = rewards(reward, texts, generator)
    value = value / value.std()
    kept = np.flatnonzero(value[:count] != value[count:])
    texts = [*(texts[i] for i in kept), *(texts[count + i] for i in kept)]
    one, other = value[:count][kept], value[count:][kept]
    count = len(kept)
    right = (
        np.ones(count, bool)
        if steepness is None
        else generator.random(count) < special.expit(steepness * np.abs(one - other))
    )
    swapped = generator.random(count) < share
    first = (one > other) == (right ^ swapped)
    rows, margins = [], np.where(first, one - other, other - one)
    for i in range(count):
        chosen, rejected = (texts[i], texts[count + i]) if first[i] else (texts[count + i], texts[i])
        rows.append({"prompt": "say", "chosen": chosen, "rejected": rejected})
    data = AuditData(rows, "pairs")
    data.__dict__["prompt_groups"] = np.arange(count)  # one prompt would be one group
    lengths = {f"{side}_words": [len(row[side].split()) for row in rows] for side in ("chosen", "rejected")}
    parts = {"data": Part("data", "", "", columns=lengths)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "measure_step", lambda *_: (1.0, 1.0))
        parts["reference"] = examine_reference(data, SETTINGS, tokenizer, reference)
    return data, swapped, margins, parts


def examine(form, reward, steepness, share, count, seed=0):
    data, swapped, margins, parts = judged(reward, steepness, share, count, seed)
    generator = np.random.default_rng(99)
    if form == 3:  # a policy that learned the reward from other pairs, not exactly
        margin = 20 * (margins + 0.3 * generator.normal(size=len(data)))
        parts = {**parts, "policy": Part("policy", "", "", columns={"margin": margin})}
    if form == 4:
        margin = 5 * (margins + 0.5 * generator.normal(size=len(data)))
        parts = {**parts, "sides": Part("sides", "", "", columns={"side_margin": margin})}
    columns, finding, blocks = examine_labels(data, SETTINGS, parts)
    return swapped, np.asarray(columns["label_score"]), columns, finding, blocks


REWARDS = [
    ("words", None, 500),
    ("end state", None, 500),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            ("words", 8.0, 500),
            ("length", None, 500),
            ("mean state", None, 500),
            ("a few good words", None, 1000),
            ("models", None, 600),
            ("models", 8.0, 1000),
        )
    ),
]
UNRELATED = pytest.param("other models", None, 600, marks=pytest.mark.long)  # of which the reference says little


@pytest.mark.parametrize("form", [2, 3, 4])
@pytest.mark.parametrize(("reward", "steepness", "count"), REWARDS)
def test_planted_swaps_are_ranked(reward, steepness, count, form):
    swapped, scores, _, _, _ = examine(form, reward, steepness, 0.05, count)
    assert area_under_curve(-scores, swapped) >= 0.9


@pytest.mark.parametrize("form", [3, 4])
@pytest.mark.parametrize(("reward", "steepness", "count"), [*REWARDS, UNRELATED])
def test_all_evidence_together_ranks_no_worse_than_a_margin_alone(reward, steepness, count, form):
    swapped, scores, _, _, _ = examine(form, reward, steepness, 0.05, count)
    generator = np.random.default_rng(99)
    noise = {3: 0.3, 4: 0.5}[form] * generator.normal(size=len(swapped))
    margin = judged(reward, steepness, 0.05, count)[2] + noise
    assert area_under_curve(-scores, swapped) >= max(0.9, area_under_curve(-margin, swapped) - 0.005)


@pytest.mark.parametrize("form", [2, 3, 4])
def test_planted_swaps_raise_the_flag(form):
    swapped, scores, columns, finding, blocks = examine(form, "words", None, 0.05, 500, seed=1)
    assert finding.raised
    assert finding.value.lower <= swapped.mean() <= finding.value.upper
    assert area_under_curve(columns["swap_probability"], swapped) >= 0.9
    assert finding.sentence.startswith(f"About {percent(finding.value.value)} (")
    assert finding.sentence.endswith(f"{len(finding.rows)} pairs are more likely swapped than not.")
    assert np.mean(swapped[list(finding.rows)]) > 0.7
    assert (np.diff(scores[list(finding.rows)]) >= 0).all()  # the worst first
    assert sorted(finding.rows) == np.flatnonzero(columns["swap_probability"] > 0.5).tolist()
    assert any("the words give the label 0." in finding.evidence[row] for row in finding.rows)
    texts = " ".join(getattr(block, "text", "") for block in blocks)
    assert ("trained on these very pairs" in texts) == (form == 3)
    assert ("It is cross-fitted" in texts) == (form == 4)


def clean(kind, seed, count=300):
    """Parts of clean labels: hidden states and lengths, without a model."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 12))
    reward = features @ generator.normal(size=12)
    reward = reward / reward.std()
    steepness = {"deterministic": None, "steep": 4.0, "weak": 1.0, "unrelated": 0.0}[kind]
    right = (
        np.full(count, True)
        if steepness is None
        else generator.random(count) < special.expit(steepness * np.abs(reward))
    )
    features *= np.where((reward > 0) == right, 1, -1)[:, None]
    lengths = generator.integers(10, 50, size=(2, count))
    columns = {"chosen_words": lengths[0], "rejected_words": lengths[1]}
    reference = Part("reference", "", "")
    reference.hidden_difference = features + 0.5 * generator.normal(size=features.shape)
    reference.end_difference = features[:, :8]
    return {"data": Part("data", "", "", columns=columns), "reference": reference}


def rows(count):
    return AuditData([{"prompt": str(i), "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(count)], "pairs")


def test_clean_labels_raise_nothing():
    kinds = ["deterministic", "steep", "weak", "unrelated"] * 5
    found = [examine_labels(rows(300), SETTINGS, clean(kind, seed))[1] for seed, kind in enumerate(kinds)]
    assert not any(finding.raised for finding in found)
    assert not any(finding.rows for finding in found)
    assert sum(finding.sentence.startswith("Nothing that was measured") for finding in found) == 5


@pytest.mark.parametrize(
    ("reward", "steepness"),
    [("words", None), *(pytest.param(*case, marks=pytest.mark.long) for case in (("words", 2.0), ("models", None)))],
)
def test_words_and_models_without_swaps_raise_nothing(reward, steepness):
    assert not examine(2, reward, steepness, 0.0, 500)[3].raised


def test_two_hundred_pairs():
    parts = clean("deterministic", 3, 200)
    swapped = np.random.default_rng(0).random(200) < 0.1
    sign = np.where(swapped, -1, 1)
    parts["reference"].hidden_difference *= sign[:, None]
    parts["reference"].end_difference = None
    columns, finding, _ = examine_labels(rows(200), SETTINGS, parts)
    assert area_under_curve(-columns["label_score"], swapped) > 0.85
    assert finding.value.lower <= swapped.mean() <= finding.value.upper


def test_one_prompt_is_too_few():
    data = AuditData([{"prompt": "1", "chosen": "a", "rejected": "b"}] * 49, "pairs")
    finding = examine_labels(data, SETTINGS, clean("deterministic", 0, 49))[1]
    assert finding.sentence.endswith("but there is 1 prompt.")


def test_without_a_flag_the_sentence_says_what_cannot_be_ruled_out():
    finding = examine_labels(rows(200), SETTINGS, clean("deterministic", 0, 200))[1]
    assert not finding.raised
    most = percent(finding.value.upper)
    assert finding.sentence.endswith(f"up to {most} of the labels may be swapped.")
    assert finding.value.upper > 0.001


def test_too_few_pairs():
    columns, finding, blocks = examine_labels(rows(49), SETTINGS, clean("deterministic", 0, 49))
    assert (
        finding.sentence
        == "At least 50 prompts are needed to tell whether labels are swapped, but there are 49 prompts."
    )
    assert not finding.raised
    assert not blocks
    assert np.isnan(columns["label_score"]).all()


def test_pairs_without_features_are_left_out():
    parts = clean("deterministic", 0, 120)
    parts["data"].columns = {}
    parts["reference"].hidden_difference[[5, 70]] = np.nan
    parts["reference"].end_difference = None
    columns, _, _ = examine_labels(rows(120), SETTINGS, parts)
    assert np.flatnonzero(np.isnan(columns["label_score"])).tolist() == [5, 70]
