"""What LitDPO minimises: a loss by name, a weighted sum of losses or a function, and the terms beside it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_did.arguments import check_number
from lit_did.batches.sequences import Sequences
from lit_did.functional import pair_margin, token_did_entropy
from lit_did.functional.preference import (
    LossTerms,
    check_beta,
    check_nll_weight,
    check_preference_loss,
    check_smoothing_and_gamma,
    pair_losses,
    sft_shares,
)
from lit_did.functional.rewards import compared_log_ratio, implicit_log_ratio
from lit_did.modules.pairs import PairStatistics, both_sides
from lit_did.ops import SequenceStatistics

PairLoss = Callable[[SequenceStatistics, SequenceStatistics], Tensor]
"""the statistics [pairs] of the chosen and of the rejected completions -> the loss [pairs]"""
LossArgument = str | Mapping[str, float] | PairLoss


class Objective:
    """What training minimises: `mean(loss) - token_did_entropy_weight * mean(token_did_entropy)`.

    Args:
        beta: DPO's inverse temperature.
        loss: One of `lit_did.functional.LOSSES`; a weighted sum of them as a dict; or a function of the statistics
            [pairs] of the chosen and of the rejected completions that returns the loss [pairs].
        label_smoothing: Of some losses, see `lit_did.functional.preference_loss`.
        gamma: Of some losses, see `lit_did.functional.preference_loss`.
        nll_weight: The weight of the SFT term. None: the default of the loss.
        token_did_entropy_weight: The weight of the mean over all completion tokens.

    Raises:
        TypeError, ValueError: They are out of range or do not belong together.
    """

    def __init__(
        self,
        *,
        beta: float,
        loss: LossArgument,
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        nll_weight: float | None = None,
        token_did_entropy_weight: float = 0.0,
    ) -> None:
        self.beta = beta
        self.custom = loss if callable(loss) else None
        self.token_did_entropy_weight = token_did_entropy_weight
        self._label_smoothing, self._gamma = label_smoothing, gamma
        if callable(loss):
            check_beta(beta)
            check_smoothing_and_gamma({}, label_smoothing, gamma, "a function as `loss`")
            if nll_weight is not None:
                check_nll_weight(nll_weight)
            self.terms = LossTerms({}, float(nll_weight or 0.0))
        else:
            self.terms = check_preference_loss(
                loss=loss, beta=beta, label_smoothing=label_smoothing, gamma=gamma, nll_weight=nll_weight
            )
        check_number("token_did_entropy_weight", token_did_entropy_weight)
        if not math.isfinite(token_did_entropy_weight):
            raise ValueError(f"Expected `token_did_entropy_weight` to be finite, but got {token_did_entropy_weight}.")
        if token_did_entropy_weight and self.reference_free:
            raise ValueError(
                f"Expected `token_did_entropy_weight` to be 0 with `loss={plain_loss(loss)!r}`, because a DID needs a "
                f"reference, but got {token_did_entropy_weight}."
            )

    @property
    def reference_free(self) -> bool:
        """Whether the loss has no reference."""
        return self.terms.reference_free

    @property
    def sft(self) -> float:
        """The weight of the SFT term."""
        return self.terms.sft

    def pairs(
        self,
        chosen: SequenceStatistics,
        rejected: SequenceStatistics,
        auxiliary: Tensor | None,
        mean_chosen_tokens: float,
    ) -> PairStatistics:
        """The loss and the reward margin of every pair.

        Args:
            chosen: [pairs] the statistics of the chosen completions.
            rejected: [pairs] the statistics of the rejected completions.
            auxiliary: A mixture of experts' auxiliary loss, a scalar that is added to every pair's loss.
            mean_chosen_tokens: How many tokens a chosen completion of the whole batch has on average. The SFT term is
                a mean over these tokens.

        Raises:
            TypeError, ValueError: A function as `loss` returned something else than a tensor [pairs].
        """
        preference = self._losses(chosen, rejected)
        if auxiliary is not None:
            preference = preference + auxiliary
        loss = preference
        if self.sft:
            loss = loss + self.sft * sft_shares(chosen.policy_logprob, mean_chosen_tokens)
        margin = pair_margin(self.log_ratio(chosen), self.log_ratio(rejected), self.beta)
        index = torch.full(loss.shape, -1, device=loss.device)
        return PairStatistics(index, chosen, rejected, loss, margin, preference_loss=preference)

    def share(self, pairs: PairStatistics, whole: Sequences) -> Tensor:
        """What some pairs add to what training minimises, a scalar.

        Args:
            pairs: The pairs of a micro-batch.
            whole: All sequences of the batch.
        """
        share = pairs.loss.sum() / (whole.num_sequences // 2)
        if not self.token_did_entropy_weight:
            return share
        both = both_sides(pairs)
        entropy = token_did_entropy(both).to(share.dtype) * both.num_tokens.sum() / whole.num_labels
        return share - self.token_did_entropy_weight * entropy

    def log_ratio(self, statistics: SequenceStatistics) -> Tensor:
        """[sequences] the implicit reward, divided by beta."""
        return implicit_log_ratio(statistics, self.terms)

    def _losses(self, chosen: SequenceStatistics, rejected: SequenceStatistics) -> Tensor:
        """[pairs] the loss of every pair, without the SFT term."""
        if self.custom is not None:
            return _checked(self.custom(chosen, rejected), chosen)
        return pair_losses(
            compared_log_ratio(chosen, self.terms),
            compared_log_ratio(rejected, self.terms),
            self.terms.preference,
            chosen_num_tokens=chosen.num_tokens,
            rejected_num_tokens=rejected.num_tokens,
            beta=self.beta,
            label_smoothing=self._label_smoothing,
            gamma=self._gamma,
        )


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
        if resuming or name == "loss":
            raise ValueError(
                f"Expected `{name}` to be the function of the run that saved the checkpoint, but got None. A "
                f"checkpoint does not hold functions. Pass it again: `LitDPO.load_from_checkpoint(path, {name}=...)`."
            )
        warnings.warn(
            f"The checkpoint does not hold the `{name}` function of the run that saved it. Validation and prediction "
            f"do not need it. To resume training, pass it again: `LitDPO.load_from_checkpoint(path, {name}=...)`. "
            "Otherwise `fit` raises an error.",
            stacklevel=4,
        )


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
