"""MicroBatches: a training batch that goes through forward and backward passes in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from lit_did.batches.sequences import Sequences, split_pairs

TOKENS_CPU = 2048
TOKENS = 16_384
"""`micro_batch_tokens="auto"`: more than matrix products need for full speed, few enough for their activations"""
Part = TypeVar("Part")


class MicroBatches(Generic[Part]):
    """A training batch in micro-batches, so that only one micro-batch's activations are in memory.

    Lightning asks `training_step` for one loss and hands it to `backward`. So `training_step` runs the first
    micro-batch with `forward`, and `backward` runs its backward pass and then all of the others. The gradients add up
    to those of the whole batch.

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

    def forward(self) -> Tensor:
        """The first micro-batch's share of what training minimises."""
        self._share = self._objective(self._first)
        return self._share

    def backward(
        self,
        loss: Tensor,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """The backward pass of the first micro-batch, and then both passes of each of the others.

        Args:
            loss: What `forward` returned, times any factors, such as a gradient scaler's. The other shares are
                multiplied by the same factors.
            backward: Runs the backward pass of a scalar.
            context: Makes the context that the other forward passes run in, such as autocast.

        Raises:
            RuntimeError: `forward` was not called before.
        """
        share, self._share = self._share, None
        if share is None:
            raise RuntimeError("Expected `forward` to be called before `backward`, once each, but it was not.")
        if self._rest:
            (factor,) = torch.autograd.grad(loss, share, retain_graph=True)
        backward(loss)
        for part in self._rest:
            with context():
                share = self._objective(part)
            backward(share * factor)


def micro_batches_of(
    sequences: Sequences, tokens: int | Literal["auto"] | None, device: torch.device
) -> list[Sequences]:
    """The pairs of a batch in micro-batches.

    Args:
        sequences: The chosen sequences, and then the rejected ones in the same order.
        tokens: What a micro-batch has at most, but for a single pair. "auto": 2,048 on a CPU, 16,384 elsewhere. None:
            the batch stays whole.
        device: Where the models are.
    """
    if tokens is None:
        return [sequences]
    if tokens == "auto":
        tokens = TOKENS_CPU if device.type == "cpu" else TOKENS
    return split_pairs(sequences, tokens)
