"""What the operators demand of their input: one error that names the argument, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from lit_did.arguments import check_bools, check_number
from lit_did.ops.statistics import TokenStatistics

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_LEADING_DIMENSIONS = 8  # kMaxLeadingDims in csrc/cuda/kernels.h


def is_fake(tensor: Tensor) -> bool:
    """Whether an operator on `tensor` returns a fake tensor, which has a shape, but neither values nor memory."""
    return detect_fake_mode(tensor) is not None


def on_host(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def check_token_arguments(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int, temperature: float
) -> None:
    """Checks shapes, dtypes, devices and options.

    Raises:
        TypeError: An argument is not a tensor, or has the wrong dtype.
        ValueError: Shapes, devices or `temperature` do not fit.
    """
    named = {"policy_logits": policy_logits, "reference_logits": reference_logits, "labels": labels}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}.")
    for name in ("policy_logits", "reference_logits"):
        if named[name].dtype not in LOGITS_DTYPES:
            raise TypeError(
                f"Expected `{name}` to be float32, bfloat16, float16 or float64, but got {named[name].dtype}."
            )
    _check_labels_type(labels)
    if policy_logits.dim() < 1 or policy_logits.shape[-1] < 1:
        raise ValueError(
            f"Expected `policy_logits` to have shape [..., V] with V >= 1, but got {tuple(policy_logits.shape)}."
        )
    if reference_logits.shape[-1:] != policy_logits.shape[-1:]:
        raise ValueError(
            "Expected `reference_logits` to have the vocabulary of `policy_logits`, "
            f"{policy_logits.shape[-1]} entries, but got {tuple(reference_logits.shape)}."
        )
    if reference_logits.shape != policy_logits.shape:
        raise ValueError(
            f"Expected `reference_logits` to have the shape of `policy_logits`, {tuple(policy_logits.shape)}, "
            f"but got {tuple(reference_logits.shape)}."
        )
    if labels.shape != policy_logits.shape[:-1]:
        raise ValueError(
            f"Expected `labels` to have shape {tuple(policy_logits.shape[:-1])}, but got {tuple(labels.shape)}."
        )
    for name in ("reference_logits", "labels"):
        if named[name].device != policy_logits.device:
            raise ValueError(
                f"Expected `{name}` on the device of `policy_logits`, {policy_logits.device}, "
                f"but got {named[name].device}."
            )
    check_options(ignore_index, temperature)


def check_linear_arguments(
    layers: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], labels: Tensor, softcap: tuple, scale: tuple
) -> None:
    """Checks the output layers of the two models, "policy" and "reference": hidden, weight and bias, and the labels.

    Vocabularies are not compared: where they are sliced, that takes all processes.

    Raises:
        TypeError: An argument is not a tensor or a number, or has the wrong dtype.
        ValueError: Shapes, devices, `softcap` or `scale` do not fit.
    """
    _check_labels_type(labels)
    for side, layer in layers.items():
        for part, value in zip(("hidden", "weight", "bias"), layer, strict=True):
            name = f"{side}_{part}"
            if part == "bias" and value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}.")
            if value.dtype not in LOGITS_DTYPES:
                raise TypeError(
                    f"Expected `{name}` to be float32, bfloat16, float16 or float64, but got {value.dtype}."
                )
            if value.device != labels.device:
                raise ValueError(
                    f"Expected `{name}` on the device of `labels`, {labels.device}, but got {value.device}."
                )
            if part != "hidden" and value.dtype != layer[0].dtype:
                raise TypeError(
                    f"Expected `{name}` to have the dtype of `{side}_hidden`, {layer[0].dtype}, but got {value.dtype}."
                )
        hidden, weight, bias = layer
        if hidden.dim() < 1 or hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"Expected `{side}_hidden` to have shape [..., H] with the shape of `labels`, {tuple(labels.shape)}, "
                f"before H, but got {tuple(hidden.shape)}."
            )
        if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"Expected `{side}_weight` to have shape [V, {hidden.shape[-1]}] with V >= 1, for the last dimension "
                f"of `{side}_hidden`, but got {tuple(weight.shape)}."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"Expected `{side}_bias` to have shape [{weight.shape[0]}], but got {tuple(bias.shape)}.")
    for name, pair, absent in (("softcap", softcap, True), ("scale", scale, False)):
        for value in pair:
            if value is None and absent:
                continue
            check_number(name, value, "a number or a (policy, reference) tuple")
            if not 0 < value < float("inf"):
                raise ValueError(f"Expected `{name}` to be positive and finite, but got {value}.")


def check_memory(chunk_tokens: int | Literal["auto"], max_extra_bytes: int | None) -> None:
    """Checks the limits of the linear statistics.

    Raises:
        TypeError: `max_extra_bytes` is neither an integer nor None, `chunk_tokens` neither an integer nor "auto".
        ValueError: One of them is not positive.
    """
    for name, value, default in (("chunk_tokens", chunk_tokens, "auto"), ("max_extra_bytes", max_extra_bytes, None)):
        if value == default:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Expected `{name}` to be an integer or {default!r}, but got {value!r}.")
        if value < 1:
            raise ValueError(f"Expected `{name}` to be positive, but got {value}.")


def check_inplace_backward(inplace_backward: bool, backend: str) -> None:
    """Checks the switch against the backend that the caller chose.

    Raises:
        TypeError: `inplace_backward` is not a bool.
        ValueError: It is True with `backend="reference"`, which cannot honour it.
    """
    check_bools(inplace_backward=inplace_backward)
    if inplace_backward and backend == "reference":
        raise ValueError(
            "Expected `inplace_backward` to be False with `backend='reference'`, which is plain torch and cannot write "
            "gradients over the logits, but got True."
        )


def check_not_leaves(policy_logits: Tensor, reference_logits: Tensor) -> None:
    """Checks that a backward in place would not overwrite a parameter, or another tensor that keeps its gradient.

    Raises:
        ValueError: Logits that require a gradient are a leaf of the graph or a view of one.
    """
    for name, logits in (("policy_logits", policy_logits), ("reference_logits", reference_logits)):
        owners = (logits,) if logits._base is None else (logits, logits._base)
        if logits.requires_grad and torch.is_grad_enabled() and any(owner.is_leaf for owner in owners):
            raise ValueError(
                f"Expected `{name}` not to be a leaf that requires a gradient, nor a view of one, with "
                "`inplace_backward=True`: its values would be overwritten by its gradient. "
                f"Pass `{name}.clone()`, or `inplace_backward=False`."
            )


def check_own_memory(
    policy_logits: Tensor, reference_logits: Tensor, policy_needs_grad: bool, reference_needs_grad: bool
) -> None:
    """Checks that each logit which a backward in place overwrites is the only one at its address.

    Raises:
        ValueError: Such logits have rows that overlap, or share memory with the other side.
    """
    for name, logits, needed in (
        ("policy_logits", policy_logits, policy_needs_grad),
        ("reference_logits", reference_logits, reference_needs_grad),
    ):
        if needed and not (logits.is_contiguous() or _have_own_addresses(logits.shape, logits.stride())):
            raise ValueError(
                f"Expected `{name}` to have memory of its own for every row with `inplace_backward=True`, but got rows "
                f"that overlap: sizes {list(logits.shape)}, strides {list(logits.stride())}. "
                f"Pass `{name}.contiguous()`."
            )
    if (policy_needs_grad or reference_needs_grad) and _share_memory(policy_logits, reference_logits):
        name, other = ("policy_logits", "reference_logits")[:: 1 if policy_needs_grad else -1]
        raise ValueError(
            f"Expected `{name}` to have memory of its own with `inplace_backward=True`, but it shares memory with "
            f"`{other}`. Pass `{name}.clone()`."
        )


def _have_own_addresses(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether every entry has an address of its own: each dimension steps beyond the reach of the finer ones.

    Strides that interleave dimensions in other ways count as overlapping.
    """
    if 0 in sizes:
        return True
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_begin, a_end), (b_begin, b_end) = _addresses(a), _addresses(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    if a.dtype != b.dtype or a.stride() != b.stride():
        return True
    # Interleaved halves of one tensor: together they are a tensor with one dimension more.
    apart = abs(a_begin - b_begin) // a.element_size()
    return not _have_own_addresses((*a.shape, 2), (*a.stride(), apart))


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor that is not empty, and the one behind its last."""
    if tensor.is_contiguous():
        entries = tensor.numel()
    else:
        entries = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + entries * tensor.element_size()


def check_leading_dimensions(**named_logits: Tensor) -> None:
    """Checks what the CUDA kernels can address: logits whose rows lie in memory like a few dimensions.

    Raises:
        ValueError: More than `MAX_LEADING_DIMENSIONS` dimensions before the last do not lie in memory like one.
    """
    for name, logits in named_logits.items():
        if logits.dim() <= MAX_LEADING_DIMENSIONS + 1:
            continue
        apart, end = 0, None
        for size, stride in zip(logits.shape[:-1], logits.stride(), strict=False):
            if size != 1:
                apart += end != size * stride
                end = stride
        if apart > MAX_LEADING_DIMENSIONS:
            raise ValueError(
                f"Expected `{name}` to have at most {MAX_LEADING_DIMENSIONS} leading dimensions apart in memory, but "
                f"got sizes {list(logits.shape)} and strides {list(logits.stride())}. Pass `{name}.contiguous()`."
            )


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Checks that every label is in [0, vocabulary) or `ignore_index`. Reads the labels' values.

    Raises:
        ValueError: A label is out of range.
    """
    labels = torch.func.debug_unwrap(labels)  # under vmap, which has no values, those of all examples
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"Expected `labels` to be in [0, {vocabulary}) or `ignore_index` ({ignore_index}), "
            f"but got {int(labels.flatten()[row])} at row {row}."
        )


def check_tokens(tokens: TokenStatistics, labels: Tensor, ignore_index: int) -> None:
    """Checks token statistics, and the labels that belong to them.

    Raises:
        TypeError: `tokens` is no TokenStatistics of float32 or float64, `labels` no integer tensor.
        ValueError: Shapes or devices do not fit.
    """
    if not isinstance(tokens, TokenStatistics):
        raise TypeError(f"Expected `tokens` to be TokenStatistics, but got {type(tokens).__name__}.")
    _check_labels_type(labels)
    if labels.dim() < 1:
        raise ValueError("Expected `labels` to have shape [..., T], but got ().")
    dtype = tokens.policy_logprob.dtype
    for name, value in zip(tokens._fields, tokens, strict=True):
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != dtype:
            raise TypeError(f"Expected `{name}` to be float32, or float64 like the others, but got {value.dtype}.")
        if value.shape != labels.shape:
            raise ValueError(
                f"Expected `{name}` to have the shape of `labels`, {tuple(labels.shape)}, but got {tuple(value.shape)}."
            )
        if value.device != labels.device:
            raise ValueError(f"Expected `{name}` on the device of `labels`, {labels.device}, but got {value.device}.")
    _check_ignore_index(ignore_index)


def check_cu_seqlens(cu_seqlens: Tensor, packed: Tensor, argument: str, shape: str) -> None:
    """Checks the packed layout: `cu_seqlens` [sequences + 1] rises from 0 to the number of tokens.

    The values of a tensor that is not on the CPU are not read, so as not to wait for the device.

    Args:
        packed: The tensor that is packed, the caller's `argument`, which must have the `shape`, tokens first.

    Raises:
        TypeError: `cu_seqlens` is not an int32 or int64 tensor.
        ValueError: Its shape, device or values do not fit `packed`.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"Expected `cu_seqlens` to be an int32 or int64 tensor, but got {got}.")
    if packed.dim() != len(shape.split(",")):
        raise ValueError(
            f"Expected `{argument}` to have shape {shape} with `cu_seqlens`, but got {tuple(packed.shape)}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"Expected `cu_seqlens` to have shape [sequences + 1], but got {tuple(cu_seqlens.shape)}.")
    if cu_seqlens.device != packed.device:
        raise ValueError(
            f"Expected `cu_seqlens` on the device of `{argument}`, {packed.device}, but got {cu_seqlens.device}."
        )
    if torch.compiler.is_compiling() or not on_host(cu_seqlens):
        return
    tokens = packed.shape[0]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"Expected `cu_seqlens` to rise from 0 to the number of tokens, {tokens}, but got {cu_seqlens.tolist()}."
        )


def _check_labels_type(labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"Expected `labels` to be a tensor, but got {type(labels).__name__}.")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"Expected `labels` to be integers, but got {labels.dtype}.")


def check_options(ignore_index: int, temperature: float) -> None:
    """Checks what does not depend on tensors.

    Raises:
        TypeError: Not an integer and a number.
        ValueError: `temperature` is not in [1e-30, 1e30].
    """
    _check_ignore_index(ignore_index)
    _check_temperature(temperature)


def _check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"Expected `ignore_index` to be an integer, but got {ignore_index!r}.")


def _check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"Expected `temperature` to be a number, but got {temperature!r}.")
    if not 1e-30 <= temperature <= 1e30:  # float32 holds its inverse, and the logits that count as infinite
        raise ValueError(f"Expected `temperature` to be in [1e-30, 1e30], but got {temperature}.")
