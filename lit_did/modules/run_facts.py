"""What a checkpoint says of its run: plain values, of which `lit_did.exporting` makes a folder and a model card."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import lightning
from torch import nn

from lit_did.data import PreferenceDataModule
from lit_did.data.loading import replicas
from lit_did.models.wrappers import inner, is_peft, unwrapped

if TYPE_CHECKING:
    from lit_did.modules.dpo import LitDPO

KEY = "run"
"""the key in a checkpoint"""
FACTS = frozenset({"module", "base_model", "adapter", "adapter_name", "data", "training", "validation", "versions"})
"""the keys of `run_facts`"""


def run_facts(module: LitDPO) -> dict[str, Any]:
    """Plain values, None where something is unknown: the model, the data, the training and the last validation.

    Args:
        module: A module whose models are loaded.
    """
    policy = module.loaded_models().policy
    trainer = module._trainer
    data = getattr(trainer, "datamodule", None)
    return {
        "module": next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("lit_did.modules.")),
        "base_model": getattr(inner(policy), "name_or_path", None) or None,
        "adapter": adapter_config(policy),
        "adapter_name": active_adapter(policy) if is_peft(unwrapped(policy)) else None,
        "data": data.facts() if isinstance(data, PreferenceDataModule) else None,
        "training": None if trainer is None else _training(trainer, module),
        "validation": module._validation,
        "versions": {
            name: version(name)
            for name in ("lit-did", "torch", "lightning", "transformers", *["peft"] * is_peft(policy))
        },
    }


def active_adapter(policy: nn.Module) -> str:
    """The name of the adapter of a PeftModel that is in use."""
    peft: Any = unwrapped(policy)
    return peft.active_adapters[0]


def adapter_config(policy: nn.Module) -> dict[str, Any] | None:
    """The configuration of the policy's adapter as plain values. None without an adapter."""
    peft: Any = unwrapped(policy)
    if not is_peft(peft):
        return None
    config = peft.peft_config[active_adapter(peft)].to_dict()
    return json.loads(json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def data_parallel_size(trainer: lightning.Trainer) -> int:
    """How many processes, or groups of processes with tensor or context parallelism, get batches of their own."""
    return replicas(trainer)["num_replicas"]


def _training(trainer: lightning.Trainer, module: LitDPO) -> dict[str, Any]:
    batches, batches_an_epoch = trainer.fit_loop.epoch_loop.batch_progress.total.completed, trainer.num_training_batches
    optimizer = next(iter(trainer.optimizers), None)
    group = {} if optimizer is None else optimizer.param_groups[0]
    learning_rate = group.get("initial_lr", group.get("lr"))
    schedulers = [type(configuration.scheduler).__name__ for configuration in trainer.lr_scheduler_configs]
    own = module._lr_scheduler is None and schedulers == ["LambdaLR"]  # which `schedule` and `warmup_steps` describe
    return {
        "steps": trainer.global_step,
        "epochs": batches / batches_an_epoch if 0 < batches_an_epoch < math.inf else None,
        "ranks": data_parallel_size(trainer),
        "processes": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "learning_rate": None if learning_rate is None else float(learning_rate),
        "weight_decay": group.get("weight_decay"),
        "lr_scheduler": None if own or not schedulers else schedulers[0],
    }
