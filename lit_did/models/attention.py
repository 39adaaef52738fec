"""Attention that stays inside each segment of a packed batch: PyTorch's or a model's own, a segment at a time.

transformers' own masks for packed batches are [tokens, tokens], and what they mask is computed all the same. Here every
segment (`lit_did.models.layout`) attends to itself and to the segment that it continues, so that the work is that of
the sequences alone. A model's configuration names the attention that it uses; `use_packed_attention` names ours in its
place, which does what the model's did wherever it is not given segments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

SERVED = ("sdpa", "eager")
PREFIX = "lit_did_"
_OF_FEW_MODELS = ("softcap", "position_bias", "is_causal", "cache")  # what transformers' sdpa takes besides


def implementation(model: nn.Module) -> str | None:
    """The attention that `model` uses, as transformers names it."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if name is None else name.removeprefix(PREFIX)


def packing(model: nn.Module) -> str:
    """How `model`, of transformers, can be expected to keep sequences apart; `lit_did.models.forward` tries it.

    "segments": it takes them as its `attention_mask`; "blocks": what `block_mask` makes of them; "positions": neither.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_attention_backend", False):
        return "positions"
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if implementation(model) == "flex_attention":
        return "blocks" if kinds == {"full_attention"} and window is None else "positions"
    # A window is in the mask, which ours replaces; the models that flash attention knows give it as an argument too.
    told = window is None or getattr(model, "_supports_flash_attn", False)
    ours = implementation(model) in SERVED and kinds <= {"full_attention", "sliding_attention"} and told
    return "segments" if ours else "positions"


def block_mask(segments: Tensor, device: torch.device) -> Any:
    """The segments as flex attention wants them: a `BlockMask` that skips the blocks between them."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths, continues = segments[0, 0].T
    of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    before = continues[of_token].to(device)
    of_token = of_token.to(device)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((of_token[query] == of_token[key]) | (before[query] == of_token[key]))

    return create_block_mask(attends, None, None, len(of_token), len(of_token), device=device)


def use_packed_attention(model: nn.Module) -> None:
    """Lets `model` take segments as its `attention_mask`, if `packing` says so; with any other it does what it did."""
    for config in _configs(model):
        name = config._attn_implementation.removeprefix(PREFIX)  # a model from another process may name ours already
        if name in SERVED:
            _register()
            config._attn_implementation_internal = PREFIX + name


def use_own_attention(model: nn.Module) -> None:
    """Undoes `use_packed_attention`."""
    for config in _configs(model):
        config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


@contextmanager
def packed_attention(*models: nn.Module) -> Iterator[None]:
    """`use_packed_attention` for a while: not enough where activations are recomputed in a later backward pass."""
    before = [(config, config._attn_implementation) for model in models for config in _configs(model)]
    try:
        for model in models:
            use_packed_attention(model)
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that attention modules read, once each."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in SERVED:
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, _by_segments(name))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _by_segments(name: str) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if name == "eager":  # a function of its own in every model's file
            inner = sys.modules[type(module).__module__].eager_attention_forward
        else:
            inner = ALL_ATTENTION_FUNCTIONS[name]
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return inner(module, query, key, value, attention_mask, **kwargs)
        # Elsewhere not every kernel of sdpa takes expanded views.
        if name == "sdpa" and query.device.type == "cpu" and all(kwargs.get(x) is None for x in _OF_FEW_MODELS):
            inner = _sdpa
        return _attend_by_segments(inner, name == "eager", module, query, key, value, attention_mask, **kwargs)

    return attend


@torch.compiler.disable  # its lengths differ with every batch
def _attend_by_segments(
    inner: Callable,
    explicit: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim]. `explicit`: `inner` wants a mask where it is causal too."""
    lengths, continues = segments[0, 0].T.tolist()
    # With the segments, so that all layers share them, and that they go when the batch goes.
    masks: dict[tuple, Tensor] = segments.__dict__.setdefault("masks", {})
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, before in enumerate(continues):
        k, v = keys[i], values[i]
        if before >= 0:
            k, v = torch.cat([keys[before], k], dim=2), torch.cat([values[before], v], dim=2)
        near = sliding_window is None or k.shape[2] <= sliding_window
        if not explicit and before < 0 and near:
            mask = None  # causal
        else:
            given = lengths[i], k.shape[2], None if near else sliding_window, query.dtype, query.device
            if given not in masks:
                masks[given] = _mask(*given)
            mask = masks[given]
        outputs.append(inner(module, queries[i], k, v, mask, sliding_window=sliding_window, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


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
    """transformers' `sdpa_attention_forward` of one sequence.

    Keys and values are not copied for every query head that shares them: heads are [keys' heads, query heads of each],
    and those of keys and values expanded views.
    """
    heads = key.shape[1]
    output = nn.functional.scaled_dot_product_attention(
        query[0].unflatten(0, (heads, -1)),
        *(x[0][:, None].expand(-1, query.shape[1] // heads, -1, -1) for x in (key, value)),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None,
    )
    return output.flatten(0, 1).transpose(0, 1)[None], None


def _mask(queries: int, keys: int, sliding_window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, queries, keys]: 0 where a query, one of the last positions, attends; elsewhere the least of `dtype`."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)[None, None]
