"""Shards models over the processes of Lightning's ModelParallelStrategy: FSDP 2, tensor parallelism, or both.

transformers has the plans, which name the modules to shard, and the engine. A model that is loaded by name is created
without memory, and each process reads only its slices. A model object is sharded in place. A LoRA adapter is sharded
here: FSDP 2 gathers the adapter of one decoder layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from lit_did.models.wrappers import adapter_marks, inner, is_peft, unwrapped

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""the dimensions of Lightning's mesh"""
REFERENCE = "reference"
"""The `fsdp_cpu_offload` that keeps the reference's weights on the CPU."""


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes, as under FSDP and tensor parallelism."""
    # The parameters of FSDP may look whole between passes.
    units = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return units or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def outermost(model: nn.Module) -> nn.Module:
    """The module whose call is a forward pass.

    A PeftModel calls the `forward` method of its base model, past the hooks with which FSDP gathers weights. So the
    base model itself is called, whose layers hold the adapter.
    """
    base: nn.Module = inner(model)
    return base if isinstance(base, FSDPModule) else model  # type: ignore[return-value]  # a module, as all are


def own_class(module: nn.Module) -> type:
    """The class of a module before FSDP made a subclass of it."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def free_whole_weights(model: nn.Module, after: Tensor | None) -> None:
    """Lets FSDP free what it has kept whole after the forward pass of a frozen model, such as the output layer.

    Args:
        model: The model.
        after: They are freed when the gradient of this tensor is known, and now if it needs none.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def free(gradient: Tensor | None = None) -> None:
        for unit in units:
            unit.reshard()

    if after is None or not after.requires_grad:
        free()
    elif units:
        after.register_hook(free)


@contextmanager
def output_layer_kept(model: nn.Module) -> Iterator[None]:
    """Keeps the output layer whole after a backward pass of FSDP, for a second one that goes through other outputs."""
    base = inner(model)
    layer = base.get_output_embeddings()
    unit = next((module for module in (layer, base) if isinstance(module, FSDPModule)), None)
    if unit is not None:
        unit.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        if unit is not None:
            unit.set_reshard_after_backward(True, recurse=False)


def distributed_config(mesh: DeviceMesh, given: Any = None, *, mixed_precision: bool = False) -> Any:
    """The `transformers.distributed.DistributedConfig` for a mesh.

    Args:
        mesh: Lightning's mesh.
        given: A configuration of the same sizes, or some of its fields as a dict, such as
            `{"dp_replicate_size": 2}` (HSDP). None: all fields have their defaults.
        mixed_precision: Whether FSDP gathers weights in bfloat16, if `given` does not say it.

    Raises:
        ValueError: `given` has other sizes than the mesh, or `fsdp_cpu_offload` is not as `of_reference` takes it.
    """
    from transformers.distributed import DistributedConfig

    data, tensor = mesh[DATA].size(), mesh[TENSOR].size()
    if given is None or isinstance(given, Mapping):
        fields = {"fsdp_mixed_precision": mixed_precision and data > 1, "tp_size": tensor, **(given or {})}
        given = DistributedConfig(**{"fsdp_size": data // (fields.get("dp_replicate_size") or 1), **fields})
    if (given.dp_size, given.tp_size, given.pp_size) != (data, tensor, 1):
        raise ValueError(
            f"Expected `distributed_config` of `model_kwargs` to have the sizes of the Trainer's strategy, {data} data-"
            f"parallel and {tensor} tensor-parallel processes, but got fsdp_size={given.fsdp_size}, "
            f"dp_replicate_size={given.dp_replicate_size}, tp_size={given.tp_size} and pp_size={given.pp_size}. Leave "
            "these sizes out: pass the other settings as a dict, or nothing."
        )
    if given.fsdp_cpu_offload not in (False, REFERENCE) or (given.fsdp_cpu_offload and data == 1):
        raise ValueError(
            f"Expected `fsdp_cpu_offload` of `distributed_config` to be False, or {REFERENCE!r} with several data-"
            "parallel processes, because the weights of a policy in training are not kept on the CPU, but got "
            f"{given.fsdp_cpu_offload!r} with {data}."
        )
    return given


def of_policy(config: Any) -> Any:
    """What `distributed_config` returned, for the policy: its weights are never kept on the CPU."""
    return replace(config, fsdp_cpu_offload=False)


def of_reference(config: Any) -> Any:
    """What `distributed_config` returned, for the reference: with `fsdp_cpu_offload="reference"`, for FSDP to keep its
    weights on the CPU."""
    return replace(config, fsdp_cpu_offload=config.fsdp_cpu_offload == REFERENCE)


def kept_on_cpu(model: nn.Module) -> bool:
    """Whether FSDP keeps the weights of a model on the CPU."""
    config = getattr(getattr(inner(model), "config", None), "distributed_config", None)
    return getattr(config, "fsdp_cpu_offload", False) is True


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes. Its weights may be on the CPU."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor) or parameter.device.type == parameter.device_mesh.device_type:
        return parameter.device
    kind = parameter.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def shard(model: nn.Module, config: Any, mesh: DeviceMesh, argument: str, *, empty: bool = False) -> None:
    """Shards a model in place, as far as it is not sharded yet. All processes have the same weights.

    Args:
        model: A model of transformers, perhaps with an adapter, on any device.
        config: What `of_policy` or `of_reference` returned.
        mesh: Lightning's mesh.
        argument: The name of the argument that the model is, for errors.
        empty: Whether weights may be on the meta device, without values.

    Raises:
        TypeError: It is not a model of transformers.
        ValueError: Its weights are quantised or missing, or its adapter cannot be sharded.
    """
    base = inner(model)
    if not hasattr(base, "maybe_distribute_model"):
        raise TypeError(
            f"Expected `{argument}` to be a model of transformers with ModelParallelStrategy, which is sharded by its "
            f"own plan, but got {type(base).__name__}. Use strategy='ddp'."
        )
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"Expected a `{argument}` that is not quantised with ModelParallelStrategy, but got "
            f"{type(base).__name__} with a quantisation. Load it without, or use strategy='ddp'."
        )
    sharded = is_sharded(base)
    if is_peft(unwrapped(model)):
        _shard_adapter(model, config, mesh)
    if not sharded:
        config, _, meshes = type(base).prepare_distribute_model(config)
        _untie(base)
        base.maybe_distribute_model(base, config, meshes)
        base.tie_weights(recompute_mapping=False)
    if kept_on_cpu(base):  # buffers stay where they are
        base._apply(lambda tensor: tensor.cpu() if isinstance(tensor, DTensor) else tensor)
    _check_layers(base, config, argument)
    _check_tied(base, config)
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing and not empty:
        raise ValueError(
            f"Expected the files of `{argument}` to hold all weights of {type(base).__name__}, but {len(missing)} have "
            f"no values, and would start at random. The first is {missing[0]}. Load the model with `from_pretrained`, "
            "save it with `save_pretrained`, and pass that folder."
        )


def _shard_adapter(policy: nn.Module, config: Any, mesh: DeviceMesh) -> None:
    """Shards what is trained of an adapter over the data-parallel processes. All start from the first one's values.

    Modules that FSDP gathers together must all run in each forward pass. The adapter that is trained does, and a frozen
    copy of its start, which is the reference, does not.
    """
    base = inner(policy)
    if config.tp_size > 1:
        raise ValueError(
            f"Expected tensor_parallel_size=1 with an adapter, because transformers' tensor parallelism does not cover "
            f"adapters, but got {config.tp_size}. Use ModelParallelStrategy(data_parallel_size={mesh.size()}, "
            "tensor_parallel_size=1)."
        )
    for name, parameter in policy.named_parameters():
        of_adapter = any(mark in name for mark in adapter_marks(policy))
        if of_adapter and not isinstance(parameter, DTensor) and not parameter.is_meta:
            value = parameter.data.to(mesh.device_type)  # NCCL takes no tensors on the CPU
            dist.broadcast(value, 0)
            parameter.data.copy_(value)
    plan = {**base.fsdp_plan, **(config.fsdp_plan or {})}
    for name, unit in base.named_modules():
        if re.sub(r"\.\d+(?=\.|$)", ".*", name) in plan:
            linear = [module for module in unit.modules() if own_class(module) is nn.Linear and _trains(module)]
            if linear:
                fully_shard(linear, mesh=mesh[DATA])
    left = [name for name, p in policy.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise ValueError(
            "Expected an adapter of linear layers inside the decoder layers, such as LoRA, with ModelParallelStrategy, "
            f"but {len(left)} of its parameters are outside of them, or are not called as modules. The first is "
            f"{left[0]}. Use strategy='ddp'."
        )


def _trains(module: nn.Module) -> bool:
    """Whether a module has trained parameters of its own that are not sharded yet."""
    return any(p.requires_grad and not isinstance(p, DTensor) for p in module.parameters(recurse=False))


def _check_layers(base: nn.Module, config: Any, argument: str) -> None:
    """Raises ValueError if FSDP gathers all layers of a model at once, because its plan does not name them."""
    units = [name for name, module in base.named_modules() if isinstance(module, FSDPModule)]
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if config.dp_size > 1 and not any(re.search(r"\.\d+$", name) for name in units):
        raise ValueError(
            f"Expected `{argument}` to have a plan for FSDP that names its decoder layers, but that of "
            f"{type(base).__name__} does not, so that all of them would be in memory at once. Pass `model_kwargs="
            f'{{"distributed_config": {{"fsdp_plan": {{"{layers[0] if layers else "..."}.*": "free_full_weight"}}}}}}`.'
        )


def _check_tied(base: Any, config: Any) -> None:
    """Raises ValueError if FSDP would train tied embeddings wrong.

    FSDP manages a tied weight in two places. It pads uneven shards, in a copy for each place, and only one is trained.
    """
    embeddings = base.get_input_embeddings().weight
    processes = config.fsdp_size * config.tp_size
    if base.all_tied_weights_keys and embeddings.requires_grad and config.fsdp_size > 1 and len(embeddings) % processes:
        raise ValueError(
            f"Expected the number of processes to divide the {len(embeddings)} entries of the vocabulary, because "
            f"{type(base).__name__} has tied embeddings, which FSDP trains wrong in uneven shards, but got {processes} "
            "processes. Use another number of processes, `lora`, or strategy='ddp'."
        )


def _untie(model: Any) -> None:
    """Gives tied weights parameters of their own without memory, as in a model that transformers is about to load.

    FSDP refuses to manage one parameter in two places. `tie_weights` ties the weights again.
    """
    for name in model.all_tied_weights_keys:
        owner, _, own = name.rpartition(".")
        parameter: Tensor = model.get_parameter(name)
        setattr(model.get_submodule(owner), own, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
