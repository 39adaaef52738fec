"""A training step of LitDPO on fake tensors, which have shapes, but no values: what it holds in memory, and when."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_did.batches.reading import read_batch
from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models import policy_and_reference
from lit_did.models.forward import Outputs, find_body, output_layer, text_config
from lit_did.models.loading import add_lora, checkpoint_activations, freeze
from lit_did.models.names import first_line
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.sharding import DATA, TENSOR, distributed_config, shard
from lit_did.models.trial import assume_right
from lit_did.models.wrappers import inner
from lit_did.modules.objective import Objective
from lit_did.modules.optimizer import adamw
from lit_did.ops import SequenceStatistics
from lit_did.ops.tiles import TILING
from lit_did.planning.counting import (
    ACTIVATIONS,
    EXCHANGE,
    GRADIENTS,
    OPTIMIZER,
    OUTPUT_LAYER,
    REFERENCE,
    WEIGHTS,
    Peak,
    TensorBytes,
    on_layers,
)
from lit_did.planning.settings import Run

DEVICE = torch.device("cpu")


class Phase(NamedTuple):
    """A part of a step. Layers are counted from the first one, or from the last one if `layer` is negative."""

    name: str
    layer: int = 0


class Trace(NamedTuple):
    """What a step holds, in bytes."""

    peaks: dict[Phase, Peak]
    weights: int
    """of the policy"""
    reference: int
    optimizer: int
    parameters: int
    """the numbers of the whole policy, over all GPUs"""
    trained: int


def trace(config: Any, run: Run) -> Trace:
    """Runs a step of LitDPO on fake tensors.

    Args:
        config: The model's configuration, a `transformers.PreTrainedConfig`.
        run: The run.

    Raises:
        ValueError: LitDPO cannot train the model in this way, or a plan cannot follow it.
    """
    with _processes(run), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        sequences = read_sequences(read_batch(pairs_of(run, config.get_text_config().vocab_size), -100))
        policy = _model(config, run)
        reference = _model(config, run, reference=True) if run.has_reference_model else None
        try:
            # A plan is made on the CPU, for a GPU: the output layer's tiles are those of a GPU.
            with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.dict(TILING, {DEVICE.type: TILING["cuda"]}):
                return _trace(policy, reference, run, sequences)
        except RuntimeError as error:  # it looks at values, or an operator does not know what shapes it would return
            name = type(inner(policy)).__name__
            raise ValueError(
                f"Expected `model` to run on tensors that have shapes, but no values, but {name} does not: "
                f"{first_line(error)} Measure a step on a GPU instead."
            ) from error


def pairs_of(run: Run, vocabulary: int) -> dict[str, Tensor]:
    """A batch of a micro-batch's pairs, end to end, as LitDPO takes it.

    Args:
        run: The run.
        vocabulary: The number of tokens that there are.
    """
    ids = torch.arange(2 * run.pairs * run.length).view(2 * run.pairs, run.length) % min(vocabulary, 1000)
    ids[run.pairs :, : run.prompt_length] = ids[: run.pairs, : run.prompt_length]
    ids[run.pairs :, run.prompt_length] = (ids[: run.pairs, run.prompt_length] + 1) % vocabulary
    labels = torch.full_like(ids, -100)
    labels[:, run.prompt_length - 1 : -1] = ids[:, run.prompt_length :]
    return {
        "input_ids": ids.view(1, -1),
        "labels": labels.view(1, -1),
        "cu_seqlens": torch.arange(2 * run.pairs + 1) * run.length,
    }


@contextlib.contextmanager
def _processes(run: Run) -> Iterator[None]:
    """Makes this process the first of `run.gpus`. The others do not exist, so what it receives has no values."""
    if not run.sharded:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("Expected a process without a process group, because a plan makes its own, but it has one.")
    dist.init_process_group("fake", rank=0, world_size=run.gpus, store=FakeStore())
    try:
        # transformers shards for the accelerator of this machine, and a plan is made on the CPU.
        with mock.patch.object(torch._C, "_get_accelerator", return_value=DEVICE):
            yield
    finally:
        dist.destroy_process_group()


def _trace(policy: nn.Module, reference: nn.Module | None, run: Run, sequences: Sequences) -> Trace:
    """`trace` of two models on the meta device, in FakeTensorMode."""
    models = [policy] if reference is None else [policy, reference]
    for model in models:
        model.to_empty(device=DEVICE)
        inner(model).tie_weights(recompute_mapping=False)
    policy.train()
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    recorded = _Recorded(policy, run) if run.cached_reference and not run.sharded else None
    alone = run.reference_free or (run.cached_reference and run.sharded)  # log-probabilities come from the disk
    second: Any = policy if alone else recorded or reference
    packs = [assume_right(model) for model in models]
    if find_body(policy) is None:
        raise ValueError(
            "Expected `model` to expose last hidden states followed by a plain nn.Linear, because a plan follows no "
            f"other way of LitDPO, but got {type(inner(policy)).__name__}."
        )
    both = PolicyAndReference(policy, second, padding_free=all(packs))
    objective = Objective(beta=0.1, loss="simpo" if run.reference_free else "sigmoid")
    # Lightning keeps no cast weights from one operator to the next, either.
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, run.precision == "bf16-mixed", cache_enabled=False)
    counted = TensorBytes()
    for name, model in zip(("policy", "reference"), models, strict=False):
        _name_phases(counted, name, layers_of(model))

    def claim_gradient(parameter: Tensor) -> None:
        counted.claim([parameter.grad], GRADIENTS)

    with counted:
        weights = counted.claim(_tensors(policy), WEIGHTS)
        if reference is not None and run.fsdp_cpu_offload is not None:
            counted.leave_out(reference.parameters())
        of_reference = counted.claim(
            [recorded.weight] if recorded is not None else [] if reference is None else _tensors(reference), REFERENCE
        )
        optimizer = adamw(
            trained, dims={}, learning_rate=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
        )
        states = _make_states(optimizer, trained, counted)
        if run.replicated:  # DDP copies gradients into buckets, and sums those
            buckets = [torch.empty_like(parameter) for parameter in trained.values()]
            counted.claim(buckets, EXCHANGE)
        for parameter in trained.values():
            parameter.register_post_accumulate_grad_hook(claim_gradient)
        counted.peaks.clear()
        for _ in range(min(2, run.micro_batches)):
            counted.phase = Phase("policy forward")
            with autocast, _output_layer_counted(counted):
                loss = _loss(both, sequences, objective)
            counted.phase = Phase("output layer backward")
            with counted.holder(OUTPUT_LAYER):
                loss.backward()
            del loss
            counted.claim((p.grad for p in trained.values()), GRADIENTS)
        counted.phase = Phase("optimiser")
        with counted.holder(OPTIMIZER):
            optimizer.step()
    peaks = {phase: peak for phase, peak in counted.peaks.items() if isinstance(phase, Phase)}
    numbers = sum(p.numel() for p in policy.parameters()), sum(p.numel() for p in trained.values())
    return Trace(peaks, weights, of_reference, states, *numbers)


def _name_phases(counted: TensorBytes, name: str, layers: list[nn.Module]) -> None:
    """Begins a phase where a layer begins its forward pass or its backward pass."""

    def begin(phase: str, number: int) -> None:
        counted.set_holder(ACTIVATIONS)
        counted.phase = Phase(phase, number if number < len(layers) // 2 else number - len(layers))

    def forward(number: int) -> None:
        now: Any = counted.phase
        if "backward" not in now.name:  # else the layer runs again, to recompute activations
            begin(f"{name} forward", number)

    on_layers(layers, forward, partial(begin, "backward"))


@contextlib.contextmanager
def _output_layer_counted(counted: TensorBytes) -> Iterator[None]:
    """Lets what the output layers and the statistics make belong to them."""
    statistics = policy_and_reference.completion_statistics

    def completion_statistics(*arguments: Any, **keywords: Any) -> SequenceStatistics:
        counted.phase = Phase("output layer")
        with counted.holder(OUTPUT_LAYER):
            return statistics(*arguments, **keywords)

    with mock.patch.object(policy_and_reference, "completion_statistics", completion_statistics):
        yield


def _loss(models: PolicyAndReference, sequences: Sequences, objective: Objective) -> Tensor:
    """What LitDPO's training step minimises, of a micro-batch."""
    statistics, auxiliary = models.statistics(sequences)
    chosen, rejected = (SequenceStatistics(*values) for values in zip(*(v.chunk(2) for v in statistics), strict=True))
    pairs = objective.pairs(chosen, rejected, auxiliary, sequences.mean_chosen_labels())
    return objective.share(pairs, sequences)


def _make_states(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], counted: TensorBytes) -> int:
    """Makes the optimiser's states, as the first step does, and returns their bytes."""
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return counted.claim(states, OPTIMIZER)


def _model(config: Any, run: Run, reference: bool = False) -> nn.Module:
    """The policy or its reference as LitDPO makes it, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=run.weights_dtype(reference))
        if run.lora is not None:
            model = add_lora(model, {"r": run.lora, "target_modules": "all-linear"})
    if run.precision == "bf16-true":
        model.to(torch.bfloat16)
    if reference:
        freeze(model)
    elif run.gradient_checkpointing or run.recompute_elementwise:
        checkpoint_activations(model, keep_products=not run.gradient_checkpointing)
    if run.sharded:
        sizes = run.data_parallel, run.tensor_parallel
        mesh = init_device_mesh(DEVICE.type, sizes, mesh_dim_names=(DATA, TENSOR))
        replicas = {"dp_replicate_size": run.dp_replicate_size}
        settings = distributed_config(mesh, replicas, mixed_precision=run.precision == "bf16-mixed")
        shard(model, settings, mesh, "model", empty=True)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list with as many modules as the configuration has layers."""
    number = text_config(model).num_hidden_layers
    lists = (module for module in inner(model).modules() if isinstance(module, nn.ModuleList))
    return list(next(modules for modules in lists if len(modules) == number))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class _Recorded:
    """A cached reference: the hidden states of a batch come from the disk, and the output layer is in memory.

    That of a policy with an adapter is the policy's own.
    """

    def __init__(self, policy: nn.Module, run: Run) -> None:
        layer = inner(policy).get_output_embeddings()
        dtype = run.weights_dtype(reference=True)
        self._policy = policy
        self._hidden = layer.in_features, torch.float32 if run.precision == "32-true" else torch.bfloat16
        self.weight = None if run.lora else torch.empty(layer.out_features, layer.in_features, dtype=dtype)

    def outputs(self, sequences: Sequences, device: torch.device) -> Outputs:
        size, dtype = self._hidden
        layer = output_layer(self._policy)
        layer = layer if self.weight is None else layer._replace(weight=self.weight, bias=None)
        return Outputs(torch.empty(sequences.num_labels, size, dtype=dtype), layer, None).detach()
