"""Preference data: reading, checking, templates, tokenising, collating and the LightningDataModule.

Importing this package loads neither lightning, transformers nor datasets: each name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read instead of `__getattr__`
    from lit_did.data.collating import *  # noqa: F403
    from lit_did.data.datamodule import *  # noqa: F403
    from lit_did.data.dataset import *  # noqa: F403
    from lit_did.data.loading import *  # noqa: F403
    from lit_did.data.pairs import *  # noqa: F403
    from lit_did.data.prompt_files import *  # noqa: F403
    from lit_did.data.reading import *  # noqa: F403
    from lit_did.data.token_batches import *  # noqa: F403
    from lit_did.data.tokenizing import *  # noqa: F403

_MODULES = {
    "collating": ("IGNORE_INDEX", "collate_packed", "collate_pairs"),
    "datamodule": ("PreferenceDataModule",),
    "dataset": ("PreferenceDataset",),
    "loading": ("EvaluationSampler", "ResumableDataLoader", "ResumableSampler"),
    "pairs": ("PreferencePair", "UnusableRowError", "parse_pair"),
    "prompt_files": ("PromptRow", "encode_prompts", "read_prompts"),
    "reading": ("SkippedRow", "SourceRow", "read_pairs", "read_rows"),
    "token_batches": ("TokenBatchSampler",),
    "tokenizing": ("Context", "TokenizedPair", "tokenize_pair", "truncate_pair"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
