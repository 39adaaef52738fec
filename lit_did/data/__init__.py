"""Preference data: reading, checking, templates, tokenising, collating and the LightningDataModule.

Importing this package loads neither lightning, transformers nor datasets: each name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_did.data.collating import IGNORE_INDEX, collate_packed, collate_pairs
    from lit_did.data.datamodule import PreferenceDataModule
    from lit_did.data.dataset import PreferenceDataset
    from lit_did.data.loading import EvaluationSampler, ResumableDataLoader, ResumableSampler
    from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair
    from lit_did.data.reading import SkippedRow, SourceRow, read_pairs, read_rows
    from lit_did.data.token_batches import TokenBatchSampler
    from lit_did.data.tokenizing import Context, TokenizedPair, tokenize_pair, truncate_pair

__all__ = [
    "IGNORE_INDEX",
    "Context",
    "EvaluationSampler",
    "PreferenceDataModule",
    "PreferenceDataset",
    "PreferencePair",
    "ResumableDataLoader",
    "ResumableSampler",
    "SkippedRow",
    "SourceRow",
    "TokenBatchSampler",
    "TokenizedPair",
    "UnusableRowError",
    "collate_packed",
    "collate_pairs",
    "parse_pair",
    "read_pairs",
    "read_rows",
    "tokenize_pair",
    "truncate_pair",
]

_HOME = {
    "IGNORE_INDEX": "collating",
    "Context": "tokenizing",
    "EvaluationSampler": "loading",
    "PreferenceDataModule": "datamodule",
    "PreferenceDataset": "dataset",
    "PreferencePair": "pairs",
    "ResumableDataLoader": "loading",
    "ResumableSampler": "loading",
    "SkippedRow": "reading",
    "SourceRow": "reading",
    "TokenBatchSampler": "token_batches",
    "TokenizedPair": "tokenizing",
    "UnusableRowError": "pairs",
    "collate_packed": "collating",
    "collate_pairs": "collating",
    "parse_pair": "pairs",
    "read_pairs": "reading",
    "read_rows": "reading",
    "tokenize_pair": "tokenizing",
    "truncate_pair": "tokenizing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
