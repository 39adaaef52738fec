"""One pass of the reference over both sides of every pair: log-probabilities, entropies, and last hidden states.

A completion that the reference samples itself at temperature 1 is as surprising as the reference expects: the surprisal
of each token, -log rho(y_t), less the entropy H(rho_t) is 0 on average. The sum of these excesses is a martingale, so
that a completion's z is its excess divided by the root of the summed squares of its tokens' excesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_did.batches.checks import checked_sequences
from lit_did.data.collating import collate_packed
from lit_did.data.dataset import PreferenceDataset
from lit_did.models.forward import Outputs, num_embeddings, num_positions
from lit_did.models.quiet import evaluating, random_numbers_kept
from lit_did.models.trial import layout_of, outputs_of
from lit_did.models.wrappers import unwrapped
from lit_did.ops import TokenStatistics, linear_token_statistics, token_statistics

SIDES = ("chosen", "rejected")
PROJECTED = 512  # dimensions that differences of last hidden states keep


class Measured(NamedTuple):
    """What the reference says of the completions of one side, [pairs] float64, in nats."""

    logprob: np.ndarray
    """of the whole completion"""
    num_tokens: np.ndarray
    entropy: np.ndarray
    """mean over tokens"""
    excess: np.ndarray
    """mean over tokens of the surprisal less the entropy"""
    z: np.ndarray
    """how many standard deviations the excess is above 0"""


class Alike(NamedTuple):
    """How alike both sides' last hidden states are. The mean is over the states that predict a side's tokens.

    Differences are chosen less rejected, [pairs, H] float32, with more than 512 dimensions projected to 512 at random.
    """

    difference: np.ndarray
    """of the means"""
    end_difference: np.ndarray
    """of the states that predict a side's last token"""
    cosine: np.ndarray
    """[pairs] float64: of the angle between both"""
    ches: np.ndarray
    """[pairs] float64, see `ches`"""


class Answers(NamedTuple):
    """What the reference says of all pairs.

    Attributes:
        chosen, rejected: By side.
        alike: Of the last hidden states. None: the model's logits are not a linear layer of them.
    """

    chosen: Measured
    rejected: Measured
    alike: Alike | None


def measure(
    dataset: PreferenceDataset, reference: nn.Module, batch_size: int, *, seed: int = 0, progress: bool = True
) -> Answers:
    """Runs the reference once over every pair.

    Args:
        dataset: The pairs.
        reference: The model. A PeftModel is measured as it is, with the adapters that are active.
        batch_size: Pairs a forward pass.
        seed: Of the random projection of hidden states.
        progress: Whether a terminal shows a progress bar.
    """
    model = unwrapped(reference)
    device = next(model.parameters()).device
    rows: list[np.ndarray] = []
    alike: list[Alike] | None = []
    with (
        random_numbers_kept(device),
        evaluating(model),
        tqdm(total=len(dataset), desc="Reference", unit="pair", disable=None if progress else True) as bar,
    ):
        for first in range(0, len(dataset), batch_size):
            examples = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
            sequences = checked_sequences(
                collate_packed(examples), num_embeddings=num_embeddings(model), num_positions=num_positions(model)
            )
            layout = layout_of(model, sequences)
            outputs = outputs_of(model, layout)
            tokens = statistics_of(outputs, layout.labels)
            excess = -tokens.policy_logprob.double() - tokens.policy_entropy.double()
            counts = layout.cu_labels.diff()
            columns = [
                sums_of(values, layout.cu_labels)
                for values in (tokens.policy_logprob, tokens.policy_entropy, excess, excess.square())
            ]
            rows.append(torch.stack([*columns, counts.double()], dim=1).cpu().numpy())
            if outputs.hidden is None:
                alike = None
            elif alike is not None:
                means = sums_of(outputs.hidden.float(), layout.cu_labels) / counts.clamp(min=1)[:, None]
                ends = outputs.hidden[layout.cu_labels[1:] - 1].float() * (counts > 0)[:, None]
                # The states of all pairs would fill the memory.
                mean, end = (torch.stack(of.chunk(2), dim=1).cpu().numpy() for of in (means, ends))
                alike.append(_alike(mean, end, seed))
            bar.update(len(examples))
    sides = []
    for side in (0, 1):
        logprob, entropy, excess_sum, squares, count = np.concatenate([np.split(batch, 2)[side] for batch in rows]).T
        z = excess_sum / np.sqrt(np.maximum(squares, np.finfo(float).tiny))
        sides.append(Measured(logprob, count, entropy / count, excess_sum / count, z))
    return Answers(sides[0], sides[1], None if alike is None else Alike(*map(np.concatenate, zip(*alike, strict=True))))


def statistics_of(outputs: Outputs, labels: Tensor) -> TokenStatistics:
    """The statistics of a model's own tokens, [completion tokens]: `policy_logprob` and `policy_entropy` are its."""
    if outputs.hidden is None:
        assert outputs.logits is not None
        return token_statistics(outputs.logits, outputs.logits, labels)
    layer: Any = outputs.layer
    return linear_token_statistics(
        outputs.hidden,
        layer.weight,
        outputs.hidden,
        layer.weight,
        labels,
        policy_bias=layer.bias,
        reference_bias=layer.bias,
        softcap=layer.softcap,
        scale=layer.scale,
        ignore_index=None,
    )


def sums_of(values: Tensor, cu_labels: Tensor) -> Tensor:
    """[sequences, ...] float64: the sum of each sequence's tokens."""
    sequence = torch.repeat_interleave(torch.arange(len(cu_labels) - 1, device=values.device), cu_labels.diff())
    total = torch.zeros(len(cu_labels) - 1, *values.shape[1:], dtype=torch.float64, device=values.device)
    return total.index_add(0, sequence, values.double())


def _alike(means: np.ndarray, ends: np.ndarray, seed: int) -> Alike:
    """Of last hidden states [pairs, 2, H]."""

    def difference(of: np.ndarray) -> np.ndarray:
        found = (of[:, 0] - of[:, 1]).astype(np.float32)
        return found if found.shape[1] <= PROJECTED else found @ _projection(found.shape[1], PROJECTED, seed)

    return Alike(difference(means), difference(ends), cosine(means), ches(means))


@lru_cache(maxsize=1)
def _projection(dimensions: int, kept: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).standard_normal((dimensions, kept), dtype=np.float32)
    return draws / np.sqrt(kept).astype(np.float32)


def edit_similarity(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> float:
    """1 less the edit distance of two token sequences divided by the length of the longer one.

    Example:
        >>> edit_similarity([1, 2, 3, 4], [1, 3, 4])
        0.75
    """
    first, second = np.asarray(one), np.asarray(other)
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    places = np.arange(len(second) + 1)
    row = places.copy()
    for token in first:
        changed = np.minimum(row[1:] + 1, row[:-1] + (second != token))
        row = np.concatenate([[row[0] + 1], changed])
        row = np.minimum.accumulate(row - places) + places  # insertions
    return float(1 - row[-1] / longest)


def ches(hidden: np.ndarray) -> np.ndarray:
    """[pairs] float64: the length-normalised CHES score of Razin et al. (arXiv 2410.08847).

    It is <h_w, h_l> - |h_w|^2, with the mean last hidden states h_w of the chosen and h_l of the rejected side. The
    higher it is, the likelier it is that training lowers the likelihood of the chosen side too.

    Args:
        hidden: [pairs, 2, H], means over tokens.
    """
    chosen, rejected = hidden[:, 0].astype(float), hidden[:, 1].astype(float)
    return (chosen * (rejected - chosen)).sum(axis=1)


def cosine(hidden: np.ndarray) -> np.ndarray:
    """[pairs] float64: the cosine of the angle between the mean last hidden states of the two sides."""
    chosen, rejected = hidden[:, 0].astype(float), hidden[:, 1].astype(float)
    norms = np.linalg.norm(chosen, axis=1) * np.linalg.norm(rejected, axis=1)
    return (chosen * rejected).sum(axis=1) / np.maximum(norms, np.finfo(float).tiny)
