"""Fingerprints: digests that name a sequence, a set of pairs and a reference model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
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


def fingerprint(model: nn.Module, keys: Iterable[bytes], adapter: str | None = None) -> dict[str, str]:
    """Returns the digests of a reference and of its pairs, as hexadecimal BLAKE2b.

    Args:
        model: The reference. The digest covers the names, dtypes, shapes and bytes of all parameters and buffers, and
            the configuration, but neither the device nor the order. A PeftModel has the digest of its base model,
            because the adapter is off in a reference.
        keys: The keys of all sequences of all processes, in any order.
        adapter: The name of an adapter of the PeftModel that counts too, because it is the reference.

    Returns:
        The digests `reference` and `pairs`.

    Example:
        >>> one, other = (fingerprint(nn.Linear(2, 2), [b"key"]) for _ in range(2))
        >>> [part for part in one if one[part] != other[part]]
        ['reference']
    """
    return {"reference": _model_digest(model, adapter), "pairs": _blake2b(b"".join(sorted(set(keys)))).hexdigest()}


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


def _model_digest(model: Any, adapter: str | None) -> str:
    model = unwrapped(model)
    config = inner(model).config.to_diff_dict() if hasattr(inner(model), "config") else {}
    digest = _blake2b(json.dumps(_architecture(config), sort_keys=True, default=str).encode())
    tensors = _tensors(model)
    if adapter is not None:
        digest.update(json.dumps(model.peft_config[adapter].to_dict(), sort_keys=True, default=str).encode())
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


def _architecture(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {str(name): _architecture(value) for name, value in config.items() if name not in _NOT_ARCHITECTURE}


def _bytes(tensor: Tensor) -> memoryview:
    # As uint8, because NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
