"""Rewards and preference losses on the log-ratios, or log-probabilities, of chosen and rejected completions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_did.arguments import check_number

LOSSES = ("sigmoid", "robust", "hinge", "ipo", "slic", "cpo", "simpo", "orpo")
REFERENCE_FREE_LOSSES = ("slic", "cpo", "simpo", "orpo")
"""losses on log pi alone: its log-ratio against a reference of log-probability 0"""
PER_TOKEN_LOSSES = ("ipo", "simpo", "orpo")
"""losses that compare means over tokens, not sums"""
SMOOTHED_LOSSES = ("sigmoid", "robust", "cpo", "simpo")
GAMMA = 0.5
NLL_WEIGHTS = {"slic": 1.0, "cpo": 1.0, "simpo": 0.0, "orpo": 1.0}


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
    """[pairs] 1 where the policy's implicit reward prefers `chosen`, 0 where `rejected`, 1/2 for a tie, NaN for NaN.

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
    loss: str = "sigmoid",
    chosen_num_tokens: Tensor | int | None = None,
    rejected_num_tokens: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    gamma: float | None = None,
    nll_weight: float | None = None,
) -> Tensor:
    """The loss of every pair.

    With h = h_w - h_l the difference of the two log-ratios, n their numbers of tokens, epsilon = label_smoothing and
    softplus(-x) = -log sigmoid(x):

    - "sigmoid": (1 - epsilon) softplus(-beta h) + epsilon softplus(beta h)
      (DPO, arXiv 2305.18290 equation 7; with epsilon, conservative DPO)
    - "robust": ((1 - epsilon) softplus(-beta h) - epsilon softplus(beta h)) / (1 - 2 epsilon)
      (robust DPO, arXiv 2403.00409: the mean over wrong and right labels is DPO's loss of the right ones. Not bounded
      below where epsilon > 0)
    - "hinge": max(0, 1 - beta h) (hinge-norm of RSO, arXiv 2309.06657)
    - "ipo": (h_w / n_w - h_l / n_l - 1 / (2 beta))^2 (arXiv 2310.12036 equation 17, beta being its tau. The paper
      writes sums over tokens, which num_tokens of 1 give; its authors confirmed to TRL that their results are of means)

    Without a reference, with log pi in the place of the log-ratio:

    - "slic": max(0, 1 - beta h) + nll (SLiC-HF, arXiv 2305.10425, its delta being 1 / beta)
    - "cpo": "sigmoid" + nll (CPO, arXiv 2401.08417)
    - "simpo": "sigmoid" of beta (h_w / n_w - h_l / n_l) - gamma in the place of beta h, + nll (SimPO, arXiv 2405.14734,
      which has no nll)
    - "orpo": beta softplus(-(logit_w - logit_l)) + nll, logit = log(p / (1 - p)), p = exp(h / n) (ORPO, arXiv
      2403.07691, beta being its lambda)

    where nll = -nll_weight h_w / n_w.

    Args:
        chosen_log_ratio: [pairs] log pi(y_w) - log rho(y_w), in nats, summed over the completion. With a loss of
            `REFERENCE_FREE_LOSSES` log pi(y_w), the log-ratio against a reference of log-probability 0.
        rejected_log_ratio: [pairs] the same of the rejected completion.
        beta: Above 0.
        loss: One of `LOSSES`.
        chosen_num_tokens: [pairs] tokens of the chosen completion, where the loss divides by them; 0 counts as 1.
        rejected_num_tokens: [pairs] tokens of the rejected completion, likewise.
        label_smoothing: The share of pairs assumed to be labelled the wrong way round, in [0, 0.5). "sigmoid",
            "robust" (which is "sigmoid" without it), "cpo" and "simpo" only.
        gamma: The margin to reach, at least 0; None: 0.5. "simpo" only.
        nll_weight: At least 0; None: 1, with "simpo" 0. Losses without a reference only.

    Returns:
        [pairs], in the inputs' dtype. All arguments broadcast.

    Raises:
        TypeError, ValueError: An option is out of range or does not belong to `loss`, or a number of tokens is missing.

    Example:
        >>> preference_loss(torch.zeros(1), torch.zeros(1), beta=0.1)  # log 2 where the policy is its reference
        tensor([0.6931])
        >>> tokens = {"chosen_num_tokens": torch.tensor([4]), "rejected_num_tokens": torch.tensor([2])}
        >>> preference_loss(torch.tensor([-8.0]), torch.tensor([-6.0]), beta=2.0, loss="simpo", **tokens)
        tensor([0.2014])
    """
    check_preference_loss(beta=beta, loss=loss, label_smoothing=label_smoothing, gamma=gamma, nll_weight=nll_weight)
    gamma = GAMMA if gamma is None else gamma
    nll_weight = NLL_WEIGHTS.get(loss, 0.0) if nll_weight is None else nll_weight
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
        losses = -(1 - label_smoothing) * logsigmoid(margin)
        if label_smoothing:  # 0 times the infinite loss of a margin that is infinite would be NaN
            wrong = -label_smoothing * logsigmoid(-margin)
            losses = (losses - wrong) / (1 - 2 * label_smoothing) if loss == "robust" else losses + wrong
    if not nll_weight:
        return losses
    return losses - nll_weight * _per_token(chosen_log_ratio, chosen_num_tokens, "chosen_num_tokens", loss)


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
    *, beta: float, loss: str, label_smoothing: float, gamma: float | None, nll_weight: float | None
) -> None:
    """Raises TypeError or ValueError unless the options of `preference_loss` are in range and belong together."""
    if loss not in LOSSES:
        raise ValueError(f"Expected `loss` to be one of {', '.join(map(repr, LOSSES))}, but got {loss!r}.")
    check_beta(beta)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"Expected `label_smoothing` to be in [0, 0.5), but got {label_smoothing}.")
    if label_smoothing and loss not in SMOOTHED_LOSSES:
        raise ValueError(f"Expected `label_smoothing` to be 0 with `loss={loss!r}`, but got {label_smoothing}.")
    for name, value, losses in (("gamma", gamma, ("simpo",)), ("nll_weight", nll_weight, REFERENCE_FREE_LOSSES)):
        if value is None:
            continue
        check_number(name, value, "an int, a float or None")
        if loss not in losses:
            raise ValueError(f"Expected `{name}` to be None with `loss={loss!r}`, but got {value}.")
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected `{name}` to be finite and at least 0, but got {value}.")


def check_beta(beta: float) -> None:
    """Raises TypeError or ValueError unless `beta` is a number above 0."""
    check_number("beta", beta)
    if not beta > 0:
        raise ValueError(f"Expected `beta` to be above 0, but got {beta}.")
    if beta == math.inf:
        raise ValueError("Expected `beta` to be finite, but got inf.")
