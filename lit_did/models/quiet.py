"""Context managers for forward passes without side effects on a model or on torch's random numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lit_did.models.wrappers import unwrapped


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` into eval mode.

    Afterwards every submodule has its own mode again, because some may be in eval mode on purpose.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` into eval mode and switches gradients off."""
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def adapter_off(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Makes a PeftModel its own reference: without its adapter, in eval mode, without gradients.

    Args:
        model: The PeftModel, perhaps wrapped.
        adapter: The name of the adapter to use instead, such as a frozen copy of the first one's start. None: none.
    """
    peft: Any = unwrapped(model)
    active = peft.active_adapter
    # peft makes every parameter of an adapter trainable when it activates the adapter again.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model):
            if adapter is None:
                with peft.disable_adapter():
                    yield
            else:
                all_active = peft.base_model.active_adapter  # one name or several
                try:
                    peft.set_adapter(adapter)
                    yield
                finally:
                    peft.set_adapter(active)
                    peft.base_model.set_adapter(all_active)  # a PeftModel's own method takes one name
    finally:
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restores the state of torch's random numbers, so that later draws are the same as without the block."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


@contextmanager
def lightning_quiet(level: int) -> Iterator[None]:
    """Keeps Lightning from logging below a level about a trainer that the user did not make."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
