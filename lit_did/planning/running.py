"""plan: the peak memory of a GPU in a training step of LitDPO, and what holds it. No GPU and no weights are needed."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch

from lit_did.planning.counting import HOLDERS, Peak
from lit_did.planning.models import read_config
from lit_did.planning.settings import Dtype, Offload, Precision, Run, Strategy
from lit_did.planning.step import Trace, layers_of, trace

FEW = (4, 5)
"""The numbers of layers that are run. With more layers of one kind, memory is linear in their number."""


@dataclass(frozen=True)
class Plan:
    """The memory of a GPU in a training step of LitDPO, in bytes. Of several GPUs, of that with the largest shards."""

    run: Run
    parameters: int
    """the number of the policy's parameters, over all GPUs"""
    trained_parameters: int
    peak: int
    """the most bytes of all tensors together"""
    held: dict[str, int]
    """by `lit_did.planning.HOLDERS`: the part of the peak that each holds"""
    when: str
    """the part of the step with the peak"""
    parts: dict[str, int]
    """the most bytes in each part of the step"""
    weights: int
    """of the policy, all the time"""
    reference: int
    """the weights of the reference, all the time"""
    optimizer: int
    """the states of AdamW, all the time"""


def plan(
    model: str | os.PathLike | Any,
    *,
    gpus: int = 1,
    strategy: Strategy | None = None,
    tensor_parallel: int = 1,
    dp_replicate_size: int = 1,
    fsdp_cpu_offload: Offload | None = None,
    tokens: int = 16_384,
    length: int = 2048,
    prompt_length: int = 512,
    micro_batches: int = 1,
    lora: int | None = None,
    reference_free: bool = False,
    cached_reference: bool = False,
    gradient_checkpointing: bool = False,
    recompute_elementwise: bool = False,
    precision: Precision = "bf16-mixed",
    dtype: Dtype = "float32",
    reference_dtype: Dtype | None = None,
) -> Plan:
    """Works out the peak memory of a GPU in a training step of LitDPO, and what holds it.

    The step runs LitDPO's own code on tensors that have shapes, but no values, and as one of many processes that do not
    exist. So no GPU and no weights are needed. Layers of one kind are run a few times, and counted as often as there
    are.

    Args:
        model: One of `known_shapes`, such as llama3-8b; a folder with a config.json, or such a file; smollm2; or a name
            of the Hugging Face hub. In Python also a configuration of transformers.
        gpus: The number of GPUs, over all nodes.
        strategy: ddp, or fsdp for ModelParallelStrategy. By default fsdp with several GPUs.
        tensor_parallel: ModelParallelStrategy's tensor_parallel_size.
        dp_replicate_size: The number of replicas (HSDP), as in distributed_config of LitDPO's model_kwargs.
        fsdp_cpu_offload: With reference, its weights are kept on the CPU, as in distributed_config.
        tokens: Tokens of a micro-batch on a GPU, with prompts counted twice. A micro-batch has at least one pair.
        length: Tokens of a sequence, which are a prompt and a completion.
        prompt_length: Tokens of a prompt.
        micro_batches: Micro-batches of an optimiser step. From the second on, gradients are in memory beside
            activations.
        lora: The rank of a LoRA adapter on all linear layers. By default all weights are trained.
        reference_free: Whether the loss has no reference.
        cached_reference: Whether LitDPO has a cache_reference, which frees the layers of the reference. With sharded
            models it keeps log-probabilities and frees all of it.
        gradient_checkpointing: LitDPO's switch of this name.
        recompute_elementwise: LitDPO's switch of this name.
        precision: The Trainer's.
        dtype: The number format of the loaded weights, which is dtype in LitDPO's model_kwargs.
        reference_dtype: That of the reference's weights, by default that of a reference by name: the policy's, or
            bfloat16 where FSDP gathers weights in it.

    Raises:
        TypeError, ValueError: An option is out of range, options do not go together, or LitDPO cannot train such a
            model in this way.
        FileNotFoundError, ConnectionError: The model's configuration is not found.

    Example:
        >>> from lit_did.planning import plan
        >>> found = plan("llama3-8b", gpus=8, gradient_checkpointing=True)  # doctest: +SKIP
        >>> f"{found.peak / 2**30:.1f} GiB, most of it {max(found.held, key=found.held.get)}"  # doctest: +SKIP
    """
    run = Run(
        gpus=gpus,
        strategy=strategy,
        tensor_parallel=tensor_parallel,
        dp_replicate_size=dp_replicate_size,
        fsdp_cpu_offload=fsdp_cpu_offload,
        tokens=tokens,
        length=length,
        prompt_length=prompt_length,
        micro_batches=micro_batches,
        lora=lora,
        reference_free=reference_free,
        cached_reference=cached_reference,
        gradient_checkpointing=gradient_checkpointing,
        recompute_elementwise=recompute_elementwise,
        precision=precision,
        dtype=dtype,
        reference_dtype=reference_dtype,
    )
    return plan_of(read_config(model), run)


def plan_of(config: Any, run: Run) -> Plan:
    """As `plan`, for a configuration of transformers and a `Run`."""
    number = config.get_text_config().num_hidden_layers
    if number > max(FEW) and _of_one_kind(config):
        one, other = (trace(_with_layers(config, few), run) for few in FEW)
        found = _extrapolated(one, other, number)
    else:
        found = trace(config, run)
    parts: dict[str, int] = {}
    for phase, peak in found.peaks.items():
        parts[phase.name] = max(parts.get(phase.name, 0), peak.total)
    highest = max(found.peaks, key=lambda phase: found.peaks[phase].total)
    held = found.peaks[highest].held
    return Plan(
        run,
        found.parameters,
        found.trained,
        found.peaks[highest].total,
        {holder: held.get(holder, 0) for holder in HOLDERS},
        highest.name,
        parts,
        found.weights,
        found.reference,
        found.optimizer,
    )


def _extrapolated(one: Trace, other: Trace, number: int) -> Trace:
    """What a step with `number` layers holds, of two with few.

    In each part of a step, memory is linear in the number of layers. The first two and the last two layers have parts
    of their own. Between them, memory rises or falls from layer to layer, so it is highest at one of these.
    """

    def at(few: float, more: float) -> int:
        return round(few + (more - few) * (number - FEW[0]) / (FEW[1] - FEW[0]))

    def peak_at(few: Peak, more: Peak) -> Peak:
        holders = {*few.held, *more.held}
        held = {holder: at(few.held.get(holder, 0), more.held.get(holder, 0)) for holder in holders}
        return Peak(at(few.total, more.total), held)

    peaks = {phase: peak_at(one.peaks[phase], other.peaks[phase]) for phase in one.peaks if phase in other.peaks}
    return Trace(peaks, *(at(few, more) for few, more in zip(one[1:], other[1:], strict=True)))


def _with_layers(config: Any, number: int) -> Any:
    few = copy.deepcopy(config)
    text = few.get_text_config()
    for name, values in _by_layer(text).items():
        setattr(text, name, values[:number])
    text.num_hidden_layers = number
    return few


def _by_layer(text: Any) -> dict[str, list]:
    """The settings that have a value for each layer, such as `layer_types`."""
    lists = ((name, value) for name, value in vars(text).items() if isinstance(value, list))
    return {name: value for name, value in lists if len(value) == text.num_hidden_layers}


def _of_one_kind(config: Any) -> bool:
    """Whether all decoder layers have the same settings and the same parameters."""
    from transformers import AutoModelForCausalLM

    if any(value != values[0] for values in _by_layer(config.get_text_config()).values() for value in values):
        return False
    with torch.device("meta"):
        layers = layers_of(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    kinds = {tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers}
    return len(kinds) == 1
