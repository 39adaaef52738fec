"""Which prompts of the pairs are completed by models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from lit_did.audit.blocks import Paragraph
from lit_did.audit.settings import Settings
from lit_did.data.dataset import Example, PreferenceDataset
from lit_did.sampling.readers import CachedModel


def places_to_complete(
    examples: Sequence[Example] | PreferenceDataset, groups: np.ndarray, settings: Settings, models: Sequence[nn.Module]
) -> list[int]:
    """Places of pairs with different prompts, drawn at random among those with room for a completion.

    Args:
        examples: The pairs as tokens.
        groups: [pairs] the number of each pair's prompt.
        settings: With `num_prompts`, `max_new_tokens` and `seed`.
        models: The models that complete them.
    """
    most = min(CachedModel(model).max_tokens for model in models)
    _, first = np.unique(groups, return_index=True)
    fitting = [int(i) for i in first if len(examples[int(i)].prompt_ids) + settings.max_new_tokens - 1 <= most]
    count = min(settings.num_prompts, len(fitting))
    return sorted(np.random.default_rng(settings.seed).choice(fitting, count, replace=False).tolist()) if count else []


def nothing_to_complete(settings: Settings) -> Paragraph:
    """Says why there are no completions."""
    return Paragraph(
        f"No prompt leaves room for {settings.max_new_tokens} new tokens within the positions of the models, so none "
        "was completed."
    )
