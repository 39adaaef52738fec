"""Attention within the segments of a packed row: in one call of a kernel, or one segment at a time.

transformers' own masks for packed rows are [tokens, tokens], and masked entries cost as much as others. Here each
segment (see `lit_did.batches.layout`) attends to itself and to the segment that it continues, so the cost is that of
the sequences. `lit_did.models.varlen` (flash attention) or `lit_did.models.flex` (flex attention) does this in one
call, where it can. Otherwise torch's or the model's own attention takes one segment at a time. The functions are
registered with transformers' `AttentionInterface` under their own names, and `model.set_attn_implementation` selects
them. Without segments they do what the model's own attention does.

`lit_did.models.trial` decides whether a model may use them: it compares the results with the unchanged model's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

from lit_did.batches.layout import Packing
from lit_did.models import flex, varlen
from lit_did.models.context_parallel import context_group, exchange

OF_MODELS = (*varlen.FLASH, flex.FLEX)  # kernels that a model may have itself
SUPPORTED = ("sdpa", "eager", *OF_MODELS)
PREFIX = "lit_did_"
BLOCK = 1024  # queries that attend with one mask, so that masks grow with the number of tokens, not with its square
ALIGNED = 16  # kernels on GPUs copy masks that begin elsewhere
_OF_FEW_MODELS = ("softcap", "position_bias", "is_causal", "cache")  # other arguments of transformers' sdpa
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the segments of a batch: the masks that all layers share. They are freed with the batch."""
_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the segments of a batch: what a kernel needs to know, `varlen.Lengths` or `flex.BlockMasks`."""
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the segments of a batch: their lengths and what they continue."""
_copied: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By a copy of segments that FSDP made on the device: the segments. Reading the copy would wait for the device."""
_running: list[Tensor] = []  # the segments that models are given at the moment, the innermost last


def implementation(model: nn.Module) -> str | None:
    """The name that transformers gives to the attention of `model`."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if name is None else _own(name)


def own_kernel(model: nn.Module) -> str | None:
    """The kernel that `model` has itself: a version of flash attention, which has no other way, or flex attention."""
    name = implementation(model)
    return name if name in OF_MODELS else None


def kernels(model: nn.Module, device: torch.device) -> tuple[str, ...]:
    """The kernels that may attend to all segments of a row in one call in place of the attention of `model`.

    The fastest comes first. A trial may find that it fails.
    """
    name = implementation(model)
    if device.type not in varlen.DEVICES or name not in ("sdpa", "eager"):
        return ()
    return (*(varlen.kernels(device) if name == "sdpa" else ()), flex.FLEX)


def without_flash(model: nn.Module, device: torch.device) -> str:
    """Why flash attention is not among `kernels`, and what to do."""
    name = implementation(model)
    if name != "sdpa":
        return (
            f"attention {name!r} is the model's own. Use model_kwargs={{'attn_implementation': 'sdpa'}}, or "
            "'flash_attention_2', which knows softcaps."
        )
    return varlen.without_kernels(device)


def prepare(segments: Tensor, device: torch.device, kernel: str) -> None:
    """Makes layers attend to all of these segments in one call of `kernel`.

    Args:
        segments: [1, 1, segments, 2] int64 on the CPU, see `lit_did.batches.layout.packed_layout`.
        device: Where the model is.
        kernel: One of `kernels`, or the `own_kernel` of the model.
    """
    of_flex = kernel == flex.FLEX
    _prepared[segments] = flex.BlockMasks(segments, device) if of_flex else varlen.lengths(segments, device, kernel)


def refused(segments: Tensor) -> str | None:
    """Why a layer did not attend to all of these segments in one call, as it should have. None: it did."""
    prepared = _prepared.get(segments)
    return None if prepared is None else prepared.refused


def packings(model: nn.Module) -> tuple[Packing, ...]:
    """The ways in which a model of transformers may keep the sequences of a packed row apart, the fastest first.

    "segments": its `attention_mask` holds the segments. "positions": `position_ids` restart with every sequence, as
    flash attention needs it.
    """
    takes = getattr(model, "_supports_attention_backend", False) and implementation(model) in SUPPORTED
    return ("segments", "positions") if takes else ("positions",)


def use_packed_attention(model: nn.Module) -> None:
    """Makes a model of transformers take segments as its `attention_mask`."""
    _register()
    _rename(model, _ours)


def use_own_attention(model: nn.Module) -> None:
    """Undoes `use_packed_attention`."""
    _rename(model, _own)


def uses_packed_attention(model: nn.Module) -> bool:
    """Whether `use_packed_attention` is in effect."""
    return (getattr(getattr(model, "config", None), "_attn_implementation", None) or "").startswith(PREFIX)


def _ours(name: str) -> str:
    """The name of the attention by segments. transformers looks for a package if a name has "flash" in it."""
    return PREFIX + name.replace("flash", "varlen") if name in SUPPORTED else name


def _own(name: str) -> str:
    """The name of the model's own attention."""
    return name.removeprefix(PREFIX).replace("varlen", "flash") if name.startswith(PREFIX) else name


@contextmanager
def packed_attention(model: nn.Module, packed: bool = True) -> Iterator[None]:
    """`use_packed_attention` within a block, or `use_own_attention` if `packed` is False.

    With gradient checkpointing, the backward pass needs it too, see `use_packed_attention_in_backward`.
    """
    before = uses_packed_attention(model)
    try:
        (use_packed_attention if packed else use_own_attention)(model)
        yield
    finally:
        (use_packed_attention if before else use_own_attention)(model)


@contextmanager
def running(segments: Tensor) -> Iterator[None]:
    """Within this block, models are given these segments, or copies of them on a device."""
    _running.append(segments)
    try:
        yield
    finally:
        _running.pop()


def _laid_out(given: Tensor) -> Tensor:
    """The segments on the CPU that a layer is given, perhaps as a copy on the device."""
    if given.device.type == "cpu":
        return given
    if given not in _copied:
        _copied[given] = next((own for own in reversed(_running) if own.shape == given.shape), None)
    return given if _copied[given] is None else _copied[given]


@torch.compiler.disable  # hooks
def use_packed_attention_in_backward(model: nn.Module, output: Tensor) -> None:
    """Makes `model` use packed attention in backward passes through `output`, which is a result of it.

    With gradient checkpointing they run layers of the model again. Afterwards the model has its own attention.
    """
    engine = torch.autograd.Variable._execution_engine

    def during_backward(gradient: Tensor) -> None:
        engine.queue_callback(lambda: use_own_attention(model))  # at the end
        use_packed_attention(model)

    output.register_hook(during_backward)


def _rename(model: nn.Module, rename: Callable[[str], str]) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) is None:
        return
    names = _names(config, rename)
    if names != _names(config, lambda name: name):
        transformers_model: Any = model
        transformers_model.set_attn_implementation(names)


def _names(config: Any, rename: Callable[[str], str]) -> dict[str, Any]:
    """The attention of a configuration and its sub-configurations, as `set_attn_implementation` takes it."""
    within = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {}}
    own = getattr(config, "_attn_implementation", None)
    named = {key: _names(sub, rename) for key, sub in within.items() if sub is not None}
    return named if own is None else {"": rename(own), **named}


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for name in SUPPORTED:
        AttentionInterface.register(_ours(name), _by_segments(name))
        AttentionMaskInterface.register(_ours(name), ALL_MASK_ATTENTION_FUNCTIONS[name])


def _by_segments(name: str) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        kind: Any = type(module)
        inner = _eager(kind) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.int64:
            return inner(module, query, key, value, attention_mask, **kwargs)
        # On other devices some sdpa kernels do not take expanded views.
        if name == "sdpa" and query.device.type == "cpu" and all(kwargs.get(x) is None for x in _OF_FEW_MODELS):
            inner = _sdpa
        return _attend(inner, name, module, query, key, value, attention_mask, **kwargs)

    return attend


@lru_cache(maxsize=64)
def _eager(kind: type[nn.Module]) -> Callable:
    """The eager attention of a class of modules: `eager_attention_forward` in the file of the class or of a base."""
    for base in inspect.getmro(kind):
        found = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise TypeError(
        f"Expected the file of {kind.__name__} to define eager_attention_forward, but {kind.__module__} does not."
    )


@torch.compiler.disable  # lengths differ with every batch
def _attend(
    inner: Callable,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim]. `inner`: the attention `name`, for one segment at a time."""
    segments = _laid_out(segments)
    if segments not in _read:
        with unset_fake_temporarily():  # they have values, also where all other tensors are fake
            _read[segments] = segments[0, 0].T.tolist()
    processes = sum(_read[segments][0]) // query.shape[2]
    if processes > 1:  # they share the row, see `lit_did.models.context_parallel`
        query, key, value = exchange(context_group(processes), True, query, key, value)
    prepared, refused = _prepared.get(segments), None
    if prepared is not None and name not in OF_MODELS:
        others = [argument for argument in (*_OF_FEW_MODELS, "s_aux") if kwargs.get(argument) is not None]
        dropout = kwargs.get("dropout", 0.0)
        if prepared.kernel == flex.FLEX:
            refused = flex.refusal(dropout, others)
        else:
            refused = varlen.refusal(prepared.kernel, query, value, dropout, others)
        prepared.refused = prepared.refused or refused
    if prepared is None or refused is not None:
        output = _by_turns(inner, name == "eager", module, query, key, value, segments, **kwargs)
    elif prepared.kernel == flex.FLEX:
        query, key, value = (x.to(varlen.dtype_of(query)) for x in (query, key, value))
        output = flex.attend(query, key, value, prepared, **kwargs)
    else:
        output = varlen.attend(query, key, value, prepared, **kwargs)
    if processes > 1:
        (own,) = exchange(context_group(processes), False, output.transpose(1, 2))
        output = own.transpose(1, 2)
    return output, None


def _by_turns(
    inner: Callable,
    explicit: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """One segment at a time, or a part of it. `explicit`: `inner` needs a mask even if it is causal."""
    lengths, continues = _read[segments]
    masks: dict[tuple, Tensor] = _masks.setdefault(segments, {})
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, before in enumerate(continues):
        k, v = keys[i], values[i]
        if before >= 0:
            k, v = torch.cat([keys[before], k], dim=2), torch.cat([values[before], v], dim=2)
        near = sliding_window is None or k.shape[2] <= sliding_window
        if not explicit and before < 0 and near:  # causal: no mask
            outputs.append(inner(module, queries[i], k, v, None, sliding_window=sliding_window, **kwargs)[0])
            continue
        given = min(lengths[i], BLOCK), k.shape[2], None if near else sliding_window, query.dtype, query.device
        if given not in masks:
            masks[given] = _mask(*given)
        stop = k.shape[2] - lengths[i]
        whole, rest = divmod(lengths[i], BLOCK)
        for block in queries[i].split([rest] * (rest > 0) + [BLOCK] * whole, dim=2):
            stop += block.shape[2]
            first = 0 if near else max(0, stop - block.shape[2] - sliding_window + 1) // ALIGNED * ALIGNED
            mask = masks[given][..., -block.shape[2] :, first - stop :]
            seen = k[:, :, first:stop], v[:, :, first:stop]
            outputs.append(inner(module, block, *seen, mask, sliding_window=sliding_window, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward` for one sequence.

    Query heads are [key heads, query heads for each key head]. Keys and values are expanded views, so that they are not
    copied for every query head.
    """
    heads = key.shape[1]
    keys, values = (x[0][:, None].expand(-1, query.shape[1] // heads, -1, -1) for x in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query[0].unflatten(0, (heads, -1)),
        keys,
        values,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None,
    )
    return output.flatten(0, 1).transpose(0, 1)[None], None


def _mask(queries: int, keys: int, sliding_window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, queries, keys]: 0 where a query attends, else the least of `dtype`. Queries are the last positions."""
    query, key = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    hidden = query < key  # bool: a difference would be int64, eight times as large
    if sliding_window is not None:
        hidden |= query - sliding_window >= key
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]
