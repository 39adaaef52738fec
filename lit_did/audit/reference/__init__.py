"""What a reference says of the pairs: how likely and how alike both sides are, and what training costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special
from scipy.sparse import csr_array
from torch import nn

from lit_did.audit.blocks import Block, PairList, Paragraph, Picture, Table
from lit_did.audit.label_features import counts_of
from lit_did.audit.page import pictures
from lit_did.audit.reference.cost import examine_cost
from lit_did.audit.reference.measuring import SIDES, Answers, edit_similarity, measure
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import mean_over_groups, share_over_groups
from lit_did.audit.tokenized import tokenized
from lit_did.audit.wording import many
from lit_did.data.dataset import PreferenceDataset

LARGEST_EXCESS = 1.0  # nats per token above the reference's own completions
FAMILY_P = 0.001  # the chance that any completion of the data is flagged as off-policy by chance
LEAST_OFF_POLICY = 0.05  # of the pairs, by the lower end of the interval
LEAST_SIMILARITY = 0.9  # at most a tenth of the tokens differ
LARGEST_DIFFERENCE = 0.1  # nats per token between the sides
LEAST_INDISTINCT = 0.01  # of the pairs, by the lower end of the interval
_COUNTED = 100_000  # pairs whose tokens are counted
_SHOWN = 10


@dataclass
class ReferencePart(Part):
    """The part of the reference.

    Attributes:
        hidden_difference: [pairs, H] float32, the mean last hidden state of the chosen side less that of the rejected
            one. More than 512 dimensions are projected to 512 at random. None: the model has none.
        end_difference: The same of the last hidden states that predict the last token of a side.
        token_counts: Of the chosen and of the rejected side, [pairs, tokens] how often each token comes. None: there
            are more than 100,000 pairs.
    """

    hidden_difference: np.ndarray | None = None
    end_difference: np.ndarray | None = None
    token_counts: tuple[csr_array, csr_array] | None = None


def examine_reference(data: AuditData, settings: Settings, tokenizer: Any, reference: nn.Module) -> ReferencePart:
    """What the reference says of the pairs, from one pass over both sides.

    Args:
        data: The pairs.
        settings: With the arguments of tokenising and the number of pairs a forward pass.
        tokenizer: The reference's.
        reference: The model. A PeftModel is measured as it is, with the adapters that are active.
    """
    dataset = tokenized(data.rows, settings, tokenizer)
    start = time.perf_counter()
    answers = measure(dataset, reference, settings.batch_size, seed=settings.seed, progress=settings.progress)
    seconds = time.perf_counter() - start
    place_of = {int(row): place for place, row in enumerate(data.row_numbers)}
    places = np.array([place_of[example.index] for example in dataset])
    groups = data.prompt_groups[places]
    similarity = np.array([edit_similarity(e.chosen_ids, e.rejected_ids) for e in dataset])

    part = ReferencePart(
        "reference",
        "What the reference says",
        "The reference reads both sides of every pair once. What it finds likely is where training starts.",
    )

    def column(values: np.ndarray) -> list[float]:
        result = np.full(len(data), np.nan)
        result[places] = values
        return result.tolist()

    def spread(values: np.ndarray) -> np.ndarray:
        result = np.full((len(data), values.shape[1]), np.nan, np.float32)
        result[places] = values
        return result

    measured = dict(zip(SIDES, (answers.chosen, answers.rejected), strict=True))
    for side, of in measured.items():
        part.columns[f"{side}_reference_logprob"] = column(of.logprob)
        part.columns[f"{side}_num_tokens"] = column(of.num_tokens)
        part.columns[f"{side}_reference_entropy"] = column(of.entropy)
        part.columns[f"{side}_excess"] = column(of.excess)
    part.columns["edit_similarity"] = column(similarity)
    if answers.alike is not None:
        part.columns["hidden_cosine"] = column(answers.alike.cosine)
        part.columns["ches"] = column(answers.alike.ches)
        part.hidden_difference = spread(answers.alike.difference)
        part.end_difference = spread(answers.alike.end_difference)
    if len(dataset) <= _COUNTED:
        part.token_counts = _token_counts(dataset, places, len(data))

    numbers = data.row_numbers[places]
    off_policy, excesses = _off_policy(answers, groups, numbers)
    part.findings = [
        *_not_finite(answers, numbers, data),
        off_policy,
        _indistinct(answers, similarity, groups, numbers),
    ]
    part.figures = {
        "num_pairs": len(dataset),
        "num_not_finite": sum(len(finding.rows) for finding in part.findings if finding.name == "not_finite"),
        "excess": excesses,
        "logprob_per_token": {
            side: mean_over_groups(of.logprob / of.num_tokens, groups, of.num_tokens) for side, of in measured.items()
        },
        "reference_prefers_chosen": _preferences(answers, groups),
    }
    part.blocks = [
        _sides_table(answers, groups, part.figures),
        _picture(answers),
        *_alike(answers, similarity, numbers),
    ]
    blocks, figures = examine_cost(dataset, reference, settings, seconds)
    part.blocks += blocks
    part.figures["cost"] = figures
    return part


def _token_counts(dataset: PreferenceDataset, places: np.ndarray, num_rows: int) -> tuple[csr_array, csr_array]:
    """Of the chosen and of the rejected side, [num_rows, tokens] how often each token comes."""
    sides = [[example.chosen_ids for example in dataset], [example.rejected_ids for example in dataset]]
    shape = (num_rows, 1 + max(int(ids.max(initial=0)) for side in sides for ids in side))
    chosen, rejected = (counts_of(side, places, shape) for side in sides)
    return chosen, rejected


def _preferences(answers: Answers, groups: np.ndarray) -> dict[str, Estimate]:
    """How often the chosen side is the likelier one."""
    one, other = answers.chosen, answers.rejected

    def wins(difference: np.ndarray) -> Estimate:
        return share_over_groups((np.sign(difference) + 1) / 2, groups)

    return {
        "in total": wins(one.logprob - other.logprob),
        "per token": wins(one.logprob / one.num_tokens - other.logprob / other.num_tokens),
    }


def _sides_table(answers: Answers, groups: np.ndarray, figures: Mapping[str, Any]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for side, of in zip(SIDES, (answers.chosen, answers.rejected), strict=True):
        rows.append(
            (
                side,
                mean_over_groups(of.num_tokens, groups),
                figures["logprob_per_token"][side],
                mean_over_groups(of.entropy, groups, of.num_tokens),
                figures["excess"][side],
            )
        )
    likelier = figures["reference_prefers_chosen"]
    return Table(
        "Both sides under the reference",
        ("side", "tokens", "log-probability per token", "entropy per token", "surprisal less entropy"),
        rows,
        "In nats. The last column says how far the side is off-policy: it is 0 for completions that the reference "
        "samples at temperature 1, and below 0 for completions that are more predictable than these. The chosen side "
        f"is the likelier one in {likelier['in total']} of the pairs, and per token in {likelier['per token']}.",
    )


def _picture(answers: Answers) -> Picture:
    excesses = {"chosen": answers.chosen.excess, "rejected": answers.rejected.excess}
    return Picture(
        "How far off-policy the completions are",
        pictures.histogram(excesses, "surprisal less entropy (nats per token)", line=0.0),
        "Histograms of surprisal less entropy per token, of chosen and of rejected completions.",
        "Completions that the reference samples itself lie around 0. Those on the right it would hardly write.",
    )


def _not_finite(answers: Answers, numbers: np.ndarray, data: AuditData) -> list[Finding]:
    """Pairs of which the reference gives no finite log-probability and entropy."""
    of_sides = [values for of in (answers.chosen, answers.rejected) for values in (of.logprob, of.entropy)]
    broken = numbers[~np.isfinite(of_sides).all(axis=0)].tolist()
    if not broken:
        return []
    return [
        Finding(
            "not_finite",
            "Values of the reference that are not finite are left out of every figure: those of "
            f"{len(broken):,} of {many(len(numbers), 'pair')}, the first in {data.called(broken[0])}.",
            "Check the model's weights, and run it in float32 or bfloat16.",
            raised=False,
            severity=1.0,
            rows=broken,
        )
    ]


def _off_policy(answers: Answers, groups: np.ndarray, numbers: np.ndarray) -> tuple[Finding, dict[str, Estimate]]:
    """Completions that are far more surprising than the reference's own."""
    sides = dict(zip(SIDES, (answers.chosen, answers.rejected), strict=True))
    excess = {side: mean_over_groups(of.excess, groups, of.num_tokens) for side, of in sides.items()}
    limit = -float(special.ndtri(FAMILY_P / (2 * len(numbers))))
    far = {side: (of.excess > LARGEST_EXCESS) & (of.z > limit) for side, of in sides.items()}
    flagged = np.flatnonzero(far["chosen"] | far["rejected"])
    worst = np.maximum(*(np.where(far[side], of.excess, 0) for side, of in sides.items()))
    flagged = flagged[np.argsort(-worst[flagged], kind="stable")]
    found = share_over_groups(far["chosen"] | far["rejected"], groups)
    raised = found.lower > LEAST_OFF_POLICY
    less = " (below 0: less)" if min(estimate.value for estimate in excess.values()) < 0 else ""
    sentence = (
        f"Chosen completions surprise the reference by {excess['chosen']} nats per token more than its own samples "
        f"would, rejected ones by {excess['rejected']}{less}"
        + (
            f"; {many(len(flagged), 'pair')} {'has' if len(flagged) == 1 else 'have'} a side above {LARGEST_EXCESS:g}."
            if len(flagged)
            else "."
        )
    )
    advice = (
        "Fine-tune the reference on the chosen completions first, or let the reference write the completions."
        if raised
        else ""
    )
    evidence = {
        int(numbers[i]): ", ".join(
            f"{side} {of.excess[i]:.2f} nats per token above the reference's own"
            for side, of in sides.items()
            if far[side][i]
        )
        for i in flagged
    }
    rows = [int(row) for row in numbers[flagged]]
    finding = Finding("off_policy", sentence, advice, raised, found.value, rows, (), evidence, found)
    return finding, excess


def _indistinct(answers: Answers, similarity: np.ndarray, groups: np.ndarray, numbers: np.ndarray) -> Finding:
    """Pairs of nearly the same tokens that the reference finds equally likely."""
    one, other = answers.chosen, answers.rejected
    difference = np.abs(one.logprob / one.num_tokens - other.logprob / other.num_tokens)
    hit = (similarity >= LEAST_SIMILARITY) & (difference <= LARGEST_DIFFERENCE)
    alike = np.flatnonzero(hit)
    alike = alike[np.argsort(-similarity[alike], kind="stable")]
    found = share_over_groups(hit, groups)
    raised = found.lower > LEAST_INDISTINCT
    count = f"{many(len(alike), 'pair')} {'has' if len(alike) == 1 else 'have'}"
    return Finding(
        "indistinct",
        f"{count} sides that the reference can hardly tell apart, which is {100 * found.value:.1f}% of the pairs; "
        "training on them may lower the likelihood of both sides."
        if len(alike)
        else "No pair has sides that the reference can hardly tell apart.",
        f"Drop the {many(len(alike), 'flagged pair')}, or write sides that differ in more than a few words."
        if raised
        else "",
        raised,
        found.value,
        [int(row) for row in numbers[alike]],
        evidence={
            int(
                numbers[i]
            ): f"edit similarity {similarity[i]:.2f}, log-probabilities per token {difference[i]:.2f} nats apart"
            for i in alike
        },
        value=found,
    )


def _alike(answers: Answers, similarity: np.ndarray, numbers: np.ndarray) -> list[Block]:
    """How alike the sides are, and the pairs with the highest CHES score."""
    one, other = answers.chosen, answers.rejected
    measures = {
        "edit similarity of the tokens": similarity,
        "log-probability per token, difference in nats": np.abs(
            one.logprob / one.num_tokens - other.logprob / other.num_tokens
        ),
    }
    if answers.alike is not None:
        measures["cosine of mean last hidden states"] = answers.alike.cosine
        measures["CHES, per token"] = answers.alike.ches
    quantiles = (0.01, 0.1, 0.5, 0.9, 0.99)
    rows = [(name, *np.nanquantile(values, quantiles).tolist()) for name, values in measures.items()]
    table = Table(
        "How alike the two sides are",
        ("measure", "1%", "10%", "median", "90%", "99%"),
        rows,
        "CHES is <h_w, h_l> - |h_w|^2 with the mean last hidden states of the two sides (Razin et al. 2024, arXiv "
        "2410.08847). Pairs with a high CHES score make training lower the likelihood of the chosen side (likelihood "
        "displacement). It compares pairs of one model, and has no scale of its own.",
    )
    if answers.alike is None:
        no_states = "The model's logits are not a linear layer of last hidden states, so that there is no CHES score."
        return [table, Paragraph(no_states)]
    scores = answers.alike.ches
    highest = np.argsort(-scores, kind="stable")[:_SHOWN]
    remarks = {int(numbers[i]): f"CHES {scores[i]:.2f}, edit similarity {similarity[i]:.2f}" for i in highest}
    return [
        table,
        PairList(
            "The highest CHES scores: the largest risk of likelihood displacement",
            [int(numbers[i]) for i in highest],
            remarks,
        ),
    ]
