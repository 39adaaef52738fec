"""AdamW and its learning-rate schedule, stepped every optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lit_did.arguments import check_number

SCHEDULES = ("constant", "linear", "cosine")


def check_optimizer(
    *,
    learning_rate: float,
    adam_betas: Sequence[float],
    adam_eps: float,
    weight_decay: float,
    warmup_steps: float,
    schedule: str,
) -> None:
    """Raises TypeError or ValueError unless they are what LitDPO documents."""
    numbers = {"learning_rate": learning_rate, "adam_eps": adam_eps, "weight_decay": weight_decay}
    for name, value in {**numbers, "warmup_steps": warmup_steps}.items():
        check_number(name, value)
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected `{name}` to be finite and at least 0, but got {value}.")
    if not isinstance(adam_betas, Sequence) or isinstance(adam_betas, str) or len(adam_betas) != 2:
        raise TypeError(f"Expected `adam_betas` to be two numbers, int or float, but got {adam_betas!r}.")
    for beta in adam_betas:
        check_number("adam_betas", beta, "two numbers, int or float")
        if not 0 <= beta < 1:
            raise ValueError(f"Expected `adam_betas` to be in [0, 1), but got {tuple(adam_betas)}.")
    if not 0 <= warmup_steps < math.inf or (warmup_steps >= 1 and warmup_steps != int(warmup_steps)):
        raise ValueError(f"Expected `warmup_steps` to be a whole number or a share below 1, but got {warmup_steps}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"Expected `schedule` to be one of {', '.join(map(repr, SCHEDULES))}, but got {schedule!r}.")


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool,
) -> AdamW:
    """AdamW over the trainable parameters; vectors (biases, norms) are not decayed.

    `fused`: one kernel that reads and writes everything once, where PyTorch has it for all parameters. Not with a
    gradient scaler: it is not told the scale.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "Expected `policy` to have trainable parameters, but all are frozen: load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
    fused = fused or None  # PyTorch's own choice
    optimizer = AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=eps, fused=fused)
    if fused:  # it could unscale gradients itself, so that Lightning refuses to clip them in mixed precision
        optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: float, schedule: str) -> float:
    """What the learning rate is multiplied by in optimiser step `step`, counted from 0.

    It rises linearly over `warmup_steps`, reaching 1 in the last of them, then stays ("constant") or falls to 0 at
    `total_steps`.

    Example:
        >>> [learning_rate_factor(s, warmup_steps=2, total_steps=4, schedule="linear") for s in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def count_warmup_steps(warmup_steps: float, total_steps: float, schedule: str) -> int:
    """Warmup in optimiser steps, where below 1 it is a share of all steps.

    Raises:
        ValueError: A share or a falling schedule, and nobody knows how many steps there will be.
    """
    if math.isinf(total_steps) and (schedule != "constant" or 0 < warmup_steps < 1):
        raise ValueError(
            "Expected a Trainer with `max_steps`, or `max_epochs` and data of known length, for "
            f"schedule={schedule!r} and warmup_steps={warmup_steps}, but got no end of training."
        )
    return int(warmup_steps) if warmup_steps >= 1 or not warmup_steps else round(warmup_steps * total_steps)


def scheduler(optimizer: AdamW, *, warmup_steps: int, total_steps: float, schedule: str) -> LambdaLR:
    """The schedule as PyTorch wants it. To be stepped once an optimiser step."""
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule),
    )
