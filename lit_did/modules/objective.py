"""The loss that LitDPO minimises: names and weights, or a function of the user's, and the SFT term beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_did.functional.preference import (
    LossTerms,
    check_beta,
    check_nll_weight,
    check_preference_loss,
    check_smoothing_and_gamma,
    pair_losses,
)
from lit_did.functional.rewards import compared_log_ratio, implicit_log_ratio
from lit_did.ops import SequenceStatistics

PairLoss = Callable[[SequenceStatistics, SequenceStatistics], Tensor]
"""the statistics [pairs] of the chosen and of the rejected completions -> the loss [pairs]"""


class Objective:
    """What training minimises, a mean over pairs.

    Args: as `LitDPO`.

    Raises:
        TypeError, ValueError: They are out of range or do not belong together.
    """

    def __init__(
        self,
        *,
        beta: float,
        loss: str | Mapping[str, float] | PairLoss,
        label_smoothing: float,
        gamma: float | None,
        nll_weight: float | None,
    ) -> None:
        self.beta = beta
        self.custom = loss if callable(loss) else None
        self._options = {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
        if self.custom is None:
            self.terms = check_preference_loss(loss=loss, nll_weight=nll_weight, **self._options)
            return
        check_beta(beta)
        check_smoothing_and_gamma({}, label_smoothing, gamma, "a function as `loss`")
        if nll_weight is not None:
            check_nll_weight(nll_weight)
        self.terms = LossTerms({}, float(nll_weight or 0.0))

    @property
    def reference_free(self) -> bool:
        """Whether there is no reference."""
        return self.terms.reference_free

    @property
    def sft(self) -> float:
        """The weight of the SFT term."""
        return self.terms.sft

    def losses(self, chosen: SequenceStatistics, rejected: SequenceStatistics) -> Tensor:
        """[pairs] the loss of every pair, without the SFT term, of statistics [pairs].

        Raises:
            TypeError, ValueError: A function returned no tensor [pairs].
        """
        if self.custom is not None:
            return _checked(self.custom(chosen, rejected), chosen)
        return pair_losses(
            *(compared_log_ratio(side, self.terms) for side in (chosen, rejected)),
            self.terms.preference,
            chosen_num_tokens=chosen.num_tokens,
            rejected_num_tokens=rejected.num_tokens,
            **self._options,
        )

    def log_ratio(self, statistics: SequenceStatistics) -> Tensor:
        """[sequences] the implicit reward, divided by beta."""
        return implicit_log_ratio(statistics, self.terms)


def plain_loss(loss: Any) -> Any:
    """A mixture as a dict of floats, which a checkpoint can hold; anything else as it is."""
    return {name: float(weight) for name, weight in loss.items()} if isinstance(loss, Mapping) else loss


def check_functions_given_again(saved: Mapping[str, Any], functions: Mapping[str, Any], *, resuming: bool) -> None:
    """Checks that functions, which a checkpoint does not hold, are given again.

    Args:
        saved: The hyperparameters in the checkpoint.
        functions: `loss`, `optimizer` and `lr_scheduler` of the module that loads it; None where none was given.
        resuming: Whether training goes on. Else a missing optimiser does not matter yet, and is a warning.

    Raises:
        ValueError: A function is missing.
    """
    for name, function in functions.items():
        if not saved or name in saved or function is not None:
            continue
        message = (
            f"Expected `{name}` to be given as it was to the run that saved the checkpoint, a function, but got none. "
            "A checkpoint does not hold functions."
        )
        if resuming or name == "loss":
            raise ValueError(f"{message} Pass it again: `LitDPO.load_from_checkpoint(path, {name}=...)`.")
        warnings.warn(f"{message} Pass it again if you train on.", stacklevel=4)


def _checked(losses: Any, chosen: SequenceStatistics) -> Tensor:
    if not isinstance(losses, Tensor):
        raise TypeError(f"Expected `loss` to return a tensor [pairs], but got {type(losses).__name__}.")
    if losses.shape != chosen.num_tokens.shape:
        raise ValueError(
            "Expected `loss` to return the loss of every pair, a tensor of the shape "
            f"{tuple(chosen.num_tokens.shape)}, but got {tuple(losses.shape)}."
        )
    if torch.is_grad_enabled() and chosen.policy_logprob.requires_grad and not losses.requires_grad:
        raise ValueError("Expected `loss` to return a tensor with a gradient in the policy, but got one without.")
    return losses
