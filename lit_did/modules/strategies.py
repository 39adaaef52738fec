"""Which strategies and averages of weights LitDPO refuses, because they would train wrong.

Every process must end each step with the same weights, or its shard of them.
"""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lit_did.models.loading import is_sharded
from lit_did.models.wrappers import is_peft


def check_backward_is_run(trainer: lightning.Trainer) -> None:
    """Raises ValueError under a strategy that does not call `LightningModule.backward`."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "Expected a `strategy` that runs the module's own `backward`, but got DeepSpeed, which runs its engine's "
            "instead. Use 'ddp'. If the model does not fit one device, use ModelParallelStrategy with FSDP 2: "
            "docs/performance.md has an example."
        )


def check_unsharded_with_ddp(module: lightning.LightningModule) -> None:
    """Raises ValueError if a model is sharded and DDP gives the shards' processes different batches."""
    models = [model for model in (module.policy, module.reference) if model is not None]
    if isinstance(module.trainer.strategy, DDPStrategy) and any(map(is_sharded, models)):
        raise ValueError(
            "Expected models that are not sharded with DDP, which gives every process a whole model and batches of its "
            "own, but got distributed tensors. Load the models without `distributed_config`, or use "
            "ModelParallelStrategy."
        )


def check_averages_of_weights(module: lightning.LightningModule) -> None:
    """Raises ValueError if a callback that averages weights has copied a module that will have other parameters."""
    callbacks = module.trainer.callbacks
    if module.policy is None and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "Expected `policy` and `reference` to be modules with StochasticWeightAveraging, which has copied LitDPO "
            "before it loads models by name, and would average nothing. Load the models yourself, or use "
            "EMAWeightAveraging."
        )
    freed = module.hparams.cache_reference is not None and module.reference is not None
    if freed and any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ValueError(
            "Expected `cache_reference` to be None with WeightAveraging, whose copy of LitDPO keeps the reference's "
            f"layers that the cache frees, but got {module.hparams.cache_reference!r}. Leave out one of the two, or "
            "train a LoRA adapter."
        )


def check_gradients_are_exchanged(module: lightning.LightningModule) -> None:
    """Raises ValueError if processes would train replicas of a parameter that drift apart.

    All processes see the same modules and strategy, so that all raise or none.
    """
    strategy, world = module.trainer.strategy, module.trainer.world_size
    if world == 1 or isinstance(strategy.model, FullyShardedDataParallel):
        return
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if isinstance(strategy.model, DistributedDataParallel):
        ignored = strategy.model.parameters_to_ignore
        alone = [name for name in trained if name in ignored]
        remedy = "Take them off the parameters that DDP ignores."
    else:
        # The processes that see other batches than this one, and itself.
        mesh = strategy.device_mesh["data_parallel"].mesh if isinstance(strategy, ModelParallelStrategy) else None
        group = set(range(world) if mesh is None else mesh.flatten().tolist())
        by_fsdp = {id(p) for part in module.modules() if isinstance(part, FSDPModule) for p in part.parameters()}
        by_hooks = len(group) == 1 and _tensor_parallel(module.policy)
        alone = [n for n, p in trained.items() if not (_exchanged(p, group, id(p) in by_fsdp) or by_hooks)]
        remedy = (
            "Use strategy='ddp' with models that are not sharded, or override `configure_model` and apply "
            "`fully_shard` to all of `self.policy` there, adapters too: docs/performance.md has an example."
        )
    if alone:
        raise ValueError(
            f"Expected every trained parameter to be sharded over the {world} processes or its gradients to be "
            f"exchanged between them, but got {type(strategy).__name__} and {len(alone)} of {len(trained)} parameters "
            f"that are neither, {alone[0]} the first. The processes' copies would drift apart. {remedy}"
        )


def _exchanged(parameter: nn.Parameter, group: set[int], by_fsdp: bool) -> bool:
    """Whether what the processes of `group`, each with batches of its own, do to the parameter is the same."""
    if not isinstance(parameter, DTensor):
        return False
    if len(group) == 1:  # tensor parallelism alone: there is one batch
        return True
    # Shards that are not FSDP's are tensor parallelism's, which needs one batch.
    return group <= set(parameter.device_mesh.mesh.flatten().tolist()) and (
        by_fsdp or all(placement.is_replicate() for placement in parameter.placements)
    )


def _tensor_parallel(policy: nn.Module) -> bool:
    """Whether transformers has sharded the policy over tensors: it then sees to the gradients of what is replicated.

    It does not know of adapters.
    """
    distributed = getattr(getattr(policy, "config", None), "distributed_config", None)
    return not is_peft(policy) and distributed is not None and distributed.tp_size > 1
