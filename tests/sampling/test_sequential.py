"""sample_did against exact enumeration, dynamic programming, and itself without caches."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from lit_did.functional import enumerate_did, estimate_did_entropy
from lit_did.functional.did_entropy import DIDEntropyEstimate, estimate_from_islands
from lit_did.models.loading import add_lora
from lit_did.sampling import DIDSamples, sample_did
from tests.modules.tiny import VOCABULARY, tiny_gpt2, tiny_llama
from tests.sampling.bigrams import as_function, bigrams, exact

SIZES = ((5, 7), (6, 6), (7, 5), (8, 5))  # vocabulary, T
REPLICATES, SAMPLES = 300, 128
quiet = functools.partial(sample_did, progress=False)


def replicates(samples: DIDSamples, count: int, islands: int = 4) -> list[DIDEntropyEstimate]:
    """Islands never meet, so that one run with many of them is many runs."""
    log_partition = samples.island_log_partition.view(count, islands)
    mean_log_ratio = log_partition - samples.island_entropy.view(count, islands)
    log_weight = samples.log_weight.view(count, -1)
    completions = samples.completions.view(count, log_weight.shape[1], -1)
    return [
        estimate_from_islands(*parts, 0.95)
        for parts in zip(log_partition, mean_log_ratio, log_weight, completions, strict=True)
    ]


@functools.cache
def runs(size: tuple[int, int], scale: float, ess_threshold: float = 0.5) -> tuple[float, float, DIDSamples]:
    vocab_size, max_new_tokens = size
    policy, reference = bigrams(vocab_size, scale, seed=100 * vocab_size + max_new_tokens)
    truth = enumerate_did(as_function(policy), as_function(reference), max_new_tokens=max_new_tokens, eos_token_id=0)
    samples = quiet(
        as_function(policy),
        as_function(reference),
        max_new_tokens=max_new_tokens,
        eos_token_id=0,
        num_samples=SAMPLES * REPLICATES,
        num_islands=4 * REPLICATES,
        ess_threshold=ess_threshold,
    )
    return float(truth.log_partition), float(truth.entropy), samples


# --- the estimate -----------------------------------------------------------------------------------------------------


# Error and coverage of twisted SMC with its control variate on such models: 0.01 / 0.15 / 0.33 nats and 0.949 / 0.946 /
# 0.910 in an independent implementation. The models' own draw decides the error: a third above it is allowed. Of the
# coverage four standard errors of 1,200 replicates.
@pytest.mark.parametrize(
    ("scale", "most_error", "coverage"), [(0.2, 0.0133, 0.949), (1.0, 0.2, 0.946), (2.0, 0.44, 0.910)]
)
def test_error_and_coverage(scale, most_error, coverage):
    errors, covered = [], []
    for size in SIZES:
        _, entropy, samples = runs(size, scale)
        estimates = replicates(samples, REPLICATES)
        errors.append(math.sqrt(np.mean([(e.entropy - entropy) ** 2 for e in estimates])))
        covered += [e.lower <= entropy <= e.upper for e in estimates]
    assert np.mean(errors) < most_error
    assert np.mean(covered) > coverage - 4 * math.sqrt(coverage * (1 - coverage) / len(covered))
    assert np.mean(covered) < 0.99  # an interval that always covers says nothing


def test_the_partition_is_unbiased():
    for size in SIZES:
        log_partition, _, samples = runs(size, 2.0)
        ratio = (samples.island_log_partition - log_partition).exp().numpy()
        assert samples.num_resamplings.any()
        assert abs(ratio.mean() - 1) < 4 * stats.sem(ratio)


def test_a_larger_model():
    # 300 tokens, T = 64: H(q) is 331 nats, of at most 365. Twice the error that the interval's half width allows.
    policy, reference = bigrams(300, 1.0, seed=3)
    log_partition, entropy = exact(policy, reference, 64)
    samples = quiet(as_function(policy), as_function(reference), max_new_tokens=64, eos_token_id=0)
    assert samples.estimate.reliable
    assert abs(samples.estimate.entropy - entropy) < 2 * (samples.estimate.upper - samples.estimate.entropy)
    assert abs(samples.estimate.entropy - entropy) < 5
    assert abs(samples.estimate.log_partition - log_partition) < 2


def test_the_control_variate_pays():
    for size in SIZES:
        _, entropy, samples = runs(size, 0.2, 0.0)
        every = torch.arange(SAMPLES * REPLICATES).view(REPLICATES, SAMPLES)
        plain = [
            estimate_did_entropy(
                samples.policy_logprob[ids],
                samples.reference_logprob[ids],
                samples.proposal_logprob[ids],
                sequences=samples.completions[ids],
            ).entropy
            for ids in every
        ]
        ours = [e.entropy for e in replicates(samples, REPLICATES)]
        error, plain_error = (math.sqrt(np.mean((np.array(e) - entropy) ** 2)) for e in (ours, plain))
        assert error < plain_error / 2  # 0.007 against 0.04


def test_weights_without_resampling_are_those_of_importance_sampling():
    # Also of completions that have ended early: their factor is 1 from then on.
    for size in SIZES:
        samples = runs(size, 2.0, 0.0)[2]
        log_weight = samples.log_ratio - samples.proposal_logprob
        assert len(samples.lengths.unique()) >= size[1] - 1
        assert not samples.num_resamplings.any()
        # Two ways of adding up the same float64 numbers.
        torch.testing.assert_close(samples.log_weight, log_weight.log_softmax(0), rtol=0, atol=1e-10)
        island = log_weight.view(4 * REPLICATES, -1)
        torch.testing.assert_close(
            samples.island_log_partition, island.logsumexp(1) - math.log(island.shape[1]), rtol=0, atol=1e-10
        )
        assert samples.log_weight.logsumexp(0).item() == pytest.approx(0, abs=1e-10)


def test_draws_come_from_the_proposal_that_is_told():
    _, _, samples = runs((5, 7), 1.0, 0.0)
    _, index, counts = torch.unique(samples.completions, dim=0, return_inverse=True, return_counts=True)
    chance = torch.zeros(len(counts), dtype=torch.float64)
    chance[index] = samples.proposal_logprob.exp()
    draws = len(index)
    often = chance * draws > 20
    z = (counts - draws * chance)[often] / (draws * chance * (1 - chance))[often].sqrt()
    assert often.sum() > 100
    # Of some hundred standard normal numbers, and their squares' mean within four standard errors.
    assert z.abs().max() < 5
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / len(z))


def test_logprobs_are_the_models_own():
    policy, reference = bigrams(5, 2.0, seed=507)
    _, _, samples = runs((5, 7), 2.0)
    for logits, logprob in ((policy, samples.policy_logprob), (reference, samples.reference_logprob)):
        table = logits.log_softmax(-1)
        for completion, value in zip(samples.completions[::999].tolist(), logprob[::999].tolist(), strict=True):
            tokens = [token for token in completion if token >= 0]
            expected = sum(float(table[a, b]) for a, b in zip([0, *tokens], tokens, strict=False))
            assert value == pytest.approx(expected, abs=1e-12)
            assert 0 not in tokens[:-1]


def test_weighted_samples_represent_the_did():
    policy, reference = bigrams(6, 2.0, seed=606)
    truth = enumerate_did(as_function(policy), as_function(reference), max_new_tokens=6, eos_token_id=0)
    _, _, samples = runs((6, 6), 2.0)
    weight = samples.log_weight.exp()
    for of_truth, of_samples in (
        (truth.lengths.double(), samples.lengths.double()),
        ((truth.completions[:, 0] == 1).double(), (samples.completions[:, 0] == 1).double()),
    ):
        expected = float((truth.did_logprob.exp() * of_truth).sum())
        spread = float((truth.did_logprob.exp() * (of_truth - expected) ** 2).sum()) ** 0.5
        # 38,400 samples; resampling makes some of them equal, so not four but eight of independent samples' errors.
        assert abs(float((weight * of_samples).sum()) - expected) < 8 * spread / math.sqrt(len(weight))


def test_where_the_policy_is_its_reference_nothing_is_left_to_chance():
    logits = bigrams(6, 1.0)[0]
    samples = quiet(as_function(logits), as_function(logits), max_new_tokens=6, eos_token_id=0)
    completions = sum(5**n for n in range(6)) + 5**6  # 1 of every length with the end, and those that are cut
    assert samples.estimate.entropy == pytest.approx(math.log(completions), abs=1e-12)
    assert samples.log_num_completions == pytest.approx(math.log(completions), abs=1e-12)
    assert samples.concentration == pytest.approx(0, abs=1e-12)
    assert samples.entropy_per_token == pytest.approx(math.log(completions) / 6, abs=1e-12)
    assert samples.estimate.upper - samples.estimate.lower < 1e-12
    assert samples.estimate.reliable


@pytest.mark.long
def test_nothing_overflows():
    # 256 tokens of 262,144: there are e^3195 completions. Tokens do not depend on each other: by recursion.
    generator = torch.Generator().manual_seed(0)
    policy, reference = 4 * torch.randn(2, 1, 2**18, generator=generator)
    log_ratio = (policy.double().log_softmax(-1) - reference.double().log_softmax(-1))[0]
    others, mean_of_others = log_ratio[1:].logsumexp(0), (log_ratio[1:].softmax(0) * log_ratio[1:]).sum()
    log_partition = mean = torch.zeros((), dtype=torch.float64)
    for _ in range(256):
        parts = torch.stack([log_ratio[0], others + log_partition])
        share = parts.softmax(0)
        mean = share[0] * log_ratio[0] + share[1] * (mean_of_others + mean)
        log_partition = parts.logsumexp(0)
    samples = quiet(
        lambda prefixes: policy.expand(len(prefixes), -1),
        lambda prefixes: reference.expand(len(prefixes), -1),
        max_new_tokens=256,
        eos_token_id=0,
        num_samples=6,
        num_islands=3,
    )
    # Every prefix has the same sum: no noise but float32's rounding, 1e-6 of numbers of some ten in each of 256 steps.
    assert samples.estimate.log_partition == pytest.approx(float(log_partition), abs=1e-2)
    assert samples.estimate.entropy == pytest.approx(float(log_partition - mean), abs=1e-2)
    assert samples.lengths.tolist() == [256] * 6


# --- what it may be given ---------------------------------------------------------------------------------------------


def recomputing(model: nn.Module, prompt: Tensor):
    """`model` without any cache, as a function of prefixes."""

    def logits(prefixes: Tensor) -> Tensor:
        with torch.no_grad():
            ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)
            return model(input_ids=ids, use_cache=False).logits[:, -1]

    return logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("ess_threshold", [0.0, 1.0])
def test_caches_follow_their_particles(make, ess_threshold):
    policy, reference = make(seed=0).eval(), make(seed=1).eval()
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "eos_token_id": 3, "num_samples": 16, "ess_threshold": ess_threshold}
    cached = quiet(policy, reference, prompt, **options)
    plain = quiet(recomputing(policy, prompt), recomputing(reference, prompt), **options)
    assert cached.num_resamplings.tolist() == [7 if ess_threshold else 0] * 4  # never at first: all weights are equal
    assert torch.equal(cached.completions, plain.completions)
    # Attention over cached keys adds up in another order: float32's 1e-6 on some ten nats, over 8 tokens.
    torch.testing.assert_close(cached.log_ratio, plain.log_ratio, rtol=0, atol=1e-3)
    # What was drawn after a prefix stands after that prefix.
    for completion, length, *logprobs in zip(cached.completions, cached.lengths, *cached[3:5], strict=True):
        ids = torch.cat([prompt, completion[None, :length]], 1)
        for model, logprob in zip((policy, reference), logprobs, strict=True):
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, 2:-1].double()
            expected = logits.log_softmax(-1).gather(1, ids[0, 3:, None]).sum()
            assert float(logprob) == pytest.approx(float(expected), abs=1e-3)


class WithoutCache(nn.Module):
    """A language model that keeps nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return type(outputs)(logits=outputs.logits)


@pytest.mark.filterwarnings("ignore:.* has no cache of keys and values")
def test_models_without_a_cache():
    policy, reference = tiny_llama(seed=0).eval(), tiny_llama(seed=1).eval()
    options = {"prompt": [5, 6], "max_new_tokens": 4, "num_samples": 8, "eos_token_id": None}
    assert torch.equal(
        quiet(WithoutCache(policy), WithoutCache(reference), **options).completions,
        quiet(policy, reference, **options).completions,
    )


def test_an_adapters_reference_is_its_base_model():
    base, policy = tiny_llama(), add_lora(tiny_llama(), {"r": 4, "target_modules": "all-linear"})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    options = {"prompt": [5, 6], "max_new_tokens": 4, "num_samples": 8, "eos_token_id": None}
    ours = quiet(policy, **options)
    assert (ours.log_ratio.abs() > 0.1).any()
    given = quiet(policy, base, **options)
    assert torch.equal(ours.completions, given.completions)
    torch.testing.assert_close(ours.log_ratio, given.log_ratio, rtol=0, atol=1e-5)  # float32


def test_ends_are_the_policys_own():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    policy.generation_config.eos_token_id = list(range(1, 66))
    options = {"prompt": [5, 6], "max_new_tokens": 6, "num_samples": 32}
    samples = quiet(policy, reference, **options)
    assert torch.equal(samples.completions, quiet(policy, reference, eos_token_id=range(1, 66), **options).completions)
    for completion, length in zip(samples.completions.tolist(), samples.lengths.tolist(), strict=True):
        assert not any(1 <= token < 66 for token in completion[: length - 1])
        assert length == 6 or 1 <= completion[length - 1] < 66
        assert completion[length:] == [-1] * (6 - length)
    assert samples.lengths.min() < 6
    assert quiet(policy, reference, eos_token_id=None, **options).lengths.tolist() == [6] * 32


def test_it_ends_when_all_have_ended():
    calls = []

    def always_ends(prefixes: Tensor) -> Tensor:
        calls.append(prefixes.shape[1])
        return torch.tensor([0.0, -math.inf], dtype=torch.float64).expand(len(prefixes), -1)

    samples = quiet(always_ends, always_ends, max_new_tokens=9, eos_token_id=0, num_samples=8)
    assert calls == [0, 0]
    assert samples.completions.tolist() == [[0] + [-1] * 8] * 8
    assert samples.estimate.entropy == pytest.approx(0, abs=1e-12)


def test_nothing_after_the_end_is_looked_at():
    policy, reference = bigrams(5, 2.0)

    def then(logits: Tensor, value: float):
        """`logits` before the end, and something else after it."""

        def function(prefixes: Tensor) -> Tensor:
            ended = (prefixes == 0).any(1)
            return torch.where(ended[:, None], value * torch.arange(5.0), as_function(logits)(prefixes))

        return function

    options = {"max_new_tokens": 6, "eos_token_id": 0, "num_samples": 400, "ess_threshold": 0.95}
    plain, steep, broken = (
        quiet(then(policy, value), then(reference, 0.0), **options) for value in (0.0, 50.0, math.nan)
    )
    assert plain.lengths.min() < 6
    assert plain.num_resamplings.any()
    for other in (steep, broken):
        assert other.estimate[:5] == plain.estimate[:5]
        assert torch.equal(other.policy_logprob, plain.policy_logprob)


def test_seeds():
    policy, reference = (as_function(logits) for logits in bigrams(8, 1.0))
    options = {"max_new_tokens": 5, "eos_token_id": 0, "num_samples": 16}
    before = torch.random.get_rng_state()
    first, again, other = (quiet(policy, reference, seed=seed, **options) for seed in (1, 1, 2))
    assert first.estimate[:5] == again.estimate[:5]
    assert torch.equal(first.completions, again.completions)
    assert not torch.equal(first.completions, other.completions)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_stay_as_they_were():
    policy, reference = tiny_llama(seed=0).train(), tiny_llama(seed=1).train()
    policy.model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    samples = quiet(policy, reference, [5], max_new_tokens=2, num_samples=8)
    assert [module.training for module in policy.modules()] == modes
    assert reference.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not samples.policy_logprob.requires_grad


def test_tokens_that_the_policy_excludes_never_come():
    policy, reference = bigrams(6, 1.0)
    policy[:, 2] = -math.inf
    both = reference.clone()
    both[:, 2] = -math.inf
    for other in (reference, both):
        samples = quiet(as_function(policy), as_function(other), max_new_tokens=4, eos_token_id=0, num_samples=400)
        assert not (samples.completions == 2).any()
        assert samples.estimate.entropy == pytest.approx(exact_without(policy, other, 4), abs=0.2)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
def test_large_numbers_mask_as_infinity_does(mask):
    estimates, truths = [], []
    for value in (mask, -math.inf):
        models = [as_function(x.float().index_fill(1, torch.tensor([2]), value)) for x in bigrams(6, 1.0)]
        estimates.append(quiet(*models, max_new_tokens=4, eos_token_id=0, num_samples=64).estimate)
        truths.append(enumerate_did(*models, max_new_tokens=4, eos_token_id=0))
    assert estimates[0][:5] == estimates[1][:5]
    assert truths[0].entropy == truths[1].entropy
    assert len(truths[0].completions) == 1 + 4 + 4**2 + 4**3 + 4**4  # of five tokens
    assert not (truths[0].completions == 2).any()


def test_a_policy_and_its_own_base_are_not_two_models():
    # peft changes the base in place: as a reference it would be the policy, and its DID the uniform distribution.
    base = tiny_llama()
    policy = add_lora(base, {"r": 4, "target_modules": "all-linear"})
    with pytest.raises(ValueError, match="they share parameters"):
        quiet(policy, base, [5, 6], max_new_tokens=2, num_samples=8)


def test_virtual_tokens_are_refused():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="virtual tokens"):
        quiet(tuned, tiny_llama(), [5, 6], max_new_tokens=2, num_samples=8)


def test_ends_as_numpy_integers():
    policy, reference = (as_function(logits) for logits in bigrams(6, 1.0))
    options = {"max_new_tokens": 4, "num_samples": 8}
    ours = quiet(policy, reference, eos_token_id=np.int64(2), **options)
    assert torch.equal(ours.completions, quiet(policy, reference, eos_token_id=[2, 2], **options).completions)


def exact_without(policy: Tensor, reference: Tensor, max_new_tokens: int) -> float:
    left = [0, 1, 3, 4, 5]
    normalizer = reference.logsumexp(-1) - reference[:, left].logsumexp(-1)  # of what stays of the reference
    table = reference[left][:, left].log_softmax(-1) - normalizer[left, None]
    log_ratio = policy[left][:, left].log_softmax(-1) - table
    log_partition, mean = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(max_new_tokens):
        log_partition[0] = mean[0] = 0
        total = log_ratio + log_partition
        mean = (total.softmax(-1) * (log_ratio + mean)).sum(-1)
        log_partition = total.logsumexp(-1)
    return float(log_partition[0] - mean[0])


def test_half_precision_models():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    options = {"prompt": [5, 6], "max_new_tokens": 6, "num_samples": 64}
    full = quiet(policy, reference, **options)
    half = quiet(policy.bfloat16(), reference.bfloat16(), **options)
    # 8 bits of mantissa on logits of size one, and other draws: the estimates' own errors are larger.
    assert half.estimate.entropy == pytest.approx(full.estimate.entropy, abs=0.5)


def test_progress(capsys):
    policy, reference = (as_function(logits) for logits in bigrams(8, 1.0))
    sample_did(policy, reference, max_new_tokens=3, num_samples=8)
    assert "3/3" in capsys.readouterr().err
    sample_did(policy, reference, max_new_tokens=3, num_samples=8, progress=False)
    assert capsys.readouterr().err == ""


# --- islands ----------------------------------------------------------------------------------------------------------


def test_the_interval_is_a_jackknife_over_islands():
    generator = torch.Generator().manual_seed(0)
    log_partition, mean = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    completions, log_weight = torch.arange(40)[:, None], torch.full((40,), -math.log(40), dtype=torch.float64)
    estimate = estimate_from_islands(log_partition + 2000, mean, log_weight, completions, 0.9)  # no overflow

    def entropy(kept):
        z, m = log_partition.numpy()[kept], mean.numpy()[kept]
        return np.log(np.exp(z).mean()) + 2000 - (np.exp(z) * m).sum() / np.exp(z).sum()

    left_out = np.array([entropy([j for j in range(4) if j != i]) for i in range(4)])
    error = np.sqrt(3 / 4 * ((left_out - left_out.mean()) ** 2).sum())
    assert estimate.entropy == pytest.approx(entropy(slice(None)), rel=1e-12)
    assert estimate.log_partition == pytest.approx(np.log(np.exp(log_partition.numpy()).mean()) + 2000, rel=1e-12)
    assert estimate.standard_error == pytest.approx(error, rel=1e-9)
    assert estimate.upper - estimate.entropy == pytest.approx(stats.t.ppf(0.95, 3) * error, rel=1e-6)
    assert estimate.entropy - estimate.lower == pytest.approx(stats.t.ppf(0.95, 3) * error, rel=1e-6)


@pytest.mark.parametrize(
    ("log_partition", "distinct", "words"),
    [
        ([0.0, 0, 0, 0], 40, None),
        ([0.0, 0, 0, 9], 40, "the islands disagree"),
        ([0.0, 0, 0, 0], 20, "effectively fewer than 25 distinct sequences"),
    ],
)
def test_verdict(log_partition, distinct, words):
    log_partition = torch.tensor(log_partition, dtype=torch.float64)
    log_weight = torch.full((40,), -math.log(40), dtype=torch.float64)
    completions = (torch.arange(40) % distinct)[:, None]
    estimate = estimate_from_islands(log_partition, log_partition, log_weight, completions, 0.95)
    assert estimate.reliable == (words is None)
    assert (words or "4 islands (effectively 4.0)") in estimate.reason


# --- errors -----------------------------------------------------------------------------------------------------------

FUNCTION = as_function(bigrams(4, 1.0)[0])
LLAMA = tiny_llama()
MODELS = {"policy": LLAMA, "reference": tiny_llama(seed=1)}
NAN = torch.full((4, 4), math.nan)
IMPOSSIBLE = bigrams(4, 1.0)[0].index_fill(1, torch.tensor([2]), -math.inf)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` to be an integer of at least 1, but got 0"),
        ({"num_islands": 2}, ValueError, "`num_islands` to be an integer of at least 3, but got 2"),
        ({"num_samples": 7}, ValueError, "`num_samples` to be an integer of at least 8, but got 7"),
        ({"num_samples": 10}, ValueError, "`num_samples` to be a multiple of `num_islands`, 4, but got 10"),
        ({"num_samples": 8.0}, TypeError, "`num_samples` to be an integer of at least 8, but got 8.0"),
        ({"ess_threshold": 2}, ValueError, r"`ess_threshold` to be in \[0, 1\], but got 2"),
        ({"confidence": 0}, ValueError, r"`confidence` to be in \(0, 1\), but got 0"),
        ({"eos_token_id": 4}, ValueError, r"`eos_token_id` to be in \[0, 4\), but got 4"),
        ({"eos_token_id": -1}, ValueError, r"`eos_token_id` to be in \[0, 4\), but got -1"),
        ({"eos_token_id": ""}, TypeError, "`eos_token_id` to be a token id, several, None or .*''"),
        (
            {"eos_token_id": "eos_token_id"},
            TypeError,
            "`eos_token_id` to be a token id, several, None or .*'eos_token_id'",
        ),
        ({"eos_token_id": 1.5}, TypeError, "`eos_token_id` to be a token id, several, None or .*1.5"),
        ({"prompt": [1]}, ValueError, "`prompt` to be None because the models are functions"),
        ({"reference": None}, TypeError, "`reference` to be a function of prefixes, .* but got NoneType"),
        ({"reference": LLAMA}, TypeError, "`reference` to be a function of prefixes, .* LlamaForCausalLM"),
        ({"policy": LLAMA, "prompt": [1]}, TypeError, "`reference` to be a causal language model, but got function"),
        ({"policy": LLAMA, "reference": None}, ValueError, "`reference` to be a causal language model, but got None"),
        ({"policy": LLAMA, "reference": LLAMA, "prompt": [1]}, ValueError, "they share parameters"),
        ({**MODELS}, ValueError, "`prompt` to be the token ids .* but got None"),
        ({**MODELS, "prompt": [[1], [2]]}, ValueError, r"`prompt` .*\(2, 1\)"),
        ({**MODELS, "prompt": torch.zeros(1, 0).long()}, ValueError, r"`prompt` .*\(1, 0\)"),
        ({**MODELS, "prompt": "Hello"}, TypeError, "`prompt` to be token ids, a tensor or a list, but got str"),
        ({**MODELS, "prompt": [1, VOCABULARY]}, ValueError, f"`prompt` .* below {VOCABULARY}, .* but got {VOCABULARY}"),
        ({**MODELS, "prompt": [1, -2]}, ValueError, "`prompt` to be token ids of at least 0 .* but got -2"),
        ({**MODELS, "prompt": []}, ValueError, r"`prompt` to be integers .* but got .*\(1, 0\)"),
        ({**MODELS, "prompt": [[1, 2], [3]]}, ValueError, r"`prompt` to be integers .* but got \[\[1, 2\], \[3\]\]"),
        ({**MODELS, "prompt": [[[1]]]}, ValueError, r"`prompt` to be integers .* but got .*\(1, 1, 1\)"),
        ({**MODELS, "prompt": [1.5]}, ValueError, "`prompt` to be integers .* but got torch.float32"),
        ({**MODELS, "prompt": ["a"]}, ValueError, r"`prompt` to be integers .* but got \['a'\]"),
        ({**MODELS, "prompt": [1, None]}, ValueError, r"`prompt` to be integers .* but got \[1, None\]"),
        ({**MODELS, "prompt": [2**70]}, ValueError, "`prompt` to be integers .* but got .1180591620717411303424"),
        (
            {**MODELS, "prompt": [1], "eos_token_id": VOCABULARY},
            ValueError,
            rf"`eos_token_id` to be in \[0, {VOCABULARY}\), but got",
        ),
        (
            {"policy": nn.Linear(2, 2), "reference": nn.Linear(2, 2), "prompt": [1]},
            TypeError,
            "`input_ids`",
        ),
        ({"eos_token_id": True}, TypeError, "`eos_token_id` to be a token id, several, None or .*True"),
        ({"seed": 1.5}, TypeError, "`seed` to be an integer, but got 1.5"),
        ({"seed": 2**70}, ValueError, "`seed` to be an integer of 64 bits, but got 1180591620717411303424"),
        ({"progress": "no"}, TypeError, "`progress` to be a bool, but got 'no'"),
        ({"ess_threshold": "x"}, TypeError, "`ess_threshold` to be an int or a float, but got 'x'"),
        ({"confidence": None}, TypeError, "`confidence` to be an int or a float, but got None"),
        ({**MODELS, "prompt": [True]}, ValueError, "`prompt` to be integers .* torch.bool"),
        (
            {"policy": LLAMA, "reference": tiny_llama(vocab_size=VOCABULARY + 1), "prompt": [1]},
            ValueError,
            "`reference` to have the policy's vocabulary",
        ),
        ({"reference": lambda prefixes: torch.zeros(len(prefixes), 5)}, ValueError, r"the policy's shape, \(1, 4\)"),
        ({"reference": lambda prefixes: torch.zeros(3, 4)}, ValueError, r"`reference` to return floats \[1, V\]"),
        ({"reference": as_function(NAN)}, ValueError, "both models to return finite logits, .* but got .*nan"),
        ({"reference": as_function(IMPOSSIBLE)}, ValueError, "both models to return finite logits, .* but got .*inf"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        quiet(**{"policy": FUNCTION, "reference": FUNCTION, "max_new_tokens": 3, "num_samples": 8, **change})


def long(name: str):
    """A model with 6 positions."""
    config = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=6, **config))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=6, **sizes, **config))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_completions_up_to_the_last_position(name):
    models = {"policy": long(name), "reference": long(name), "prompt": [1, 2], "eos_token_id": None, "num_samples": 8}
    assert quiet(**models, max_new_tokens=5).lengths.tolist() == [5] * 8  # the last token is not read
    with pytest.raises(ValueError, match="at most 7 tokens together because `policy` has 6 positions, but got 2 and 6"):
        quiet(**models, max_new_tokens=6)
