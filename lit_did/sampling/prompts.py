"""did_entropy_of_prompts: the DID's entropy of many prompts, several at a time, and its mean over them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_did.arguments import check_bools, check_integer
from lit_did.representing import short_repr
from lit_did.sampling.readers import (
    CachedModel,
    as_readers,
    checked_prompt,
    ends_of,
    model_readers,
    warn_without_padding,
)
from lit_did.sampling.sequential import DIDSamples, Settings, check_seed, draw

LEAST_RELIABLE = 0.9
"""the share of prompts with a reliable estimate that a mean over prompts needs to be called reliable"""


@short_repr
class MeanOverPrompts(NamedTuple):
    """A mean over prompts of a quantity that is estimated for each, with two intervals. In nats.

    The first interval is about all prompts of the kind that these are a random sample of. It covers the differences
    between prompts and the errors of their estimates. The second is about these prompts alone. It covers only the
    errors of their estimates.
    """

    mean: float
    """over the prompts"""
    standard_error: float
    """of `mean` for the prompts that these are a sample of; infinite for one prompt"""
    lower: float
    """where the interval about such prompts begins"""
    upper: float
    """where it ends"""
    standard_error_of_these: float
    """of `mean` for these prompts"""
    lower_of_these: float
    """where the interval about these prompts begins"""
    upper_of_these: float
    """where it ends"""


def mean_over_prompts(
    estimates: ArrayLike, standard_errors: ArrayLike, *, num_islands: int, confidence: float = 0.95
) -> MeanOverPrompts:
    """The mean of independent estimates, one a prompt, with its two intervals.

    The interval about such prompts is Student's, from the estimates' own variance. That variance contains the
    errors of the estimates. The interval about these prompts adds up the estimates' squared standard errors, each with
    `num_islands` - 1 degrees of freedom, and has Satterthwaite's degrees of freedom.

    Args:
        estimates: One for each prompt, at least one.
        standard_errors: Of the estimates.
        num_islands: The islands that each standard error comes from.
        confidence: The level of the intervals.

    Example:
        >>> found = mean_over_prompts([1.0, 3.0], [0.1, 0.1], num_islands=4)
        >>> found.mean, round(found.standard_error, 3), round(found.standard_error_of_these, 3)
        (2.0, 1.0, 0.071)
    """
    from scipy.special import stdtrit

    values, variances = np.array(estimates), np.square(np.array(standard_errors))
    count, mean = len(values), float(values.mean())
    errors = [
        math.inf if count < 2 else float(values.std(ddof=1)) / math.sqrt(count),
        math.sqrt(variances.sum()) / count,
    ]
    squares = np.square(variances).sum()
    freedom = [count - 1, (num_islands - 1) * (variances.sum() ** 2 / squares if squares else count)]
    bounds = []
    for error, degrees in zip(errors, freedom, strict=True):
        margin = math.inf if error == math.inf else float(stdtrit(degrees, (1 + confidence) / 2)) * error
        bounds.append((error, mean - margin, mean + margin))
    return MeanOverPrompts(mean, *bounds[0], *bounds[1])


def verdict_of_mean(estimates: Sequence[float], reliable: Sequence[bool]) -> tuple[bool, str]:
    """Whether to believe a mean over prompts, and why: at least nine in ten estimates have to be reliable.

    Args:
        estimates: One for each prompt.
        reliable: Their verdicts.

    Example:
        >>> verdict_of_mean([1.0, 2.0, 9.0], [True, True, False])
        (False, 'Estimates of 2 of 3 prompts are reliable; their mean is 1.5. Unreliable: fewer than 90%.')
    """
    count, total = sum(reliable), len(reliable)
    kept = [value for value, is_reliable in zip(estimates, reliable, strict=True) if is_reliable]
    words = f"Estimates of {count} of {total} prompts are reliable" + (
        f"; their mean is {sum(kept) / count:.4g}." if 0 < count < total else "."
    )
    if count >= LEAST_RELIABLE * total:
        return True, words
    return False, f"{words} Unreliable: fewer than {LEAST_RELIABLE:.0%}."


@short_repr
class DIDEntropyOfPrompts(NamedTuple):
    """The DID's entropy of every prompt, and its mean over the prompts."""

    prompts: list[DIDSamples]
    """what `sample_did` returns for each prompt"""
    entropy: MeanOverPrompts
    """H(q), in nats"""
    entropy_per_token: MeanOverPrompts
    """H(q) / T, in nats a token"""
    concentration: MeanOverPrompts
    """log of the number of completions, less H(q), in nats"""
    reliable: bool
    """whether at least nine in ten prompts have a reliable estimate"""
    reason: str
    """the numbers behind `reliable`"""


def did_entropy_of_prompts(
    policy: nn.Module,
    reference: nn.Module | None = None,
    prompts: Sequence[Tensor | Sequence[int]] = (),
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto",
    num_samples: int = 128,
    num_islands: int = 4,
    ess_threshold: float = 0.5,
    confidence: float = 0.95,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> DIDEntropyOfPrompts:
    """Estimates the DID's entropy of many prompts by `sample_did`, and its mean over them with intervals.

    Both models read `batch_size` prompts at a time, padded on the left to one length. If a model gives other results
    for padded prompts than in its own forward pass, one warning says so, and only prompts of one length are read
    together. A prompt's result does not depend on the others, up to the rounding of the models' logits. Its
    random numbers come from `prompt_seed(seed, index)`: `sample_did` with that seed returns the same samples.

    Args:
        policy: A transformers causal language model.
        reference: The same, with the same vocabulary. None: the policy is a PeftModel, and its reference is itself
            without its adapter.
        prompts: Token ids of each prompt, [t] or [1, t]. At least one prompt.
        max_new_tokens: T, where completions are cut.
        eos_token_id: The token or tokens that end a completion, as for `sample_did`.
        num_samples: The number of particles of each prompt.
        num_islands: The number of independent groups of a prompt's particles.
        ess_threshold: When an island resamples, as for `sample_did`.
        confidence: The level of all intervals.
        batch_size: Prompts that are read together. Memory grows with `batch_size` times `num_samples`.
        seed: The seed of all draws, not negative.
        progress: Whether to show a progress bar.

    Returns:
        `DIDEntropyOfPrompts`.

    Raises:
        TypeError, ValueError: As `sample_did`. Errors of a prompt begin with its number.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, eos_token_id=None)
        >>> policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> found = did_entropy_of_prompts(policy, reference, [[1, 2], [3]], max_new_tokens=2, progress=False)
        >>> len(found.prompts), found.reliable, found.entropy.mean < math.log(11**2)
        (2, True, True)
    """
    found: dict[int, DIDSamples] = {}
    for batch in sample_in_batches(
        policy,
        reference,
        prompts,
        Settings(max_new_tokens, num_samples, num_islands, ess_threshold, confidence),
        eos_token_id=eos_token_id,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    ):
        found |= batch
    samples = [found[index] for index in range(len(prompts))]
    estimates = [x.estimate for x in samples]
    entropies, errors = [e.entropy for e in estimates], np.array([e.standard_error for e in estimates])
    mean = partial(mean_over_prompts, num_islands=num_islands, confidence=confidence)
    return DIDEntropyOfPrompts(
        samples,
        mean(entropies, errors),
        mean([x.entropy_per_token for x in samples], errors / max_new_tokens),
        mean([x.concentration for x in samples], errors),
        *verdict_of_mean(entropies, [e.reliable for e in estimates]),
    )


def sample_in_batches(
    policy: nn.Module,
    reference: nn.Module | None,
    prompts: Sequence[Tensor | Sequence[int]],
    settings: Settings,
    *,
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto",
    batch_size: int,
    seed: int,
    progress: bool,
    skip: Collection[int] = (),
    names: Sequence[str] = (),
) -> Iterator[dict[int, DIDSamples]]:
    """Samples `did_entropy_of_prompts` batch by batch: {index of the prompt: its samples}.

    Batches depend on the prompts and `batch_size` alone, the longest prompts first. A batch whose prompts are all in
    `skip` is left out, which changes no number of the others. `names` are what errors call the prompts.
    """
    settings.checked()
    check_seed(seed)
    check_integer("seed", seed, 0)
    check_integer("batch_size", batch_size, 1)
    check_bools(progress=progress)
    if not isinstance(policy, nn.Module):
        raise TypeError(f"Expected `policy` to be a causal language model, but got {type(policy).__name__}.")
    if not len(prompts):
        raise ValueError("Expected `prompts` to be the token ids of at least one prompt, but got none.")
    readers = model_readers(policy, reference)
    token_ids = []
    for index, prompt in enumerate(prompts):
        try:
            token_ids.append(checked_prompt(prompt))
            for reader, name in zip(readers, ("policy", "reference"), strict=True):
                reader.check_prompt(token_ids[-1], settings.max_new_tokens, name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{names[index] if names else f'Prompt {index}'}: {error}") from error
    ends = ends_of(policy, eos_token_id)
    lengths = [len(ids) for ids in token_ids]
    mixed = batch_size > 1 and len(set(lengths)) > 1 and _read_padding(policy, reference, token_ids)
    batches = batches_of(lengths, batch_size, mixed=mixed)
    skipped = set(skip)
    left = [batch for batch in batches if not skipped.issuperset(batch)]
    done = len(prompts) - sum(map(len, left))
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} prompts [{elapsed}<{remaining}]"
    with tqdm(total=len(prompts), initial=done, desc="DID", bar_format=layout, disable=not progress) as bar:
        for batch in left:

            def report(step: int, done: int = done, size: int = len(batch)) -> None:
                bar.update(done + size * step / settings.max_new_tokens - bar.n)

            seeds = [prompt_seed(seed, index) for index in batch]
            samples = draw(policy, reference, [token_ids[i] for i in batch], seeds, ends, settings, report)
            done += len(batch)
            bar.update(done - bar.n)
            yield dict(zip(batch, samples, strict=True))


def prompt_seed(seed: int, index: int, *more: int) -> int:
    """The seed of prompt number `index`, which depends on no other prompt. Below 2**53, so exact in any JSON.

    Args:
        seed: The seed of all draws.
        index: The prompt's number.
        *more: Numbers of further streams of the same prompt, each with a seed of its own.

    Example:
        >>> prompt_seed(0, 1)
        2383740928328724
    """
    return int(np.random.SeedSequence(seed, spawn_key=(index, *more)).generate_state(1, np.uint64)[0]) >> 11


def batches_of(lengths: Sequence[int], batch_size: int, *, mixed: bool) -> list[list[int]]:
    """The prompts' numbers in batches, the longest prompts first, so that little is padded and memory fails at once.

    Args:
        lengths: Of the prompts.
        batch_size: The most prompts of a batch.
        mixed: Whether a batch may have prompts of different lengths.

    Example:
        >>> batches_of([3, 5, 3, 4], 2, mixed=True), batches_of([3, 5, 3, 4], 2, mixed=False)
        ([[1, 3], [0, 2]], [[1], [3], [0, 2]])
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and len(batches[-1]) < batch_size and (mixed or lengths[batches[-1][0]] == lengths[index])
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _read_padding(policy: nn.Module, reference: nn.Module | None, prompts: Sequence[Tensor]) -> bool:
    """Whether both models keep a cache and leave padding out of it, tried with the shortest and the longest prompt.

    Every batch is compared with the models' own forward passes once more. This trial saves drawing what is wrong.
    """
    tried = [min(prompts, key=len), max(prompts, key=len)]
    first, second, unread = as_readers(policy, reference, tried, 2)
    wrong = []
    for reader in (first, second):
        assert isinstance(reader, CachedModel)
        logits = reader.read(*unread)
        agrees = reader.agrees(logits) and reader.agrees(reader.read(logits.argmax(-1, keepdim=True)))
        if not reader.caches:
            return False  # reading alone is as fast, and a warning has named the model
        wrong += [] if agrees else [reader.name]
    if wrong:
        warn_without_padding(" and ".join(sorted(set(wrong))))
    return not wrong
