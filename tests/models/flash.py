"""Kernels of flash attention for the CPU, in float64: with them torch's and transformers' own functions run anywhere.

They use loops over the sequences and a mask for each, so they share nothing with the code that they test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as of_transformers

from lit_did.models import varlen

calls: list[str] = []
"""The kernels that ran forward, in order."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: tuple[int, int], softcap: float = 0.0
) -> Tensor:
    """One sequence, [tokens, heads, dim]. The last query is aligned with the last key."""
    _, _, v, weights = _weights(query, key, value, scale, window, softcap)
    return (weights @ v).transpose(0, 1)


def _weights(query, key, value, scale, window, softcap=0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    place, of_key = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None], torch.arange(k.shape[1])
    left, right = (k.shape[1] if side < 0 else side for side in window)
    hidden = (of_key < place - left) | (of_key > place + right)
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return q, k, v, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def gradients(upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: tuple[int, int]):
    """Of `attention`, by hand: autograd does not run inside of an operator."""
    q, k, v, weights = _weights(query, key, value, scale, window)
    up = upstream.double().transpose(0, 1)
    of_weights = up @ v.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
    of_keys, of_values = (x.unflatten(0, (key.shape[1], -1)).sum(1) for x in (of_scores.mT @ q, weights.mT @ up))
    return [x.transpose(0, 1) for x in (of_scores @ k, of_keys, of_values)]


def of_sequences(query, key, value, cu_queries, cu_keys, most_queries, most_keys, *options) -> Tensor:
    """`attention` of each sequence."""
    parts = split(query, key, value, cu_queries, cu_keys, most_queries, most_keys)
    return torch.cat([attention(*part, *options) for part in parts]).to(query.dtype)


def split(query, key, value, cu_queries, cu_keys, most_queries, most_keys) -> list[tuple[Tensor, ...]]:
    """The three tensors of each sequence, after the checks of the real kernels."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert cu_queries[-1] == len(query)
    assert cu_keys[-1] == len(key) == len(value)
    assert (int(cu_queries.diff().max()), int(cu_keys.diff().max())) == (most_queries, most_keys)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.dtype == key.dtype == value.dtype
    parts = (x.split(cu.diff().tolist()) for x, cu in ((query, cu_queries), (key, cu_keys), (value, cu_keys)))
    return list(zip(*parts, strict=True))


def check_dtype(query: Tensor) -> None:
    if query.dtype not in varlen.HALF:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")


def _forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale=None, window_size=(-1, -1), *_):
    calls.append(varlen.TORCH)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = (window_size[0], 0) if is_causal else tuple(window_size)
    output = of_sequences(query, key, value, cu_q, cu_k, max_q, max_k, scale, window)
    return output, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _backward(
    upstream, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, state, scale=None, window_size=(-1, -1)
):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = (window_size[0], 0) if is_causal else tuple(window_size)
    parts = split(query, key, value, cu_q, cu_k, max_q, max_k)
    ups = upstream.split(cu_q.diff().tolist())
    found = [gradients(up, *part, scale, window) for up, part in zip(ups, parts, strict=True)]
    return tuple(torch.cat(x).to(query.dtype) for x in zip(*found, strict=True))


def _flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """As that of the package flash_attn."""
    assert causal
    assert not dropout_p
    check_dtype(q)
    calls.append("flash_attn")
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return of_sequences(q, k, v, *bounds, softmax_scale, (window_size[0], 0), softcap)


def _flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    check_dtype(q)
    options = (softmax_scale, (window_size[0], 0) if causal else window_size, softcap)
    return torch.stack([attention(*row, *options) for row in zip(q, k, v, strict=True)]).to(q.dtype)


@contextmanager
def on_the_cpu(half: tuple[torch.dtype, ...] = (*varlen.HALF, torch.float32, torch.float64)) -> Iterator[list[str]]:
    """Lets the CPU have flash attention, for these dtypes. Yields `calls`, empty."""
    calls.clear()
    with mock.patch.object(varlen, "DEVICES", ("cpu",)), mock.patch.object(varlen, "HALF", half):
        yield calls


@contextmanager
def flash_attn_installed() -> Iterator[None]:
    """Lets transformers find the functions above in place of the package flash_attn."""

    def load(implementation: str, *_):
        assert implementation == "flash_attention_2"
        process = of_transformers._lazy_define_process_function(_flash_attn_varlen_func)
        pads = of_transformers._pad_input, of_transformers._unpad_input
        return (_flash_attn_func, _flash_attn_varlen_func, None, *pads), (process, dict)

    with mock.patch.object(of_transformers, "lazy_import_flash_attention", load):
        yield


if find_spec("torch.nn.attention.varlen") and varlen._of_torch() is not None:
    of_torch = sys.modules["torch.nn.attention.varlen"]
    of_torch._varlen_attn.register_kernel("cpu")(_forward)
    of_torch._varlen_attn_backward.register_kernel("cpu")(_backward)
