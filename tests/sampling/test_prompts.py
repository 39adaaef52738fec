"""did_entropy_of_prompts against sample_did of every prompt alone, and its intervals against exact enumeration."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_did.functional import enumerate_did
from lit_did.models.loading import add_lora
from lit_did.sampling import DIDEntropyOfPrompts, did_entropy_of_prompts, prompt_seed, sample_did
from lit_did.sampling import prompts as prompts_module
from lit_did.sampling.prompts import mean_over_prompts, sample_in_batches, verdict_of_mean
from lit_did.sampling.sequential import Settings
from tests.models import zoo
from tests.modules.tiny import tiny_gpt2, tiny_llama
from tests.sampling.bigrams import bigrams
from tests.sampling.test_caches import cache_name

PROMPTS = [[5, 6, 7], [9], [8, 4, 2, 11, 30], [12, 13]]
OPTIONS = {"max_new_tokens": 6, "num_samples": 16, "eos_token_id": 3}
quiet = functools.partial(did_entropy_of_prompts, progress=False)


def assert_alone(found: DIDEntropyOfPrompts, policy, reference, prompts, **options) -> None:
    """Each prompt's samples are those of `sample_did`."""
    for index, (samples, prompt) in enumerate(zip(found.prompts, prompts, strict=True)):
        alone = sample_did(policy, reference, prompt, seed=prompt_seed(0, index), progress=False, **options)
        assert torch.equal(samples.completions, alone.completions)
        assert torch.equal(samples.num_resamplings, alone.num_resamplings)
        # The models' float32 rounds other sums for other shapes: 1e-6 of some ten nats, over some tokens.
        torch.testing.assert_close(samples.log_ratio, alone.log_ratio, rtol=0, atol=1e-3)
        torch.testing.assert_close(samples.log_weight, alone.log_weight, rtol=0, atol=1e-3)
        assert samples.estimate.entropy == pytest.approx(alone.estimate.entropy, abs=1e-3)
        assert samples.estimate.standard_error == pytest.approx(alone.estimate.standard_error, abs=1e-3)
        assert samples.log_num_completions == alone.log_num_completions


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
@pytest.mark.parametrize("ess_threshold", [0.5, 1.0])
def test_prompts_that_are_read_together(make, batch_size, ess_threshold):
    policy, reference = make(seed=0).eval(), make(seed=1).eval()
    options = OPTIONS | {"ess_threshold": ess_threshold}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quiet(policy, reference, PROMPTS, batch_size=batch_size, **options)
    assert_alone(found, policy, reference, PROMPTS, **options)


def test_the_models_read_prompts_together(monkeypatch):
    policy, reference = tiny_llama(0).eval(), tiny_llama(1).eval()
    shapes = []
    forward = policy.forward
    policy.forward = functools.wraps(forward)(lambda **x: shapes.append(tuple(x["input_ids"].shape)) or forward(**x))
    quiet(policy, reference, PROMPTS, batch_size=4, **OPTIONS)
    assert (4, 5) in shapes
    assert (4 * 16, 1) in shapes


def test_numbers_do_not_depend_on_other_prompts():
    policy, reference = tiny_llama(0).eval(), tiny_llama(1).eval()
    every, some = (quiet(policy, reference, p, batch_size=2, **OPTIONS) for p in (PROMPTS, PROMPTS[:2]))
    for ours, theirs in zip(every.prompts, some.prompts, strict=False):
        assert torch.equal(ours.completions, theirs.completions)
    other = quiet(policy, reference, PROMPTS[:2], batch_size=2, seed=1, **OPTIONS)
    assert not torch.equal(some.prompts[0].completions, other.prompts[0].completions)
    same = quiet(policy, reference, [PROMPTS[1]] * 2, batch_size=2, **OPTIONS)
    assert not torch.equal(same.prompts[0].completions, same.prompts[1].completions)
    assert torch.equal(same.prompts[1].completions, some.prompts[1].completions)


def test_batches_that_are_skipped_change_no_others():
    policy, reference = tiny_llama(0).eval(), tiny_llama(1).eval()
    settings = Settings(6, 16, 4, 0.5, 0.95)
    batches = functools.partial(
        sample_in_batches, policy, reference, PROMPTS, settings, batch_size=2, seed=0, progress=False
    )
    every = list(batches())
    assert [list(batch) for batch in every] == [[2, 0], [3, 1]]  # the longest first
    assert [list(batch) for batch in batches(skip=[2])] == [[2, 0], [3, 1]]  # half of a batch is not kept
    (left,) = batches(skip=[0, 2])
    assert list(left) == [3, 1]
    for index, samples in left.items():
        assert samples.estimate == every[1][index].estimate or math.isnan(samples.estimate.pareto_k)
        assert torch.equal(samples.policy_logprob, every[1][index].policy_logprob)


class Counted(list):
    reads = 0

    def __iter__(self):
        Counted.reads += 1
        return super().__iter__()


def test_the_work_before_sampling_grows_with_the_prompts_alone(monkeypatch):
    made = []
    init = prompts_module.CachedModel.__init__
    monkeypatch.setattr(prompts_module.CachedModel, "__init__", lambda *a, **k: made.append(a) or init(*a, **k))
    settings, skip = Settings(6, 16, 4, 0.5, 0.95), Counted(range(40))
    options = {"batch_size": 1, "seed": 0, "progress": False, "skip": skip}
    assert list(sample_in_batches(tiny_llama(0), tiny_llama(1), [[5, 6]] * 40, settings, **options)) == []
    assert len(made) == 2
    assert Counted.reads == 1


def test_an_adapters_reference_is_its_base_model():
    policy = add_lora(tiny_llama(), {"r": 4, "target_modules": "all-linear"})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    found = quiet(policy, None, PROMPTS, batch_size=4, **OPTIONS)
    assert (found.prompts[0].log_ratio.abs() > 0.1).any()
    assert_alone(found, policy, tiny_llama(), PROMPTS, **OPTIONS)


# --- models that cannot read padding ----------------------------------------------------------------------------------


class Changed(nn.Module):
    """A Llama that reads padding as tokens, always or once its cache holds `after` tokens, or has no cache."""

    def __init__(self, seed: int, after: int = 0, caches: bool = True) -> None:
        super().__init__()
        self.model = tiny_llama(seed).eval()
        self.after, self.caches = after, caches
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, position_ids=None):
        self.shapes.append(tuple(input_ids.shape))
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if held >= self.after and attention_mask is not None:
            attention_mask, position_ids = torch.ones_like(attention_mask), None
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            position_ids=position_ids,
            **{cache_name(self.model): past_key_values},
        )


class WithoutCache(Changed):
    def forward(self, input_ids, attention_mask=None):
        self.shapes.append(tuple(input_ids.shape))
        return CausalLMOutputWithPast(logits=self.model(input_ids=input_ids, attention_mask=attention_mask).logits)


@pytest.mark.parametrize("after", [0, 8])
def test_padding_that_a_model_reads_is_noticed(after):
    """At once by the trial of two tokens, or after 8 by the models' own forward passes."""
    policy, reference = Changed(0, after), tiny_llama(1).eval()
    with pytest.warns(UserWarning, match="Changed gives other results for prompts that are padded") as warned:
        found = quiet(policy, reference, PROMPTS, batch_size=4, **OPTIONS)
    assert len(warned) == 1
    assert ((4 * 16, 1) in policy.shapes) == (after > 0)
    assert_alone(found, tiny_llama(0).eval(), reference, PROMPTS, **OPTIONS)


@pytest.mark.filterwarnings("ignore:WithoutCache has no cache of keys and values")
def test_models_without_a_cache_read_prompts_of_one_length_together():
    prompts = [[5, 6], [7], [8, 9]]
    policy = WithoutCache(0)
    found = quiet(policy, tiny_llama(1).eval(), prompts, batch_size=4, **OPTIONS)
    assert_alone(found, tiny_llama(0).eval(), tiny_llama(1).eval(), prompts, **OPTIONS)
    assert (2 * 16, 3) in policy.shapes
    assert (16, 2) in policy.shapes


# Windows, states, positions as biases, routers; BART, RoBERTa and Llama 4 do not leave padding out.
OFTEN = {"mistral", "gemma2", "bloom", "mamba2", "qwen3_next", "mixtral", "bart", "roberta", "llama4_text"}
# They attend to few keys. Rounding changes which, so that a prompt alone differs from the model's own forward pass too.
UNSTEADY = {"doge", "dots3_note", "dots3_note_text", "glm_moe_dsa"}
NAMES = [name for name in zoo.NAMES if name not in {*zoo.REFUSED, *UNSTEADY}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.long) for n in NAMES])
def test_architectures(name):
    policy, reference = zoo.build(name, 0).eval(), zoo.build(name, 1).eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 4, 3], [8, 4, 2, 11, 12, 3]]
    options = {"max_new_tokens": 8, "eos_token_id": None, "num_samples": 8, "ess_threshold": 1.0}
    assert_alone(quiet(policy, reference, prompts, batch_size=3, **options), policy, reference, prompts, **options)


# --- means over prompts -----------------------------------------------------------------------------------------------


class Bigrams(nn.Module):
    """A table of logits by the token before, with a cache that has nothing to keep."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        return CausalLMOutputWithPast(logits=self.logits[input_ids], past_key_values=Nothing())


class Nothing:
    def reorder_cache(self, rows: Tensor) -> None:
        pass


def test_a_prompt_whose_completions_have_all_ended_waits_for_the_others():
    """It does nothing more, as alone. Rounding of 25 equal weights would have it resample."""
    policy, reference = bigrams(6, 1.0)
    for table in (policy, reference):
        table[1, 1:] = -math.inf
    options = {"max_new_tokens": 5, "eos_token_id": 0, "num_samples": 75, "num_islands": 3, "ess_threshold": 1.0}
    found = quiet(Bigrams(policy), Bigrams(reference), [[1], [2]], batch_size=2, **options)
    assert [int(samples.lengths.max()) for samples in found.prompts] == [1, 5]  # the premise
    assert_alone(found, Bigrams(policy), Bigrams(reference), [[1], [2]], **options)


def covered(replicates: int, count: int, scale: float) -> tuple[list[bool], list[bool]]:
    """Whether each interval covers the truth, in replicates with `count` prompts each.

    Prompts are drawn from 24 tokens. The truth about such prompts is the mean over all tokens, and about these prompts
    the mean over those drawn.
    """
    vocab_size, max_new_tokens = 25, 3
    policy, reference = bigrams(vocab_size, scale, seed=1)

    def after(table: Tensor, start: int):
        return lambda x: table[x[:, -1]] if x.shape[1] else table[start].expand(len(x), -1)

    truth = np.array(
        [
            float(
                enumerate_did(
                    after(policy, token), after(reference, token), max_new_tokens=max_new_tokens, eos_token_id=0
                ).entropy
            )
            for token in range(1, vocab_size)
        ]
    )
    drawn = torch.randint(1, vocab_size, (replicates, count), generator=torch.Generator().manual_seed(0))
    found = quiet(
        Bigrams(policy),
        Bigrams(reference),
        drawn.flatten()[:, None],
        max_new_tokens=max_new_tokens,
        eos_token_id=0,
        num_samples=32,
        batch_size=400,
    )
    estimates = np.array([s.estimate.entropy for s in found.prompts]).reshape(drawn.shape)
    errors = np.array([s.estimate.standard_error for s in found.prompts]).reshape(drawn.shape)
    such, these = [], []
    for prompts, values, spread in zip(drawn.numpy(), estimates, errors, strict=True):
        mean = mean_over_prompts(values, spread, num_islands=4)
        such.append(mean.lower <= truth.mean() <= mean.upper)
        these.append(mean.lower_of_these <= truth[prompts - 1].mean() <= mean.upper_of_these)
    return such, these


def test_coverage_of_both_intervals():
    # 0.95 less or more four standard errors of 200 replicates.
    for intervals in covered(200, 8, 0.5):
        assert 0.888 < np.mean(intervals) < 0.999


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0])
def test_coverage_in_many_replicates(scale):
    such, these = covered(2000, 8, scale)
    assert 0.93 < np.mean(such) < 0.97
    assert 0.92 < np.mean(these) < 0.97


def test_the_two_intervals():
    estimates, errors = [1.0, 2.0, 6.0], [0.3, 0.1, 0.2]
    found = mean_over_prompts(estimates, errors, num_islands=4, confidence=0.9)
    low, high = stats.t.interval(0.9, 2, 3.0, stats.sem(estimates))
    assert found[:4] == pytest.approx((3.0, stats.sem(estimates), low, high), rel=1e-9)
    variances = np.square(errors)
    freedom = variances.sum() ** 2 / (np.square(variances) / 3).sum()
    error = math.sqrt(variances.sum()) / 3
    low, high = stats.t.interval(0.9, freedom, 3.0, error)
    assert found[4:] == pytest.approx((error, low, high), rel=1e-9)
    one = mean_over_prompts([2.0], [0.1], num_islands=4)
    assert one[:4] == (2.0, math.inf, -math.inf, math.inf)
    assert one.upper_of_these == pytest.approx(2 + stats.t.ppf(0.975, 3) * 0.1, rel=1e-9)
    assert mean_over_prompts([2.0, 2.0], [0.0, 0.0], num_islands=4) == (2.0, 0, 2.0, 2.0, 0, 2.0, 2.0)


def test_the_quantities_belong_together():
    found = quiet(tiny_llama(0).eval(), tiny_llama(1).eval(), PROMPTS, batch_size=4, **OPTIONS)
    entropies = [samples.estimate.entropy for samples in found.prompts]
    most = found.prompts[0].log_num_completions
    assert found.entropy.mean == pytest.approx(np.mean(entropies), rel=1e-12)
    assert found.entropy_per_token[:4] == pytest.approx([x / 6 for x in found.entropy[:4]], rel=1e-12)
    assert found.concentration.mean == pytest.approx(most - found.entropy.mean, rel=1e-12)
    assert found.concentration.lower == pytest.approx(most - found.entropy.upper, rel=1e-12)
    assert found.concentration.upper_of_these == pytest.approx(most - found.entropy.lower_of_these, rel=1e-12)
    assert not found.reliable  # 16 samples are below 25
    assert found.reason == "Estimates of 0 of 4 prompts are reliable. Unreliable: fewer than 90%."


@pytest.mark.parametrize(("reliable", "verdict"), [(10, True), (9, True), (8, False), (0, False)])
def test_verdict(reliable, verdict):
    verdicts = [True] * reliable + [False] * (10 - reliable)
    found, reason = verdict_of_mean([1.0] * reliable + [5.0] * (10 - reliable), verdicts)
    assert found == verdict
    assert f"{reliable} of 10 prompts" in reason
    assert ("their mean is 1." in reason) == (0 < reliable < 10)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_progress(capsys):
    policy, reference = tiny_llama(0).eval(), tiny_llama(1).eval()
    did_entropy_of_prompts(policy, reference, PROMPTS, batch_size=2, **OPTIONS)
    assert "4.0/4 prompts" in capsys.readouterr().err
    quiet(policy, reference, PROMPTS, batch_size=2, **OPTIONS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompts": []}, ValueError, "`prompts` to be the token ids of at least one prompt"),
        ({"prompts": [[1], [2, 99]]}, ValueError, "Prompt 1: .* but got 99"),
        ({"prompts": [[1], "Hello"]}, TypeError, "Prompt 1: .* but got str"),
        ({"prompts": [[1], list(range(60))]}, ValueError, "Prompt 1: "),
        ({"batch_size": 0}, ValueError, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"seed": -1}, ValueError, "`seed` to be an integer of at least 0, but got -1"),
        ({"num_samples": 10}, ValueError, "`num_samples` to be a multiple of `num_islands`, 4, but got 10"),
        ({"policy": lambda prefixes: prefixes}, TypeError, "`policy` to be a causal language model, but got function"),
        ({"reference": None}, ValueError, "Only a PeftModel can be its own reference"),
        ({"progress": "no"}, TypeError, "`progress` to be a bool"),
    ],
)
def test_errors(change, error, words):
    arguments = {"policy": tiny_gpt2(0), "reference": tiny_gpt2(1), "prompts": PROMPTS, **OPTIONS, **change}
    with pytest.raises(error, match=words):
        quiet(**arguments)
