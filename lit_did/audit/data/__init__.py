"""What the pairs alone show, without a model: faults of rows, length, words, habits, and the kinds of pairs."""

from __future__ import annotations

import numpy as np

from lit_did.audit.blocks import Block, Paragraph, Picture, Table
from lit_did.audit.data.bag_of_words import BagOfWords, draw_folds
from lit_did.audit.data.copies import find_contradictions, find_duplicates, find_identical, find_unusable
from lit_did.audit.data.habits import Habit, find_habits, rank_habits, read_habits
from lit_did.audit.data.keys import read_keys
from lit_did.audit.data.kinds import tables_of_kinds
from lit_did.audit.data.leaks import find_leaks
from lit_did.audit.data.length import find_length_bias, log_ratios, longer_is_chosen
from lit_did.audit.data.near import Shingles, find_near_duplicates
from lit_did.audit.data.sample import draw_sample, read_words
from lit_did.audit.data.thinking import find_empty_thinking
from lit_did.audit.page.pictures import bars, histogram
from lit_did.audit.report import Estimate, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS, share_over_groups
from lit_did.audit.wording import NOTHING, cell

_SHOWN = 12  # habits in the picture


def examine_data(data: AuditData, settings: Settings, *, val: AuditData | None) -> Part:
    """Examines the pairs alone.

    Args:
        data: The pairs.
        settings: Of the audit. The seed is that of all draws.
        val: Validation pairs. None: nothing is said of leaks.
    """
    seed, count = settings.seed, len(data)
    keys = read_keys(data)
    groups, sample = data.prompt_groups, draw_sample(data, seed)
    folds = draw_folds(groups, seed)
    sampled = list(read_words(data, sample))
    shingles, classifier = Shingles(words for _, words in sampled), BagOfWords(sampled, folds)
    del sampled
    lengths, probabilities = np.empty((count, 3), np.int64), np.empty(count)
    bands = []
    for places, words in read_words(data, np.arange(count)):
        lengths[places] = words.lengths.reshape(-1, 3)
        probabilities[places] = classifier.probabilities(words, folds[places])
        bands.append(shingles.bands(words))
    ratios = log_ratios(lengths[:, 1:])
    signs = read_habits(data, sample)
    habits = rank_habits(signs, ratios[sample], groups[sample])
    duplicates, is_copy = find_duplicates(data, keys)
    near = find_near_duplicates(data, shingles, np.concatenate(bands), lengths.sum(1), is_copy, keys)
    findings = [
        find_unusable(data),
        find_identical(data, keys),
        duplicates,
        near,
        find_contradictions(data, keys),
        *([] if val is None else [find_leaks(data, shingles, val)]),
        find_empty_thinking(data),
        find_length_bias(data, ratios, groups, seed),
        find_habits(data, habits, seed),
    ]
    longer = longer_is_chosen(ratios)
    right = np.where(np.isnan(probabilities), np.nan, (np.sign(probabilities - 0.5) + 1) / 2)
    baselines = {"longer": share_over_groups(longer, groups), "words": share_over_groups(right, groups)}
    tables = tables_of_kinds(data, lengths, longer, right, groups)
    return Part(
        "data",
        "The data",
        "What the pairs alone show: faults of rows, and how far length, words and habits predict the label.",
        findings,
        [
            *_baselines(baselines, len(sample), count),
            *_lengths(lengths, ratios),
            *_habits(habits, len(sample)),
            *tables,
        ],
        {"chosen_words": lengths[:, 1], "rejected_words": lengths[:, 2], "words_probability": probabilities},
        {
            "num_pairs": count,
            "num_prompts": int(groups.max(initial=-1)) + 1,
            "num_sampled": len(sample),
            "baselines": baselines,
            "length": _length_figures(lengths, ratios, groups),
            "habits": {habit.name: {**habit._asdict(), "is_fault": habit.is_fault} for habit in habits},
        },
    )


def _baselines(baselines: dict[str, Estimate], sampled: int, count: int) -> list[Block]:
    of = f"{sampled:,} of {count:,} pairs, drawn at random" if sampled < count else "the pairs"
    rows = [["take the longer side", baselines["longer"]], ["bag of words", baselines["words"]]]
    note = (
        "A reward must beat these. A tie is half right. The bag of words is a logistic regression on the counts "
        f"of words, fitted to {of}, in five-fold cross-validation over prompts."
    )
    return [Table("Baselines", ("baseline", "accuracy"), rows, note)]


def _length_figures(lengths: np.ndarray, ratios: np.ndarray, groups: np.ndarray) -> dict[str, object]:
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95], axis=0).T.tolist()
    return {
        "longer": share_over_groups(ratios > 0, groups),
        "shorter": share_over_groups(ratios < 0, groups),
        "equal": share_over_groups(ratios == 0, groups),
        "median_ratio": float(np.exp(np.median(ratios))),
        "quantiles": dict(zip(("prompt", "chosen", "rejected"), quantiles, strict=True)),
    }


def _lengths(lengths: np.ndarray, ratios: np.ndarray) -> list[Block]:
    names = ("prompt", "chosen", "rejected")
    low, middle, high = np.quantile(lengths, [0.05, 0.5, 0.95], axis=0)
    rows = [
        [name, float(mean), float(a), float(b), float(c)]
        for name, mean, a, b, c in zip(names, lengths.mean(0), low, middle, high, strict=True)
    ]
    share = [float(np.mean(ratios > 0)), float(np.mean(ratios < 0)), float(np.mean(ratios == 0))]
    note = (
        "In words, without punctuation. "
        f"The chosen side is longer in {share[0]:.0%} of the pairs, shorter in {share[1]:.0%} and equally long in "
        f"{share[2]:.0%}. The median ratio of the lengths is {np.exp(np.median(ratios)):.2f}."
    )
    svg = histogram({"chosen": lengths[:, 1], "rejected": lengths[:, 2]}, "length (words)")
    described = (
        f"Histograms of the lengths; the medians are {middle[1]:.0f} words (chosen) and {middle[2]:.0f} (rejected)."
    )
    return [
        Table("Lengths", ("text", "mean", "5%", "median", "95%"), rows, note),
        Picture("Lengths of the completions", svg, described),
    ]


def _habits(habits: list[Habit], sampled: int) -> list[Block]:
    if not habits:
        return [Paragraph("No habit of formatting or phrasing tells the sides of any pair apart.")]
    rows = [
        [
            habit.name,
            cell(habit.accuracy),
            habit.coverage,
            cell(habit.near),
            cell(habit.beyond),
            habit.p,
            "yes" if habit.is_fault else "",
        ]
        for habit in sorted(habits, key=lambda habit: habit.accuracy.count < MIN_PROMPTS)
    ]
    names = ("habit", "accuracy", "pairs it tells apart", "at about equal length", "beyond length", "p", "fault")
    note = (
        f"How often the side that alone has the habit is the chosen one, over {sampled:,} pairs. p is Holm's over all "
        'habits. "At about equal length" takes pairs whose lengths differ by 25% at most. "Beyond '
        f'length" is the accuracy less what the lengths of the sides would give. {NOTHING}'
    )
    blocks: list[Block] = [Table("Habits", names, rows, note)]
    shown = [habit for habit in habits if habit.accuracy.count >= MIN_PROMPTS][:_SHOWN]
    if shown:
        svg = bars([habit.name for habit in shown], [habit.accuracy for habit in shown], "accuracy", line=0.5)
        best = f"The habit that predicts best is {shown[0].name}, with an accuracy of {shown[0].accuracy}."
        blocks.append(Picture("How well habits predict the chosen side", svg, best))
    return blocks
