"""PolicyAndReference: a policy beside its reference, and the statistics of a batch's completions under both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lit_did.arguments import check_bools
from lit_did.batches import IGNORE_INDEX
from lit_did.batches.layout import Layout
from lit_did.batches.reading import read_batch
from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models import attention
from lit_did.models.adapters import ADAPTER, freeze_start, warn_if_untrained
from lit_did.models.context_parallel import over_group
from lit_did.models.forward import Outputs, text_config
from lit_did.models.loading import (
    check_adapter,
    check_adapter_is_all_that_trains,
    check_can_be_copied,
    check_positions_are_kept,
    check_same_vocabulary,
    check_separate,
    frozen_copy,
)
from lit_did.models.loading import freeze as freeze_model
from lit_did.models.quantisation import keep_gradients
from lit_did.models.quiet import adapter_off, evaluating, random_numbers_kept
from lit_did.models.sharding import device_of, free_whole_weights, is_sharded, kept_on_cpu
from lit_did.models.trial import layout_of, outputs_of
from lit_did.models.wrappers import inner, is_peft, unwrapped
from lit_did.ops import SequenceStatistics, linear_sequence_statistics, sequence_statistics
from lit_did.ops.checks import check_options
from lit_did.ops.extension import Backend, check_backend

MAX_LOGITS_BYTES = 2**30
ReferenceKind = Literal["model", "adapter off", "adapter", "recorded", "policy"]


@runtime_checkable
class RecordedReference(Protocol):
    """A reference whose last hidden states were recorded, such as a reference cache."""

    def outputs(self, sequences: Sequences, device: torch.device) -> Outputs:
        """What the reference answers at the completion tokens of `sequences`, on `device`."""
        ...


class PolicyAndReference(nn.Module):
    """Runs a policy beside its reference and returns the statistics of a batch's completions.

    Register it as a submodule of your own LightningModule. Then device moves, strategies and checkpoints include both
    models, and `DIDMonitor` finds them. The result is differentiable in the policy. Call it under `torch.no_grad()` to
    measure.

    The models are given no padding, and what both sequences of a pair begin with is encoded once, where the models
    give the same results that way. Last hidden states go straight into the fused operator, so that no logits are kept
    in memory, where the output layer is a plain `nn.Linear`. A warning names a model that needs a slower way.

    Args:
        policy: A causal language model of transformers. Its mode (train or eval) and its parameters stay as they are.
        reference: The model that the policy is compared with. It is frozen and stays in eval mode. None: a `PeftModel`
            is its own reference with its adapter switched off, and any other policy gets a frozen copy of its present
            weights. "adapter": a frozen copy of the present adapter of a `PeftModel`, on the same base model. Or a
            recorded reference, which is an object with a method `outputs(sequences, device)`. Or `policy` itself: then
            it runs once, and every log-ratio is 0.
        adapter: The name of the policy's adapter that is the reference, in place of no adapter. Only for a `PeftModel`
            without `reference`.
        freeze: False leaves a `reference` model's parameters and mode as they are. It still runs in eval mode and
            without gradients.
        padding_free: Whether the models are given the sequences of a batch end to end, without padding.
        share_prompts: Whether the models are given once what both sequences of a pair begin with. Sequence i and
            sequence i + n / 2 of n are a pair.
        ignore_index: The label of tokens that are not part of a completion.
        temperature: Divides both models' logits.
        backend: Of the operators: "auto", "fused" or "reference".

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the two models share parameters or have different vocabularies, the
            adapter is not all that is trained of a `PeftModel` without `reference`, or `adapter` is not the name of
            another adapter of it.

    Example:
        >>> from lightning import LightningModule
        >>> class MyDPO(LightningModule):
        ...     def __init__(self, policy, reference=None):
        ...         super().__init__()
        ...         self.models = PolicyAndReference(policy, reference)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         statistics = self.models(batch)  # SequenceStatistics [sequences]
        ...         chosen, rejected = statistics.log_ratio.chunk(2)
        ...         return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    """

    policy: nn.Module
    reference: nn.Module | None

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | RecordedReference | Literal["adapter"] | None = None,
        *,
        adapter: str | None = None,
        freeze: bool = True,
        padding_free: bool = True,
        share_prompts: bool = True,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(policy, nn.Module):
            raise TypeError(
                f"Expected `policy` to be a model, but got {type(policy).__name__}. Load a model by its name with "
                "AutoModelForCausalLM.from_pretrained."
            )
        check_bools(freeze=freeze, padding_free=padding_free, share_prompts=share_prompts)
        check_options(ignore_index, temperature)
        check_backend(backend)
        self.policy, self.adapter = policy, adapter
        self.padding_free, self.share_prompts = padding_free, share_prompts
        self.ignore_index, self.temperature, self.backend = ignore_index, temperature, backend
        self._freeze, self._recorded = freeze, None
        self.reference = None
        if is_peft(unwrapped(policy)):
            check_positions_are_kept(unwrapped(policy))
        if reference is policy:
            self.reference_kind: ReferenceKind = "policy"
        elif reference is None and is_peft(unwrapped(policy)):
            check_adapter_is_all_that_trains(unwrapped(policy), adapter)
            self.reference_kind = "adapter off" if adapter is None else "adapter"
        elif isinstance(reference, str) and reference == ADAPTER:
            check_can_be_copied(policy, adapter=True)
            warn_if_untrained(unwrapped(policy))
            check_adapter_is_all_that_trains(unwrapped(policy), ADAPTER)
            self.adapter, self.reference_kind = freeze_start(unwrapped(policy)), "adapter"
        elif reference is None:
            check_can_be_copied(policy)
            self.reference, self.reference_kind = frozen_copy(policy), "model"
        elif isinstance(reference, nn.Module):
            check_separate(policy, reference)
            check_same_vocabulary(policy, reference)
            self.reference, self.reference_kind = freeze_model(reference) if freeze else reference, "model"
        elif isinstance(reference, RecordedReference):
            self._recorded, self.reference_kind = reference, "recorded"
        else:
            raise TypeError(
                f'Expected `reference` to be a model, "{ADAPTER}", None, or a recorded reference with a method '
                f"`outputs(sequences, device)`, but got {type(reference).__name__}. Load a model by its name with "
                "AutoModelForCausalLM.from_pretrained."
            )
        keep_gradients(self)
        if adapter is not None:
            check_adapter(adapter, unwrapped(policy) if reference is None and is_peft(unwrapped(policy)) else None)

    def forward(self, batch: Mapping[str, Any]) -> SequenceStatistics:
        """The statistics of every completion, [sequences].

        Args:
            batch: In any form that `lit_did.batches.reading.read_batch` documents, on any device. It is read on the
                CPU, so keep it there.
        """
        return self.statistics(self.read(batch))[0]

    def read(self, batch: Mapping[str, Any], *, ignore_index: int | None = None) -> Sequences:
        """The sequences of a batch, on the CPU.

        Args:
            batch: In any form that `lit_did.batches.reading.read_batch` documents, on any device.
            ignore_index: The label of tokens that are not part of a completion. None: the constructor's.
        """
        if isinstance(batch, Mapping):  # read back once, where it is on another device
            batch = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return read_sequences(read_batch(batch, self.ignore_index if ignore_index is None else ignore_index))

    def statistics(
        self,
        sequences: Sequences,
        whole: Sequences | None = None,
        *,
        alone: bool = False,
        group: ProcessGroup | None = None,
    ) -> tuple[SequenceStatistics, Tensor | None]:
        """The statistics [sequences], and the auxiliary loss of a mixture of experts that is configured to return one.

        Args:
            sequences: What `read` returned, or some of it.
            whole: All sequences that one backward pass goes through, if `sequences` are some of them.
            alone: Whether the policy runs without its reference, as if it were its own: every log-ratio is 0.
            group: The processes that share the tokens of `sequences`, which all of them pass. Each gets the statistics
                of whole sequences. Gradients are right after a mean over all processes, as DDP and FSDP take it, see
                `lit_did.models.context_parallel`.
        """
        return self._run(self.policy, self.reference, sequences, whole, alone=alone, group=group)

    def measure(
        self,
        sequences: Sequences,
        *,
        temperature: float | None = None,
        backend: Backend | None = None,
        max_logits_bytes: int = MAX_LOGITS_BYTES,
    ) -> SequenceStatistics:
        """The statistics [sequences], without gradients and without a trace in the models or in random numbers.

        Both models run in eval mode. DDP and `torch.compile` around a model do not run. With a sharded model, all
        processes call this together.

        Args:
            sequences: What `read` returned.
            temperature: Divides both models' logits. None: the constructor's.
            backend: Of the operators. None: the constructor's.
            max_logits_bytes: About how many bytes the logits of all completion tokens may take at a time. Sequences
                take turns, at least one each.
        """
        policy, reference = (model if model is None else unwrapped(model) for model in (self.policy, self.reference))
        assert policy is not None
        with random_numbers_kept(device_of(policy)), evaluating(policy):
            portions = _portions(sequences, policy, max_logits_bytes)
            # Processes with fewer portions repeat their last one: the others need them in every forward pass.
            repeats = _most(len(portions), policy, reference) - len(portions)
            parts = [
                self._run(policy, reference, portion, temperature=temperature, backend=backend)[0]
                for portion in [*portions, *[portions[-1]] * repeats]
            ]
        return SequenceStatistics(*(torch.cat(values) for values in zip(*parts[: len(portions)], strict=True)))

    def choose_layouts(self, sequences: Sequences, *, max_logits_bytes: int = MAX_LOGITS_BYTES) -> None:
        """Tries the models on the shapes of these sequences, as `measure` would, but does not measure.

        A layout that was found for some sequences is kept for later ones. So a run that goes on in the middle of its
        data, and calls this for the data before, gives the bits of a run without an interruption.

        Args:
            sequences: What `read` returned.
            max_logits_bytes: As for `measure`.
        """
        policy, reference = (model if model is None else unwrapped(model) for model in (self.policy, self.reference))
        assert policy is not None
        with random_numbers_kept(device_of(policy)), evaluating(policy):
            for portion in _portions(sequences, policy, max_logits_bytes):
                for model in (policy, reference) if reference is not None else (policy,):
                    self._layout(model, portion)

    def reference_outputs(self, sequences: Sequences) -> Outputs:
        """What the reference model answers at the completion tokens, without gradients, even where it is recorded.

        Args:
            sequences: What `read` returned.
        """
        return self._reference_outputs(self.policy, self.reference, sequences)

    def reference_logprobs(self, sequences: Sequences) -> Tensor:
        """What the reference's log-probability of every completion is, [sequences], without gradients.

        Args:
            sequences: What `read` returned.
        """
        with torch.no_grad():
            outputs = self.reference_outputs(sequences).detach()
            layout = self._layout(self.policy if self.reference is None else self.reference, sequences)
            labels, cu_labels = layout.labels, layout.cu_labels
            options: Any = {"temperature": self.temperature, "backend": self.backend}
            return completion_statistics(outputs, outputs, labels, cu_labels, **options).policy_logprob

    def forget_reference(self) -> None:
        """Frees the reference model. From now on the policy runs alone, and every log-ratio is 0."""
        self.reference, self.reference_kind = None, "policy"

    def use_recorded(self, recorded: RecordedReference, output_layer: nn.Module | None) -> None:
        """Takes the reference's answers from a record from now on.

        Args:
            recorded: It holds the answers.
            output_layer: What takes the place of the `reference` model, whose layers are no longer needed.
        """
        self._recorded, self.reference, self.reference_kind = recorded, output_layer, "recorded"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolicyAndReference:
        """As every module's, for `to` and its like. Weights that FSDP keeps on the CPU only get the dtype."""
        stay: set[int] = set()
        if self.reference is not None and kept_on_cpu(self.reference):
            stay = {id(parameter) for parameter in self.reference.parameters()}

        def apply(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype)).dtype) if id(tensor) in stay else fn(tensor)

        return super()._apply(apply, recurse)

    def train(self, mode: bool = True) -> PolicyAndReference:
        """Puts the policy into train or eval mode. A frozen reference stays in eval mode."""
        super().train(mode)
        if self._freeze and self.reference is not None:
            self.reference.eval()
        return self

    # -----------------------------------------------------------------------------------------------------------

    def _run(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        sequences: Sequences,
        whole: Sequences | None = None,
        *,
        alone: bool = False,
        temperature: float | None = None,
        backend: Backend | None = None,
        group: ProcessGroup | None = None,
    ) -> tuple[SequenceStatistics, Tensor | None]:
        layout = self._layout(policy, sequences, whole, group)
        of_policy = outputs_of(policy, layout)
        if layout.packing == "segments" and any(getattr(m, "gradient_checkpointing", False) for m in policy.modules()):
            for tensor in (of_policy.hidden, of_policy.logits, of_policy.auxiliary_loss):
                if tensor is not None and tensor.requires_grad:
                    attention.use_packed_attention_in_backward(inner(policy), tensor)
        device = layout.labels.device
        if alone or self.reference_kind == "policy":
            of_reference = of_policy.detach()
        elif self._recorded is not None:
            of_reference = self._recorded.outputs(sequences, device)
        else:
            of_reference = self._reference_outputs(policy, reference, sequences, layout, group).to(device)
        statistics = completion_statistics(
            of_policy,
            of_reference,
            layout.labels,
            layout.cu_labels,
            temperature=self.temperature if temperature is None else temperature,
            backend=backend or self.backend,
        )
        if reference is not None and self._freeze:  # the statistics' backward pass may read its output layer
            free_whole_weights(reference, of_policy.hidden)
        return statistics if group is None else over_group(statistics, group), of_policy.auxiliary_loss

    def _reference_outputs(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        sequences: Sequences,
        layout: Layout | None = None,
        group: ProcessGroup | None = None,
    ) -> Outputs:
        """What the reference answers. `layout`: the policy's, which also suits the policy without its adapter."""
        if reference is None:
            with adapter_off(policy, self.adapter):
                return outputs_of(policy, layout or self._layout(policy, sequences))
        with evaluating(reference):
            own = self._layout(reference, sequences, group=group)
            if group is not None and layout is not None:
                rows = [value.inputs["attention_mask"][..., 0].sum() for value in (layout, own)]  # on the CPU
                if rows[0] != rows[1]:
                    raise ValueError(
                        "Expected a policy and a reference that both take shared prompts with `context_parallel_size`, "
                        "so that a process has the same tokens of both, but one of them does not. Pass "
                        "`share_prompts=False`."
                    )
            return outputs_of(reference, own)

    def _layout(
        self,
        model: nn.Module,
        sequences: Sequences,
        whole: Sequences | None = None,
        group: ProcessGroup | None = None,
    ) -> Layout:
        options = {"padding_free": self.padding_free, "share": self.share_prompts}
        return layout_of(model, sequences, **options, batch=whole, group=group)


def completion_statistics(
    policy: Outputs,
    reference: Outputs,
    labels: Tensor,
    cu_labels: Tensor,
    *,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> SequenceStatistics:
    """The statistics of every completion, [sequences].

    Args:
        policy: What the policy answers at the completion tokens.
        reference: What the reference answers at the same tokens.
        labels: [completion tokens] int64, those tokens.
        cu_labels: [sequences + 1] int64, where each sequence's tokens begin and end.
        temperature: Divides both models' logits.
        backend: Of the operators.
    """
    one, other = policy.layer, reference.layer
    sliced = [layer is not None and layer.process_group is not None for layer in (one, other)]
    if policy.hidden is None or reference.hidden is None or sliced[0] != sliced[1]:
        return sequence_statistics(
            _logits(policy),
            _logits(reference),
            labels,
            cu_seqlens=cu_labels,
            temperature=temperature,
            backend=backend,
        )
    assert one is not None
    assert other is not None
    group, one, other = one.process_group, one.local(), other.local()
    return linear_sequence_statistics(
        policy.hidden,
        one.weight,
        reference.hidden,
        other.weight,
        labels,
        policy_bias=one.bias,
        reference_bias=other.bias,
        softcap=(one.softcap, other.softcap),
        scale=(one.scale, other.scale),
        ignore_index=None,  # a layout has the labels of completion tokens alone
        cu_seqlens=cu_labels,
        temperature=temperature,
        process_group=group,
        backend=backend,
    )


def _logits(outputs: Outputs) -> Tensor:
    if outputs.hidden is None:
        assert outputs.logits is not None
        return outputs.logits
    assert outputs.layer is not None
    return outputs.layer.logits(outputs.hidden)


def _portions(sequences: Sequences, policy: nn.Module, max_logits_bytes: int) -> list[Sequences]:
    """The sequences in portions whose completions' logits take at most `max_logits_bytes`, or of one sequence."""
    token = 2 * 4 * getattr(text_config(policy), "vocab_size", 1)  # two models, float32 at the most
    limit = max_logits_bytes // token
    portions: list[list[int]] = [[]]
    tokens = 0
    for index in range(sequences.num_sequences):
        completion = int((sequences.labels[sequences.slice(index)] != IGNORE_INDEX).sum())
        if portions[-1] and tokens + completion > limit:
            portions.append([])
            tokens = 0
        portions[-1].append(index)
        tokens += completion
    return [sequences.select(portion) for portion in portions]


def _most(number: int, policy: nn.Module, reference: nn.Module | None) -> int:
    """The largest `number` of all processes if a model is sharded, else `number`."""
    sharded = any(is_sharded(model) for model in (policy, reference) if model is not None)
    if not sharded or not torch.distributed.is_initialized():
        return number
    most = torch.tensor(number, device=device_of(policy))
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
