"""sample_did: completions from the DID of two models, and its entropy, by twisted sequential Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from lit_did.arguments import check_bools, check_integer, check_range
from lit_did.functional.did_entropy import DIDEntropyEstimate, check_confidence, estimate_from_islands
from lit_did.functional.enumeration import NextToken
from lit_did.representing import short_repr
from lit_did.sampling.readers import (
    CachedFunction,
    CachedModel,
    as_reader,
    as_readers,
    checked_prompt,
    ends_of,
    unmasked,
    warn_without_cache,
    warn_without_padding,
)

_COMPARED, _LEAST_COMPARED = 8, 2  # completions that a model reads once more, whole; of each of several prompts


@short_repr
class DIDSamples(NamedTuple):
    """K weighted completions of the DID q(y) = pi(y) / rho(y) / Z, and its entropy. In nats; on the CPU.

    With `exponent` or `prior`, q(y) = prior(y) (pi(y) / rho(y))^exponent / Z.

    The particles stand island after island, K / num_islands each.
    """

    completions: Tensor
    """[K, T] int64, -1 after the end; a completion may occur several times"""
    lengths: Tensor
    """[K] int64: tokens of each completion, its end-of-sequence token included"""
    log_weight: Tensor
    """[K] float64: their exponentials sum to 1; E_q[f] is about sum_i exp(log_weight_i) f(y_i)"""
    policy_logprob: Tensor
    """[K] float64: log pi(y)"""
    reference_logprob: Tensor
    """[K] float64: log rho(y)"""
    proposal_logprob: Tensor
    """[K] float64: of what was drawn; a proposal for `estimate_did_entropy` only with `ess_threshold=0`"""
    island_log_partition: Tensor
    """[num_islands] float64: each island's own estimate of log Z"""
    island_entropy: Tensor
    """[num_islands] float64: each island's own estimate of H(q)"""
    num_resamplings: Tensor
    """[num_islands] int64: how often each resampled"""
    log_num_completions: float
    """the logarithm of how many completions there are: H(q) where nothing was learned, pi = rho"""
    estimate: DIDEntropyEstimate
    """H(q) and log Z over all islands, with an interval from their differences"""
    prior_logprob: Tensor
    """[K] float64: log of the prior's probability; 0 without a prior"""

    @property
    def log_ratio(self) -> Tensor:
        """[K] log pi(y) - log rho(y)"""
        return self.policy_logprob - self.reference_logprob

    @property
    def entropy_per_token(self) -> float:
        """H(q) / T, in nats a token"""
        return self.estimate.entropy / self.completions.shape[1]

    @property
    def concentration(self) -> float:
        """log of the number of completions, less H(q): how far from knowing nothing, 0 where pi = rho"""
        return self.log_num_completions - self.estimate.entropy


def sample_did(
    policy: nn.Module | NextToken,
    reference: nn.Module | NextToken | None = None,
    prompt: Tensor | Sequence[int] | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto",
    num_samples: int = 128,
    num_islands: int = 4,
    ess_threshold: float = 0.5,
    confidence: float = 0.95,
    exponent: float = 1.0,
    prior: nn.Module | NextToken | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DIDSamples:
    """Draws completions of one prompt from the DID of two models and estimates H(q) with an interval.

    The method is twisted sequential Monte Carlo. All particles grow token by token. A token v is drawn in proportion to
    pi(v) / rho(v) times the number of completions that could follow it. The normalizer of that proposal goes into the
    particle's weight. An island resamples its particles (systematically) when their effective sample size falls below
    `ess_threshold` of their number. Completions that have ended keep their weight. The expectation of each log-ratio
    under the proposal is known, so its distance from what was drawn is a control variate for the entropy. The interval
    is a jackknife over the islands, which are independent, with a t quantile.
    `lit_did.functional.did_entropy.estimate_from_islands` has the rules of the verdict. `lit-did docs theory` has the
    measured errors.

    All weights are logarithms, so any length and vocabulary works. Two runs with one seed on one machine agree.

    Language models use their own caches. Afterwards some completions go through each model's own forward pass. If a
    log-probability differs, everything is drawn again without caches, and one warning says so.

    Args:
        policy: A transformers causal language model, or a function from prefixes [n, t] int64, t from 0, to the next
            token's logits [n, V], as for `lit_did.functional.enumerate_did`.
        reference: The same, with the same vocabulary. None: the policy is a PeftModel, and its reference is itself
            without its adapter.
        prompt: [t] or [1, t] token ids, t >= 1, for language models. None for functions.
        max_new_tokens: T, where completions are cut. H(q) grows with T, so report both.
        eos_token_id: The token or tokens that end a completion. None: no token does. "auto": those of the policy's
            `generation_config`, and none for functions.
        num_samples: K, a multiple of `num_islands`, at least two particles for each island. All are read at once, each
            with its own keys and values. Fewer than 25 effective particles are never called reliable.
        num_islands: The number of independent groups of particles, at least 3.
        ess_threshold: In [0, 1], as a share of an island's particles. With 0 it never resamples: the samples are then
            independent, as `lit_did.functional.estimate_did_entropy` needs them.
        confidence: The level of the interval, in (0, 1).
        exponent: a of q(y) proportional to (pi(y) / rho(y))^a, finite. With 1 / beta and the models of the chosen and
            of the rejected completions, q is the DID of DPO's optimum (`lit-did docs theory`, "Two sides").
        prior: A model with the same vocabulary, to draw from q(y) proportional to prior(y) (pi(y) / rho(y))^a. A DID
            has the uniform prior. With the reference of DPO as the prior, `exponent=1 / beta` and the two sides'
            models, q is DPO's optimum, over whole completions, and Z = E_prior[(pi / rho)^a].
        seed: The seed of the draws.
        progress: Whether to show a progress bar.

    Returns:
        `DIDSamples`, tensors on the CPU without gradients.

    Raises:
        TypeError: A model or another argument has the wrong type.
        ValueError: An argument is out of range, `reference` is None and `policy` is no PeftModel, the models share
            parameters or have different vocabularies, logits are NaN, or the reference excludes (-inf) a token that the
            policy does not.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])  # of every token, after any prefix; token 0 ends the completion
        >>> samples = sample_did(lambda prefixes: logits.expand(len(prefixes), -1),
        ...                      lambda prefixes: 0 * logits.expand(len(prefixes), -1), max_new_tokens=4,
        ...                      eos_token_id=0, num_samples=256, progress=False)
        >>> from lit_did.functional import enumerate_did
        >>> exact = enumerate_did(lambda prefixes: logits.expand(len(prefixes), -1),
        ...                       lambda prefixes: 0 * logits.expand(len(prefixes), -1), max_new_tokens=4,
        ...                       eos_token_id=0)
        >>> round(samples.estimate.entropy, 1), round(float(exact.entropy), 1)
        (2.7, 2.7)
    """
    settings = Settings(max_new_tokens, num_samples, num_islands, ess_threshold, confidence, exponent).checked()
    check_seed(seed)
    check_bools(progress=progress)
    prompts = None if prompt is None else [checked_prompt(prompt)]
    ends = ends_of(policy, eos_token_id)
    with tqdm(total=max_new_tokens, desc="DID", unit="token", disable=not progress) as bar:
        report = lambda step: bar.update(step - bar.n)  # noqa: E731
        return draw(policy, reference, prompts, [seed], ends, settings, report, prior)[0]


class Settings(NamedTuple):
    """How to sample; `sample_did` describes the fields."""

    max_new_tokens: int
    num_samples: int
    num_islands: int
    ess_threshold: float
    confidence: float
    exponent: float = 1.0

    def checked(self) -> Settings:
        """The same; raises TypeError or ValueError if a field is wrong."""
        islands = self.num_islands
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("num_islands", islands, 3)
        check_integer("num_samples", self.num_samples, 2 * islands)
        if self.num_samples % islands:
            raise ValueError(
                f"Expected `num_samples` to be a multiple of `num_islands`, {islands}, but got {self.num_samples}."
            )
        check_range("ess_threshold", self.ess_threshold, "[0, 1]")
        check_confidence(self.confidence)
        check_range("exponent", self.exponent, "(-inf, inf)")
        return self

    @property
    def exponents(self) -> tuple[float, ...]:
        """Of the policy's, the reference's and perhaps the prior's probabilities in q."""
        return (self.exponent, -self.exponent, 1.0)


def draw(
    policy: nn.Module | NextToken,
    reference: nn.Module | NextToken | None,
    prompts: Sequence[Tensor] | None,
    seeds: Sequence[int],
    ends: list[int],
    settings: Settings,
    report: Callable[[int], object],
    prior: nn.Module | NextToken | None = None,
) -> list[DIDSamples]:
    """`sample_did` of several prompts, whose particles the models read together.

    A prompt's random numbers come from its own seed, so its samples are those of the prompt alone, up to the rounding
    of the models' logits.

    Args:
        policy, reference: As for `sample_did`.
        prompts: What `checked_prompt` returns for each prompt. None: the models are functions.
        seeds: One for each prompt.
        ends: The tokens that end a completion.
        settings: Checked.
        report: Called with the number of tokens that all particles have.
        prior: As for `sample_did`.
    """
    for cache in (True, False):
        first, second, unread = as_readers(policy, reference, prompts, settings.max_new_tokens, cache=cache)
        readers = [first, second]
        if prior is not None:
            readers.append(as_reader(prior, "prior", policy, prompts, settings.max_new_tokens, cache=cache))
        particles = _Particles(settings, seeds, len(readers))
        log_num_completions = _grow(particles, readers, unread, ends, settings, report)
        wrong = _wrong_caches(particles, readers, prompts) if cache and prompts else []
        if not wrong:
            break
        if prompts and len({len(prompt) for prompt in prompts}) > 1:
            warn_without_padding(" and ".join(wrong))
            alone = [
                draw(policy, reference, [prompt], [seed], ends, settings, report, prior)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            return [samples for (samples,) in alone]
        warn_without_cache(" and ".join(wrong), "gives other results with its cache than in its own forward pass")
    return particles.results(settings.confidence, log_num_completions)


def _grow(
    particles: _Particles,
    readers: Sequence[CachedModel | CachedFunction],
    unread: tuple[Tensor, ...],
    ends: list[int],
    settings: Settings,
    report: Callable[[int], object],
) -> float:
    """Grows the particles to their ends; the logarithm of how many completions there are."""
    own, max_new_tokens = torch.arange(len(particles.ended)), settings.max_new_tokens
    parents = own // settings.num_samples  # all particles of a prompt begin with the same row, which is read once
    for step in range(max_new_tokens):
        logits = [reader.read(*unread) for reader in readers]
        if step == 0:
            completions = _log_completions(logits[0].shape[-1], ends, max_new_tokens)
            # Under a prior, what follows a prefix has the probability 1.
            after = completions if len(readers) == 2 else torch.zeros_like(completions)
            particles.log_partition += after[max_new_tokens]  # the number of all completions
        ended = particles.ended[: len(logits[0])]  # False for prompts
        twisted = _Twisted(logits, settings.exponents, ended, ends, float(after[max_new_tokens - step - 1]))
        particles.weigh(twisted.log_sum[parents] - after[max_new_tokens - step])
        ancestors = particles.resample(settings.ess_threshold)
        parents = parents[ancestors]
        tokens = twisted.draw(parents, particles.uniform(twisted.num_halvings))
        particles.add(step, tokens, *twisted.of(parents, tokens), ends)
        report(step + 1)
        if particles.ended.all():
            break
        if step == 0 or not torch.equal(ancestors, own):  # saves a copy of keys and values
            for reader in readers:
                reader.select(parents)
        parents, unread = own, (tokens[:, None],)
    return float(completions[max_new_tokens])


def _wrong_caches(
    particles: _Particles, readers: Sequence[CachedModel | CachedFunction], prompts: Sequence[Tensor]
) -> list[str]:
    """Names of models that give some completions other log-probabilities in one forward pass over all their tokens.

    This finds a cache that goes wrong anywhere, such as beyond a window, when rows are reordered, or before it failed.
    It also finds a model that does not leave padding out.
    """
    each = len(particles.completions) // len(prompts)
    compared = max(_LEAST_COMPARED, _COMPARED // len(prompts))
    rows = [range(i * each, (i + 1) * each, max(1, each // compared)) for i in range(len(prompts))]
    wrong = set()
    for reader, log_probs in zip(readers, particles.logprobs, strict=False):  # the last row is the proposal's
        if not isinstance(reader, CachedModel) or not reader.has_cached:
            continue
        for prompt, row in ((prompt, row) for prompt, some in zip(prompts, rows, strict=True) for row in some):
            completion = particles.completions[row]
            if not reader.agrees_on(prompt, completion[completion >= 0], log_probs[row]):
                wrong.add(reader.name)
                break
    return sorted(wrong)


class _Particles:
    """The completions of every prompt as they grow, their weights, and each island's sums. float64, on the CPU.

    A prompt has K particles in some islands, and its own random numbers. n counts the particles of all prompts.
    """

    def __init__(self, settings: Settings, seeds: Sequence[int], num_models: int) -> None:
        self._exponents = settings.exponents[:num_models]
        self._num_samples, self._num_islands = settings.num_samples, settings.num_islands
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        particles, islands = len(seeds) * settings.num_samples, len(seeds) * settings.num_islands
        self.completions = torch.full((particles, settings.max_new_tokens), -1)
        self.ended = torch.zeros(particles, dtype=torch.bool)
        # The policy's, the reference's, perhaps the prior's, and the proposal's.
        self.logprobs = torch.zeros(num_models + 1, particles, dtype=torch.float64)
        self.log_weight = torch.zeros(islands, particles // islands, dtype=torch.float64)  # since resampling
        self.log_partition = torch.zeros(islands, dtype=torch.float64)  # until resampling
        self.control = torch.zeros(islands, dtype=torch.float64)  # the control variate, of mean 0
        self.num_resamplings = torch.zeros(islands, dtype=torch.long)

    def uniform(self, count: int) -> Tensor:
        """[n, count] random numbers in [0, 1)."""
        return self._random(self._num_samples, count)

    def _random(self, *shape: int) -> Tensor:
        """Numbers of this shape for each prompt, from its own generator, one prompt after the other."""
        return torch.cat([torch.rand(shape, dtype=torch.float64, generator=g) for g in self._generators])

    def weigh(self, log_increment: Tensor) -> None:
        """Multiplies the weights of completions that go on; [n]."""
        self.log_weight += log_increment.masked_fill(self.ended, 0).view_as(self.log_weight)

    def resample(self, ess_threshold: float) -> Tensor:
        """[n] the particle that each one goes on with: systematic resampling, island by island, where it is due."""
        num_islands, each = self.log_weight.shape
        weight = self.log_weight.softmax(1)
        due = 1 / weight.square().sum(1) < ess_threshold * each
        due &= ~self.ended.view_as(weight).all(1)  # what a prompt alone would no longer do
        positions = (self._random(self._num_islands)[:, None] + torch.arange(each)) / each
        drawn = torch.searchsorted(weight.cumsum(1), positions).clamp(max=each - 1)
        own = torch.arange(each).expand(num_islands, -1)
        ancestors = (torch.where(due[:, None], drawn, own) + each * torch.arange(num_islands)[:, None]).flatten()
        self.log_partition += torch.where(due, self.log_weight.logsumexp(1) - math.log(each), 0)
        self.log_weight[due] = 0
        self.num_resamplings += due
        self.completions, self.ended = self.completions[ancestors], self.ended[ancestors]
        self.logprobs = self.logprobs[:, ancestors]
        return ancestors

    def add(self, step: int, tokens: Tensor, logprobs: Tensor, surprise: Tensor, ends: list[int]) -> None:
        """Adds token number `step` [n] to those that go on.

        Args:
            step: The token's number.
            tokens: [n].
            logprobs: [models + 1, n] each model's and the proposal's.
            surprise: [n] of the log density.
            ends: The tokens that end a completion.
        """
        going = ~self.ended
        self.completions[going, step] = tokens[going]
        self.logprobs += torch.where(going, logprobs, 0)
        self.control += (self.log_weight.softmax(1) * surprise.view_as(self.log_weight)).sum(1)  # 0 where ended
        self.ended |= torch.isin(tokens, torch.tensor(ends, dtype=torch.long))

    def results(self, confidence: float, log_num_completions: float) -> list[DIDSamples]:
        """Of every prompt."""
        each = self.log_weight.shape[1]
        log_partition = self.log_partition + self.log_weight.logsumexp(1) - math.log(each)
        exponents = torch.tensor(self._exponents, dtype=torch.float64)
        log_density = (exponents[:, None] * self.logprobs[:-1]).sum(0).view_as(self.log_weight)  # but for log Z
        mean_log_density = (self.log_weight.softmax(1) * log_density).sum(1) - self.control
        results = []
        for i in range(len(self._generators)):
            rows = slice(i * self._num_samples, (i + 1) * self._num_samples)
            islands = slice(i * self._num_islands, (i + 1) * self._num_islands)
            partition, mean, completions = log_partition[islands], mean_log_density[islands], self.completions[rows]
            log_weight = (self.log_weight[islands].log_softmax(1) + partition.log_softmax(0)[:, None]).flatten()
            policy_logprob, reference_logprob, *priors, proposal_logprob = self.logprobs[:, rows]
            results.append(
                DIDSamples(
                    completions,
                    (completions >= 0).sum(1),
                    log_weight,
                    policy_logprob,
                    reference_logprob,
                    proposal_logprob,
                    partition,
                    partition - mean,
                    self.num_resamplings[islands],
                    log_num_completions,
                    estimate_from_islands(partition, mean, log_weight, completions, confidence),
                    priors[0] if priors else torch.zeros_like(policy_logprob),
                )
            )
        return results


class _Twisted:
    """The proposal of one step: the token DIDs of n prefixes, twisted by how many completions follow a token.

    Args:
        logits: [n, V] of every model, of float64 computed in it, of other dtypes in float32.
        exponents: Of the models' probabilities.
        ended: [n] bool: prefixes whose logits are not looked at.
        ends: The tokens that end a completion, followed by one (empty) completion.
        log_following: The logarithm of how many follow any other token.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        exponents: Sequence[float],
        ended: Tensor,
        ends: list[int],
        log_following: float,
    ) -> None:
        for name, other in zip(("reference", "prior"), logits[1:], strict=False):
            if other.shape != logits[0].shape:
                raise ValueError(
                    f"Expected `{name}` to return logits of the policy's shape, {tuple(logits[0].shape)}, "
                    f"but got {tuple(other.shape)}."
                )
        self._logits = [_wide(logits[0])]
        self._logits += [_wide(other).to(self._logits[0]) for other in logits[1:]]
        self._normalizers = [x.logsumexp(-1) for x in self._logits]
        log_ratio = exponents[0] * self._logits[0]
        normalizer = exponents[0] * self._normalizers[0]
        for exponent, other, of_other in zip(exponents[1:], self._logits[1:], self._normalizers[1:], strict=False):
            log_ratio.add_(other, alpha=exponent)
            normalizer.add_(of_other, alpha=exponent)
        log_ratio -= normalizer[:, None]
        # Excluded by a model with a positive exponent: of weight 0, whatever the others say.
        for exponent, x in zip(exponents, self._logits, strict=False):
            if exponent > 0:
                log_ratio.masked_fill_(x == -torch.inf, -torch.inf)
        log_ratio.masked_fill_(ended.to(log_ratio.device)[:, None], 0)
        self._twist = torch.full((log_ratio.shape[-1],), log_following, dtype=torch.float64, device=log_ratio.device)
        self._twist[ends] = 0
        # Relative to its largest entry it is small enough for float32.
        twisted = log_ratio + (self._twist - log_following).to(log_ratio)
        log_sum = twisted.logsumexp(-1)
        if not log_sum.isfinite().all():
            row = int((~log_sum.isfinite()).nonzero()[0])
            raise ValueError(
                "Expected both models to return finite logits, or -inf in the policy's and, only there, in the "
                f"reference's, but got a sum of ratios of {float(log_sum[row].exp())} in row {row}."
            )
        self._log_sum, self._log_following = log_sum.double(), log_following
        self._log_ratio = log_ratio
        self._probability = (twisted - log_sum[:, None]).exp()
        weighted = self._probability * log_ratio
        self._expected = weighted.masked_fill_(self._probability == 0, 0).sum(-1)

    @property
    def log_sum(self) -> Tensor:
        """[n] float64: the logarithm of the proposal's normalizer."""
        return self._log_sum.cpu() + self._log_following

    @property
    def num_halvings(self) -> int:
        """How many random numbers draw one token."""
        return (self._probability.shape[-1] - 1).bit_length()

    def draw(self, parents: Tensor, uniform: Tensor) -> Tensor:
        """[K] a token for each of K particles.

        Each random number halves the tokens that are left. Rounding of the logits then changes a token about once in
        30,000 draws. The inverse of the cumulative distribution would change one in seventy, because its steps are as
        small as the rounding.

        Args:
            parents: [K] numbers of their prefixes.
            uniform: [K, num_halvings] float64 random numbers in [0, 1).
        """
        size = 2**self.num_halvings
        uniform = uniform.to(self._probability.device)
        rows = max(1, 2**23 // size)  # 128 MiB of sums
        tokens = []
        for parent, numbers in zip(parents.to(uniform.device).split(rows), uniform.split(rows), strict=True):
            level = self._probability[parent].double()
            sums = [pad(level, (0, size - level.shape[1]))]
            while sums[-1].shape[1] > 1:
                sums.append(torch.add(*sums[-1].chunk(2, 1)))
            token = torch.zeros_like(parent)
            for level, number in zip(reversed(sums[:-1]), numbers.unbind(1), strict=True):
                half = level.shape[1] // 2
                left, right = (level.gather(1, at[:, None])[:, 0] for at in (token, token + half))
                token += half * (number * (left + right) >= left)  # never to a side of probability 0
            tokens.append(token)
        return torch.cat(tokens).cpu()

    def of(self, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of K tokens: [., K] each model's and the proposal's logprob; [K] log density less its expectation."""
        at = (parents.to(self._log_ratio.device), tokens.to(self._log_ratio.device))
        models = [x[at] - of[at[0]] for x, of in zip(self._logits, self._normalizers, strict=True)]
        log_ratio = self._log_ratio[at]
        proposal = log_ratio.double() + self._twist[at[1]] - self._log_following - self._log_sum[at[0]]
        logprobs = torch.stack([*(logprob.double() for logprob in models), proposal])
        return logprobs.cpu(), (log_ratio - self._expected[at[0]]).double().cpu()


def _log_completions(vocab_size: int, ends: list[int], max_new_tokens: int) -> Tensor:
    """[T + 1] float64: the logarithm of how many completions follow a prefix with n tokens to go, n from 0 to T."""
    beyond = [token for token in ends if not 0 <= token < vocab_size]
    if beyond:
        raise ValueError(f"Expected `eos_token_id` to be in [0, {vocab_size}), but got {beyond[0]}.")
    log_ends, log_others = torch.tensor([len(ends), vocab_size - len(ends)], dtype=torch.float64).log()
    counts = [torch.zeros((), dtype=torch.float64)]
    for _ in range(max_new_tokens):
        counts.append(torch.logaddexp(log_ends, log_others + counts[-1]))
    return torch.stack(counts)


def _wide(logits: Tensor) -> Tensor:
    return unmasked(logits.detach() if logits.dtype == torch.float64 else logits.detach().float())


def check_seed(seed: int) -> None:
    """Raises TypeError or ValueError unless torch can take it."""
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"Expected `seed` to be an integer of 64 bits, but got {seed!r}.")
