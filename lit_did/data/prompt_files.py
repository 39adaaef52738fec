"""Reads prompts to answer, without completions, and tokenises them as the prompts of pairs are tokenised.

`lit-did docs data` lists the sources.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_did.arguments import check_integer
from lit_did.data.errors import UnusableRowError, kind, malformed, unusable
from lit_did.data.files import read_text
from lit_did.data.formats import check_columns, columns_to_read, holds_pairs, read_prompt_fields
from lit_did.data.messages import check_unicode
from lit_did.data.pairs import PreferencePair, Text, parse_prompt, prepare_pair
from lit_did.data.reading import Columns, Warn, read_raw, read_rows
from lit_did.data.rendering import Renderer
from lit_did.data.tokenizing import tokenize_rendered

STDIN = "-"


class PromptRow(NamedTuple):
    """A prompt and its place."""

    index: int  # type: ignore[assignment]  # a field may hide the method of tuples
    """row number in the source, from 0; blank lines are not counted"""
    where: str
    """what errors call the row"""
    prompt: Text
    """a string for plain text, or a list of messages for a chat"""
    tag: str = ""
    """the kind of prompt"""
    tools: list | None = None
    """the variable `tools` of the chat template"""
    chat_template_kwargs: dict | None = None
    """other variables of the chat template"""
    system: str | None = None
    """the system message of a plain-text prompt; that of a chat is its first message"""


def read_prompts(
    source: Any, name: str = "prompts", *, columns: Columns | None = None, warn: Warn = warnings.warn
) -> list[PromptRow]:
    """Reads prompts.

    Args:
        source: A `.txt` file with one prompt a line; "-", which reads such lines from the standard input; a list of
            strings. Or a source of rows, as for `read_rows`: each row has `prompt`, a string or messages. Or
            preference pairs, each of whose different prompts is returned once.
        name: What errors call a source that is not a file.
        columns: Names of the source's columns by field, such as {"prompt": "question"}. None leaves a field out.
        warn: Called with a text about pairs, see `read_rows`.

    Returns:
        The prompts in the order of the source.

    Raises:
        FileNotFoundError, ConnectionError, TypeError, ImportError: As `read_rows`.
        ValueError: For malformed content, and for a source without prompts. The message begins with file and line (from
            1), or source and row (from 0).

    Example:
        >>> [row.prompt for row in read_prompts([{"prompt": "2+2?"}, {"prompt": [{"role": "user", "content": "Hi"}]}])]
        ['2+2?', [{'role': 'user', 'content': 'Hi'}]]
    """
    check_columns(columns)
    if isinstance(source, (str, os.PathLike)):
        name = "stdin" if os.fspath(source) == STDIN else os.fspath(source)
    lines = _lines(source, name)
    if lines is not None:
        rows = [PromptRow(index, where, text) for index, (where, text) in enumerate(lines)]
        for row in rows:
            check_unicode("the prompt", row.prompt, row.where)
    elif _holds_pairs(source, name, columns):
        rows = _of_pairs(source, name, columns, warn)
    else:
        missing = {column for column in (columns or {}).values() if column is not None}
        rows = []
        for index, (where, row) in enumerate(read_raw(source, name, partial(_columns_to_read, columns=columns))):
            rows.append(_parse(index, where, row, columns))
            missing -= row.keys()
        if missing and rows:
            raise ValueError(f"{name}: Expected the columns that `columns` names, but no row has {sorted(missing)}.")
    if not rows:
        raise ValueError(f"{name}: Expected prompts, but got none.")
    return rows


def encode_prompts(
    rows: Sequence[PromptRow],
    tokenizer: Any,
    *,
    as_chat: bool | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    parse_special_tokens: bool = False,
    max_length: int | None = None,
) -> list[list[int]]:
    """The token ids of prompts, ready to be continued: that of a chat ends in the header of the assistant's turn.

    Args:
        rows: From `read_prompts`.
        tokenizer: A transformers tokenizer.
        as_chat: Whether to wrap plain text as a user's message. None: where the tokenizer has a chat template.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template. A row's own override them.
        parse_special_tokens: Whether to read control tokens that the text of rows spells as control tokens.
        max_length: The most tokens of a prompt. A longer one raises: a cut prompt would be another one.

    Returns:
        The ids of each prompt, at least one.

    Raises:
        ValueError: If a prompt cannot be rendered or is too long. The message begins with its place.
    """
    renderer = Renderer(
        tokenizer, chat_template, chat_template_kwargs=chat_template_kwargs, parse_special_tokens=parse_special_tokens
    )
    as_chat = renderer.has_template if as_chat is None else as_chat
    if max_length is not None:
        check_integer("max_length", max_length, 1)
    rendered = []
    for row in rows:
        try:
            rendered.append(renderer.prompt(prepare_pair(_pair(row), as_chat)))
        except (TypeError, ValueError) as error:
            kept = ValueError if isinstance(error, UnusableRowError) else type(error)
            raise kept(f"{row.where}: {error}") from error
    prompts = [pair.prompt_ids for pair in tokenize_rendered(rendered, tokenizer)]
    for row, ids in zip(rows, prompts, strict=True):
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{row.where}: Expected a prompt of at most {max_length} tokens, but got {len(ids)}.")
    return prompts


def _pair(row: PromptRow) -> PreferencePair:
    nothing: Any = "" if isinstance(row.prompt, str) else []
    return PreferencePair(
        row.prompt,
        nothing,
        nothing,
        tools=row.tools,
        chat_template_kwargs=row.chat_template_kwargs,
        system=row.system,
    )


def _lines(source: Any, name: str) -> Iterable[tuple[str, str]] | None:
    """The lines of a source that has one prompt a line; None for another source."""
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, str) for item in source):
        return ((f"{name}, row {number}", text) for number, text in enumerate(source))
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.path.expanduser(os.fspath(source))
    if path == STDIN:
        return _stdin()
    return read_text(Path(path)) if path.lower().endswith((".txt", ".txt.gz")) else None


def _stdin() -> Iterator[tuple[str, str]]:
    for number, line in enumerate(sys.stdin, start=1):
        if line.strip():
            yield f"stdin, line {number}", line.rstrip("\r\n")


def _columns_to_read(names: list[str], where: str, columns: Columns | None) -> list[str]:
    return columns_to_read(names, where, columns) if holds_pairs(names, columns) else names


def _holds_pairs(source: Any, name: str, columns: Columns | None) -> bool:
    first = next(iter(read_raw(source, name, partial(_columns_to_read, columns=columns))), None)
    return first is not None and isinstance(first[1], Mapping) and holds_pairs(first[1], columns)


def _of_pairs(source: Any, name: str, columns: Columns | None, warn: Warn) -> list[PromptRow]:
    pairs, skipped = read_rows(source, name, columns=columns, warn=warn)
    prompts: dict[str, PromptRow] = {}
    for row in pairs:
        pair = row.pair
        found = PromptRow(
            row.index, row.where, pair.prompt, pair.tag, pair.tools, pair.chat_template_kwargs, pair.system
        )
        _check_last(pair.prompt, row.where)
        prompts.setdefault(json.dumps([pair.prompt, *found[4:]], sort_keys=True, default=str), found)
    if skipped:
        warn(
            f"{name}: {len(skipped)} of {len(pairs) + len(skipped)} pairs are no preference pairs, and their prompts "
            f"are left out. The first is {skipped[0].where}: {skipped[0].reason}"
        )
    return list(prompts.values())


def _parse(index: int, where: str, row: Any, columns: Columns | None) -> PromptRow:
    if not isinstance(row, Mapping):
        raise malformed(where, "an object with `prompt`", kind(row))
    try:
        parsed = parse_prompt(read_prompt_fields(row, columns, where), where)
    except RecursionError:
        raise malformed(where, "values within Python's recursion limit", "values that are nested too deeply") from None
    _check_last(parsed.prompt, where)
    return PromptRow(index, where, parsed.prompt, parsed.tag, parsed.tools, parsed.chat_template_kwargs, parsed.system)


def _check_last(prompt: Text, where: str) -> None:
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise malformed(where, "`prompt` to end in a message to answer", "one of the assistant at its end")
    if isinstance(prompt, str) and not prompt.strip():
        raise unusable(where, "`prompt` to be non-empty", "whitespace" if prompt else "an empty string")
