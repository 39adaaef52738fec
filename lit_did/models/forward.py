"""The outputs of a language model at completion tokens: last hidden states with the output layer, or logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from lit_did.batches.layout import Layout
from lit_did.batches.moving import to_device
from lit_did.models import attention
from lit_did.models.sharding import is_sharded, outermost, own_class
from lit_did.models.wrappers import compiled_like, inner, unwrapped


class OutputLayer(NamedTuple):
    """logits = scale (hidden weight^T + bias). With a softcap, logits are softcap tanh(logits / softcap)."""

    weight: Tensor
    """[V, H]. Under tensor parallelism a DTensor: each process has a slice of the vocabulary."""
    bias: Tensor | None
    """[V]"""
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of last hidden states [..., H]."""
        if self.process_group is not None:
            assert isinstance(self.weight, DTensor)
            hidden = DTensor.from_local(hidden, self.weight.device_mesh, [Replicate()], run_check=False)
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that each have a slice of the vocabulary. None: this one has all of it."""
        return self.weight.device_mesh.get_group() if isinstance(self.weight, DTensor) else None

    def local(self) -> OutputLayer:
        """What this process has of the layer."""
        local: dict[str, Any] = {n: v.to_local() for n, v in self._asdict().items() if isinstance(v, DTensor)}
        return self._replace(**local)


class Outputs(NamedTuple):
    """One model's outputs at completion tokens: last hidden states and the output layer, or else logits."""

    hidden: Tensor | None
    """[completion tokens, H]"""
    layer: OutputLayer | None
    logits: Tensor | None
    """[completion tokens, V]"""
    auxiliary_loss: Tensor | None = None
    """The load-balancing loss of a mixture of experts times its coefficient, if the configuration asks for it."""

    def to(self, device: torch.device) -> Outputs:
        """The same, on `device`."""
        return self._each(lambda tensor: to_device(tensor, device))

    def detach(self) -> Outputs:
        """The same, without gradients."""
        return self._each(Tensor.detach)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        def each(value: Any) -> Any:
            if isinstance(value, OutputLayer):
                return OutputLayer(*map(each, value))
            return function(value) if isinstance(value, Tensor) else value

        return Outputs(*map(each, self))


def completion_outputs(model: nn.Module, layout: Layout, body: nn.Module | None) -> Outputs:
    """The outputs of `model` at the completion tokens of `layout`.

    Args:
        model: A causal language model.
        layout: A layout that the model takes, see `lit_did.models.trial.layout_of`.
        body: The model without its output layer, see `find_body`. None: the outputs are logits.

    Raises:
        TypeError: The model is not a causal language model.
    """
    if body is not None:
        return Outputs(completion_hidden(model, layout, body), output_layer(model), None)
    logits, auxiliary = completion_logits(model, layout)
    return Outputs(None, None, logits, auxiliary)


def completion_hidden(model: nn.Module, layout: Layout, body: nn.Module) -> Tensor:
    """The last hidden states [completion tokens, H] that predict the completion tokens."""
    parameters = inspect.signature(unwrapped(body).forward).parameters
    options = {"use_cache": False} if "use_cache" in parameters else {}
    run = _inside(model, body) if is_sharded(model) else body
    with attention_for(model, layout):
        states = [
            run(**inputs, **options).last_hidden_state.flatten(0, 1)[rows]
            for inputs, rows in _passes(layout, _forgetting(run, layout, options))
        ]
    return states[0] if len(states) == 1 else torch.cat(states)


def _inside(model: nn.Module, body: nn.Module) -> Callable[..., Any]:
    """A function that runs a sharded model's own forward pass, and returns what `body` returned in it.

    FSDP gathers weights in the forward pass of the whole model only. The output layer runs on one position.
    """

    def run(**inputs: Any) -> Any:
        returned: list[Any] = []
        handle = body.register_forward_hook(lambda module, arguments, output: returned.append(output))
        try:
            outermost(model)(**inputs, logits_to_keep=1)
        finally:
            handle.remove()
        return returned[0]

    return run


def completion_logits(model: nn.Module, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The logits [completion tokens, V] of the model's own forward pass, and its auxiliary loss.

    A model that takes `logits_to_keep` skips the output layer at positions that predict no completion token.
    """
    parameters, name = inspect.signature(inner(model).forward).parameters, type(inner(model)).__name__
    options = {"use_cache": False} if "use_cache" in parameters else {}
    takes = "input_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"Expected a causal language model that takes `input_ids`, but got {type(inner(model)).__name__}."
        )
    results, auxiliary = [], []
    run = outermost(model)
    with attention_for(model, layout):
        for inputs, rows in _passes(layout, _forgetting(run, layout, options)):
            length, kept = inputs["input_ids"].shape[1], None
            if "logits_to_keep" in parameters:
                kept, column = torch.unique(rows % length, return_inverse=True)
            output = run(**inputs, **options, **({} if kept is None else {"logits_to_keep": kept}))
            logits = getattr(output, "logits", None)
            shape = (len(inputs["input_ids"]), length if kept is None else len(kept))
            if not isinstance(logits, Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != shape:
                got = f"`logits` of the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no `logits`"
                raise TypeError(
                    "Expected a causal language model that returns `logits` [sequences, T, V], but "
                    f"{name} returned {got}."
                )
            results.append(logits.flatten(0, 1)[rows] if kept is None else logits[rows // length, column])
            if adds_auxiliary_loss(model):
                auxiliary.append(output.aux_loss * _auxiliary_coefficient(model) * inputs["input_ids"].numel())
    total = layout.inputs["input_ids"].numel() if layout.kind != "alone" else layout.inputs["attention_mask"].sum()
    return torch.cat(results), torch.stack(auxiliary).sum() / total if auxiliary else None


def output_layer(model: nn.Module) -> OutputLayer:
    """The layer that turns last hidden states into logits. Of a sharded model, after its forward pass.

    Raises:
        TypeError: FSDP has not kept the weight whole after the forward pass.
    """
    layer, config = inner(model).get_output_embeddings(), text_config(model)
    if isinstance(layer.weight, DTensor):
        slices = layer.weight.device_mesh.mesh_dim_names == ("tp",) and layer.weight.placements[0].is_shard(0)
        if not slices:
            raise TypeError(
                "Expected FSDP to keep the weight of the output layer whole after a forward pass, but it has freed "
                "it. Use reshard_after_forward=False for it."
            )
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere's
        scale *= config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite's
        scale /= config.logits_scaling
    return OutputLayer(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def find_body(model: nn.Module) -> nn.Module | None:
    """The model without its output layer, if the output layer is a plain linear one. Otherwise None.

    The logits may still not be the layer's outputs for the last hidden states. A trial finds that out, see
    `lit_did.models.trial`.
    """
    base = inner(model)
    body = getattr(base, getattr(base, "base_model_prefix", None) or "", None)
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if body is None or layer is None or own_class(layer) is not nn.Linear:
        return None  # a subclass has an adapter or a quantised weight, which would be left out
    if type(layer.weight) not in (nn.Parameter, Tensor, DTensor, FakeTensor):
        return None
    if layer.weight.dim() != 2 or adds_auxiliary_loss(model):  # only the model's own forward pass does what is needed
        return None
    sharded = is_sharded(model)  # which puts hooks on the layer, and needs a forward pass of the whole model
    if sharded and "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    if not sharded and (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)):
        return None
    known = {id(parameter) for part in (body, layer) for parameter in part.parameters()}
    if any(parameter.requires_grad and id(parameter) not in known for parameter in base.parameters()):
        return None  # such as a factor of the logits that is 1 until it is trained
    return body if sharded else compiled_like(model, body)


def adds_auxiliary_loss(model: nn.Module) -> bool:
    """Whether `model` is a mixture of experts whose configuration asks for the load-balancing loss."""
    return bool(getattr(text_config(model), "output_router_logits", False)) and bool(_auxiliary_coefficient(model))


def _auxiliary_coefficient(model: nn.Module) -> float:
    return getattr(inner(model), "router_aux_loss_coef", getattr(text_config(model), "router_aux_loss_coef", 0.0))


def attention_for(model: nn.Module, layout: Layout) -> AbstractContextManager:
    """Switches `model` to the attention that `layout` needs, while it runs."""
    packed = layout.packing == "segments"
    stack = ExitStack()
    if packed:
        stack.enter_context(attention.running(layout.inputs["attention_mask"]))
    if packed != attention.uses_packed_attention(inner(model)):
        stack.enter_context(attention.packed_attention(inner(model), packed))
    return stack


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, which is a part of the configuration of a model for text and images.

    None: the model has no configuration.
    """
    config: Any = getattr(inner(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def num_embeddings(model: nn.Module) -> int | None:
    """The number of the model's input embeddings: its vocabulary, perhaps padded. None: it cannot be read."""
    embeddings = input_embeddings(model)
    weight = getattr(embeddings, "weight", None)
    rows = None if weight is None or weight.dim() != 2 else weight.shape[0]
    return getattr(embeddings, "num_embeddings", rows)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's input embeddings. None: the model has no method that returns them."""
    base = inner(model)
    return base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None


def num_positions(model: nn.Module) -> float:
    """The number of positions in the configuration. Infinity: the configuration does not limit them."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else float("inf")


def _forgetting(run: Callable[..., Any], layout: Layout, options: dict[str, Any]) -> Callable[[], None]:
    """A function that makes the model forget the previous row, by a forward pass over one token."""

    def reset() -> None:
        if layout.forgets:
            with torch.no_grad():
                run(**{name: value[:1, :1] for name, value in layout.inputs.items()}, **options)

    return reset


def _passes(layout: Layout, reset: Callable[[], None]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The arguments of every forward pass, and the positions in [rows * T] of its outputs that are needed."""
    if layout.kind != "alone":
        yield layout.inputs, layout.rows
        return
    lengths, bounds = layout.inputs["attention_mask"].sum(1).tolist(), layout.cu_labels.tolist()
    width = layout.inputs["input_ids"].shape[1]
    for row, length in enumerate(lengths):
        reset()
        inputs = {name: value[row : row + 1, :length] for name, value in layout.inputs.items()}
        yield inputs, layout.rows[bounds[row] : bounds[row + 1]] - row * width
