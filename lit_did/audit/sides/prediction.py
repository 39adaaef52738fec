"""What DPO would learn of pairs whose sides have the log-ratio log pi_w - log pi_l. `lit-did docs theory` derives it.

The predicted optimum is rho (pi_w / pi_l)^(k / beta) / Z over whole completions. k is 1 for independent sides. For
judged pairs, k (log pi_w - log pi_l) stands in for the judge's reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import nn
from tqdm.auto import tqdm

from lit_did.audit.report import Estimate
from lit_did.audit.sides.fitting import SideModels
from lit_did.audit.statistics import ratio_over_groups
from lit_did.data.dataset import Example
from lit_did.sampling import DIDSamples, prompt_seed, sample_did

NUM_SAMPLES = 64


class Line(NamedTuple):
    """Where the reference's margins lie between those of the sides: M_rho = (1 - s) M_w + s M_l + error."""

    s: Estimate
    """0: at the chosen side, 1: at the rejected side"""
    r_squared: Estimate
    """1 - sum error^2 / sum (M_l - M_w)^2"""


def line_between(chosen: ArrayLike, rejected: ArrayLike, reference: ArrayLike, groups: ArrayLike) -> Line:
    """Least squares of M_rho - M_w on M_l - M_w, through the origin, with intervals over prompts.

    R^2 compares the errors with the distance between the sides: 1 on the line, 0 or less where the reference is as far
    from the line as the sides are from each other. The usual R^2 divides by the sum of (M_rho - M_w)^2, which is 0 at
    s = 0. M_w and M_l are estimates. Their errors pull s towards 1/2 and lower R^2.

    Args:
        chosen: [pairs] M_w, the margins log p(y_w) - log p(y_l) by the chosen side's model.
        rejected: [pairs] M_l.
        reference: [pairs] M_rho.
        groups: [pairs] the number of each pair's prompt.

    Example:
        >>> line = line_between([1.0, 2.0, 4.0], [0.0, 4.0, 2.0], [0.75, 2.5, 3.5], range(3))
        >>> line.s.value, line.r_squared.value
        (0.25, 1.0)
    """
    w, l, rho = (np.asarray(margins, dtype=float) for margins in (chosen, rejected, reference))  # noqa: E741
    x, y = l - w, rho - w
    s = ratio_over_groups(x * y, x * x, groups)
    # The sum of squares is at its minimum in s, so that the error of s does not matter for it.
    unexplained = ratio_over_groups(np.square(y - s.value * x), x * x, groups)
    lower, upper = 1 - unexplained.upper, min(1.0, 1 - unexplained.lower)
    return Line(s, Estimate(1 - unexplained.value, lower, upper, unexplained.count))


def predicted_change(log_ratio: ArrayLike, log_partition: ArrayLike, *, exponent: float) -> np.ndarray:
    """log pi_DPO(y) - log rho(y) = exponent (log pi_w(y) - log pi_l(y)) - log Z.

    Args:
        log_ratio: [pairs, 2] log pi_w - log pi_l of the chosen and of the rejected completion.
        log_partition: [pairs] log Z = log E_rho[(pi_w / pi_l)^exponent], of each pair's prompt.
        exponent: k / beta.
    """
    return exponent * np.asarray(log_ratio, dtype=float) - np.asarray(log_partition, dtype=float)[:, None]


class Drawn(NamedTuple):
    """Draws for one prompt."""

    pair: int
    """a pair of the prompt"""
    optimum: DIDSamples
    """of the predicted optimum; its log-partition is log Z"""
    did: DIDSamples
    """of the predicted optimum's DID, proportional to (pi_w / pi_l)^(k / beta)"""


def draw(
    models: Sequence[SideModels],
    base: nn.Module,
    examples: Sequence[Example],
    folds: np.ndarray,
    pairs: Sequence[int],
    *,
    exponent: float,
    max_new_tokens: int,
    seed: int,
    progress: bool,
) -> list[Drawn]:
    """Draws for the prompts of some pairs, by side models that were not fitted to these prompts.

    Args:
        models: The side models of each fold.
        base: The reference.
        examples: All pairs.
        folds: [pairs] their folds.
        pairs: The pairs whose prompts are used.
        exponent: k / beta.
        max_new_tokens: Where completions are cut.
        seed: Of the draws.
        progress: Whether a terminal shows a progress bar.
    """
    found = []
    for number, pair in enumerate(tqdm(pairs, desc="Predicted policy", disable=None if progress else True)):
        own = models[folds[pair]]
        options: dict[str, Any] = {
            "exponent": exponent,
            "max_new_tokens": max_new_tokens,
            "num_samples": NUM_SAMPLES,
            "seed": prompt_seed(seed, number),
            "progress": False,
        }
        prompt = [int(token) for token in examples[pair].prompt_ids]
        optimum = sample_did(own.chosen, own.rejected, prompt, prior=base, **options)
        found.append(Drawn(pair, optimum, sample_did(own.chosen, own.rejected, prompt, **options)))
    return found
