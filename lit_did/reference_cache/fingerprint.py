"""Fingerprints: digests that name a sequence, a set of pairs and a reference model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Set
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_did.batches.sequences import Sequences
from lit_did.models.wrappers import adapter_marks, inner, is_peft, unwrapped
from lit_did.reference_cache.storage import KEY_BYTES

_blake2b = partial(hashlib.blake2b, digest_size=KEY_BYTES)
# Fields of a configuration that may differ between equal models: their source, and what the weights show themselves.
_NOT_ARCHITECTURE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
# The same of an adapter's configuration.
_NOT_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
# Types of tensors whose values are all on this process. Two are those of bitsandbytes.
_WHOLE = {"Tensor", "Parameter", "Params4bit", "Int8Params"}


def sequence_keys(sequences: Sequences) -> list[bytes]:
    """Returns the keys of sequences in the cache: 16 bytes of BLAKE2b over a sequence's tokens and labels.

    The batch, its padding and its order do not change a key. A sequence has the same key as a chosen and as a rejected
    completion.

    Args:
        sequences: Sequences whose positions count from 0.

    Returns:
        One key for each sequence.

    Raises:
        ValueError: The positions of a sequence do not count from 0.

    Example:
        >>> from lit_did.batches.sequences import read_sequences
        >>> ids, labels = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[-100, 7, -100, -100]])
        >>> batch = {"input_ids": ids, "labels": labels, "attention_mask": ids.sign()}
        >>> short = {name: values[:, :3] for name, values in batch.items()}
        >>> one, other = (sequence_keys(read_sequences(given)) for given in (batch, short))
        >>> one == other
        True
    """
    if not sequences.positions_count_from_zero:
        raise ValueError(
            "Expected `position_ids` to count from 0 in every sequence with `cache_reference`, but got others."
        )
    tokens = np.stack([sequences.input_ids, sequences.labels]).astype("<i8")
    return [_blake2b(tokens[:, sequences.slice(i)].tobytes()).digest() for i in range(sequences.num_sequences)]


def fingerprint(
    model: nn.Module | None, keys: Iterable[bytes], adapter: str | None = None, files: str | None = None
) -> dict[str, str]:
    """Returns the digests of a reference and of its pairs, as hexadecimal BLAKE2b.

    Args:
        model: The reference, or None with `files`. The digest covers the names, dtypes, shapes and bytes of all
            parameters and buffers, and the configuration, but neither the device nor the order. A PeftModel has the
            digest of its base model, because the adapter is off in a reference.
        keys: The keys of all sequences of all processes, in any order.
        adapter: The name of an adapter of the PeftModel that counts too, because it is the reference.
        files: The digest of the files that the model was loaded from, which then counts instead of the model.

    Returns:
        The digests `reference` and `pairs`.

    Example:
        >>> one, other = (fingerprint(nn.Linear(2, 2), [b"key"]) for _ in range(2))
        >>> [part for part in one if one[part] != other[part]]
        ['reference']
    """
    return {
        "reference": files or _model_digest(model, adapter),
        "pairs": _blake2b(b"".join(sorted(set(keys)))).hexdigest(),
    }


def quick_digest(model: nn.Module, values: int = 64, *, adapter: bool = False) -> str | None:
    """Returns a digest of a few values of each tensor, which differs between models and changes with training.

    Args:
        model: The model.
        values: How many values of each tensor count.
        adapter: Whether a PeftModel's adapter counts too.

    Returns:
        The digest, or None if some tensor's values are not on this process (meta or sharded tensors).
    """
    model = unwrapped(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()]) if adapter else _tensors(model)
    if any(t.is_meta or not t.numel() or type(t).__name__ not in _WHOLE for t in tensors.values()):
        return None
    digest = _blake2b()
    for name, tensor in sorted(tensors.items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // values)][:values]
        digest.update(json.dumps([name, tensor.shape]).encode())
        digest.update(_bytes(some.double()))
    return digest.hexdigest()


def exact_digest(model: Any, *, adapter: bool = False) -> str | None:
    """Returns a digest of the configurations, of a few values of each tensor, and of the sum of all of its bits.

    Args:
        model: The model.
        adapter: Whether a PeftModel's adapters count too.

    Returns:
        The digest, or None as for `quick_digest`.
    """
    model = unwrapped(model)
    values = quick_digest(model, adapter=adapter)
    if values is None:
        return None
    peft_model = adapter and is_peft(model)
    digest = _blake2b(f"{values}{_configurations(model, model.peft_config if peft_model else ())}".encode())
    tensors = dict([*model.named_parameters(), *model.named_buffers()]) if adapter else _tensors(model)
    for _, tensor in sorted(tensors.items()):
        digest.update(f"{tensor.dtype} {_sum_of_bits(tensor.detach())}".encode())
    return digest.hexdigest()


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of the values, read as integers: exact, so the same in any order."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    parts = tensor.flatten().view(integers).split(2**24)  # sums of int64 make a copy
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def _model_digest(model: Any, adapter: str | None) -> str:
    model = unwrapped(model)
    digest = _blake2b(_configurations(model, () if adapter is None else (adapter,)).encode())
    tensors = _tensors(model)
    if adapter is not None:
        named = chain(model.named_parameters(), model.named_buffers())
        tensors |= {name: tensor for name, tensor in named if adapter in name.split(".")}
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Returns parameters and buffers; those of a PeftModel's base model by the names that they had before."""
    adapter: tuple[str, ...] = ()
    if is_peft(model):
        adapter = adapter_marks(model)
        model = model.get_base_model()
    # peft moves the layers that it wraps one level down.
    wrapped = re.compile(r"\b(base_layer|original_module|token_adapter)\.")
    return {
        wrapped.sub("", name): tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not any(mark in name for mark in adapter)
    }


def _configurations(model: Any, adapters: Iterable[str]) -> str:
    """The configurations of a model and of some of its adapters, as JSON."""
    configs = [_plain(inner(model).config.to_diff_dict(), _NOT_ARCHITECTURE) if hasattr(inner(model), "config") else {}]
    configs += [_plain(model.peft_config[name].to_dict(), _NOT_ADAPTER) for name in sorted(adapters)]
    return json.dumps(configs, sort_keys=True, default=str)


def _plain(value: Any, left_out: Set[str]) -> Any:
    """A configuration without some keys. Sets become sorted lists, because their order differs between processes."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, left_out) for name, item in value.items() if name not in left_out}
    if isinstance(value, Set):
        return sorted(value, key=str)
    return [_plain(item, left_out) for item in value] if isinstance(value, list | tuple) else value


def _bytes(tensor: Tensor) -> memoryview:
    # As uint8, because NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
