"""The settings of an audit: how texts become tokens, how models run, and how much work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TOKENIZATION = (
    "max_length",
    "truncation",
    "min_completion_tokens",
    "as_chat",
    "chat_template",
    "chat_template_kwargs",
    "parse_special_tokens",
)
"""arguments of tokenising"""
NEEDED = {
    **dict.fromkeys(TOKENIZATION, ("tokenizer", "reference", "policy")),
    **dict.fromkeys(("max_pairs", "batch_size", "dtype", "device"), ("reference", "policy")),
    "by": ("policy",),
    **dict.fromkeys(("beta", "num_prompts", "max_new_tokens"), ("policy", "sides")),
}
"""arguments that have no effect unless one of others is given"""


@dataclass(frozen=True)
class Settings:
    """What all parts of an audit share.

    Attributes:
        columns: Names of the source's columns by field.
        sides: Whether a model of each side is fitted.
        by: Columns of the source, beside the tag, whose values get figures of their own.
        beta: DPO's inverse temperature.
        tokenization: Arguments of `PreferenceDataset`: max_length, truncation, min_completion_tokens, as_chat,
            chat_template, chat_template_kwargs, parse_special_tokens.
        batch_size: Pairs a forward pass.
        num_prompts: Prompts whose DID entropy of completions is estimated, and which are completed.
        max_new_tokens: Where these completions are cut.
        max_pairs: The most pairs that models read. None: all.
        seed: Of all draws.
        dtype, device: Of models that are given by name. None: there are none, or their own dtype.
        progress: Whether a terminal shows progress bars.
    """

    columns: Mapping[str, str | None] | None = None
    sides: bool = False
    by: tuple[str, ...] = ()
    beta: float = 0.1
    tokenization: Mapping[str, Any] = field(default_factory=lambda: {"max_length": 1024})
    batch_size: int = 8
    num_prompts: int = 8
    max_new_tokens: int = 32
    max_pairs: int | None = None
    seed: int = 0
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    progress: bool = True
