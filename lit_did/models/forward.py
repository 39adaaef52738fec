"""What the output layer of a language model is given at completion tokens, and the layer: no logits, no padding.

What a model allows is found out once, by trying it on a handful of tokens: whether sequences may lie end to end, and
whether its logits are a linear layer's of its last hidden states. Where not, it is padded, and asked for its logits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lit_did.models import attention
from lit_did.models.layout import SHORTEST_SHARED, Layout, Sequences, packed_layout, padded_layout
from lit_did.models.loading import is_peft
from lit_did.models.quiet import evaluating, random_numbers_kept
from lit_did.models.recompute import elementwise_recomputed


class OutputLayer(NamedTuple):
    """logits = scale (hidden weight^T + bias), and with a softcap: softcap tanh(logits / softcap)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of `hidden` [..., H]."""
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Abilities(NamedTuple):
    """What a model allows."""

    packing: str | None
    """How sequences may lie end to end: "segments" (`lit_did.models.attention`), "blocks" (flex attention's form of
    them), "positions" (the model tells them apart by `position_ids` that restart, as with flash attention); None: they
    may not"""
    body: Callable | None
    """The model without its output layer; None: its logits are no linear layer's of last hidden states at hand."""


@torch.compiler.disable
def layout_of(model: nn.Module, sequences: Sequences, *, pack: bool = True, share: bool = True) -> Layout:
    """The sequences as `model` takes them best, on its device.

    Args:
        pack: End to end, if the model can.
        share: What pairs begin with in common once, if the model can.
    """
    device = next(model.parameters()).device
    packing = abilities(model).packing if pack else None
    if packing is None or (packing == "positions" and not sequences.counts):
        return padded_layout(sequences, device)
    return _packed(sequences, device, packing, share)


def completion_hidden(
    model: nn.Module, layout: Layout, *, recompute: bool = False, kept_bytes: int = 0
) -> Tensor | None:
    """The last hidden states [completion tokens, H] that predict each; None where `model` has none at hand.

    Args:
        recompute: Elementwise results are computed again in the backward pass (`lit_did.models.recompute`), unless the
            model is compiled, whose compiler decides on that; `kept_bytes` of them are not.
    """
    body = abilities(model).body
    if body is None:
        return None
    compiled = torch.compiler.is_compiling() or not isinstance(body, nn.Module) or hasattr(body, "_orig_mod")
    recompute = recompute and torch.is_grad_enabled() and not compiled
    with elementwise_recomputed(kept_bytes) if recompute else nullcontext():
        hidden = _hidden(body, layout)
    return hidden.flatten(0, 1)[layout.rows]


def completion_logits(model: nn.Module, layout: Layout) -> Tensor:
    """The logits [completion tokens, V] that predict each, from the model's own forward pass.

    Models that can, skip the output layer where no sequence has a completion token.
    """
    parameters = inspect.signature(_inner(model).forward).parameters
    length = layout.inputs["input_ids"].shape[1]
    arguments = {"use_cache": False} if "use_cache" in parameters else {}
    takes = "input_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(f"Expected a causal language model, which takes `input_ids`, but got {type(model).__name__}.")
    if "logits_to_keep" in parameters:
        kept, column = torch.unique(layout.rows % length, return_inverse=True)
        arguments["logits_to_keep"] = kept
    logits = getattr(model(**layout.inputs, **arguments), "logits", None)
    if logits is None:
        raise TypeError(f"Expected a causal language model, which returns `logits`, but got {type(model).__name__}.")
    if "logits_to_keep" in parameters:
        return logits[layout.rows // length, column]
    return logits.flatten(0, 1)[layout.rows]


def output_layer(model: nn.Module) -> OutputLayer:
    """The layer that turns what `completion_hidden` returns into logits."""
    layer, config = _inner(model).get_output_embeddings(), _inner(model).config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere's
        scale *= config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite's
        scale /= config.logits_scaling
    return OutputLayer(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


# ---------------------------------------------------------------------------------------------------------------
# What a model allows
# ---------------------------------------------------------------------------------------------------------------

_abilities: WeakKeyDictionary[nn.Module, Abilities] = WeakKeyDictionary()


@torch.compiler.disable
def abilities(model: nn.Module) -> Abilities:
    """What `model` allows, tried once. A warning names what it does not."""
    if model not in _abilities:
        with random_numbers_kept(next(model.parameters()).device), evaluating(model):
            _abilities[model] = _try(model)
    return _abilities[model]


def _try(model: nn.Module) -> Abilities:
    parameter = next(model.parameters())
    half = parameter.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(parameter.device.type)
    tolerance = 2e-2 if half else 1e-4  # far above rounding, and below what another sequence's tokens change

    def agree(logits: Tensor, expected: Tensor) -> bool:
        logits, expected = logits.float(), expected.float()
        scale = expected.abs().nan_to_num(0).max().item()
        return torch.allclose(logits, expected, rtol=0, atol=tolerance * scale, equal_nan=True)

    sequences = _trial(model)
    alone = [padded_layout(sequences.select([i]), parameter.device) for i in range(sequences.count)]
    expected = torch.cat([completion_logits(model, layout) for layout in alone])
    name = type(_inner(model)).__name__
    body = _find_body(model)
    if body is None or not agree(
        output_layer(model).logits(torch.cat([_hidden(body, one)[0] for one in alone])), expected
    ):
        body = None
        warnings.warn(
            f"The logits of {name} are no linear layer's of last hidden states at hand: those of all completion tokens "
            "are held in memory.",
            stacklevel=5,
        )
    packing = _find_packing(model, sequences, lambda logits: agree(logits, expected))
    if packing is None:
        warnings.warn(
            f"{name} does not take sequences end to end, with its attention "
            f"{attention.implementation(_inner(model))!r}: they are padded.",
            stacklevel=5,
        )
    return Abilities(packing, body)


def _find_packing(model: nn.Module, sequences: Sequences, is_right: Callable[[Tensor], bool]) -> str | None:
    if "position_ids" not in inspect.signature(_inner(model).forward).parameters:
        return None
    device = next(model.parameters()).device
    packing = attention.packing(_inner(model))
    layouts = [_packed(sequences, device, packing, share) for share in (False, True)]
    try:
        with attention.packed_attention(_inner(model)):
            return packing if all(is_right(completion_logits(model, layout)) for layout in layouts) else None
    except Exception:  # of somebody's model that was given what it does not know
        return None


def _find_body(model: nn.Module) -> Callable | None:
    inner = _inner(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", None) or "", None)
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    # No subclass: an adapter or a quantised weight would be passed by. No shards: they are whole inside a forward pass.
    plain = type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and layer.weight.dim() == 2
    if body is None or not plain or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    if _is_sharded(model, layer):  # the model's own forward gathers what the layer needs
        return None
    known = {id(parameter) for part in (body, layer) for parameter in part.parameters()}
    if any(parameter.requires_grad and id(parameter) not in known for parameter in inner.parameters()):
        return None  # such as a factor of the logits that is 1 until it is trained
    if hasattr(model, "dynamo_ctx"):  # of torch.compile(model, ...): what it was given
        return model.dynamo_ctx(body)
    return body if model._compiled_call_impl is None and inner._compiled_call_impl is None else torch.compile(body)


def _is_sharded(model: nn.Module, layer: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` manages the layer; between passes its weight may look whole."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) and layer in part.modules() for part in model.modules())


def _hidden(body: Callable, layout: Layout) -> Tensor:
    parameters = inspect.signature(getattr(body, "_orig_mod", body).forward).parameters
    return body(**layout.inputs, **({"use_cache": False} if "use_cache" in parameters else {})).last_hidden_state


def _trial(model: nn.Module) -> Sequences:
    """Two sequences with a beginning in common, every token labelled."""
    size = _inner(model).get_input_embeddings().num_embeddings if hasattr(model, "get_input_embeddings") else 2
    common = SHORTEST_SHARED
    ids = [np.arange(common + rest) * step % size for rest, step in ((4, 1), (2, 1))]
    ids[1][common:] = ids[1][common:][::-1] * 3 % size
    positions = np.concatenate([np.arange(len(i)) for i in ids])
    flat = np.concatenate(ids)
    return Sequences(flat, positions, flat, np.array([0, len(ids[0]), len(flat)]))


def _packed(sequences: Sequences, device: torch.device, packing: str, share: bool) -> Layout:
    layout = packed_layout(sequences, device, share=share and packing != "positions")
    if packing == "segments":
        return layout
    mask = attention.block_mask(layout.inputs["attention_mask"], device) if packing == "blocks" else None
    return layout._replace(inputs={**layout.inputs, "attention_mask": mask})


def _inner(model: nn.Module) -> nn.Module:
    """The model of transformers inside what compiles or adapts it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if is_peft(model) else model
