"""Dropout and other random numbers in training mode: they are switched off, and what is left of them is found.

Otherwise a log-ratio would compare two draws of noise, not two models.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_did.models.quiet import random_numbers_kept
from lit_did.models.wrappers import inner

_MARKS = ("drop", "jitter", "noise")  # dropout, layerdrop, attn_pdrop, router_jitter_noise
_PROBE_TOKENS = 8


Probability = tuple[Any, str, float]
"""owner, attribute and value"""


def switch_off_dropout(model: nn.Module) -> list[Probability]:
    """Sets every dropout probability and every noise of the modules and their configurations to 0.

    Returns:
        What the configurations had, for `dropout_in_config`.
    """
    changed = list(_probabilities(model))
    for owner, name, _ in changed:
        setattr(owner, name, 0.0)
    return [probability for probability in changed if _is_config(probability[0])]


@contextmanager
def dropout_in_config(switched_off: Sequence[Probability]) -> Iterator[None]:
    """The configurations have their dropout again, so that a saved model has the values of the one it was made from.

    Args:
        switched_off: From `switch_off_dropout`.
    """
    for owner, name, value in switched_off:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _ in switched_off:
            setattr(owner, name, 0.0)


def active_dropout(model: nn.Module) -> list[str]:
    """Names of the modules with active dropout."""
    return [
        name
        for name, module in model.named_modules()
        if module.training and any(not _is_config(owner) for owner, *_ in _probabilities(module, deep=False))
    ]


@torch.compiler.disable  # hooks, and passes that are not compiled
def random_modules(model: nn.Module, input_ids: Tensor) -> list[str]:
    """Names of the innermost modules that draw random numbers, or whose outputs differ between two equal passes.

    Some draw numbers that change gradients only, such as routers that estimate their gradients.

    Args:
        model: A causal language model, in the mode in which it is trained.
        input_ids: [1, T] int64. The first few are used.
    """
    with random_numbers_kept(input_ids.device), torch.no_grad():
        one, other = (_record(model, input_ids[:, :_PROBE_TOKENS], seed) for seed in (0, 1))
    names = [
        name
        for name, call in one.items()
        if call.drew
        or (name in other and _same(call.inputs, other[name].inputs) and not _same(call.outputs, other[name].outputs))
    ]
    return [name for name in names if not any(other != name and _within(other, name) for other in names)]


class _Call(NamedTuple):
    inputs: list[Tensor]
    outputs: list[Tensor]
    drew: bool
    """Whether the state of torch's random numbers changed."""


def _record(model: nn.Module, input_ids: Tensor, seed: int) -> dict[str, _Call]:
    """The first call of every module in a forward pass that starts from `seed`."""
    torch.default_generator.manual_seed(seed)
    if input_ids.device.type == "cuda":
        with torch.cuda.device(input_ids.device):
            torch.cuda.manual_seed(seed)
    record: dict[str, _Call] = {}
    states: dict[str, Tensor] = {}
    handles = []

    def state() -> Tensor:
        cuda = input_ids.device.type == "cuda"
        return torch.cuda.get_rng_state(input_ids.device) if cuda else torch.get_rng_state()

    for name, module in model.named_modules():

        def before(_: nn.Module, args: tuple, name: str = name) -> None:
            states.setdefault(name, state())

        def after(_: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
            if name not in record:  # copies, because the tensors may be changed in place later
                inputs, outputs = ([t.clone() for t in _tensors(values)] for values in ((args, kwargs), output))
                record[name] = _Call(inputs, outputs, drew=not torch.equal(state(), states[name]))

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.compiler.set_stance("force_eager"):
            # Some models fail to make a cache.
            options = {"use_cache": False} if "use_cache" in inspect.signature(inner(model).forward).parameters else {}
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
    finally:
        for handle in handles:
            handle.remove()
    return record


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether the tensors are the same up to rounding. Some GPU kernels add in a different order in each run."""
    return len(tensors) == len(others) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(tensors, others, strict=True)
    )


def _within(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _probabilities(model: nn.Module, deep: bool = True) -> Iterator[Probability]:
    """Every probability above 0."""
    seen = set()
    for module in model.modules() if deep else [model]:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield module, "p", module.p
        owners = [module, *_configs(getattr(module, "config", None))]
        for owner in owners:
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            for name, value in list(vars(owner).items()):
                # PhiMoE's routers also use their jitter in eval mode, so it is part of the model.
                used = "jitter" in name and type(owner).__name__.startswith("Phimoe")
                if type(value) is float and value > 0 and any(mark in name for mark in _MARKS) and not used:
                    yield owner, name, value


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and its sub-configurations."""
    if config is None or not _is_config(config):
        return
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        yield from _configs(getattr(config, name, None))


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")
