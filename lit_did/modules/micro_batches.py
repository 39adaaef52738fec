"""MicroBatches: a training batch that goes through forward and backward passes in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_did.batches.sequences import Sequences, split_into, split_pairs

TOKENS_CPU = 2048
TOKENS = 16_384
"""`micro_batch_tokens="auto"`: more than matrix products need for full speed, few enough for their activations"""
OTHER_FACTOR = (
    "Expected an overridden `training_step` to return the loss of `super().training_step` without a factor, because "
    "DDP needs the gradients of other micro-batches before, but got another factor"
)
NO_PARTS = "Pass `micro_batch_tokens=None`."
Part = TypeVar("Part")


def check_factor(factor: Tensor, expected: float) -> None:
    """Raises ValueError if a loss has another factor than expected. Reads its value."""
    if not math.isclose(factor, expected, rel_tol=1e-5):
        raise ValueError(f"{OTHER_FACTOR}, {factor / expected:.4g}. {NO_PARTS}")


class MicroBatches(Generic[Part]):
    """A training batch in micro-batches, so that only one micro-batch's activations are in memory.

    Lightning asks `training_step` for one loss and hands it to `backward`. So `training_step` runs the first
    micro-batch with `forward`, and `backward` runs its backward pass and then all of the others. The gradients add up
    to those of the whole batch. DDP exchanges gradients in the first backward pass after `training_step`. So under DDP
    `forward_last` runs all but the last micro-batch within `training_step`, both passes.

    Args:
        parts: The micro-batches, at least one.
        objective: A function that runs a micro-batch forward and returns its share of what training minimises, a
            scalar. The shares of all micro-batches add up to what training minimises.

    Raises:
        ValueError: There are no micro-batches.

    Example:
        >>> weight = torch.ones((), requires_grad=True)
        >>> batch = MicroBatches([2.0, 3.0], lambda part: part * weight)
        >>> batch.backward(batch.forward())
        >>> weight.grad
        tensor(5.)
    """

    def __init__(self, parts: Sequence[Part], objective: Callable[[Part], Tensor]) -> None:
        if not parts:
            raise ValueError("Expected `parts` to hold at least one micro-batch, but got none.")
        self._first, *self._rest = parts
        self._objective = objective
        self._share: Tensor | None = None
        self._factor: float | None = None

    def forward(self) -> Tensor:
        """The first micro-batch's share of what training minimises."""
        self._share = self._objective(self._first)
        return self._share

    def forward_last(
        self,
        factor: float,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Tensor:
        """The last micro-batch's share of what training minimises, after both passes of the others.

        Args:
            factor: What the loss will be multiplied by before `backward` gets it.
            backward: Runs the backward pass of a scalar.
            context: Makes the context that the backward passes run in.
        """
        *before, self._first = (self._first, *self._rest)
        self._rest, self._factor = [], factor
        for part in before:
            share = self._objective(part) * factor
            with context():
                backward(share)
        return self.forward()

    def backward(
        self,
        loss: Tensor,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        context: Callable[[], AbstractContextManager] = nullcontext,
        check: Callable[[Tensor, float], None] = check_factor,
    ) -> None:
        """The backward pass of the first micro-batch, and then both passes of each of the others.

        Args:
            loss: What `forward` returned, times any factors, such as a gradient scaler's. The other shares are
                multiplied by the same factors.
            backward: Runs the backward pass of a scalar.
            context: Makes the context that the other forward passes run in, such as autocast.
            check: Is called with the factor of `loss` and the one that `forward_last` was told, if it was called.

        Raises:
            RuntimeError: `forward` was not called before.
        """
        share, self._share = self._share, None
        if share is None:
            raise RuntimeError("Expected `forward` to be called before `backward`, once each, but it was not.")
        if self._rest or self._factor is not None:
            (factor,) = torch.autograd.grad(loss, share, retain_graph=True)
            if self._factor is not None:
                check(factor, self._factor)
        backward(loss)
        for part in self._rest:
            with context():
                share = self._objective(part)
            backward(share * factor)


def micro_batches_of(
    sequences: Sequences, tokens: int | Literal["auto"] | None, device: torch.device, *, agreed: bool = False
) -> list[Sequences]:
    """The pairs of a batch in micro-batches.

    Args:
        sequences: The chosen sequences, and then the rejected ones in the same order.
        tokens: What a micro-batch has at most, but for a single pair. "auto": 2,048 on a CPU, 16,384 elsewhere. None:
            the batch stays whole.
        device: Where the models are.
        agreed: Whether all processes make the same number of micro-batches, as sharded models need. All of them call
            this function. If one needs more, the others make more too, up to the fewest pairs of a process.
    """
    if tokens is None:
        return [sequences]
    if tokens == "auto":
        tokens = TOKENS_CPU if device.type == "cpu" else TOKENS
    parts = split_pairs(sequences, tokens)
    if agreed:
        numbers = torch.tensor([len(parts), -(sequences.num_sequences // 2)], device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        most, fewest_pairs = numbers.tolist()
        count = min(most, -fewest_pairs)
        parts = parts if len(parts) == count else split_into(sequences, count)
    return parts
