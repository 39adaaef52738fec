"""The DID of every completion of models small enough to enumerate: the truth that estimates are measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_did.arguments import check_integer
from lit_did.functional.did_entropy import did_entropy_over_candidates
from lit_did.ops.reference import LARGEST_LOGIT
from lit_did.representing import short_repr

NextToken = Callable[[Tensor], Tensor]
"""a model: from prefixes [n, t] int64, t from 0, to the next token's logits (or log-probabilities) [n, V]"""


@short_repr
class EnumeratedDID(NamedTuple):
    """All N completions of two models and their DID, exact. float64, in nats, differentiable in the models' logits."""

    completions: Tensor
    """[N, T] int64, -1 after the end; shorter ones first, and in the order of their tokens"""
    lengths: Tensor
    """[N] int64: tokens of each completion, its end-of-sequence token included"""
    policy_logprob: Tensor
    """[N] log pi(y)"""
    reference_logprob: Tensor
    """[N] log rho(y)"""
    log_partition: Tensor
    """[] log Z, Z = sum_y pi(y) / rho(y)"""
    entropy: Tensor
    """[] H(q), in [0, log N]"""

    @property
    def log_ratio(self) -> Tensor:
        """[N] log pi(y) - log rho(y)"""
        return self.policy_logprob - self.reference_logprob

    @property
    def did_logprob(self) -> Tensor:
        """[N] log q(y)"""
        return self.log_ratio - self.log_partition


def enumerate_did(
    policy: NextToken,
    reference: NextToken,
    *,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    max_completions: int = 5_000_000,
) -> EnumeratedDID:
    """Every completion of two small models, with its probabilities, log Z and H(q).

    A transformers model becomes such a function, for a prompt [1, t], as
    `lambda prefixes: model(torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)).logits[:, -1]`.

    A completion ends with `eos_token_id` or is cut at `max_new_tokens` tokens. Both models are called once for each
    length, with all prefixes of that length. A function with a larger model inside must split them. What a function
    returns is normalised in float64.

    Args:
        policy: From prefixes [n, t] int64 on the CPU, t from 0 to max_new_tokens - 1, to logits or log-probabilities
            of the next token, [n, V] floats. -inf is a token that never comes.
        reference: The same of the reference. No completion may be impossible that is not so for the policy too; what
            both exclude is left out.
        max_new_tokens: T, at least 1.
        eos_token_id: The token that ends a completion. Without it all have T tokens.
        max_completions: How many to allow: V**T without `eos_token_id`, about (V - 1)**T with it. They are all held in
            memory, with the logits of their prefixes.

    Returns:
        EnumeratedDID: tensors on the CPU.

    Raises:
        TypeError: What `policy` or `reference` returns is no tensor of floats, or an argument is no integer.
        ValueError: It has another shape or is NaN, `reference` makes a completion impossible, there are more than
            `max_completions`, or an argument is out of range.

    Example:
        >>> policy = lambda prefixes: torch.tensor([[0.0, 0.0, 2.0]]).expand(len(prefixes), 3)
        >>> reference = lambda prefixes: torch.zeros(len(prefixes), 3)
        >>> exact = enumerate_did(policy, reference, max_new_tokens=2, eos_token_id=0)
        >>> exact.completions.tolist()
        [[0, -1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
        >>> exact.did_logprob.exp()[-1]
        tensor(0.6667, dtype=torch.float64)
        >>> exact.entropy
        tensor(1.1537, dtype=torch.float64)
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    if eos_token_id is not None:
        check_integer("eos_token_id", eos_token_id)
    prefixes = torch.zeros(1, 0, dtype=torch.long)
    logprob = torch.zeros(2, 1, dtype=torch.float64)  # of the prefixes: pi's, rho's
    completions, logprobs = [], []
    vocab_size = None
    for length in range(1, max_new_tokens + 1):
        steps = [_next_token(policy, "policy", prefixes, vocab_size)]
        vocab_size = steps[0].shape[1]
        steps.append(_next_token(reference, "reference", prefixes, vocab_size))
        if length == 1:
            _check_size(vocab_size, max_new_tokens, eos_token_id, max_completions)
        logprob = (logprob[:, :, None] + torch.stack(steps)).flatten(1)
        tokens = torch.arange(vocab_size).repeat(len(prefixes))
        prefixes = torch.cat([prefixes.repeat_interleave(vocab_size, 0), tokens[:, None]], 1)
        ended = torch.full_like(tokens, length == max_new_tokens, dtype=torch.bool)
        if eos_token_id is not None:
            ended |= tokens == eos_token_id
        completions.append(pad(prefixes[ended], (0, max_new_tokens - length), value=-1))
        logprobs.append(logprob[:, ended])
        prefixes, logprob = prefixes[~ended], logprob[:, ~ended]

    every = torch.cat(completions)
    policy_logprob, reference_logprob = torch.cat(logprobs, 1)
    support = (policy_logprob > -torch.inf) | (reference_logprob > -torch.inf)
    every, policy_logprob, reference_logprob = every[support], policy_logprob[support], reference_logprob[support]
    impossible = reference_logprob == -torch.inf
    if impossible.any():
        example = [token for token in every[impossible][0].tolist() if token >= 0]
        raise ValueError(
            f"Expected `reference` to give every completion a probability above 0, but got 0 for {example}."
        )
    return EnumeratedDID(
        every,
        (every >= 0).sum(1),
        policy_logprob,
        reference_logprob,
        (policy_logprob - reference_logprob).logsumexp(0),
        did_entropy_over_candidates(policy_logprob, reference_logprob),
    )


def _next_token(model: NextToken, name: str, prefixes: Tensor, vocab_size: int | None) -> Tensor:
    """[n, V] float64 log-probabilities."""
    logits = model(prefixes)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"Expected `{name}` to return a tensor of floats, but got {kind}.")
    if logits.dim() != 2 or len(logits) != len(prefixes) or logits.shape[1] != (vocab_size or logits.shape[1]):
        raise ValueError(
            f"Expected `{name}` to return shape ({len(prefixes)}, {vocab_size or 'V'}) for {len(prefixes)} prefixes, "
            f"but got {tuple(logits.shape)}."
        )
    logits = logits.cpu().double()
    # Masks such as -1e9 and finfo.min mean -inf, as in the operators.
    logprob = logits.masked_fill(logits < -LARGEST_LOGIT, -torch.inf).log_softmax(-1)
    wrong = logprob.isnan().any(1)  # of NaN, of inf, and of -inf for all tokens
    if wrong.any():
        raise ValueError(
            f"Expected `{name}` to return numbers that make a distribution, but got {logits[wrong][0].tolist()} "
            f"after {prefixes[wrong][0].tolist()}."
        )
    return logprob


def _check_size(vocab_size: int, max_new_tokens: int, eos_token_id: int | None, max_completions: int) -> None:
    if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
        raise ValueError(f"Expected `eos_token_id` to be in [0, {vocab_size}), but got {eos_token_id}.")
    completions = 1
    for _ in range(max_new_tokens):
        completions = vocab_size * completions if eos_token_id is None else 1 + (vocab_size - 1) * completions
        if completions > max_completions:
            raise ValueError(
                f"Expected `max_new_tokens` to leave at most {max_completions:,} completions (`max_completions`), "
                f"but got {max_new_tokens} with a vocabulary of {vocab_size}."
            )
