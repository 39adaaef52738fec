"""The pairs of an audit as tokens, as training with the same settings sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_did.audit.settings import Settings
from lit_did.data.dataset import PreferenceDataset
from lit_did.data.reading import SourceRow


def tokenized(rows: Sequence[SourceRow], settings: Settings, tokenizer: Any) -> PreferenceDataset:
    """The tokens of pairs. Pairs that are unusable, or too long with `truncation="drop"`, are left out.

    Args:
        rows: The pairs.
        settings: With the arguments of `PreferenceDataset`.
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: No pair is left.
    """
    return PreferenceDataset(rows, tokenizer, **settings.tokenization)
