"""Pairs whose prompt, or nearly the same prompt, is in the validation data."""

from __future__ import annotations

import numpy as np

from lit_did.audit.data.near import Shingles, similar_prompts
from lit_did.audit.data.sample import read_words
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.source import AuditData, has_prompt
from lit_did.audit.wording import many, percent

_TRIED = 4  # validation prompts of each band that a prompt is compared with


def find_leaks(data: AuditData, shingles: Shingles, val: AuditData) -> Finding:
    """Pairs whose prompt is in the validation data: equal but for case, whitespace and marks at its ends, or nearly."""
    keys, others = _keys(data), _keys(val)
    first: dict[int, int] = {}
    for place, key in others.items():
        first.setdefault(key, place)
    exact = {place: first[key] for place, key in keys.items() if key in first}
    near = _near(data, shingles, val, exact)
    rows, of_val = data.row_numbers, val.row_numbers.tolist()
    evidence = {
        int(rows[place]): f"Has {how} prompt of {val.called(of_val[other])} of the validation data."
        for found, how in ((exact, "the"), (near, "nearly the"))
        for place, other in found.items()
    }
    numbers, total = list(evidence), len(data)
    if not numbers:
        return Finding("leaked", f"No prompt is in the {many(len(val), 'validation pair')} too.", "", False, 0.0)
    shared = {keys[place] for place in exact}
    in_val = {place for place, key in others.items() if key in shared} | set(near.values())
    share = len(numbers) / total
    if exact and near:
        what = f"the prompt of a validation pair ({len(exact):,}) or nearly that of one ({len(near):,})"
    else:
        what = f"{'nearly ' if near else ''}the prompt of a validation pair"
    have = "has" if len(numbers) == 1 else "have"
    sentence = (
        f"{many(len(numbers), 'pair')} of {total:,} ({percent(share)}) {have} {what}. "
        f"This concerns {len(in_val):,} of {many(len(val), 'validation pair')}."
    )
    value = Estimate(share, count=total)
    look = "Look at the nearly equal ones: prompts of one template may be among them. " if near else ""
    advice = f"{look}Remove {'it' if len(numbers) == 1 else 'what leaks'} from one of both."
    return Finding("leaked", sentence, advice, True, share, numbers, None, evidence, value)


def _keys(data: AuditData) -> dict[int, int]:
    """By the place of a pair with a prompt, the number of its prompt."""
    return {
        place: key
        for place, (key, row) in enumerate(zip(data.prompt_keys.tolist(), data.rows, strict=True))
        if has_prompt(row.pair)
    }


def _near(data: AuditData, shingles: Shingles, val: AuditData, exact: dict[int, int]) -> dict[int, int]:
    """By the place of a pair, that of a validation pair with nearly the same prompt."""
    theirs = [(places, shingles.bands(words, prompts=True)) for places, words in read_words(val, np.arange(len(val)))]
    bands = np.concatenate([found for _, found in theirs])
    order = np.argsort(bands, axis=0, kind="stable")
    ordered = np.take_along_axis(bands, order, 0)
    candidates: set[tuple[int, int]] = set()
    left = np.array([place for place in range(len(data)) if place not in exact], np.int64)
    for places, words in read_words(data, left):
        for number, band in enumerate(shingles.bands(words, prompts=True).T):
            starts = np.searchsorted(ordered[:, number], band)
            for step in range(_TRIED):
                at = np.minimum(starts + step, len(val) - 1)
                same = (ordered[at, number] == band) & (band != 0) & (starts + step < len(val))
                candidates |= set(zip(places[same].tolist(), order[at[same], number].tolist(), strict=True))
    if not candidates:
        return {}
    prompts = [
        _prompts(source, shingles, {pair[part] for pair in candidates}) for part, source in enumerate((data, val))
    ]
    found: dict[int, int] = {}
    for place, other in sorted(candidates):
        if place not in found and similar_prompts(shingles, prompts[0][place], prompts[1][other]):
            found[place] = other
    return found


def _prompts(data: AuditData, shingles: Shingles, places: set[int]) -> dict[int, np.ndarray]:
    known: dict[int, np.ndarray] = {}
    for numbers, words in read_words(data, sorted(places)):
        known |= {place: texts[0] for place, texts in zip(numbers.tolist(), shingles.sides(words), strict=True)}
    return known
