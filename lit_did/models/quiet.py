"""Forward passes that leave a model, and torch's random numbers, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, without gradients.

    Every submodule has its own mode back afterwards: some may be in eval mode on purpose.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapter_off(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """`model`, a PeftModel, as its own reference: without its adapter, in eval mode, without gradients.

    Args:
        adapter: The name of an adapter that is put in its place, such as a frozen copy of its start.
    """
    # peft makes every parameter of an adapter trainable when it puts it back.
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapter
    try:
        with evaluating(model):
            if adapter is None:
                with model.disable_adapter():
                    yield
            else:
                try:
                    model.set_adapter(adapter)
                    yield
                finally:
                    model.set_adapter(active)
    finally:
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever random numbers are drawn, those after it are the same as without."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
