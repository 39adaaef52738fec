"""sample_did with an exponent and a prior against enumeration, and with language models against functions."""

from __future__ import annotations

import pytest
import torch

from lit_did.functional import enumerate_did
from lit_did.sampling import sample_did
from tests.modules.tiny import tiny_llama
from tests.sampling.bigrams import as_function, bigrams

OPTIONS = {"max_new_tokens": 4, "eos_token_id": 0, "num_samples": 1024, "progress": False}


@pytest.mark.parametrize(("exponent", "with_prior"), [(0.5, False), (-1.5, False), (1.0, True), (2.0, True)])
def test_against_enumeration(exponent, with_prior):
    chosen, rejected = bigrams(5, 0.7, seed=1)
    prior = bigrams(5, 0.7, seed=2)[0]
    found = enumerate_did(as_function(chosen), as_function(rejected), max_new_tokens=4, eos_token_id=0)
    of_prior = enumerate_did(as_function(prior), as_function(rejected), max_new_tokens=4, eos_token_id=0).policy_logprob
    density = exponent * found.log_ratio + with_prior * of_prior
    log_target = density.log_softmax(0)
    samples = sample_did(
        as_function(chosen),
        as_function(rejected),
        exponent=exponent,
        prior=as_function(prior) if with_prior else None,
        **OPTIONS,
    )
    estimate = samples.estimate
    assert estimate.reliable or with_prior  # few completions may have all of the weight
    assert estimate.log_partition == pytest.approx(float(density.logsumexp(0)), abs=0.1)
    assert estimate.entropy == pytest.approx(float(-(log_target.exp() * log_target).sum()), abs=0.1)
    # The weighted completions have the target's probabilities, and every model's own log-probability.
    rows = (samples.completions[:, None] == found.completions[None]).all(-1).double().argmax(1)
    for place in range(4):
        got = torch.zeros(6).double().index_add_(0, samples.completions[:, place] + 1, samples.log_weight.exp())
        exact = torch.zeros(6).double().index_add_(0, found.completions[:, place] + 1, log_target.exp())
        torch.testing.assert_close(got, exact, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.policy_logprob, found.policy_logprob[rows])
    torch.testing.assert_close(samples.prior_logprob, of_prior[rows] * with_prior)


def test_language_models_are_read_like_functions():
    models = [tiny_llama(seed, vocab_size=6).double().eval() for seed in range(3)]
    prompt = torch.tensor([[1, 2, 3]])

    def function(model):
        def logits(prefixes):
            with torch.no_grad():
                return model(torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)).logits[:, -1]

        return logits

    options = {**OPTIONS, "num_samples": 64, "exponent": 0.7}
    one = sample_did(*models[:2], prompt, prior=models[2], **options)
    other = sample_did(*map(function, models[:2]), prior=function(models[2]), **options)
    torch.testing.assert_close(one.completions, other.completions)
    assert one.estimate.log_partition == pytest.approx(other.estimate.log_partition, abs=1e-9)


def test_arguments_are_checked():
    chosen, rejected = map(as_function, bigrams(5, 0.7))
    with pytest.raises(ValueError, match="Expected `exponent`"):
        sample_did(chosen, rejected, exponent=float("nan"), **OPTIONS)
    with pytest.raises(TypeError, match=r"Expected `prior` to be a function of prefixes"):
        sample_did(chosen, rejected, prior=tiny_llama(), **OPTIONS)
    with pytest.raises(ValueError, match=r"Expected `prior` to return logits of the policy's shape"):
        sample_did(chosen, rejected, prior=lambda prefixes: torch.zeros(len(prefixes), 4), **OPTIONS)
