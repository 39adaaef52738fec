"""Describes a data module: in one line, and as plain values for checkpoints and model cards."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lit_did.data.mixing import is_mixture

if TYPE_CHECKING:
    from lit_did.data.datamodule import PreferenceDataModule

_COUNTS = ("num_rows", "num_dropped", "num_identical", "num_truncated")
_SETTINGS = (
    *("val_fraction", "max_length", "truncation", "as_chat", "parse_special_tokens"),
    *("batch_size", "tokens_per_batch", "shuffle", "seed"),
)


def data_facts(data: PreferenceDataModule) -> dict[str, Any]:
    """The tokenizer, the sources, the counts and the settings."""
    name = getattr(data.tokenizer, "name_or_path", None) or ""
    datasets = {"train": data.train_dataset, "val": data.val_dataset}
    return {
        "tokenizer": (os.path.abspath(name) if os.path.isdir(name) else name) or None,
        "num_tokens": len(data.tokenizer) if hasattr(data.tokenizer, "__len__") else None,
        "chat_template": data.chat_template or getattr(data.tokenizer, "chat_template", None),
        "sources": {name: _named_sources(getattr(data, name)) for name in datasets},
        "weights": {os.fspath(name): float(weight) for name, weight in data.train.items()}
        if is_mixture(data.train)
        else None,
        "counts": {
            name: {"num_pairs": len(dataset)} | {count: getattr(dataset, count) for count in _COUNTS}
            for name, dataset in datasets.items()
            if dataset is not None
        },
        "settings": {name: getattr(data, name) for name in _SETTINGS},
    }


def describe_data(data: PreferenceDataModule, tokenizer: Any) -> str:
    """The sources, the numbers of pairs and the main settings in one line.

    Args:
        data: The data module.
        tokenizer: What was passed as its tokenizer, or the loaded one.
    """
    parts = []
    for name in ("train", "val", "test", "predict"):
        source, dataset = getattr(data, name), getattr(data, f"{name}_dataset")
        if source is not None or dataset is not None:
            described = [] if source is None else [_describe_source(source)]
            pairs = [] if dataset is None else [f"{len(dataset)} pairs"]
            parts.append(f"{name}={': '.join(described + pairs)}")
    if isinstance(tokenizer, os.PathLike):
        tokenizer = str(tokenizer)
    elif tokenizer is not None and not isinstance(tokenizer, str):
        tokenizer = type(tokenizer).__name__
    options = {"max_length": data.max_length, "batch_size": data.batch_size, "as_chat": data.as_chat}
    parts += [f"tokenizer={tokenizer!r}", *(f"{name}={value}" for name, value in options.items())]
    return f"{type(data).__name__}({', '.join(parts)})"


def _named_sources(source: Any) -> list[str]:
    """The files and the data sets of the hub that a source names; none for rows and tables."""
    sources = source if isinstance(source, list | tuple | dict) else [source]
    return [os.fspath(part) for part in sources if isinstance(part, str | os.PathLike)]


def _describe_source(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return repr(str(source))
    if isinstance(source, list | tuple | dict) and all(isinstance(part, str | os.PathLike) for part in source):
        return f"{len(source)} files"
    return f"{len(source)} rows" if hasattr(source, "__len__") else type(source).__name__
