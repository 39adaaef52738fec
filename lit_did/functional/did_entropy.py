"""The entropy of the DID of whole completions, q(y) = pi(y) / rho(y) / Z: estimated from samples, and over candidates.

Enumerable models have it exactly: `lit_did.functional.enumeration`. The token DIDs' entropy, another quantity, is in
`lit_did.functional.information`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_did.arguments import check_range
from lit_did.representing import short_repr

MIN_EFFECTIVE_SAMPLES = 25
"""below it the interval covers too rarely: what an estimate needs to be called reliable, with `MAX_PARETO_K`"""
MAX_PARETO_K = 0.5
"""above it the weights' variance is infinite, so that neither standard error nor effective sample size mean anything"""


@short_repr
class DIDEntropyEstimate(NamedTuple):
    """An estimate of H(q) from samples, with what decides whether to believe it. Floats, in nats.

    H(q) grows with the longest completion T and the vocabulary V: report it with both, per token or as concentration.
    """

    entropy: float
    """H(q) of whole completions"""
    log_partition: float
    """log Z, Z = sum_y pi(y) / rho(y)"""
    lower: float
    """where the confidence interval of `entropy` begins"""
    upper: float
    """where it ends"""
    standard_error: float
    """of `entropy`, by the jackknife over samples, or over the islands of `lit_did.sampling.sample_did`"""
    effective_sample_size: float
    """(sum w)^2 / sum w^2 over the samples, in [1, K]"""
    pareto_k: float
    """the weights' tail index, k-hat; -inf where the largest weights are equal, inf where no tail could be fitted; NaN
    from `sample_did`, whose weights start again at every resampling"""
    num_distinct: int
    """different sequences among the samples"""
    effective_distinct: float
    """the effective sample size with equal sequences pooled into one, in [1, num_distinct]"""
    reliable: bool
    """whether the interval can be believed"""
    reason: str
    """the numbers behind `reliable`, and what is wrong with them"""

    def per_token(self, max_new_tokens: int) -> float:
        """H(q) / T, with T = `max_new_tokens`, the number of tokens at which completions are cut."""
        return self.entropy / max_new_tokens

    def concentration(self, vocab_size: int, max_new_tokens: int) -> float:
        """T log V - H(q): how far q is from the uniform distribution over all strings of T tokens.

        Where completions can end earlier there are fewer of them than V**T, and it is a little above 0 at pi = rho.
        """
        return max_new_tokens * math.log(vocab_size) - self.entropy


def estimate_did_entropy(
    policy_logprob: Tensor,
    reference_logprob: Tensor,
    proposal_logprob: Tensor,
    *,
    sequences: Tensor | None = None,
    confidence: float = 0.95,
) -> DIDEntropyEstimate:
    """H(q) by importance sampling, from K completions drawn independently from a proposal g.

    With r = pi / rho and w = r / g: log Z = log mean w, H(q) = log Z - sum_i w_i log r_i / sum_i w_i. The interval is
    the jackknife's standard error times a t quantile with (effective sample size - 1) degrees of freedom.

    The proposal decides whether this works. q spreads over sequences that neither pi nor rho would write, so their
    samples are rarely enough. Samples from the token DIDs (every token from softmax(policy_logits - reference_logits))
    do much better. g must give every completion a chance: no top-k or top-p. An estimate is reliable where

    - the effective sample size, equal sequences pooled, is at least 25;
    - the Pareto k-hat is at most 0.5 (arXiv 1507.02646);
    - there are at least half as many distinct sequences as effective samples: a proposal that draws the same few again
      and again gives them fair weights and misses the rest unseen. Enumerate models that have no more sequences.

    No rule sees a part of q that no sample has hit. A q that lies on fewer than 25 sequences, with H(q) below some 3.2
    nats (log 25), is never called reliable, however many samples there are: enumerate it where that can be done.

    Args:
        policy_logprob: [K] log pi(y_i), summed over the completion, in nats, any float dtype. -inf has weight 0.
        reference_logprob: [K] log rho(y_i), finite.
        proposal_logprob: [K] log g(y_i), finite; `policy_logprob` again where the samples come from the policy.
        sequences: [K] or [K, T] integers that tell completions apart: an id each, or token ids with one padding.
            Without it completions count as equal where their three log-probabilities are.
        confidence: Of the interval, in (0, 1).

    Returns:
        DIDEntropyEstimate: floats computed in float64, without gradients. The interval is infinite where the effective
        sample size is below 2.

    Raises:
        TypeError: An argument is no tensor, or has the wrong kind of dtype.
        ValueError: Shapes do not agree, K is below 2, a value or `confidence` is out of range.

    Example:
        >>> logprob = torch.full((64,), -10 * math.log(2))  # 64 of the 1,024 strings of 10 bits; pi = rho
        >>> estimate = estimate_did_entropy(logprob, logprob, logprob, sequences=torch.arange(64))
        >>> round(estimate.entropy, 4), round(estimate.per_token(max_new_tokens=10), 4), estimate.reliable
        (6.9315, 0.6931, True)
        >>> estimate.reason
        'Effective sample size 64.0 of 64, Pareto k-hat -inf, 64 distinct sequences (effectively 64.0).'
    """
    given = {
        "policy_logprob": policy_logprob,
        "reference_logprob": reference_logprob,
        "proposal_logprob": proposal_logprob,
    }
    check_samples(given, sequences, at_least=2)
    if (policy_logprob == -math.inf).all():
        raise ValueError("Expected `policy_logprob` to be above -inf in at least one sample, but got -inf in all.")
    check_confidence(confidence)
    from scipy.special import stdtrit  # here, so that `import lit_did` does not wait for it

    logprob = torch.stack([value.detach().cpu().double() for value in given.values()], -1)
    policy, reference, proposal = logprob.unbind(-1)
    log_ratio = policy - reference
    log_weight = log_ratio - proposal
    log_ratio = log_ratio.masked_fill(log_ratio == -math.inf, 0)  # of weight 0, and 0 log 0 = 0

    log_partition, entropy = _importance_sampling(log_weight, log_ratio)
    standard_error = _jackknife_error(log_weight, log_ratio)
    sequences = logprob if sequences is None else sequences.cpu()
    effective, num_distinct, effective_distinct = _diagnostics(log_weight, sequences)
    # One sample that outweighs all others has none to be compared with.
    margin = float(stdtrit(effective - 1, (1 + confidence) / 2)) * standard_error if effective >= 2 else math.inf
    tail = pareto_k(log_weight)
    faults = _faults_of_sample(effective, effective_distinct)
    if tail > MAX_PARETO_K:
        faults.append(f"k-hat is above {MAX_PARETO_K}")
    if num_distinct < effective / 2:
        faults.append("the proposal repeats itself, with fewer distinct sequences than half the effective samples")
    numbers = (
        f"Effective sample size {effective:.1f} of {len(log_weight)}, Pareto k-hat {tail:.2f}, "
        f"{num_distinct} distinct sequences (effectively {effective_distinct:.1f})."
    )
    return DIDEntropyEstimate(
        float(entropy),
        float(log_partition),
        float(entropy) - margin,
        float(entropy) + margin,
        standard_error,
        effective,
        tail,
        num_distinct,
        effective_distinct,
        *_verdict(numbers, faults),
    )


def estimate_from_islands(
    log_partition: Tensor, mean_log_ratio: Tensor, log_weight: Tensor, sequences: Tensor, confidence: float
) -> DIDEntropyEstimate:
    """H(q) of G independent islands of weighted samples, with a jackknife interval over the islands.

    The islands count by their estimates of Z, as in one sample of all. The t quantile has G - 1 degrees of freedom.
    The estimate is reliable where the effective sample size, equal sequences pooled, is at least 25, and effectively
    half of the islands or more count: where one outweighs the others, all may have missed what matters.

    Args:
        log_partition: [G] float64: each island's log Z.
        mean_log_ratio: [G] float64: each island's estimate of E_q[log r].
        log_weight: [K] float64: of all samples.
        sequences: [K, T] integers that tell samples apart.
        confidence: Of the interval.
    """
    from scipy.special import stdtrit

    islands = len(log_partition)

    def entropy_of(chosen: Tensor) -> Tensor:
        share = log_partition[chosen].softmax(0)
        return log_partition[chosen].logsumexp(0) - math.log(len(chosen)) - (share * mean_log_ratio[chosen]).sum()

    every = torch.arange(islands)
    entropy = float(entropy_of(every))
    left_out = torch.stack([entropy_of(every[every != i]) for i in range(islands)])
    standard_error = math.sqrt((islands - 1) / islands * float((left_out - left_out.mean()).square().sum()))
    margin = float(stdtrit(islands - 1, (1 + confidence) / 2)) * standard_error
    effective, num_distinct, effective_distinct = _diagnostics(log_weight, sequences)
    effective_islands = 1 / float(log_partition.softmax(0).square().sum())
    faults = _faults_of_sample(effective, effective_distinct)
    if effective_islands < islands / 2:
        faults.append("the islands disagree: effectively fewer than half of them count")
    numbers = (
        f"Effective sample size {effective:.1f} of {len(log_weight)}, {islands} islands (effectively "
        f"{effective_islands:.1f}), {num_distinct} distinct sequences (effectively {effective_distinct:.1f})."
    )
    return DIDEntropyEstimate(
        entropy,
        float(log_partition.logsumexp(0)) - math.log(islands),
        entropy - margin,
        entropy + margin,
        standard_error,
        effective,
        math.nan,
        num_distinct,
        effective_distinct,
        *_verdict(numbers, faults),
    )


def did_entropy_over_candidates(policy_logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """The entropy of pi / rho normalised over K given candidates: exact, comparable between sets of one size.

    In [0, log K]: log K where all candidates have one log-ratio, 0 where one has all the weight. It says how evenly
    the policy's implicit reward rates these candidates, not how wide the DID of all completions is.

    Args:
        policy_logprob: [..., K] log pi(y), summed over the completion, in nats, any float dtype. -inf leaves the
            candidate out, with gradient 0. Candidates that are equal count each.
        reference_logprob: [..., K] log rho(y).

    Returns:
        [...] float64, in nats, differentiable in both. NaN where no candidate has a policy probability above 0, or one
        has a reference probability of 0: the ratio is not defined.

    Raises:
        TypeError: An argument is no tensor of floats.
        ValueError: Shapes differ, or there are no candidates.

    Example:
        >>> policy, reference = torch.tensor([[-4.0, -2.0], [-4.0, -2.0]]), torch.tensor([[-5.0, -3.0], [-9.0, -1.0]])
        >>> did_entropy_over_candidates(policy, reference)
        tensor([0.6931, 0.0173], dtype=torch.float64)
    """
    _check_logprobs({"policy_logprob": policy_logprob, "reference_logprob": reference_logprob})
    if policy_logprob.dim() < 1 or policy_logprob.shape[-1] < 1:
        raise ValueError(
            f"Expected `policy_logprob` to have shape [..., K] with K >= 1, but got {tuple(policy_logprob.shape)}."
        )
    log_did = (policy_logprob.double() - reference_logprob.double()).log_softmax(-1)
    did = log_did.exp()
    # 0 log 0 = 0, in the gradient too.
    return -(did * log_did.masked_fill(did == 0, 0)).sum(-1)


def pareto_k(log_weight: Tensor) -> float:
    """k-hat of Pareto smoothed importance sampling (arXiv 1507.02646): a generalised Pareto's shape, of the tail.

    Below 0.5 the weights' variance is finite, below 1 their mean. The tail is the min(K / 5, 3 sqrt(K)) largest of the
    K `log_weight`, float64. The fit is that of Zhang and Stephens (2009, doi 10.1198/tech.2009.08017), drawn towards
    0.5 as if by ten observations. -inf where no weight exceeds the tail's threshold, inf where fewer than five do.

    Example:
        >>> uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> round(pareto_k(-0.8 * uniform.log()), 2)  # a Pareto distribution with k = 0.8
        0.76
    """
    tail = math.ceil(min(len(log_weight) / 5, 3 * math.sqrt(len(log_weight))))
    largest = (log_weight - log_weight.max()).exp().sort().values[-tail - 1 :]
    threshold = largest[0]
    excess = largest[1:] - threshold
    excess = excess[excess > 1e-9 * threshold]  # less is rounding of equal weights
    n = len(excess)
    if n == 0:
        return -math.inf
    if n < 5:
        return math.inf
    # The posterior mean of theta = -k / scale under their data-driven prior, on a grid of its quantiles.
    grid = 30 + math.isqrt(n)
    step = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    first_quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - (grid / step).sqrt()) / (3 * first_quartile)
    shapes = torch.log1p(-theta[:, None] * excess).mean(-1)
    log_likelihood = n * (torch.log(-theta / shapes) - shapes - 1)
    theta = (log_likelihood.nan_to_num(nan=-math.inf).softmax(0) * theta).sum()  # NaN is 0 / 0, where theta is 0
    shape = float(torch.log1p(-theta * excess).mean())
    return (n * shape + 10 * 0.5) / (n + 10)


def _importance_sampling(log_weight: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """log Z and H(q)."""
    log_partition = log_weight.logsumexp(0) - math.log(len(log_weight))
    return log_partition, log_partition - (log_weight.softmax(0) * log_ratio).sum()


def _jackknife_error(log_weight: Tensor, log_ratio: Tensor) -> float:
    """The standard error of H(q), from the estimates without one sample each."""
    samples = len(log_weight)
    log_partition, entropy = _importance_sampling(log_weight, log_ratio)
    weight = log_weight.softmax(0)
    rest = 1 - weight
    mean_of_rest = (log_partition - entropy - weight * log_ratio) / rest
    left_out = log_partition + rest.log() + math.log(samples / (samples - 1)) - mean_of_rest
    # The closed form cancels where a weight is near 1, and only the heaviest can be above 1/2: it is computed again.
    heaviest = int(weight.argmax())
    others = torch.arange(samples) != heaviest
    left_out[heaviest] = _importance_sampling(log_weight[others], log_ratio[others])[1]
    error = math.sqrt((samples - 1) / samples * float((left_out - left_out.mean()).square().sum()))
    return math.inf if math.isnan(error) else error  # all others have weight 0: nothing is left without the heaviest


def _diagnostics(log_weight: Tensor, sequences: Tensor) -> tuple[float, int, float]:
    """Effective sample size, number of distinct sequences, and the effective sample size with equal ones pooled."""
    weight = log_weight.softmax(0)
    _, index = torch.unique(sequences, dim=0, return_inverse=True)
    num_distinct = int(index.max()) + 1
    pooled = weight.new_zeros(num_distinct).index_add(0, index, weight)
    return 1 / float(weight.square().sum()), num_distinct, 1 / float(pooled.square().sum())


def _faults_of_sample(effective: float, effective_distinct: float) -> list[str]:
    if effective < MIN_EFFECTIVE_SAMPLES:
        return [f"the effective sample size is below {MIN_EFFECTIVE_SAMPLES}"]
    if effective_distinct < MIN_EFFECTIVE_SAMPLES:  # never above the effective sample size
        return [f"the weight lies on effectively fewer than {MIN_EFFECTIVE_SAMPLES} distinct sequences"]
    return []


def _verdict(numbers: str, faults: list[str]) -> tuple[bool, str]:
    """`reliable` and `reason`."""
    return not faults, f"{numbers} Unreliable: {'; '.join(faults)}." if faults else numbers


def check_samples(given: dict[str, Tensor], sequences: Tensor | None, *, at_least: int) -> None:
    """Raises TypeError or ValueError unless these are log-probabilities and sequences of `at_least` or more samples."""
    _check_logprobs(given)
    policy_logprob = given["policy_logprob"]
    if policy_logprob.dim() != 1 or len(policy_logprob) < at_least:
        raise ValueError(
            f"Expected `policy_logprob` to have shape [K] with K >= {at_least}, but got {tuple(policy_logprob.shape)}."
        )
    for name, value in given.items():
        allowed = value.isfinite() | (value == -math.inf) if name == "policy_logprob" else value.isfinite()
        if not allowed.all():
            index = int((~allowed).nonzero()[0])
            raise ValueError(f"Expected `{name}` to be finite, but got {float(value[index])} in sample {index}.")
        if (value > 1e-3).any():  # rounding may leave a certain token a little above 0
            index = int(value.argmax())
            raise ValueError(
                f"Expected `{name}` to hold log-probabilities, at most 0, but got {float(value[index])} "
                f"in sample {index}."
            )
    if sequences is None:
        return
    if not isinstance(sequences, Tensor) or sequences.is_floating_point() or sequences.is_complex():
        raise TypeError(f"Expected `sequences` to be a tensor of integers, but got {kind(sequences)}.")
    if sequences.dim() not in (1, 2) or len(sequences) != len(policy_logprob):
        raise ValueError(
            f"Expected `sequences` to have shape [K] or [K, T] with K = {len(policy_logprob)}, "
            f"but got {tuple(sequences.shape)}."
        )


def check_confidence(confidence: float) -> None:
    """Raises TypeError or ValueError unless it is a number in (0, 1)."""
    check_range("confidence", confidence, "(0, 1)")


def _check_logprobs(given: dict[str, Tensor]) -> None:
    shape = None
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"Expected `{name}` to be a tensor of floats, but got {kind(value)}.")
        shape = value.shape if shape is None else shape
        if value.shape != shape:
            raise ValueError(
                f"Expected `{name}` to have the shape of `policy_logprob`, {tuple(shape)}, "
                f"but got {tuple(value.shape)}."
            )


def kind(value: object) -> str:
    """What a value is, for an error's words."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
