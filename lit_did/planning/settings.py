"""What a plan is made for: the run's sizes and switches, named as LitDPO and the Trainer name them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from lit_did.arguments import check_bools, check_choice, check_integer

Strategy = Literal["ddp", "fsdp"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
Dtype = Literal["float32", "bfloat16"]
Offload = Literal["reference"]


@dataclass(frozen=True)
class Run:
    """A run of LitDPO. `lit_did.planning.plan` describes the options.

    Raises:
        TypeError, ValueError: A value is out of range, or two of them do not go together.
    """

    gpus: int = 1
    strategy: Strategy | None = None
    tensor_parallel: int = 1
    dp_replicate_size: int = 1
    fsdp_cpu_offload: Offload | None = None
    tokens: int = 16_384
    length: int = 2048
    prompt_length: int = 512
    micro_batches: int = 1
    lora: int | None = None
    reference_free: bool = False
    cached_reference: bool = False
    gradient_checkpointing: bool = False
    recompute_elementwise: bool = False
    precision: Precision = "bf16-mixed"
    dtype: Dtype = "float32"
    reference_dtype: Dtype | None = None

    def __post_init__(self) -> None:
        for name in (
            *("gpus", "tensor_parallel", "dp_replicate_size"),
            *("tokens", "length", "prompt_length", "micro_batches"),
        ):
            check_integer(name, getattr(self, name), 1)
        if self.lora is not None:
            check_integer("lora", self.lora, 1)
        check_bools(**{field.name: getattr(self, field.name) for field in fields(self) if field.type == "bool"})
        for name, choices in (("precision", Precision), ("dtype", Dtype)):
            check_choice(name, getattr(self, name), choices)
        if self.reference_dtype is not None:
            check_choice("reference_dtype", self.reference_dtype, Dtype)
        if self.strategy is not None:
            check_choice("strategy", self.strategy, Strategy)
        if self.prompt_length >= self.length:
            raise ValueError(
                f"Expected `prompt_length` to be less than `length`, {self.length}, but got {self.prompt_length}."
            )
        if self.gpus % self.tensor_parallel:
            raise ValueError(
                f"Expected `tensor_parallel` to divide the number of GPUs, {self.gpus}, but got {self.tensor_parallel}."
            )
        if self.tensor_parallel > 1 and self.strategy == "ddp":
            raise ValueError(f"Expected `tensor_parallel` to be 1 with DDP, but got {self.tensor_parallel}.")
        if self.tensor_parallel > 1 and self.lora is not None:
            raise ValueError(f"Expected `tensor_parallel` to be 1 with LoRA, but got {self.tensor_parallel}.")
        if self.data_parallel % self.dp_replicate_size or (self.dp_replicate_size > 1 and not self.sharded):
            raise ValueError(
                "Expected `dp_replicate_size` to divide the number of data-parallel GPUs with ModelParallelStrategy, "
                f"{self.data_parallel}, and to be 1 without, but got {self.dp_replicate_size}."
            )
        if self.fsdp_cpu_offload is not None:
            check_choice("fsdp_cpu_offload", self.fsdp_cpu_offload, Offload)
            if not (self.sharded and self.data_parallel > 1 and self.has_reference_model):
                raise ValueError(
                    "Expected `fsdp_cpu_offload` to be None without a reference model, and without several data-"
                    f"parallel GPUs with ModelParallelStrategy, but got {self.fsdp_cpu_offload!r}."
                )
        if self.reference_free and self.cached_reference:
            raise ValueError("Expected `cached_reference` to be False with `reference_free`, but got True.")

    @property
    def sharded(self) -> bool:
        """Whether each GPU has a shard of the weights."""
        return self.gpus > 1 and self.strategy != "ddp"

    @property
    def replicated(self) -> bool:
        """Whether DDP sums gradients."""
        return self.gpus > 1 and self.strategy == "ddp"

    @property
    def data_parallel(self) -> int:
        """The number of data-parallel processes."""
        return self.gpus // self.tensor_parallel

    @property
    def pairs(self) -> int:
        """Pairs of a micro-batch."""
        return max(1, self.tokens // (2 * self.length))

    @property
    def has_reference_model(self) -> bool:
        """Whether a second model is in memory."""
        return self.lora is None and not self.reference_free and not self.cached_reference

    def weights_dtype(self, reference: bool = False) -> torch.dtype:
        """The number format of a model's weights."""
        name = self.dtype
        if reference:  # one by name, of a run under FSDP, has the precision in which weights are gathered
            gathered = self.sharded and self.data_parallel > 1 and self.precision == "bf16-mixed"
            name = self.reference_dtype or ("bfloat16" if gathered else self.dtype)
        return torch.bfloat16 if self.precision == "bf16-true" else getattr(torch, name)
