"""Prints pairs as they are scored: prompt, completions, turns that are not scored, and what `max_length` cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from lit_did.data.chunks import Tokenization
from lit_did.data.pairs import UnusableRowError
from lit_did.data.reading import SkippedRow, SourceRow
from lit_did.data.special_tokens import ControlTokens
from lit_did.data.tokenizing import Context, TokenizedPair, tokenize_rendered

_STYLES = {"prompt": "cyan", "scored": "green", "not scored": "bright_black", "cut": "red strike"}
_LONGEST = 1000  # characters of a part; of longer ones, the middle is left out

Part = tuple[str, list[int]]
"""a key of `_STYLES`, and ids of tokens"""


def print_pairs(rows: Iterable[SourceRow | SkippedRow], tokenization: Tokenization, n: int) -> None:
    """Prints the first `n` pairs that can be trained on, and why rows before them are left out."""
    for row in rows:
        if n == 0:
            return
        if isinstance(row, SkippedRow):
            print(f"{row.where} is left out: {row.reason}")
            continue
        try:
            (whole,) = tokenize_rendered([tokenization.render(row)], tokenization.tokenizer)
            cut = tokenization.cut(whole)
        except UnusableRowError as error:
            print(f"{row.where} is left out: {error}")
            continue
        print_pair(row.where, whole, cut, tokenization.tokenizer, tokenization.renderer.control)
        n -= 1


def print_pair(where: str, whole: TokenizedPair, cut: TokenizedPair, tokenizer: Any, control: ControlTokens) -> None:
    """Prints a pair, part by part, in colour if rich is installed and the output is a terminal.

    Args:
        where: What the pair is called.
        whole, cut: The pair before and after truncation.
        tokenizer: Turns the ids to text.
        control: The tokenizer's control tokens. Those that the pair spells as text are marked.
    """
    write = _writer()
    write(f"{where}: prompt {_count(cut.prompt_ids, whole.prompt_ids)}", "bold")
    prompt = prompt_parts(whole.prompt_ids, cut.prompt_ids)
    _print_parts(prompt, [], tokenizer, control, write)
    for side in ("chosen", "rejected"):
        ids, context = getattr(whole, f"{side}_ids"), getattr(whole, f"{side}_context")
        kept = getattr(cut, f"{side}_ids")
        write(f"{side}: {_count(kept, ids)} scored", "bold")
        parts = completion_parts(ids, context, len(kept))
        _print_parts(parts, whole.prompt_ids, tokenizer, control, write)


def _count(kept: list[int], whole: list[int]) -> str:
    return f"{len(kept)} tokens" if len(kept) == len(whole) else f"{len(kept)} of {len(whole)} tokens"


def prompt_parts(whole: list[int], kept: list[int]) -> list[Part]:
    """The prompt's tokens before truncation, in order."""
    if whole[len(whole) - len(kept) :] == kept:
        return [("cut", whole[: len(whole) - len(kept)]), ("prompt", kept)]
    start = len(whole) - len(kept) + 1  # BOS stays
    return [("prompt", whole[:1]), ("cut", whole[1:start]), ("prompt", whole[start:])]


def completion_parts(ids: list[int], context: Context | None, num_kept: int) -> list[Part]:
    """The completion tokens and those between them, in order. All after the first `num_kept` are cut."""
    tokens = []
    between = list(zip(context.places, context.ids, strict=True)) if context else []
    for place, token in enumerate(ids):
        while between and between[0][0] <= place:
            tokens.append(("not scored" if place < num_kept else "cut", between.pop(0)[1]))
        tokens.append(("scored" if place < num_kept else "cut", token))
    return [(kind, [token for _, token in group]) for kind, group in groupby(tokens, key=lambda item: item[0])]


def runs(
    parts: Iterable[Part], before: list[int], tokenizer: Any, control: ControlTokens
) -> Iterator[tuple[str, bool, str]]:
    """The parts as text. Each is a key of `_STYLES`, whether the text is control tokens, and the text.

    Args:
        parts: From `prompt_parts` or `completion_parts`.
        before: The ids before them.
        tokenizer: Turns the ids to text.
        control: The tokenizer's control tokens. Those that are spelled as text are marked.
    """
    ids = list(before)
    control_ids = control.ids(tokenizer)
    for kind, part in parts:
        for is_control, group in groupby(part, key=control_ids.__contains__):
            run = list(group)
            # After the tokens before it, because SentencePiece drops the first space of a text.
            start, whole = tokenizer.decode(ids), tokenizer.decode(ids + run)
            piece = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(run)
            yield kind, is_control, piece if is_control else control.show(piece)
            ids += run


def shortened(text: str) -> str:
    """`text` without the middle, if it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ...{len(text) - _LONGEST:,} characters... {text[-_LONGEST // 2 :]}"


def _print_parts(
    parts: list[Part],
    before: list[int],
    tokenizer: Any,
    control: ControlTokens,
    write: Callable[[str, str], None],
) -> None:
    # Parts of no tokens have no runs. Neighbours differ in kind.
    for kind, group in groupby(runs(parts, before, tokenizer, control), key=lambda run: run[0]):
        text = shortened("".join(piece for _, _, piece in group))
        for old, new in (("\r", "\\r"), ("\n", "\\n"), ("\t", "\\t")):
            text = text.replace(old, new)
        write(f"{kind:>12} | {text}", _STYLES[kind])


def _writer() -> Callable[[str, str], None]:
    """A function that prints a line, in a style if rich is installed."""
    try:
        from rich.console import Console
    except ImportError:
        return lambda text, style: print(text)
    console = Console(highlight=False)
    return lambda text, style: console.print(text, style=style, markup=False, emoji=False, soft_wrap=True)
