"""The check that every contestant passes before it is timed: values and gradients against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = 8  # Rows of the full-size call that are checked. More rows in float64 would not fit beside large logits.


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss in every output. They differ, so that errors do not cancel, and are exact in every dtype."""
    grads = []
    for k, output in enumerate(outputs):
        steps = torch.arange(output.numel(), device=output.device)
        grads.append(((3 * steps + 5 * k) % 7 + 1).to(output.dtype).div(8).reshape(output.shape))
    return grads


class Truth:
    """Values and gradients of `reference` for the first `ROWS` rows, in float64."""

    def __init__(
        self, reference: Callable[..., tuple[Tensor, ...]], policy: Tensor, other: Tensor, labels: Tensor
    ) -> None:
        self.labels = labels[:ROWS]
        policy, other = (x[:ROWS].detach().double().requires_grad_() for x in (policy, other))
        self.values = reference(policy, other, self.labels)
        self.gradients = torch.autograd.grad(list(self.values), (policy, other), upstream(self.values))

    def verify(
        self, name: str, fields: Sequence[str], values: Sequence[Tensor], gradients: Sequence[Tensor] = ()
    ) -> None:
        """Raises RuntimeError if values or gradients are further from the truth than rounding explains."""
        coarse = 4 * max(_eps(value) for value in values)
        for field, value, expected in zip(fields, values, self.values, strict=True):
            error = (value[: len(expected)].double() - expected).abs()
            _refuse(error > 1e-3 + coarse * (1 + expected.abs()), f"{name} is wrong: {field} differs", error, "nats")
        for side, gradient, expected in zip(("policy", "reference"), gradients, self.gradients, strict=False):
            error = (gradient[:ROWS].double() - expected).abs()
            allowed = 1e-4 + _eps(gradient) + 2 * coarse
            # The label's entry is of order 1, the others of order 1/V, so each kind is compared with its own size. The
            # others are compared together, because the terms of one entry may cancel. An ignored row's must be 0.
            label = torch.zeros_like(error, dtype=torch.bool).scatter_(1, self.labels.clamp(min=0)[:, None], True)
            for what, kind in (("at the label", label), ("off the label", ~label)):
                wrong, size = (error * kind).sum(-1), (expected.abs() * kind).sum(-1)
                relative = torch.where(wrong == 0, wrong, wrong / size)
                text = f"{name} is wrong: the gradient of the {side} logits differs {what}"
                _refuse(relative > allowed, text, 100 * relative, "percent")


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _refuse(wrong: Tensor, text: str, error: Tensor, unit: str) -> None:
    if wrong.any() or not error.isfinite().all():
        raise RuntimeError(f"{text} from float64 by {error.max().item():.2g} {unit}.")
