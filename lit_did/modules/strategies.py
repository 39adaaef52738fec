"""Refuses the strategies and the averages of weights with which LitDPO would train wrong.

Every process must end each step with the same weights, or with its shard of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lit_did.batches.sequences import Sequences
from lit_did.models.sharding import is_sharded
from lit_did.models.wrappers import is_peft
from lit_did.reference_cache.fingerprint import quick_digest

if TYPE_CHECKING:
    from lit_did.modules.policy_module import PolicyModule


def check_backward_is_run(trainer: lightning.Trainer) -> None:
    """Raises ValueError under a strategy that does not call `LightningModule.backward`."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "Expected a `strategy` that calls the module's own `backward`, but got DeepSpeed, which calls its "
            "engine's. Use 'ddp'. If the model does not fit on one device, use ModelParallelStrategy. "
            "`lit-did docs scale` has an example."
        )


def check_settings_are_used(strategy: Any, settings: Any) -> None:
    """Raises ValueError if `distributed_config` is given to processes that do not shard models."""
    if settings is not None and strategy.world_size > 1 and not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            "Expected `model_kwargs` without `distributed_config`, unless the Trainer's strategy is "
            f"ModelParallelStrategy, which shards models, but got {type(strategy).__name__}. Leave it out, or use "
            "ModelParallelStrategy."
        )


def check_settings_have_a_reference(config: Any, reference: nn.Module | None) -> None:
    """Raises ValueError if a reference is to be kept on the CPU, but there is no second model."""
    if config.fsdp_cpu_offload and reference is None:
        raise ValueError(
            "Expected `fsdp_cpu_offload` of `distributed_config` to be False without a reference model, as with a LoRA "
            f"adapter, but got {config.fsdp_cpu_offload!r}. Leave it out."
        )


def check_same_on_all_processes(trainer: lightning.Trainer, argument: str, model: nn.Module) -> None:
    """Raises ValueError if a model that is about to be sharded has other weights on another process."""
    digest = quick_digest(model)  # None: it is sharded, as a model that was loaded by name
    same = trainer.strategy.broadcast(digest) == digest
    if not trainer.strategy.reduce_boolean_decision(same):
        raise ValueError(
            f"Expected `{argument}` to have the same weights on all processes, because each keeps a share of its own, "
            "but they differ. Load the model from one place, or call `lightning.seed_everything` before you make it."
        )


def check_reference_can_be_cached(module: PolicyModule) -> None:
    """Raises ValueError if `cache_reference` is to keep hidden states of sharded models."""
    settings: Any = module.hparams
    models, strategy = (module.policy, module.reference), module.trainer.strategy
    if settings.cache_reference is None or not any(is_sharded(model) for model in models if model is not None):
        return
    if settings.cache_kind != "logprobs" or not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            "Expected `cache_kind` to be 'logprobs' and the strategy to be ModelParallelStrategy with "
            f"`cache_reference` and sharded models, but got {settings.cache_kind!r} and {type(strategy).__name__}. "
            "Change these, leave `cache_reference` out, or use strategy='ddp'."
        )


def check_context_can_be_shared(module: PolicyModule) -> None:
    """Raises ValueError if the strategy or the settings do not allow `context_parallel_size`."""
    size = module.context_parallel_size
    if size == 1:
        return
    strategy, world = module.trainer.strategy, module.trainer.world_size
    cache, kind = (module.hparams[name] for name in ("cache_reference", "cache_kind"))
    whole = type(strategy) is DDPStrategy or (
        type(strategy) is ModelParallelStrategy and strategy.device_mesh["tensor_parallel"].size() == 1
    )
    if not whole or world % size:
        raise ValueError(
            "Expected `context_parallel_size` to divide the number of processes, under strategy='ddp' or "
            f"ModelParallelStrategy with tensor_parallel_size=1, but got {size} and {world} processes under "
            f"{type(strategy).__name__}. Pass `context_parallel_size=1`, or change the Trainer."
        )
    if cache is not None and kind != "logprobs":
        raise ValueError(
            f"Expected `cache_kind` to be 'logprobs' with `cache_reference` and `context_parallel_size={size}`, but "
            f"got {kind!r}. Change it, or leave out one of the two."
        )


def check_same_batch(sequences: Sequences, group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises ValueError if the processes of a context-parallel group have got different batches."""
    digest = zlib.crc32(sequences.input_ids.tobytes())
    ends = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    if int(ends.sum()):
        size, world = group.size(), dist.get_world_size()
        raise ValueError(
            f"Expected the {size} processes of a group to get the same batches with `context_parallel_size={size}`, "
            "but they differ. Use PreferenceDataModule. Or pass Trainer(use_distributed_sampler=False) and give your "
            f"DataLoader a DistributedSampler with num_replicas={world // size} and rank=trainer.global_rank // {size}."
        )


def check_unsharded_with_ddp(module: PolicyModule) -> None:
    """Raises ValueError if a model is sharded and DDP gives the processes different batches."""
    models = [model for model in (module.policy, module.reference) if model is not None]
    if isinstance(module.trainer.strategy, DDPStrategy) and any(map(is_sharded, models)):
        raise ValueError(
            "Expected models that are not sharded with DDP, because DDP gives every process its own batches and a "
            "whole model, but got distributed tensors. Load the models without `distributed_config`, or use "
            "ModelParallelStrategy."
        )


def check_averages_of_weights(module: PolicyModule) -> None:
    """Raises ValueError if a callback averages the weights of a copy that does not have the module's parameters."""
    trainer: Any = module.trainer
    settings: Any = module.hparams
    callbacks = trainer.callbacks
    if module.policy is None and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "Expected `policy` and `reference` to be modules with StochasticWeightAveraging, because it copies LitDPO "
            "before models are loaded by name, and would average nothing. Load the models yourself, or use "
            "EMAWeightAveraging."
        )
    freed = settings.cache_reference is not None and module.reference is not None
    if freed and any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ValueError(
            "Expected `cache_reference` to be None with WeightAveraging, because its copy of LitDPO keeps the layers "
            f"of the reference that the cache frees, but got {settings.cache_reference!r}. Leave out one of the "
            "two, or train a LoRA adapter."
        )


def check_gradients_are_exchanged(module: PolicyModule) -> None:
    """Raises ValueError if the processes' copies of a parameter would drift apart.

    All processes have the same modules and strategy, so either all raise or none.
    """
    strategy, world = module.trainer.strategy, module.trainer.world_size
    if world == 1 or isinstance(strategy.model, FullyShardedDataParallel):
        return
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if isinstance(strategy.model, DistributedDataParallel):
        ignored = strategy.model.parameters_to_ignore
        alone = [name for name in trained if name in ignored]
        remedy = "Remove them from the parameters that DDP ignores."
    else:
        # This process and those that get other batches.
        mesh = strategy.device_mesh["data_parallel"].mesh if isinstance(strategy, ModelParallelStrategy) else None
        group = set(range(world) if mesh is None else mesh.flatten().tolist())
        by_fsdp = {id(p) for part in module.modules() if isinstance(part, FSDPModule) for p in part.parameters()}
        by_hooks = len(group) == 1 and module.policy is not None and _tensor_parallel(module.policy)
        alone = [n for n, p in trained.items() if not (_exchanged(p, group, id(p) in by_fsdp) or by_hooks)]
        remedy = (
            "Use ModelParallelStrategy, and do not shard models yourself, or shard all of them. Or use strategy='ddp' "
            "with models that are not sharded. `lit-did docs scale` has an example."
        )
    if alone:
        raise ValueError(
            f"Expected every trained parameter to be sharded over the {world} processes, or its gradients to be "
            f"exchanged between them, but with {type(strategy).__name__} neither holds for {len(alone)} of "
            f"{len(trained)} parameters. The first is {alone[0]}. The processes' copies would drift apart. {remedy}"
        )


def _exchanged(parameter: nn.Parameter, group: set[int], by_fsdp: bool) -> bool:
    """Whether a parameter gets the same update on all processes of `group`, which have different batches."""
    if not isinstance(parameter, DTensor):
        return False
    if len(group) == 1:  # only tensor parallelism: there is one batch
        return True
    # Shards that are not FSDP's are those of tensor parallelism, which needs one batch.
    return group <= set(parameter.device_mesh.mesh.flatten().tolist()) and (
        by_fsdp or all(placement.is_replicate() for placement in parameter.placements)
    )


def _tensor_parallel(policy: nn.Module) -> bool:
    """Whether transformers runs the policy tensor-parallel. It then exchanges the gradients of replicated parameters.

    It does not do so for adapters.
    """
    distributed = getattr(getattr(policy, "config", None), "distributed_config", None)
    return not is_peft(policy) and distributed is not None and distributed.tp_size > 1
