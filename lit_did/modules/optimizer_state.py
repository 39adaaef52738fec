"""Optimiser states by the names of parameters, so that a run goes on under another strategy.

Lightning numbers parameters in a checkpoint: by the optimiser's groups, or under a strategy that shards by the module.
A file of one read under the other would give a parameter another's moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning
from torch import nn
from torch.optim import Optimizer

from lit_did.models.wrappers import plain_name


def by_names(states: list[dict[str, Any]], module: lightning.LightningModule) -> list[dict[str, Any]]:
    """The states of a checkpoint with names for numbers; on ranks without states, and where names are, as they are."""
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
    """Makes optimisers load states by names too."""
    names = _names(module)

    def to_numbers(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        saved = {name: group for group in state["param_groups"] for name in group["params"]}
        if not any(isinstance(name, str) for name in saved):
            return None
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        own = [name for group in groups for name in group]
        if saved.keys() != set(own):
            differing = sorted(saved.keys() ^ set(own))
            raise ValueError(
                "Expected the checkpoint's optimiser to have this one's parameters, but "
                f"{len(differing)} are in one of them only, {differing[0]} the first."
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
