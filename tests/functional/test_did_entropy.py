"""Estimates of H(q) against the truth by enumeration, intervals against replicates, k-hat against Pareto samples.

The replicates: bigram models with an end-of-sequence token, of four sizes, the reference's logits
normal with standard deviation 2 and the policy's those plus `scale` times a normal number. A replicate is an estimate
from K = 128 completions drawn from one of three proposals. All seeds are fixed.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_did.functional.did_entropy import (
    DIDEntropyEstimate,
    did_entropy_over_candidates,
    estimate_did_entropy,
    pareto_k,
)
from lit_did.functional.enumeration import enumerate_did

SIZES = [(5, 7), (6, 6), (7, 5), (8, 5)]  # vocabulary, tokens: 9,000 to 22,000 completions
SCALES = (0.2, 1.0, 2.0)
SAMPLES = 128
REPLICATES = 80  # of every model

# Root mean square errors in nats of an experiment apart from this one, on four other models of these sizes.
PUBLISHED = {"policy": (1.78, 1.56, 1.52), "reference": (1.70, 1.34, 2.15), "token DID": (0.13, 0.43, 0.91)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(NamedTuple):
    """Log-probabilities [N] of all completions of one pair of models, and of the three proposals; the truth."""

    policy: Tensor
    reference: Tensor
    proposals: dict[str, Tensor]
    log_partition: float
    entropy: float

    def estimate(self, proposal: str, ids: Tensor) -> DIDEntropyEstimate:
        g = self.proposals[proposal]
        return estimate_did_entropy(self.policy[ids], self.reference[ids], g[ids], sequences=ids)

    def draw(self, proposal: str, samples: int, replicates: int, seed: int = 0) -> Tensor:
        """[replicates, samples] indices of completions."""
        generator = torch.Generator().manual_seed(seed)
        chances = self.proposals[proposal].exp()
        return torch.multinomial(chances, replicates * samples, True, generator=generator).view(replicates, samples)


@functools.cache
def model(vocab_size: int, max_new_tokens: int, scale: float) -> Model:
    generator = torch.Generator().manual_seed(SIZES.index((vocab_size, max_new_tokens)))
    reference = 2 * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    policy = reference + scale * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)

    def bigram(logits: Tensor):
        # No completion goes on after token 0, the end: its row gives the first token.
        return lambda prefixes: logits[prefixes[:, -1] if prefixes.shape[1] else torch.zeros(1, dtype=torch.long)]

    exact = enumerate_did(bigram(policy), bigram(reference), max_new_tokens=max_new_tokens, eos_token_id=0)
    token_did = enumerate_did(
        bigram(policy - reference), bigram(reference), max_new_tokens=max_new_tokens, eos_token_id=0
    )
    proposals = {
        "policy": exact.policy_logprob,
        "reference": exact.reference_logprob,
        "token DID": token_did.policy_logprob,
    }
    return Model(
        exact.policy_logprob, exact.reference_logprob, proposals, float(exact.log_partition), float(exact.entropy)
    )


@functools.cache
def replicates(proposal: str, scale: float) -> list[list[tuple[float, DIDEntropyEstimate]]]:
    """The truth and the estimate, of every replicate of every model."""
    every = []
    for size in SIZES:
        exact = model(*size, scale)
        draws = exact.draw(proposal, SAMPLES, REPLICATES)
        every.append([(exact.entropy, exact.estimate(proposal, ids)) for ids in draws])
    return every


def rmse(rows: list[tuple[float, DIDEntropyEstimate]]) -> float:
    return math.sqrt(sum((estimate.entropy - truth) ** 2 for truth, estimate in rows) / len(rows))


# --- the estimator ---------------------------------------------------------------------------------------------------


def in_plain_python(policy: list[float], reference: list[float], proposal: list[float]) -> tuple[float, float]:
    """log Z and H(q) by importance sampling."""
    ratios = [math.exp(p - r) for p, r in zip(policy, reference, strict=True)]
    weights = [r / math.exp(g) for r, g in zip(ratios, proposal, strict=True)]
    log_partition = math.log(sum(weights) / len(weights))
    mean = sum(w * math.log(r) for w, r in zip(weights, ratios, strict=True) if w) / sum(weights)
    return log_partition, log_partition - mean


def samples(seed: int, count: int = 40) -> list[Tensor]:
    return list(-5 * torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


@pytest.mark.parametrize("heaviest", [0, 5, 60])  # nats: with the last, one sample has all the weight but e-60
def test_estimate_and_jackknife_against_plain_python(heaviest):
    policy, reference, proposal = samples(0)
    policy -= heaviest
    policy[3] += heaviest
    estimate = estimate_did_entropy(policy, reference, proposal)
    lists = [x.tolist() for x in (policy, reference, proposal)]
    log_partition, entropy = in_plain_python(*lists)
    assert estimate.log_partition == pytest.approx(log_partition, rel=1e-12)
    assert estimate.entropy == pytest.approx(entropy, rel=1e-9)
    left_out = [in_plain_python(*(x[:i] + x[i + 1 :] for x in lists))[1] for i in range(40)]
    mean = sum(left_out) / 40
    error = math.sqrt(39 / 40 * sum((x - mean) ** 2 for x in left_out))
    assert estimate.standard_error == pytest.approx(error, rel=1e-9)


def test_interval_is_a_t_interval_with_the_effective_sample_size():
    policy, reference, proposal = samples(1)
    weights = (policy - reference - proposal).exp()
    effective = float(weights.sum() ** 2 / weights.square().sum())
    for confidence in (0.5, 0.95):
        estimate = estimate_did_entropy(policy, reference, proposal, confidence=confidence)
        margin = stats.t.ppf((1 + confidence) / 2, effective - 1) * estimate.standard_error
        assert estimate.effective_sample_size == pytest.approx(effective)
        assert estimate.lower == pytest.approx(estimate.entropy - margin)
        assert estimate.upper == pytest.approx(estimate.entropy + margin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_that_is_its_reference_is_exact(dtype):
    vocab_size, max_new_tokens = 1000, 50
    # From the token DIDs, uniform here, all weights are V^T = e+150; the models' own log-probabilities cancel.
    logprob = -100 * torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=dtype) - 5000
    proposal = torch.full((64,), -max_new_tokens * math.log(vocab_size), dtype=torch.float64)
    estimate = estimate_did_entropy(logprob, logprob, proposal)
    assert estimate.entropy == estimate.log_partition == pytest.approx(max_new_tokens * math.log(vocab_size), rel=1e-12)
    assert estimate.standard_error == pytest.approx(0, abs=1e-9)
    assert estimate.pareto_k == -math.inf
    assert estimate.reliable
    assert estimate.per_token(max_new_tokens) == pytest.approx(math.log(vocab_size), rel=1e-12)
    assert estimate.concentration(vocab_size, max_new_tokens) == pytest.approx(0, abs=1e-9)
    assert estimate.concentration(2 * vocab_size, max_new_tokens) == pytest.approx(max_new_tokens * math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_computed_in_float64(dtype):
    rounded = [x.to(dtype) for x in samples(5)]
    assert estimate_did_entropy(*rounded) == estimate_did_entropy(*(x.double() for x in rounded))


def test_log_probabilities_far_below_float64s_smallest():
    policy, reference, proposal = samples(2)
    near = estimate_did_entropy(policy, reference, proposal)
    far = estimate_did_entropy(policy - 3000, reference, proposal - 5000)
    assert far.log_partition == pytest.approx(near.log_partition + 2000)
    assert far.entropy == pytest.approx(near.entropy + 5000)
    assert far.standard_error == pytest.approx(near.standard_error, rel=1e-6)


def test_a_sample_that_the_policy_cannot_write_has_weight_0():
    policy, reference, proposal = samples(3)
    policy[[0, 7]] = -math.inf
    estimate = estimate_did_entropy(policy, reference, proposal)
    _, entropy = in_plain_python(policy.tolist(), reference.tolist(), proposal.tolist())
    assert estimate.entropy == pytest.approx(entropy, rel=1e-9)
    assert 0 < estimate.standard_error < math.inf
    policy[1:] = -math.inf
    policy[0] = -1
    alone = estimate_did_entropy(policy, reference, proposal)
    assert alone.standard_error == math.inf
    assert (alone.lower, alone.upper) == (-math.inf, math.inf)
    assert not alone.reliable


# --- against the truth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", SCALES)
def test_consistent_from_the_token_did(size, scale):
    exact = model(*size, scale)
    count = 8000
    estimates = [exact.estimate("token DID", ids) for ids in exact.draw("token DID", count, 8, seed=1)]
    for truth, values in (
        (exact.entropy, torch.tensor([e.entropy for e in estimates])),
        (exact.log_partition, torch.tensor([e.log_partition for e in estimates])),
    ):
        # Five standard errors of a mean of eight, whose own error is a quarter of it.
        assert abs(float(values.mean()) - truth) < 5 * float(values.std()) / math.sqrt(8)
    # From 128 samples it falls by eight, as 1 / sqrt(K); at scale 2, with the heaviest weights, more slowly yet.
    at_128 = rmse(replicates("token DID", scale)[SIZES.index(size)])
    assert rmse([(exact.entropy, estimate) for estimate in estimates]) < (2 if scale < 2 else 4) * at_128 / 8


@pytest.mark.parametrize("proposal", PUBLISHED)
@pytest.mark.parametrize("scale", SCALES)
def test_error_is_that_of_the_theory(proposal, scale):
    # The published models are others, and errors vary by half between models; that of 80 replicates varies by a tenth.
    published = PUBLISHED[proposal][SCALES.index(scale)]
    error = sum(rmse(rows) for rows in replicates(proposal, scale)) / len(SIZES)
    assert published / 1.7 < error < published * 1.7


@pytest.mark.parametrize("scale", SCALES[:2])
def test_interval_covers_where_reliable(scale):
    reliable = [(t, e) for rows in replicates("token DID", scale) for t, e in rows if e.reliable]
    covered = sum(estimate.lower <= truth <= estimate.upper for truth, estimate in reliable) / len(reliable)
    assert len(reliable) > 100  # of 320
    # .94 as in the table of docs/theory.md, give or take three standard errors of a share.
    assert abs(covered - 0.94) < 3 * math.sqrt(0.94 * 0.06 / len(reliable))


@pytest.mark.parametrize("proposal", ["policy", "reference"])
@pytest.mark.parametrize("scale", SCALES)
def test_samples_of_the_models_are_not_called_reliable(proposal, scale):
    estimates = [estimate for rows in replicates(proposal, scale) for _, estimate in rows]
    assert sum(estimate.reliable for estimate in estimates) <= 0.02 * len(estimates)
    assert all("Unreliable" in estimate.reason for estimate in estimates if not estimate.reliable)


def test_token_did_is_reliable_where_the_models_are_near():
    estimates = [estimate for rows in replicates("token DID", 0.2) for _, estimate in rows]
    assert sum(estimate.reliable for estimate in estimates) >= 0.98 * len(estimates)


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_a_proposal_that_misses_a_mode_betrays_itself_by_repeats():
    exact = model(6, 6, 1.0)
    # Fifty sequences in proportion to q, and hardly anything of the rest: equal weights, a small k-hat, a wrong answer.
    few = torch.randperm(len(exact.policy), generator=torch.Generator().manual_seed(0))[:50]
    outside = torch.ones(len(exact.policy), dtype=torch.float64)
    outside[few] = 0
    exact.proposals["few"] = (exact.policy - exact.reference - 20 * outside).log_softmax(0)
    for ids in exact.draw("few", 512, 20):
        estimate = exact.estimate("few", ids)
        assert estimate.effective_sample_size > 500
        assert estimate.pareto_k < 0.5
        assert abs(estimate.entropy - exact.entropy) > 3
        assert not estimate.reliable


def even(distinct: int, count: int = 128) -> DIDEntropyEstimate:
    """An estimate from equal weights, of which `distinct` sequences have each as many."""
    logprob = torch.full((count,), -20.0)
    return estimate_did_entropy(logprob, logprob, logprob, sequences=torch.arange(count) % distinct)


def test_verdict_and_its_words():
    assert even(64).reliable
    assert even(64).reason == (
        "Effective sample size 128.0 of 128, Pareto k-hat -inf, 64 distinct sequences (effectively 64.0)."
    )
    assert not even(63).reliable
    assert "the proposal repeats itself, with fewer distinct" in even(63).reason
    assert "effectively fewer than 25 distinct sequences" in even(24).reason
    assert even(26, 26).reliable
    assert not even(24, 24).reliable
    assert "the effective sample size is below 25" in even(24, 24).reason
    # Pareto weights with k = 0.9, of 10,000 samples.
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heavy = estimate_did_entropy(-0.9 * uniform.log() - 20, torch.full_like(uniform, -20), torch.full_like(uniform, -9))
    assert heavy.effective_sample_size > 25
    assert not heavy.reliable
    assert heavy.reason.endswith("Unreliable: k-hat is above 0.5.")


def test_effective_distinct_pools_equal_sequences():
    policy, reference, proposal = samples(4, 6)
    weights = (policy - reference - proposal).softmax(0).tolist()
    estimate = estimate_did_entropy(policy, reference, proposal, sequences=torch.tensor([4, 2, 4, 9, 2, 4]))
    pooled = [weights[0] + weights[2] + weights[5], weights[1] + weights[4], weights[3]]
    assert estimate.num_distinct == 3
    assert estimate.effective_distinct == pytest.approx(1 / sum(w * w for w in pooled))


def test_ids_token_ids_and_log_probabilities_tell_the_same_sequences_apart():
    exact = model(5, 7, 1.0)
    ids = exact.draw("token DID", 128, 1)[0]
    of = exact.policy[ids], exact.reference[ids], exact.proposals["token DID"][ids]
    token_ids = torch.stack([ids // 1000, ids % 1000], -1)
    by_id = estimate_did_entropy(*of, sequences=ids)
    assert by_id.num_distinct == len(set(ids.tolist())) < 128
    for other in (estimate_did_entropy(*of, sequences=token_ids), estimate_did_entropy(*of)):
        assert other[:-2] == pytest.approx(by_id[:-2])
        assert other[-2:] == by_id[-2:]


# --- k-hat -----------------------------------------------------------------------------------------------------------


def generalised_pareto(shape: float, count: int, draws: int, seed: int = 0) -> Tensor:
    """[draws, count] logarithms of 1 + X, X generalised Pareto with scale 1; what exceeds a threshold is one again."""
    uniform = torch.rand(draws, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log1p((uniform**-shape - 1) / shape)


@pytest.mark.parametrize("shape", [0.2, 0.7, 1.0])
def test_pareto_k_of_generalised_pareto_samples(shape):
    count, draws = 1000, 1000
    tail = math.ceil(3 * math.sqrt(count))
    values = torch.tensor([pareto_k(log_weight) for log_weight in generalised_pareto(shape, count, draws)])
    # The asymptotic standard deviation of a shape is (1 + k) / sqrt(n). The prior weighs as ten of n + 10.
    expected, deviation = (tail * shape + 5) / (tail + 10), (1 + shape) / math.sqrt(tail) * tail / (tail + 10)
    assert abs(float(values.mean()) - expected) < 4 * deviation / math.sqrt(draws) + 0.5 / tail  # bias: of order 1 / n
    assert 0.7 * deviation < float(values.std()) < 1.4 * deviation


def test_pareto_k_does_not_depend_on_scale_or_order():
    log_weight = generalised_pareto(0.7, 500, 1)[0]
    assert pareto_k(log_weight - 4000) == pytest.approx(pareto_k(log_weight), rel=1e-9)
    assert pareto_k(log_weight.flip(0)) == pareto_k(log_weight)


def test_pareto_k_of_tails_without_a_shape():
    count = torch.arange(200, dtype=torch.float64)
    assert pareto_k(torch.zeros(200, dtype=torch.float64)) == -math.inf
    assert pareto_k(1e-13 * count) == -math.inf  # rounding of equal weights
    assert pareto_k(torch.where(count > 195, count, 0)) == math.inf  # four above equal ones
    assert pareto_k(torch.where(count > 194, count / 200, 0)) < math.inf  # five
    assert pareto_k(-count[:20]) == math.inf  # a tail of four
    # The 104 of the tail equal, and all below them too: the fit meets theta = 0, where its likelihood is 0 / 0.
    assert pareto_k((torch.arange(1200) >= 1200 - 104).double()) < 0


# --- over candidates -------------------------------------------------------------------------------------------------


def test_candidates_against_plain_python():
    policy, reference = -9 * torch.rand(2, 3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = did_entropy_over_candidates(policy, reference)
    assert entropy.shape == (3, 4)
    for i, j in [(0, 0), (2, 3)]:
        ratios = [math.exp(d) for d in (policy - reference)[i, j].tolist()]
        did = [r / sum(ratios) for r in ratios]
        assert float(entropy[i, j]) == pytest.approx(-sum(q * math.log(q) for q in did), rel=1e-12)


def test_candidates_even_degenerate_and_one():
    logprob = torch.tensor([-5.0, -300.0, -7000.0])
    assert float(did_entropy_over_candidates(logprob + 2, logprob)) == pytest.approx(math.log(3), rel=1e-12)
    assert float(did_entropy_over_candidates(logprob, torch.zeros(3))) < 1e-100
    assert float(did_entropy_over_candidates(logprob[:1], logprob[:1] * 2)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_candidates_give_float64_and_gradients_in_the_dtype_given(dtype):
    policy, reference = (x.to(dtype).requires_grad_() for x in samples(0)[:2])
    entropy = did_entropy_over_candidates(policy, reference)
    entropy.backward()
    assert entropy.dtype == torch.float64
    assert policy.grad.dtype == reference.grad.dtype == dtype
    # float64 inside: the result is that of the rounded values to its last digits.
    expected = did_entropy_over_candidates(policy.detach().double(), reference.detach().double())
    assert entropy.item() == pytest.approx(expected.item(), rel=1e-14)


def test_candidates_gradient():
    policy, reference = (x[:10].view(2, 5).requires_grad_() for x in samples(0)[:2])
    assert torch.autograd.gradcheck(did_entropy_over_candidates, (policy, reference))


def test_candidates_that_the_policy_cannot_write_are_left_out():
    policy = torch.tensor([-1.0, -torch.inf, -3.0, -5000.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -4.0, -1.0], dtype=torch.float64, requires_grad=True)
    entropy = did_entropy_over_candidates(policy, reference)
    entropy.backward()
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-12)
    assert policy.grad.isfinite().all()
    assert reference.grad.isfinite().all()
    assert policy.grad[[1, 3]].tolist() == [0, 0]


def test_candidates_without_a_ratio_are_nan_in_their_row_only():
    policy = torch.tensor([[-1.0, -2.0], [-torch.inf, -torch.inf], [-1.0, -1.0], [-torch.inf, -1.0]])
    reference = torch.tensor([[-1.0, -2.0], [-1.0, -1.0], [-torch.inf, -1.0], [-torch.inf, -1.0]])
    entropy = did_entropy_over_candidates(policy, reference)
    assert entropy.isnan().tolist() == [False, True, True, True]


# --- errors ----------------------------------------------------------------------------------------------------------

FIVE = torch.full((5,), -2.0)


def with_value(value: float) -> Tensor:
    return torch.tensor([-2.0, -2.0, value, -2.0, -2.0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"policy_logprob": [-2.0] * 5}, TypeError, "`policy_logprob` to be a tensor of floats, but got list"),
        ({"proposal_logprob": FIVE.long()}, TypeError, "`proposal_logprob` to be .* floats, but got torch.int64"),
        ({"reference_logprob": FIVE[:4]}, ValueError, r"`reference_logprob` to have the shape .* got \(4,\)"),
        (
            dict.fromkeys(("policy_logprob", "reference_logprob", "proposal_logprob"), FIVE[:1]),
            ValueError,
            "K >= 2, .*1",
        ),
        (
            dict.fromkeys(("policy_logprob", "reference_logprob", "proposal_logprob"), FIVE.repeat(3, 1)),
            ValueError,
            "K >= 2",
        ),
        (
            {"policy_logprob": with_value(math.nan)},
            ValueError,
            "`policy_logprob` to be finite, but got nan in sample 2",
        ),
        (
            {"policy_logprob": with_value(math.inf)},
            ValueError,
            "`policy_logprob` to be finite, but got inf in sample 2",
        ),
        ({"reference_logprob": with_value(-math.inf)}, ValueError, "`reference_logprob` to be finite, but got -inf"),
        ({"proposal_logprob": with_value(-math.inf)}, ValueError, "`proposal_logprob` to be finite, but got -inf"),
        ({"policy_logprob": FIVE - math.inf}, ValueError, "`policy_logprob` to be above -inf in at least one sample"),
        ({"confidence": 1.0}, ValueError, r"`confidence` to be in \(0, 1\), but got 1.0"),
        ({"confidence": 95}, ValueError, r"`confidence` to be in \(0, 1\), but got 95"),
        ({"sequences": FIVE}, TypeError, "`sequences` to be a tensor of integers, but got torch.float32"),
        ({"sequences": [[1, 2]] * 5}, TypeError, "`sequences` to be a tensor of integers, but got list"),
        ({"proposal_logprob": FIVE.exp()}, ValueError, "`proposal_logprob` to hold log-probabilities, at most 0, but"),
        ({"sequences": torch.arange(4)}, ValueError, r"`sequences` to have shape .* K = 5, but got \(4,\)"),
        ({"sequences": torch.zeros(5, 1, 1).long()}, ValueError, r"`sequences` to have shape .*\(5, 1, 1\)"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        estimate_did_entropy(**{"policy_logprob": FIVE, "reference_logprob": FIVE, "proposal_logprob": FIVE, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((FIVE.tolist(), FIVE), TypeError, "`policy_logprob` to be a tensor of floats, but got list"),
        ((FIVE, FIVE.int()), TypeError, "`reference_logprob` to be a tensor of floats, but got torch.int32"),
        ((FIVE, FIVE[None]), ValueError, r"`reference_logprob` to have the shape .*\(5,\), but got \(1, 5\)"),
        ((FIVE[0], FIVE[0]), ValueError, r"`policy_logprob` to have shape \[..., K\] .* got \(\)"),
        ((FIVE[:0], FIVE[:0]), ValueError, r"K >= 1, but got \(0,\)"),
    ],
)
def test_errors_of_candidates(arguments, error, words):
    with pytest.raises(error, match=words):
        did_entropy_over_candidates(*arguments)
