"""LitDPO's optimiser and learning-rate schedule: AdamW and a schedule, or what the user's functions return."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lit_did.arguments import check_choice, check_number
from lit_did.models.wrappers import is_peft, plain_name

Schedule = Literal["constant", "linear", "cosine"]
FUSED = ("cpu", "cuda")  # the types of devices for which AdamW is PyTorch's fused one
LEARNING_RATE = 1e-6
ADAPTER_LEARNING_RATE = 5e-5
"""For an adapter: it has few parameters, and half of LoRA's parameters start at zero."""
SAMPLE = 65_536
"""The number of weights of a parameter from which the share of lost steps is estimated."""


def check_optimizer(
    *,
    optimizer: Callable[[Iterable], Optimizer] | None,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
    learning_rate: float | None,
    adam_betas: Sequence[float],
    adam_eps: float,
    weight_decay: float,
    warmup_steps: float,
    schedule: str,
) -> None:
    """Raises TypeError or ValueError unless the arguments are what LitDPO documents."""
    for name, function in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if function is not None and not callable(function):
            given = "parameters" if name == "optimizer" else "the optimiser"
            raise TypeError(f"Expected `{name}` to be a function of {given} or None, but got {function!r}.")
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, "an int, a float or None")
    numbers = {"learning_rate": learning_rate or 0.0, "adam_eps": adam_eps, "weight_decay": weight_decay}
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
        raise ValueError(
            "Expected `warmup_steps` to be a whole number of steps, or a share of all steps below 1, but got "
            f"{warmup_steps}."
        )
    check_choice("schedule", schedule, Schedule)
    adam = {"learning_rate": learning_rate, "adam_betas": tuple(adam_betas), "adam_eps": adam_eps}
    _check_unused("optimizer", optimizer, {**adam, "weight_decay": weight_decay})
    _check_unused("lr_scheduler", lr_scheduler, {"warmup_steps": warmup_steps, "schedule": schedule})


DEFAULTS = {
    "learning_rate": None,
    "adam_betas": (0.9, 0.999),
    "adam_eps": 1e-8,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
}


def _check_unused(argument: str, function: Any, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting is not the default although `function` replaces it."""
    for name, value in settings.items():
        if function is not None and value != DEFAULTS[name]:
            raise ValueError(
                f"Expected `{name}` to be {DEFAULTS[name]!r}, because `{argument}` replaces it, but got {value!r}. Set "
                f"it in `{argument}`, or leave `{argument}` out."
            )


def optimizer_and_schedule(
    policy: nn.Module,
    trainer: lightning.Trainer,
    settings: Any,
    *,
    dims: Mapping[str, int],
    optimizer: Callable[[Iterable], Optimizer] | None = None,
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
) -> dict[str, Any]:
    """The optimiser and schedule, as `configure_optimizers` returns them.

    Args:
        policy: The policy. Its parameters that require gradients are trained.
        trainer: The Trainer.
        settings: Its attributes are LitDPO's arguments.
        dims: By name, how many dimensions an unsharded parameter has.
        optimizer: A function of the trained parameters that returns the optimiser. None: AdamW.
        lr_scheduler: A function of the optimiser that returns its scheduler. None: `settings.schedule`.

    Raises:
        TypeError: A function returned something else.
        ValueError: All parameters are frozen, or the schedule needs an end of training that is not known.
    """
    trained = {plain_name(name): p for name, p in policy.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "Expected `policy` to have trainable parameters, but all are frozen. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    made: Optimizer
    if optimizer is not None:
        made = optimizer(list(trained.values()))
        if not isinstance(made, Optimizer):
            raise TypeError(f"Expected `optimizer` to return a torch.optim.Optimizer, but got {made!r}.")
    else:
        default = ADAPTER_LEARNING_RATE if is_peft(policy) else LEARNING_RATE
        made = adamw(
            trained,
            dims=dims,
            learning_rate=default if settings.learning_rate is None else settings.learning_rate,
            betas=tuple(settings.adam_betas),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=getattr(trainer.precision_plugin, "scaler", None) is None,
        )
    schedule: LRScheduler
    if lr_scheduler is None:
        total = trainer.estimated_stepping_batches
        warmup = count_warmup_steps(settings.warmup_steps, total, settings.schedule)
        if 0 <= total < warmup:  # -1: of data without a length, nobody knows
            warnings.warn(
                "The learning rate still rises when training ends, so it never reaches `learning_rate`. Cause: "
                f"`warmup_steps` is {warmup}, and training has {total:g} optimiser steps. Lower `warmup_steps`. A "
                "number below 1 is a share of all steps.",
                stacklevel=2,
            )
        schedule = scheduler(made, warmup_steps=warmup, total_steps=total, schedule=settings.schedule)
    else:
        schedule = lr_scheduler(made)
        if not isinstance(schedule, LRScheduler):
            raise TypeError(
                f"Expected `lr_scheduler` to return a torch.optim.lr_scheduler.LRScheduler, but got {schedule!r}."
            )
        if isinstance(schedule, ReduceLROnPlateau):  # it needs a logged value, at the end of each epoch
            monitor = getattr(schedule, "monitor", "val/loss")  # that of lightning.pytorch.cli names one
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}


def adamw(
    trained: Mapping[str, nn.Parameter],
    *,
    dims: Mapping[str, int],
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool,
) -> AdamW:
    """AdamW without weight decay for vectors (biases, norms).

    Args:
        trained: Parameters by name.
        dims: By name, how many dimensions an unsharded parameter has. Shards of FSDP 1 and of ZeRO 3 are flat.
        learning_rate: The learning rate.
        betas: The decay rates of the two moments.
        eps: The term that keeps steps finite. It is raised for float16 weights, with a warning.
        weight_decay: For matrices.
        fused: Whether to use PyTorch's fused kernel, which reads and writes everything once, if all parameters support
            it. A gradient scaler does not work with it.

    Raises:
        ValueError: FSDP has joined matrices and vectors into one parameter.
    """
    if weight_decay and any(isinstance(parameter, FlatParameter) for parameter in trained.values()):
        raise ValueError(
            f"Expected FSDP to keep parameters separate with weight_decay={weight_decay}, because vectors are not "
            "decayed, but got flat parameters. Pass FSDPStrategy(use_orig_params=True)."
        )
    matrices = {name: p for name, p in trained.items() if dims.get(name, p.dim()) >= 2}
    vectors = {name: p for name, p in trained.items() if name not in matrices}
    decayed = ((matrices, weight_decay), (vectors, 0.0))
    groups = [{"params": list(group.values()), "weight_decay": decay} for group, decay in decayed if group]
    fused = fused and all(p.device.type in FUSED and p.is_floating_point() for p in trained.values())
    eps = _eps(eps, trained.values())
    optimizer: Any = AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused or None)  # None: torch's choice
    if fused:  # it could unscale gradients itself, and then Lightning would refuse to clip them in mixed precision
        optimizer._step_supports_amp_scaling = False
    return optimizer


def _eps(eps: float, parameters: Iterable[nn.Parameter]) -> float:
    """`eps`, but for float16 weights at least so large that a step is finite if its gradient's square rounds to 0."""
    float16 = torch.finfo(torch.float16)
    least = math.sqrt(float16.tiny * float16.eps)  # the root of the smallest number above 0
    if eps >= least or all(parameter.dtype != torch.float16 for parameter in parameters):
        return eps
    warnings.warn(
        f"adam_eps={eps} is too small for float16 weights: the square of a gradient below {least:.1e} rounds to 0, so "
        f"steps would become far too large. AdamW uses {least:.1e} instead. Better train float32 weights: load the "
        "policy in float32 and use Trainer(precision='16-mixed'). `adam_eps=2.5e-4` silences this warning.",
        stacklevel=3,
    )
    return least


def warn_if_steps_are_rounded_away(optimizers: Iterable[Optimizer]) -> None:
    """Warns if most weights are in half precision and so large that a step of Adam does not change them.

    Adam's steps are about as large as the learning rate, or smaller if gradients change their sign. A step of less than
    half the distance to the next number is lost in rounding.
    """
    lost, numbers = 0.0, 0
    rates: set[float] = set()
    dtypes: set[str] = set()
    for group in (g for o in optimizers if isinstance(o, Adam) for g in o.param_groups):
        rate = float(group.get("initial_lr", group["lr"]))  # before the warmup
        for parameter in group["params"]:
            numbers += parameter.numel()
            if parameter.dtype in (torch.bfloat16, torch.float16):
                lost += _share_rounded(parameter.detach(), rate) * parameter.numel()
                rates.add(rate)
                dtypes.add(str(parameter.dtype).removeprefix("torch."))
    if lost > numbers / 2:
        warnings.warn(
            f"The model hardly trains: its weights are {' and '.join(sorted(dtypes))}, and at the learning rate "
            f"{max(rates):g} the updates of {lost / numbers:.0%} of them round to zero. Train float32 weights: load "
            "the policy in float32 (the default for a policy by name; `dtype=torch.float32` in `from_pretrained`), "
            "and use Trainer(precision='bf16-mixed') or '32-true'.",
            stacklevel=3,
        )


def _share_rounded(weight: Tensor, step: float) -> float:
    """The share of weights that a step does not change, estimated from a sample."""
    weight = (weight.to_local() if isinstance(weight, DTensor) else weight).flatten()
    weight = weight[:: max(1, weight.numel() // SAMPLE)]
    if not step or not weight.numel():
        return 0.0
    # The distance between numbers from 2^k to 2^(k + 1) is 2^k eps.
    least = 2.0 ** (math.floor(math.log2(2 * step / torch.finfo(weight.dtype).eps)) + 1)
    return (weight.abs().float() >= least).float().mean().item()


def learning_rate_factor(step: int, *, warmup_steps: int, total_steps: float, schedule: str) -> float:
    """The factor of the learning rate in an optimiser step.

    Args:
        step: The optimiser step, counted from 0.
        warmup_steps: The factor rises linearly over these steps and is 1 in the last of them.
        total_steps: The number of all optimiser steps.
        schedule: After the warmup, the factor stays 1 ("constant") or falls to 0 at `total_steps` ("linear", "cosine").

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
    """The number of warmup steps.

    Args:
        warmup_steps: A number of optimiser steps. Below 1: a share of all steps.
        total_steps: The number of all optimiser steps. Infinity: not known.
        schedule: The schedule after the warmup.

    Raises:
        ValueError: The number of all steps is not known, but a share or a falling schedule needs it.
    """
    if math.isinf(total_steps) and (schedule != "constant" or 0 < warmup_steps < 1):
        raise ValueError(
            "Expected a Trainer with `max_steps`, or with `max_epochs` and data of known length, for "
            f"schedule={schedule!r} and warmup_steps={warmup_steps}, but the end of training is not known."
        )
    return int(warmup_steps) if warmup_steps >= 1 or not warmup_steps else round(warmup_steps * total_steps)


def scheduler(optimizer: Optimizer, *, warmup_steps: int, total_steps: float, schedule: str) -> LambdaLR:
    """The schedule as a PyTorch scheduler, which must be stepped after every optimiser step."""
    factor = partial(learning_rate_factor, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule)
    return LambdaLR(optimizer, factor)


def follow_finders(trainer: lightning.Trainer, settings: Any) -> None:
    """Gives the schedule the learning rate and the number of steps that Lightning's finders have set.

    `LearningRateFinder` and `BatchSizeFinder` run as callbacks, after `configure_optimizers`.

    Args:
        trainer: The Trainer.
        settings: Its attributes are LitDPO's arguments.
    """
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if not isinstance(schedule, LambdaLR):
            continue
        factor: Any = schedule.lr_lambdas[0]
        if not isinstance(factor, partial) or factor.func is not learning_rate_factor:
            continue
        total, rate = trainer.estimated_stepping_batches, settings.learning_rate
        found = rate is not None and rate != schedule.optimizer.defaults["lr"]
        if total == factor.keywords["total_steps"] and not found:
            continue
        warmup = count_warmup_steps(settings.warmup_steps, total, settings.schedule)
        # Not a partial of the old one, which would be nested after a restore, and not be recognised the next time.
        factor = partial(learning_rate_factor, warmup_steps=warmup, total_steps=total, schedule=settings.schedule)
        schedule.lr_lambdas = [factor] * len(schedule.base_lrs)
        if found:
            schedule.optimizer.defaults["lr"] = rate
            schedule.base_lrs = [rate] * len(schedule.base_lrs)
        for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)


def resume_data(trainer: lightning.Trainer) -> None:
    """Lets a resumed run continue with the batch that would have come next.

    `configure_optimizers` asks for the number of steps. So Lightning makes the dataloaders before it reads their states
    from the checkpoint, and it gives those states only to dataloaders that it makes later.
    """
    loop: Any = trainer.fit_loop
    if getattr(loop, "_combined_loader_states_to_load", None):
        _warn_if_batches_are_left_out(trainer, loop._combined_loader_states_to_load)
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def _warn_if_batches_are_left_out(trainer: lightning.Trainer, states: Iterable[Any]) -> None:
    """Warns if Lightning has counted an epoch as finished that `max_steps` or a callback ended early.

    Args:
        trainer: The trainer of the resumed run.
        states: Of the training dataloaders in the checkpoint. `ResumableDataLoader` has states that say where they are.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current  # Lightning's type of it lacks `processed`
    for state in states:
        if not (isinstance(state, Mapping) and {"epoch", "batches", "num_batches", "epoch_skew"} <= state.keys()):
            continue
        epoch, most = state["epoch"], min(state["num_batches"], trainer.num_training_batches)
        if progress.processed - state["epoch_skew"] > epoch and state["batches"] < most:
            rank_zero_warn(
                f"The run that is resumed ended after batch {state['batches']:g} of {most:g} of epoch {epoch}, and "
                "Lightning counts that epoch as finished. Training goes on with the next epoch, without the other "
                "batches. To go on where a run ended, resume from a checkpoint of "
                "`ModelCheckpoint(every_n_train_steps=...)`, which is saved before the epoch ends."
            )
