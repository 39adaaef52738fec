"""Rewards and preference losses on the log-ratios of chosen and rejected completions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOSSES = ("sigmoid", "ipo", "hinge")


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
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of every pair, with h = chosen_log_ratio - rejected_log_ratio and epsilon = label_smoothing:

    - "sigmoid": -(1 - epsilon) log sigmoid(beta h) - epsilon log sigmoid(-beta h)
      (DPO, arXiv 2305.18290 equation 7; with epsilon, conservative DPO)
    - "ipo": (h - 1 / (2 beta))^2 (arXiv 2310.12036 equation 17, beta being its tau; h sums over tokens, as there)
    - "hinge": max(0, 1 - beta h) (SLiC, arXiv 2305.10425, on the normalised likelihood)

    Args:
        chosen_log_ratio: [pairs], in nats, summed over the completion.
        rejected_log_ratio: [pairs].
        beta: Above 0.
        loss: One of `LOSSES`.
        label_smoothing: The share of pairs assumed to be labelled the wrong way round, in [0, 0.5); "sigmoid" only.

    Returns:
        [pairs], in the inputs' dtype.

    Raises:
        ValueError: `loss`, `beta` or `label_smoothing` is out of range, or they do not go together.

    Example:
        >>> preference_loss(torch.zeros(1), torch.zeros(1), beta=0.1)  # log 2 where the policy is its reference
        tensor([0.6931])
    """
    check_preference_loss(beta=beta, loss=loss, label_smoothing=label_smoothing)
    h = chosen_log_ratio - rejected_log_ratio
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return (1 - beta * h).clamp(min=0)
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def check_preference_loss(*, beta: float, loss: str, label_smoothing: float) -> None:
    """Raises ValueError unless the three make a loss."""
    if loss not in LOSSES:
        raise ValueError(f"Expected `loss` to be one of {', '.join(map(repr, LOSSES))}, but got {loss!r}.")
    check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"Expected `label_smoothing` to be in [0, 0.5), but got {label_smoothing}.")
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"Expected `label_smoothing` to be 0 with `loss={loss!r}`, but got {label_smoothing}.")


def check_beta(beta: float) -> None:
    """Raises TypeError or ValueError unless `beta` is a number above 0."""
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"Expected `beta` to be a number, but got {beta!r}.")
    if not beta > 0:
        raise ValueError(f"Expected `beta` to be above 0, but got {beta}.")
