"""What is wrapped around a language model: torch.compile, data parallelism, peft. This file alone looks through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FSDP_PREFIX = "_fsdp_wrapped_module."
_COMPILED = "_orig_mod"
_PREFIXES = (FSDP_PREFIX, "_checkpoint_wrapped_module.", f"{_COMPILED}.")


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a `peft.PeftModel`, whose adapter can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what compiles it or distributes its data. A PeftModel is returned as it is."""
    while True:
        # Not getattr: a PeftModel passes that on to a compiled base model.
        inside = model._modules.get(_COMPILED)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inside = model.module
        if inside is None:
            return model
        model = inside


def inner(model: nn.Module) -> Any:
    """The model of transformers inside all that wraps it, adapters too."""
    peft: Any = unwrapped(model)
    return unwrapped(peft.get_base_model()) if is_peft(peft) else peft


def compiled_like(model: nn.Module, part: nn.Module) -> nn.Module:
    """`part` of a model, compiled as the model is, if it is.

    Args:
        model: A language model, perhaps wrapped.
        part: A module inside it.
    """
    whole: Any = model
    compiler: Any = getattr(whole, "dynamo_ctx", torch.compile)  # torch.compile(model, ...) keeps its options there
    in_place = any(m._compiled_call_impl is not None for m in (model, inner(model)))  # by model.compile()
    return compiler(part) if in_place or hasattr(whole, "dynamo_ctx") else part


def adapter_marks(model: nn.Module) -> tuple[str, ...]:
    """Parts of names: a parameter of a PeftModel whose name contains one belongs to an adapter."""
    peft: Any = model
    return (peft.base_model.prefix, "modules_to_save", "trainable_tokens")


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers add."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name
