"""Rewards and preference losses on the log-ratios, or log-probabilities, of chosen and rejected completions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_did.arguments import check_number

LossName = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "slic", "cpo", "simpo", "orpo", "sft"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
REFERENCE_FREE_LOSSES = ("slic", "cpo", "simpo", "orpo")
"""losses on log pi alone: its log-ratio against a reference of log-probability 0"""
PER_TOKEN_LOSSES = ("sigmoid_norm", "ipo", "simpo", "orpo")
"""losses that compare means over tokens, not sums"""
PER_TOKEN_REWARDS = ("simpo", "orpo")
"""losses whose implicit reward is a mean over tokens"""
SMOOTHED_LOSSES = ("sigmoid", "sigmoid_norm", "robust", "cpo", "simpo")
GAMMA = 0.5
NLL_WEIGHTS = {"slic": 1.0, "cpo": 1.0, "orpo": 1.0}
"""the default `nll_weight`, where it is not 0"""


class LossTerms(NamedTuple):
    """What a loss is made of."""

    preference: dict[str, float]
    """the preference losses and their weights"""
    sft: float
    """the weight of the SFT term"""

    @property
    def reference_free(self) -> bool:
        """Whether no term has a reference."""
        return any(name in REFERENCE_FREE_LOSSES for name in self.preference)

    @property
    def per_token_reward(self) -> bool:
        """Whether the implicit reward is a mean over tokens."""
        return any(name in PER_TOKEN_REWARDS for name in self.preference)


def pair_margin(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, beta: float) -> Tensor:
    """beta times the difference of the two log-ratios: by how much the policy's implicit reward prefers `chosen`.

    Args:
        chosen_log_ratio: [pairs] log pi(y_w) - log rho(y_w), in nats, summed over the completion.
        rejected_log_ratio: [pairs] the same of the rejected completion.
        beta: DPO's inverse temperature.

    Returns:
        [pairs], in the inputs' dtype.

    Example:
        >>> pair_margin(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.1)
        tensor([0.3000])
    """
    return beta * (chosen_log_ratio - rejected_log_ratio)


def pair_accuracy(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> Tensor:
    """Whether the policy's implicit reward prefers `chosen`.

    Args:
        chosen_log_ratio: [pairs] log pi(y_w) - log rho(y_w), summed over the completion.
        rejected_log_ratio: [pairs] the same of the rejected completion.

    Returns:
        [pairs] 1 if it prefers `chosen`, 0 if `rejected`, 1/2 for a tie, NaN for NaN.

    Example:
        >>> pair_accuracy(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    difference = chosen_log_ratio - rejected_log_ratio
    return torch.where(difference.isnan(), difference, (torch.sign(difference) + 1) / 2)  # the sign of NaN is 0


def preference_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float = 0.1,
    loss: LossName | Mapping[str, float] = "sigmoid",
    chosen_num_tokens: Tensor | int | None = None,
    rejected_num_tokens: Tensor | int | None = None,
    chosen_logprob: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float | None = None,
    nll_weight: float | None = None,
) -> Tensor:
    """The loss of every pair. `lit-did docs losses` lists the losses with their formulas, options and sources.

    The SFT term is the negative log-likelihood of the chosen completions, a mean over all their tokens. A pair's share
    of it is -log pi(y_w) / m, where m is the mean of `chosen_num_tokens`: the mean over the pairs that are passed
    together is that over their tokens. "sft" is this term alone.

    Args:
        chosen_log_ratio: [pairs] log pi(y_w) - log rho(y_w), in nats, summed over the completion. With a loss of
            `REFERENCE_FREE_LOSSES` log pi(y_w), the log-ratio against a reference of log-probability 0.
        rejected_log_ratio: [pairs] the same of the rejected completion.
        beta: Above 0.
        loss: One of `LOSSES`, or a weighted sum of them, such as `{"sigmoid": 0.8, "sft": 0.2}`. All must have the same
            implicit reward: losses with a reference, "slic" and "cpo", or "simpo" and "orpo". "sft" goes with all.
        chosen_num_tokens: [pairs] tokens of the chosen completion, where the loss divides by them; 0 counts as 1.
        rejected_num_tokens: [pairs] tokens of the rejected completion, likewise.
        chosen_logprob: [pairs] log pi(y_w), for an SFT term beside losses with a reference.
        label_smoothing: The share of pairs assumed to be labelled the wrong way round, in [0, 0.5). Only with
            "sigmoid", "sigmoid_norm", "robust" (which is "sigmoid" without it), "cpo" and "simpo", and at most one of
            them.
        gamma: The margin to reach, at least 0. None: 0.5. Only with "simpo".
        nll_weight: The weight of the SFT term, at least 0; another way to write "sft" in `loss`. None: 1 times the
            weight of "slic", "cpo" and "orpo", else 0.

    Returns:
        [pairs], in the inputs' dtype. All arguments broadcast.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range or does not belong to `loss`, or an argument that the loss needs is
            missing.

    Example:
        >>> preference_loss(torch.zeros(1), torch.zeros(1), beta=0.1)  # log 2 where the policy is its reference
        tensor([0.6931])
        >>> tokens = {"chosen_num_tokens": torch.tensor([4]), "rejected_num_tokens": torch.tensor([2])}
        >>> preference_loss(torch.tensor([-8.0]), torch.tensor([-6.0]), beta=2.0, loss="simpo", **tokens)
        tensor([0.2014])
        >>> mixture = {"loss": {"sigmoid": 0.8, "sft": 0.2}, "chosen_logprob": torch.tensor([-8.0])}
        >>> preference_loss(torch.zeros(1), torch.zeros(1), **mixture, **tokens)  # 0.8 log 2 + 0.2 * 8 / 4
        tensor([0.9545])
    """
    terms = check_preference_loss(
        beta=beta, loss=loss, nll_weight=nll_weight, label_smoothing=label_smoothing, gamma=gamma
    )
    losses = pair_losses(
        chosen_log_ratio,
        rejected_log_ratio,
        terms.preference,
        beta=beta,
        chosen_num_tokens=chosen_num_tokens,
        rejected_num_tokens=rejected_num_tokens,
        label_smoothing=label_smoothing,
        gamma=gamma,
    )
    if not terms.sft:
        return losses
    if terms.reference_free:
        chosen_logprob = chosen_log_ratio
    if chosen_logprob is None or chosen_num_tokens is None:
        missing = "chosen_logprob" if chosen_logprob is None else "chosen_num_tokens"
        raise ValueError(f"Expected `{missing}` with `loss={loss!r}`, whose SFT term needs it, but got None.")
    return losses + terms.sft * sft_shares(chosen_logprob, torch.as_tensor(chosen_num_tokens).double().mean())


def pair_losses(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    weights: Mapping[str, float],
    *,
    beta: float,
    chosen_num_tokens: Tensor | int | None = None,
    rejected_num_tokens: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    gamma: float | None = None,
) -> Tensor:
    """[pairs] the weighted sum of preference losses by name, without an SFT term; arguments as `preference_loss`."""
    total = torch.zeros_like(chosen_log_ratio - rejected_log_ratio)
    gamma = GAMMA if gamma is None else gamma
    for loss, weight in weights.items():
        chosen, rejected = chosen_log_ratio, rejected_log_ratio
        if loss in PER_TOKEN_LOSSES:
            chosen = _per_token(chosen, chosen_num_tokens, "chosen_num_tokens", loss)
            rejected = _per_token(rejected, rejected_num_tokens, "rejected_num_tokens", loss)
        if loss == "ipo":
            losses = (chosen - rejected - 1 / (2 * beta)) ** 2
        elif loss in ("hinge", "slic"):
            losses = (1 - beta * (chosen - rejected)).clamp(min=0)
        elif loss == "orpo":
            losses = -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
        else:
            margin = beta * (chosen - rejected) - (gamma if loss == "simpo" else 0)
            smoothing = label_smoothing if loss in SMOOTHED_LOSSES else 0.0
            losses = -(1 - smoothing) * logsigmoid(margin)
            if smoothing:  # 0 times the infinite loss of a margin that is infinite would be NaN
                wrong = -smoothing * logsigmoid(-margin)
                losses = (losses - wrong) / (1 - 2 * smoothing) if loss == "robust" else losses + wrong
        total = total + weight * losses
    return total


def sft_shares(chosen_logprob: Tensor, mean_num_tokens: Tensor | float) -> Tensor:
    """[pairs] every pair's share of the SFT term, whose mean over a batch's pairs is one over its chosen tokens.

    Args:
        chosen_logprob: [pairs] log pi(y_w).
        mean_num_tokens: A scalar: the chosen tokens of the batch, divided by its pairs.
    """
    return -chosen_logprob / torch.as_tensor(mean_num_tokens).clamp(min=1)


def _per_token(value: Tensor, num_tokens: Tensor | int | None, name: str, loss: str) -> Tensor:
    if num_tokens is None:
        raise ValueError(f"Expected `{name}` with `loss={loss!r}`, which divides by it, but got None.")
    return value / torch.as_tensor(num_tokens).clamp(min=1)


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p. A p of 1 counts as the largest below it, so that all stays finite.

    expm1 keeps 1 - p exact near p = 1. Far below, where it rounds to 1, the error is that of one rounding beside log p;
    a second formula there would pass NaN back from the first, which `torch.where` multiplies by 0.
    """
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)
    return logprob - torch.log(-torch.expm1(logprob))


def check_preference_loss(
    *,
    beta: float,
    loss: str | Mapping[str, float],
    label_smoothing: float,
    gamma: float | None,
    nll_weight: float | None,
) -> LossTerms:
    """What the loss is made of.

    Raises:
        TypeError, ValueError: Options of `preference_loss` are out of range or do not belong together.
    """
    weights = _weights(loss)
    check_beta(beta)
    check_smoothing_and_gamma(weights, label_smoothing, gamma, f"`loss={loss!r}`")
    sft = weights.pop("sft", None)
    if nll_weight is not None:
        check_nll_weight(nll_weight)
        if sft is not None:
            raise ValueError(
                f"Expected `nll_weight` to be None with `loss={loss!r}`, which holds the SFT term, but got "
                f"{nll_weight}."
            )
        sft = nll_weight
    if sft is None:
        sft = sum(weight * NLL_WEIGHTS.get(name, 0.0) for name, weight in weights.items())
    _check_rewards(loss, weights)
    terms = LossTerms({name: float(weight) for name, weight in weights.items() if weight}, float(sft))
    if not terms.preference and not terms.sft:
        raise ValueError(f"Expected `loss` to hold a weight above 0, but got {loss!r}.")
    return terms


def _weights(loss: str | Mapping[str, float]) -> dict[str, float]:
    """{name: weight} of a loss by name or of a mixture."""
    choices = ", ".join(map(repr, LOSSES))
    if isinstance(loss, str):
        loss = {loss: 1.0}
    if not isinstance(loss, Mapping):
        raise TypeError(f"Expected `loss` to be a name or a dict of names and weights, but got {loss!r}.")
    if not loss:
        raise ValueError(f"Expected `loss` to hold at least one of {choices}, but got {{}}.")
    for name, weight in loss.items():
        if name not in LOSSES:
            raise ValueError(f"Expected `loss` to be one of {choices}, or weights of them, but got {name!r}.")
        check_number("loss", weight, f"a dict of names and weights, int or float, for {name!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"Expected `loss` to hold finite weights of at least 0, but got {weight} for {name!r}.")
    return dict(loss)


def _check_rewards(loss: str | Mapping[str, float], weights: Mapping[str, float]) -> None:
    """Raises ValueError unless all losses have the same implicit reward."""
    rewards = {name: (name in REFERENCE_FREE_LOSSES, name in PER_TOKEN_REWARDS) for name in weights}
    for name, reward in rewards.items():
        first = next(iter(rewards))
        if reward != rewards[first]:
            raise ValueError(
                f"Expected `loss` to mix losses with the same implicit reward (those with a reference; 'slic' and "
                f"'cpo'; 'simpo' and 'orpo'; 'sft' with all), but got {first!r} and {name!r}."
            )


def check_smoothing_and_gamma(
    losses: Mapping[str, float], label_smoothing: float, gamma: float | None, named: str
) -> None:
    """Raises TypeError or ValueError unless they are in range and belong to the losses, which messages call `named`."""
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"Expected `label_smoothing` to be in [0, 0.5), but got {label_smoothing}.")
    smoothed = [name for name in losses if name in SMOOTHED_LOSSES]
    if label_smoothing and len(smoothed) != 1:
        several = f", where {' and '.join(map(repr, smoothed))} have it" if smoothed else ""
        raise ValueError(f"Expected `label_smoothing` to be 0 with {named}{several}, but got {label_smoothing}.")
    if gamma is None:
        return
    check_number("gamma", gamma, "an int, a float or None")
    if "simpo" not in losses:
        raise ValueError(f"Expected `gamma` to be None with {named}, but got {gamma}.")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"Expected `gamma` to be finite and at least 0, but got {gamma}.")


def check_nll_weight(nll_weight: float) -> None:
    """Raises TypeError or ValueError unless `nll_weight` is a finite number of at least 0."""
    check_number("nll_weight", nll_weight, "an int, a float or None")
    if not 0 <= nll_weight < math.inf:
        raise ValueError(f"Expected `nll_weight` to be finite and at least 0, but got {nll_weight}.")


def check_beta(beta: float) -> None:
    """Raises TypeError or ValueError unless `beta` is a number above 0."""
    check_number("beta", beta)
    if not beta > 0:
        raise ValueError(f"Expected `beta` to be above 0, but got {beta}.")
    if beta == math.inf:
        raise ValueError("Expected `beta` to be finite, but got inf.")
