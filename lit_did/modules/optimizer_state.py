"""Optimiser states by the names of parameters, so that a run can resume under another strategy.

Lightning numbers the parameters in a checkpoint: in the order of the optimiser's groups or, under a sharded strategy,
in the order of the module. A file of one kind read as the other would give a parameter the moments of another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning
from torch import nn
from torch.optim import Optimizer

from lit_did.models.wrappers import plain_name


def by_names(states: list[dict[str, Any]], module: lightning.LightningModule) -> list[dict[str, Any]]:
    """The optimiser states of a checkpoint with names instead of numbers. Names, and empty states, are kept."""
    strategy = module.trainer.strategy
    names = _names(module)
    renamed = []
    for state, optimizer in zip(states, strategy.optimizers, strict=True):
        if strategy.lightning_restore_optimizer:
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        else:
            order = list(names.values())
        renamed.append(_renumbered(state, dict(enumerate(order))))
    return renamed


def accept_names(optimizers: Iterable[Optimizer], module: lightning.LightningModule) -> None:
    """Makes optimisers load states by names, and refuse the states of another kind of optimiser.

    Args:
        optimizers: The optimisers of `module`.
        module: A module whose `_saved_optimizer` is the class of the optimiser in the checkpoint, or None.
    """
    names = _names(module)

    def to_numbers(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        own_class = type(optimizer).__name__
        saved_class = module._saved_optimizer or own_class
        own_groups, saved_groups = len(optimizer.param_groups), len(state["param_groups"])
        if (saved_class, saved_groups) != (own_class, own_groups):
            raise ValueError(
                f"Expected the optimiser of the checkpoint, {saved_class} with {saved_groups} parameter groups, but "
                f"got {own_class} with {own_groups}. Pass the same `optimizer` to resume. To train the weights with "
                "another one, use `LitDPO.load_from_checkpoint(path, optimizer=...)` and `fit` without `ckpt_path`."
            )
        saved = {name: group for group in state["param_groups"] for name in group["params"]}
        if not any(isinstance(name, str) for name in saved):
            return None
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        own = [name for group in groups for name in group]
        if saved.keys() != set(own):
            differing = sorted(saved.keys() ^ set(own))
            raise ValueError(
                "Expected the checkpoint's optimiser to have the parameters of this one, but "
                f"{len(differing)} are in only one of them. The first is {differing[0]}. Pass the `policy` and `lora` "
                "of the run that saved the checkpoint."
            )
        param_groups = [{**saved[group[0]], "params": group} for group in groups]
        return _renumbered({**state, "param_groups": param_groups}, {name: i for i, name in enumerate(own)})

    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(to_numbers)


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}


def _renumbered(state: dict[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
    if "param_groups" not in state:
        return state
    groups = [{**g, "params": [keys.get(key, key) for key in g["params"]]} for g in state["param_groups"]]
    return {
        **state,
        "state": {keys.get(key, key): value for key, value in state["state"].items()},
        "param_groups": groups,
    }
