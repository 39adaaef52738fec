"""Attention over all segments of a packed row in one call: flash attention for sequences of different lengths.

A segment (see `lit_did.batches.layout`) that continues another one has its own queries and the keys of both. Flash
attention puts queries at the end of their keys, for causal attention and for windows, so it needs no mask. If a row has
such segments, the keys and values of all segments are gathered first: one copy each in a layer.

Lengths are worked out on the CPU. They are moved to the device once a batch, and the host does not wait for it.
`lit_did.models.trial` compares the results with the unchanged model's before a kernel is used.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_did.batches.moving import to_device

DEVICES = ("cuda",)
"""the types of devices that have flash attention"""
HALF = (torch.bfloat16, torch.float16)
MOST_DIM = 256  # entries of a head, a multiple of 8
TORCH = "varlen_attn"  # of torch.nn.attention.varlen
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # transformers' names


@dataclass(eq=False)
class Lengths:
    """What one call needs to know about the segments of a batch, on the device of the model."""

    kernel: str
    """`TORCH`, or one of `FLASH`"""
    cu_queries: Tensor
    """[segments + 1] int32: where the queries of each segment begin and end"""
    cu_keys: Tensor
    """[segments + 1] int32: where its keys begin and end"""
    most_queries: int
    most_keys: int
    keys: Tensor | None
    """[keys] int64: the token of the row that each key belongs to. None: the keys are the row."""
    refused: str | None = None
    """Why a layer did not use the kernel, and what to do. None: all layers used it so far."""


def lengths(segments: Tensor, device: torch.device, kernel: str) -> Lengths:
    """What one call of `kernel` needs to know about these segments.

    Args:
        segments: [1, 1, segments, 2] int64 on the CPU, see `lit_did.batches.layout.packed_layout`.
        device: Where the model is.
        kernel: One of `kernels`, or one of `FLASH` that the model has itself.
    """
    own, continues = segments[0, 0].numpy().T
    before = np.where(continues >= 0, own[continues], 0)
    starts = own.cumsum() - own
    keys = None
    if (continues >= 0).any():
        pieces: list[np.ndarray] = []
        for segment, other in enumerate(continues):
            pieces += [np.arange(starts[s], starts[s] + own[s]) for s in (other, segment) if s >= 0]
        keys = to_device(torch.from_numpy(np.concatenate(pieces)), device)
    bounds = np.zeros((2, len(own) + 1), dtype=np.int32)
    bounds[:, 1:] = own.cumsum(), (own + before).cumsum()
    cu_queries, cu_keys = to_device(torch.from_numpy(bounds), device).unbind()
    most = int(own.max(initial=0)), int((own + before).max(initial=0))
    return Lengths(kernel, cu_queries, cu_keys, *most, keys)


def kernels(device: torch.device) -> tuple[str, ...]:
    """What can attend in one call on `device` in place of `sdpa`, the fastest first. A trial may find that it fails."""
    if device.type not in DEVICES or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)):
        return ()
    from transformers import utils

    flash = ((FLASH[1], "is_flash_attn_3_available"), (FLASH[0], "is_flash_attn_2_available"))
    found = tuple(name for name, check in flash if getattr(utils, check, bool)())
    return found if _of_torch() is None else (*found, TORCH)


def without_kernels(device: torch.device) -> str:
    """Why `kernels` is empty, and what to do."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for it. It needs an A100 or a later GPU."
    return f"torch {torch.__version__} has no kernel that suits. Install torch 2.11 or later, or flash-attn."


@lru_cache(maxsize=1)
def _of_torch() -> Callable[..., Any] | None:
    """torch's `varlen_attn`. None: this torch has none, or one without a scale and windows (2.10)."""
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
            return varlen_attn
    return None


def refusal(kernel: str, query: Tensor, value: Tensor, dropout: float, others: list[str]) -> str | None:
    """Why `kernel` cannot be used in place of `sdpa`, and what to do. None: it can.

    Args:
        kernel: One of `kernels`.
        query: [1, heads, tokens, dim]
        value: [1, key heads, tokens, dim of values]
        dropout: Of the attention's weights.
        others: Names of other arguments of the attention that are not None.
    """
    dim, dtype = query.shape[-1], dtype_of(query)
    if dtype not in HALF:
        return f"its numbers are {str(dtype)[6:]}, and flash attention needs bfloat16. Use precision='bf16-mixed'."
    if dim % 8 or dim > MOST_DIM or value.shape[-1] > dim:
        return (
            f"its heads have {dim} and {value.shape[-1]} entries, and flash attention needs multiples of 8 up to "
            f"{MOST_DIM}."
        )
    if dropout and kernel == TORCH:
        return (
            f"it has a dropout of {dropout}, which PyTorch's kernel lacks. Set `attention_dropout` to 0 in the model's "
            "configuration, or install flash-attn."
        )
    if others:
        return (
            f"the model passes {', '.join(others)} to its attention, which is not the same in every kernel. Try "
            "model_kwargs={'attn_implementation': 'flash_attention_2'}."
        )
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor:
    """[1, heads, tokens, dim] to [1, tokens, heads, dim of values].

    Args:
        query: [1, heads, tokens, dim]
        key: [1, key heads, tokens, dim]
        value: [1, key heads, tokens, dim of values]
        lengths: Of the segments in these tokens.
        scaling: Of the scores. None: 1 / sqrt(dim).
        sliding_window: Number of keys that a query attends to at most, its own included. None: all before it.
        dropout: Of the attention's weights.
        is_causal: Must not be False.
        others: Arguments that transformers' flash attention knows.
    """
    dtype, width = dtype_of(query), value.shape[-1]
    queries, keys, values = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if lengths.keys is not None:
        keys, values = (x.index_select(0, lengths.keys) for x in (keys, values))
    if width < query.shape[-1]:
        values = F.pad(values, (0, query.shape[-1] - width))
    if sliding_window is not None and sliding_window >= lengths.most_keys:
        sliding_window = None
    if lengths.kernel != TORCH:
        options = {**others, "dropout": dropout, "softmax_scale": scaling, "sliding_window": sliding_window}
        return _flash(queries, keys, values, lengths, options).narrow(-1, 0, width)
    varlen_attn: Any = _of_torch()
    bounds = lengths.cu_queries, lengths.cu_keys, lengths.most_queries, lengths.most_keys
    groups = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_attn(queries, keys, values, *bounds, scale=scaling, window_size=window, **groups)
    return output.unsqueeze(0).narrow(-1, 0, width)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, options: dict[str, Any]) -> Tensor:
    """transformers' way to flash attention, which knows the arguments of each version of it."""
    from transformers import modeling_flash_attention_utils as flash

    attend: Any = flash._flash_attention_forward
    if options.get("s_aux") is not None:
        options["s_aux"] = options["s_aux"].to(queries.dtype)
    return attend(
        *(x[None] for x in (queries, keys, values)),
        attention_mask=None,
        query_length=len(queries),
        is_causal=True,
        cu_seq_lens_q=lengths.cu_queries,
        cu_seq_lens_k=lengths.cu_keys,
        max_length_q=lengths.most_queries,
        max_length_k=lengths.most_keys,
        attn_implementation=lengths.kernel,
        **options,
    )


def dtype_of(query: Tensor) -> torch.dtype:
    """What attention computes in: autocast casts `sdpa`, but none of these kernels."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def operators() -> list[Any]:
    """The operators of these kernels that the installed libraries have, for selective checkpointing."""
    for module in ("torch.nn.attention.varlen", "flash_attn"):
        with suppress(ImportError):
            importlib.import_module(module)
    names = (("torch_attn", "_varlen_attn"), ("flash_attn", "_flash_attn_varlen_forward"))
    spaces = [(getattr(torch.ops, space), name) for space, name in names]
    return [getattr(space, name).default for space, name in spaces if hasattr(space, name)]
