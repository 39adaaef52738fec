"""Energy-based models: a free logit for every completion, so that losses, gradients and divergences are exact.

Distributions over N completions are log-probabilities [..., N] in float64, in nats; leading dimensions are replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_did.functional import preference_loss
from lit_did.functional.preference import REFERENCE_FREE_LOSSES

SCALE = 1.3
"""standard deviation of log(pi* / rho) before normalising: a Jensen-Shannon divergence of some 0.15 nats"""


PIECE = 2**16
"""pairs whose loss is computed at once; they fit the processor's cache, which is about 4 times as fast for large N"""


class Preferences(NamedTuple):
    """What preference pairs are drawn from, chosen and rejected independently. All log-probabilities [..., N]."""

    reference: Tensor
    """log rho, the reference policy"""
    chosen: Tensor
    """of the chosen completions; log rho again in the paper's setting"""
    rejected: Tensor
    """log pi_l, of the rejected completions"""
    target: Tensor
    """log pi*, what training should learn"""

    def replicate(self, index: int) -> Preferences:
        return Preferences(*(field[index] for field in self))


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch with one thread for a while, so that results do not depend on the number of cores.

    On tensors this small, a second thread gains little. On a busy machine it was ten times as slow.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gaussian(count: int, num_completions: int, seeds: Iterable[int]) -> Tensor:
    """[count, seeds, N] independent standard normal numbers. A replicate depends on its own seed alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [[torch.randn(num_completions, dtype=torch.float64, generator=g) for _ in range(count)] for g in generators]
    return torch.stack([torch.stack(replicate) for replicate in draws], 1)


def power_law(reference: Tensor, target: Tensor, beta: float, chosen_share: float = 0.0) -> Preferences:
    """Preferences whose optimal policy is `target` (arXiv 2505.23761).

    Chosen completions come from rho, rejected ones from pi_l proportional to rho (rho / pi*)^beta. Of the pairs of two
    completions y and y', counted in both orders, y is chosen in the share that Bradley and Terry's model gives:
    rho(y) pi_l(y') / (rho(y) pi_l(y') + rho(y') pi_l(y)) = sigmoid(beta log(pi*/rho)(y) - beta log(pi*/rho)(y')).

    Args:
        reference: [..., N] log rho.
        target: [..., N] log pi*.
        beta: The exponent, above 0.
        chosen_share: How much of the law the chosen completions carry, in [0, 1]: they come from rho (pi* / rho)^(share
            beta), the rejected ones from rho (rho / pi*)^((1 - share) beta), and the shares stay as above.

    Example:
        >>> reference, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
        >>> power_law(reference, target, beta=0.5).rejected.exp()  # odds (1/4)^0.5
        tensor([0.3333, 0.6667])
    """
    law = beta * (target - reference)
    chosen = (reference + chosen_share * law).log_softmax(-1)
    return Preferences(reference, chosen, (reference - (1 - chosen_share) * law).log_softmax(-1), target)


def random_power_law(num_completions: int, seeds: Iterable[int], beta: float) -> Preferences:
    """Random rho and pi*, [seeds, N], log-normal before normalising, with the preferences of the power law."""
    logits, change = gaussian(2, num_completions, seeds)
    reference = logits.log_softmax(-1)
    return power_law(reference, (reference + SCALE * change).log_softmax(-1), beta)


def entropy(logprob: Tensor) -> Tensor:
    """[...] H, in nats."""
    return -(logprob.exp() * logprob).sum(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """[...] KL(first, second), in nats."""
    return (first.exp() * (first - second)).sum(-1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """[...] the Jensen-Shannon divergence, in nats: 0 for equal distributions, log 2 for disjoint ones.

    Example:
        >>> jensen_shannon(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 1e-30]).log())
        tensor(0.2158)
    """
    middle = torch.logaddexp(first, second) - math.log(2)
    return (kl(first, middle) + kl(second, middle)) / 2


def population_loss(policy: Tensor, preferences: Preferences, **loss: Any) -> Tensor:
    """The mean of `preference_loss` over all pairs, each with its probability: no sampling.

    Args:
        policy: [..., N] log pi.
        preferences: [..., N].
        loss: Arguments of `preference_loss`. Completions count as one token each.

    Returns:
        [...] differentiable in `policy`.
    """
    score = policy if loss["loss"] in REFERENCE_FREE_LOSSES else policy - preferences.reference
    chosen, rejected = preferences.chosen.exp(), preferences.rejected.exp()
    rows = max(1, PIECE // score.numel())
    total = torch.zeros(score.shape[:-1], dtype=score.dtype)
    for row, probability in zip(score.split(rows, -1), chosen.split(rows, -1), strict=True):
        losses = preference_loss(  # [..., rows, N]
            row[..., :, None], score[..., None, :], chosen_num_tokens=1, rejected_num_tokens=1, **loss
        )
        total = total + (probability * (losses @ rejected[..., None]).squeeze(-1)).sum(-1)
    return total


def train(preferences: Preferences, *, steps: int, step_size: float, **loss: Any) -> list[Tensor]:
    """Adam on `population_loss` from the reference, all replicates at once, its step size falling to 0 as a cosine.

    Args:
        preferences: [..., N].
        steps: At least 1.
        step_size: Adam's step size for the logits, times beta: how far the first steps move beta log pi(y).
        loss: Arguments of `preference_loss`.

    Returns:
        steps + 1 policies, log pi [..., N].
    """
    logits = preferences.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=step_size / loss["beta"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    policies = [preferences.reference]
    for _ in range(steps):
        optimizer.zero_grad()
        population_loss(logits.log_softmax(-1), preferences, **loss).sum().backward()
        optimizer.step()
        schedule.step()
        policies.append(logits.detach().log_softmax(-1))
    return policies


class Minimum(NamedTuple):
    """The minimum of a loss, and the gradient left there. Tensors [seeds, ...]."""

    policy: Tensor
    """[seeds, N] log pi"""
    loss: Tensor
    """[seeds]"""
    gradient: Tensor
    """[seeds] the largest |d loss / d logit| over its scale, sqrt(p_w + p_l)"""


def minimise(preferences: Preferences, *, evaluations: int = 200, **loss: Any) -> Minimum:
    """L-BFGS with strong Wolfe line search on `population_loss`, one replicate at a time.

    The logits are scaled by sqrt(p_w + p_l), the probabilities of chosen and rejected, near which the smooth losses'
    curvature is the same in all directions. It stops where no scaled derivative exceeds 1e-10, or after `evaluations`:
    `Minimum.gradient` is the largest derivative left. Losses with kinks (hinge, SLiC) have a gradient at their minimum,
    so use `train` for them.

    Args:
        preferences: [seeds, N].
        evaluations: About the largest number of evaluations of the loss and its gradient.
        loss: Arguments of `preference_loss`.
    """
    found = []
    for index in range(len(preferences.reference)):
        one = preferences.replicate(index)
        scale = (one.chosen.exp() + one.rejected.exp()).sqrt()
        scaled = (one.reference * scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=evaluations,
            max_eval=evaluations,
            tolerance_grad=1e-10,
            tolerance_change=0,
            history_size=30,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer=optimizer, scaled=scaled, scale=scale, one=one) -> Tensor:
            optimizer.zero_grad()
            value = population_loss((scaled / scale).log_softmax(-1), one, **loss)
            value.backward()
            return value

        optimizer.step(closure)
        value = closure().detach()
        assert scaled.grad is not None  # the closure has just set it
        found.append(((scaled / scale).detach().log_softmax(-1), value, scaled.grad.abs().max()))
    return Minimum(*map(torch.stack, zip(*found, strict=True)))
