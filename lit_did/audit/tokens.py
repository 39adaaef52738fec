"""The pairs as tokens: what `max_length` cuts, what is scored, and what a chat template does to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lit_did.audit.blocks import Block, Paragraph, ScoredPair, ScoredPairs, ScoredSide, Table
from lit_did.audit.data.thinking import CLOSING
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import share_over_groups
from lit_did.audit.tokenized import tokenized
from lit_did.audit.wording import many, percent
from lit_did.data.dataset import ContextArrays, Example
from lit_did.data.pairs import prepare_pair
from lit_did.data.preview import completion_parts, prompt_parts, runs, shortened
from lit_did.data.rendering import Renderer
from lit_did.data.tokenizing import Context, TokenizedPair, TooLongError, tokenize_rendered, truncate_pair

MOST_PAIRS = 20_000  # of larger data a sample is tokenised
LARGEST_SHARE = 0.01  # of the pairs whose completions lose tokens, by the lower end of the interval
_WHOLE = 2**31 - 1
_QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
_THINK = re.compile("|".join(map(re.escape, CLOSING)), re.IGNORECASE)


def examine_tokens(data: AuditData, settings: Settings, tokenizer: Any) -> Part:
    """What tokenising and `max_length` do to the pairs.

    Args:
        data: The pairs.
        settings: With the arguments of tokenising.
        tokenizer: A transformers tokenizer.
    """
    places = np.arange(len(data))
    if len(data) > MOST_PAIRS:
        places = np.sort(np.random.default_rng(settings.seed).choice(len(data), MOST_PAIRS, replace=False))
    max_length = settings.tokenization["max_length"]
    cutting = {n: v for n, v in settings.tokenization.items() if n in ("truncation", "min_completion_tokens")}
    rows = [data.rows[i] for i in places]
    options = {n: v for n, v in settings.tokenization.items() if n not in cutting}
    dataset = tokenized(rows, Settings(tokenization={**options, "max_length": _WHOLE}), tokenizer)

    place_of = dict(zip((row.index for row in rows), places.tolist(), strict=True))
    columns = {
        name: np.full(len(data), np.nan)
        for name in ("prompt_whole_tokens", "chosen_whole_tokens", "rejected_whole_tokens", "lost_tokens")
    }
    needed: list[int] = []  # max_length that keeps a pair whole
    lost: dict[int, int] = {}  # completion tokens, by row number
    cut_prompts = lost_in_prompts = 0
    dropped: list[int] = []
    for example in dataset:
        place = place_of[example.index]
        whole = _as_lists(example)
        sides = [len(whole.chosen_ids), len(whole.rejected_ids)]
        contexts = [0 if c is None else len(c.ids) for c in (whole.chosen_context, whole.rejected_context)]
        needed.append(len(whole.prompt_ids) + max(map(sum, zip(sides, contexts, strict=True))))
        columns["prompt_whole_tokens"][place] = len(whole.prompt_ids)
        columns["chosen_whole_tokens"][place], columns["rejected_whole_tokens"][place] = sides
        columns["lost_tokens"][place] = 0
        if needed[-1] <= max_length:
            continue
        cut = _truncated(whole, max_length, tokenizer, cutting)
        if cut is None:
            dropped.append(example.index)
            columns["lost_tokens"][place] = sum(sides)
            continue
        fewer = sum(sides) - len(cut.chosen_ids) - len(cut.rejected_ids)
        columns["lost_tokens"][place] = fewer
        if fewer:
            lost[example.index] = fewer
        cut_prompts += cut.prompt_ids != whole.prompt_ids
        lost_in_prompts += len(whole.prompt_ids) - len(cut.prompt_ids)

    part = Part(
        "tokens",
        "As tokens",
        f"What the tokenizer makes of the pairs, and what a `max_length` of {max_length:,} cuts.",
        columns={name: values.tolist() for name, values in columns.items()},
    )
    if len(places) < len(data):
        part.blocks.append(
            Paragraph(
                f"A random sample of {len(places):,} of the {len(data):,} pairs is tokenised (seed {settings.seed})."
            )
        )
    groups = data.prompt_groups[[place_of[example.index] for example in dataset]]
    is_sample = len(places) < len(data)
    truncation = _truncation(dataset, max_length, lost, dropped, needed, columns, groups, is_sample)
    part.findings.append(truncation)
    part.findings += _notes(dataset)
    part.figures = {
        "num_pairs": len(dataset),
        "num_unusable": len(dataset.skipped),
        "num_cut_prompts": cut_prompts,
        "num_cut_completions": len(lost),
        "num_too_long": len(dropped),
        "lost_prompt_tokens": lost_in_prompts,
        "lost_completion_tokens": sum(lost.values()),
        "truncated_share": truncation.value,
        "max_length_for": {f"{100 * q:.0f}%": _quantile(needed, q) for q in (0.95, 0.99, 1.0)},
    }
    part.blocks += [
        _lengths(columns, needed, max_length),
        Paragraph(
            f"A `max_length` of {max_length:,} cuts {many(cut_prompts, 'prompt')} ({lost_in_prompts:,} tokens) and "
            f"completions of {many(len(lost), 'pair')} ({sum(lost.values()):,} tokens)"
            + (f", and leaves out {many(len(dropped), 'pair')}" if dropped else "")
            + f". {_quantile(needed, 0.95):,} would keep 95% of the pairs whole, {_quantile(needed, 0.99):,} 99%."
        ),
        *(Paragraph(text.partition(": ")[2]) for kind, text in dataset.warnings("pairs").items() if kind in _NOTES),
    ]
    if len(dataset.skipped):
        first = dataset.skipped[0]
        part.blocks.append(
            Paragraph(
                f"{many(len(dataset.skipped), 'pair')} cannot be tokenised: left out, the first in "
                f"{first.where}: {first.reason}"
            )
        )
    part.blocks.append(_scored_pairs(data, settings, tokenizer, dataset, place_of, needed, lost))
    return part


def _truncated(whole: TokenizedPair, max_length: int, tokenizer: Any, cutting: dict[str, Any]) -> TokenizedPair | None:
    """The pair after truncation. None: it is left out."""
    try:
        return truncate_pair(whole, max_length, tokenizer.bos_token_id, **cutting)
    except TooLongError:
        return None
    except ValueError:  # other turns fill max_length
        return None


def _as_lists(example: Example) -> TokenizedPair:
    def context(arrays: ContextArrays | None) -> Context | None:
        return None if arrays is None else Context(arrays.ids.tolist(), arrays.places.tolist())

    return TokenizedPair(
        example.prompt_ids.tolist(),
        example.chosen_ids.tolist(),
        example.rejected_ids.tolist(),
        context(example.chosen_context),
        context(example.rejected_context),
    )


def _quantile(values: Sequence[float], q: float) -> int:
    """The smallest value that a share `q` of the values does not exceed."""
    return int(np.quantile(values, q, method="inverted_cdf"))


# ------------------------------------------------------------------------------------------------------------- findings


def _truncation(
    dataset: Any,
    max_length: int,
    lost: dict[int, int],
    dropped: list[int],
    needed: list[int],
    columns: dict[str, np.ndarray],
    groups: np.ndarray,
    is_sample: bool,
) -> Finding:
    worse = {*lost, *dropped}
    value = share_over_groups([example.index in worse for example in dataset], groups)
    raised = value.lower > LARGEST_SHARE
    of = f" of a random sample of {many(len(dataset), 'pair')}" if is_sample else ""
    if not lost and not dropped:
        sentence = f"No completion{of} loses tokens to the `max_length` of {max_length:,}."
    else:
        total = float(np.nansum(columns["chosen_whole_tokens"]) + np.nansum(columns["rejected_whole_tokens"]))
        tokens = float(np.nansum(columns["lost_tokens"]))
        what = "lose completion tokens to" if len(lost) + len(dropped) != 1 else "loses completion tokens to"
        sentence = (
            f"{many(len(lost) + len(dropped), 'pair')}{of} ({percent(value.value)}) {what} the `max_length` of "
            f"{max_length:,}: "
            f"{tokens:,.0f} tokens, {percent(tokens / total)} of all completion tokens."
        )
    number = {example.index: tokens for example, tokens in zip(dataset, needed, strict=True)}
    rows = sorted([*lost, *dropped], key=lambda row: -lost.get(row, number[row]))
    enough = _quantile(needed, 0.99)
    return Finding(
        "truncated",
        sentence,
        f"Set `max_length` to {enough}, which keeps 99% of the pairs whole, or drop the pairs that are longer."
        if raised
        else "",
        raised=raised,
        severity=value.value,
        rows=rows,
        evidence={
            row: f"{number[row]:,} tokens; {lost[row]:,} completion tokens are cut"
            if row in lost
            else f"{number[row]:,} tokens; left out"
            for row in rows
        },
        value=value,
    )


_NOTES = ("turns", "header", "control")


def _notes(dataset: Any) -> list[Finding]:
    """What `PreferenceDataset` warns of, as findings. The page has the whole warnings beside them."""
    warnings = dataset.warnings("pairs")
    notes = {
        "header": (
            "header_scored",
            f"The chat template's own start of an answer is scored in {dataset.num_with_header:,} of {len(dataset):,} "
            "pairs.",
            "Set `chat_template_kwargs`, or a `chat_template` whose generation prompt ends where answers start.",
            dataset.num_with_header,
        ),
        "control": (
            "control_as_text",
            f"The text of {dataset.num_spelling_control:,} of {len(dataset):,} pairs spells control tokens, which are "
            "encoded as text.",
            "Set `parse_special_tokens` if a chat template made the text.",
            dataset.num_spelling_control,
        ),
        "turns": (
            "no_turns",
            "The pairs are plain text, but the tokenizer has a chat template.",
            "Set `as_chat` unless the model continues plain text.",
            len(dataset),
        ),
    }
    return [
        Finding(name, sentence, advice, raised=False, severity=count / len(dataset), value=Estimate(count))
        for kind, (name, sentence, advice, count) in notes.items()
        if kind in warnings
    ]


def _lengths(columns: dict[str, np.ndarray], needed: list[int], max_length: int) -> Table:
    rows = []
    for title, values in (
        ("prompt", columns["prompt_whole_tokens"]),
        ("chosen", columns["chosen_whole_tokens"]),
        ("rejected", columns["rejected_whole_tokens"]),
        ("prompt and the longer completion", np.array(needed, dtype=float)),
    ):
        known = values[~np.isnan(values)]
        rows.append((title, *(_quantile(known, q) for q in _QUANTILES), round(float(known.mean()), 1)))
    return Table(
        "Lengths in tokens, before truncation",
        ("what", "median", "90%", "95%", "99%", "longest", "mean"),
        rows,
        f"A pair is kept whole if the last row is at most `max_length`, which is {max_length:,}.",
    )


# --------------------------------------------------------------------------------------------------------- scored pairs


def _scored_pairs(
    data: AuditData,
    settings: Settings,
    tokenizer: Any,
    dataset: Any,
    place_of: dict[int, int],
    needed: list[int],
    lost: dict[int, int],
) -> Block:
    """Two typical pairs, and one each that is cut, has a think block, a header, or several turns."""
    options = {n: v for n, v in settings.tokenization.items() if n in _RENDERING}
    renderer = Renderer(tokenizer, **options)
    as_chat = settings.tokenization.get("as_chat", False)
    cutting = {n: v for n, v in settings.tokenization.items() if n in ("truncation", "min_completion_tokens")}
    places = [place_of[example.index] for example in dataset]
    typical = np.argsort(np.abs(np.array(needed) - np.median(needed)), kind="stable")[:2]
    wanted: dict[int, str] = {places[i]: "a pair of typical length" for i in typical}

    def want(candidates: Iterable[int], remark: str) -> None:
        place = next(iter(candidates), None)
        if place is not None:
            wanted[place] = remark if place not in wanted else f"{wanted[place]}; {remark}"

    want((place_of[row] for row in lost), "max_length cuts it")
    want((place for place in places if any(map(_THINK.search, data.texts(place)[1:]))), "a think block")
    several = (place_of[e.index] for e in dataset if (e.chosen_context, e.rejected_context) != (None, None))
    want(several, "turns within a completion, which are not scored")
    pairs = []
    for place, remark in wanted.items():
        row = data.rows[place]
        rendered = renderer(prepare_pair(row.pair, as_chat))
        (whole,) = tokenize_rendered([rendered], tokenizer)
        cut = _truncated(whole, settings.tokenization["max_length"], tokenizer, cutting)
        if cut is None:
            continue
        prompt = list(_stretches(runs(prompt_parts(whole.prompt_ids, cut.prompt_ids), [], tokenizer, renderer.control)))
        sides = []
        for name in ("chosen", "rejected"):
            ids, context = getattr(whole, f"{name}_ids"), getattr(whole, f"{name}_context")
            parts = completion_parts(ids, context, len(getattr(cut, f"{name}_ids")))
            text = runs(parts, whole.prompt_ids, tokenizer, renderer.control)
            sides.append(ScoredSide(name, [*prompt, *_stretches(text, header=rendered.header)]))
        pairs.append(ScoredPair(row.index, sides, remark))
    return ScoredPairs(
        "What is scored",
        pairs,
        "The loss reads the log-probabilities of what is scored, given all that comes before it.",
    )


_RENDERING = ("chat_template", "chat_template_kwargs", "parse_special_tokens")


def _stretches(texts: Iterable[tuple[str, bool, str]], header: str = "") -> Iterator[tuple[str, str]]:
    """The stretches of a `ScoredSide`, from what `runs` yields.

    Args:
        texts: A kind, whether it is control tokens, and the text.
        header: What the template puts before the answer, at the start of what is scored.
    """
    closing = ""  # what ends the think block that is open
    for kind, is_control, text in texts:
        if header and kind in ("scored", "cut"):
            shared = _common_start(header, text)
            if shared:
                yield "header" if kind == "scored" else kind, text[:shared]
            header, text = (header[shared:], text[shared:]) if shared else ("", text)
        if not text:
            continue
        if kind == "cut" or is_control:
            yield "cut" if kind == "cut" else "control", shortened(text)
            continue
        if kind != "scored":
            yield kind, shortened(text)
            continue
        while text:
            if not closing:
                opening = _THINK.search(text)
                start = opening.start() if opening else len(text)
                if start:
                    yield "scored", shortened(text[:start])
                text = text[start:]
                closing = CLOSING[opening[0].lower()] if opening else ""
                continue
            end = re.search(re.escape(closing), text, re.IGNORECASE)
            stop = end.end() if end else len(text)
            yield "think", shortened(text[:stop])
            text = text[stop:]
            closing = "" if end else closing


def _common_start(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
