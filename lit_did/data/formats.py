"""Finds which column of a row holds which field: the names of well-known data sets, and those that users give.

`lit-did docs data` lists the names. A column that may hold a prompt is used or refused, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from lit_did.data.errors import in_words, kind, malformed, one_line

FIELDS = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs", "tag")
_REQUIRED = ("chosen", "rejected")
_SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),
    ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
)
_PROMPTS = (
    "question", "instruction", "query", "input", "context", "messages", "conversations", "conversation", "history",
)  # fmt: skip
_SYSTEMS = ("system", "system_prompt", "system_message")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Names of columns that describe a pair and therefore do not hold its prompt.
_ABOUT = re.compile(
    r"(chosen|rejected)_|(?:.*_)?(ids?|idx|index|key|uu?id|hash|sources?|origin|datasets?|subset|split|category|categories|"
    r"topics?|domain|lang|language|locale|models?|scores?|ratings?|ranks?|rewards?|margin|labels?|tags?|types?|kind|"
    r"meta|metadata|info|urls?|links?|license|date|time|timestamp|created|annotators?|feedback|critiques?|rationale|"
    r"reason|explanation|comments?|notes?|weight|difficulty|name|file|path|version|author|judge|winner|status|responses?|generations?)(_|$)"
)


class Columns(NamedTuple):
    """The columns that hold the fields of a row."""

    named: dict[str, str]
    """the source's column of each field (a key of `FIELDS`) that is certain"""
    prompts: tuple[str, ...]
    """columns with a known name that may hold the prompt"""
    unknown: tuple[str, ...]
    """if there are none of these: columns with an unknown name that may hold the prompt"""


def check_columns(columns: Any) -> None:
    """Raises TypeError or ValueError unless `columns` maps names of `FIELDS` to the source's names or to None."""
    if columns is None:
        return
    if not isinstance(columns, Mapping):
        raise TypeError(f'Expected `columns` to be a dict such as {{"prompt": "question"}}, but got {columns!r}.')
    for name, column in columns.items():
        if name not in FIELDS:
            raise ValueError(f"Expected the keys of `columns` to be among {in_words(FIELDS)}, but got {name!r}.")
        if not isinstance(column, str) and (column is not None or name in _REQUIRED):
            raise TypeError(f"Expected `columns[{name!r}]` to be the name of a column, but got {column!r}.")


def find_columns(names: Any, columns: Mapping[str, str | None] | None, where: str) -> Columns:
    """Finds the columns that hold the fields of a row.

    Args:
        names: The row itself, or the names of its columns.
        columns: The names that the user gives; see `read_rows`.
        where: What errors call the row or the table.

    Raises:
        ValueError: If a column of `columns` or those of both answers are not among `names`.
    """
    row = names if isinstance(names, Mapping) else {}
    names = tuple(names)
    try:
        found = _find_columns(names, tuple((columns or {}).items()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if found is None:
        raise ValueError(
            f"{where}: Expected the keys `chosen` and `rejected`, but got {in_words(names)}. {_remedy(names, row)}"
        )
    return found


def _remedy(names: tuple[str, ...], row: Mapping[str, Any]) -> str:
    """What to do about a row without answers."""
    if {"completion", "label"} <= set(names):
        return (
            "Rows with one `completion` and its `label`, as for KTO, are not pairs: put a good and a bad completion of "
            "the same prompt into one row."
        )
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "chosen" in value[0]:
            return f"The pairs seem to be in `{one_line(name)}`: pass that list instead of the object around it."
    return 'Name them: `columns={"chosen": ..., "rejected": ...}`.'


def describe_columns(names: Any, columns: Mapping[str, str | None] | None) -> str:
    """Says which fields `find_columns` reads from columns of other names without `columns`; "" for none."""
    found = find_columns(names, columns, "row")
    parts = [
        (name, column)
        for name, column in found.named.items()
        # Not every trainer reads a column `system`, so the warning also says that it becomes a message.
        if name not in (columns or {}) and (column != name or name == "system")
    ]
    if "prompt" not in found.named and found.prompts:
        parts.append(("prompt", "` and `".join(found.prompts)))
    return ", ".join(f"{name} from `{column}`" for name, column in parts)


def columns_to_read(names: list[str], where: str, columns: Mapping[str, str | None] | None) -> list[str]:
    """The columns of a table that `read_fields` needs. Others, such as embeddings, are not decoded."""
    repeated = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if repeated is not None:
        raise ValueError(f"{where}: Expected every column once, but got `{repeated}` more than once.")
    found = find_columns(names, columns, where)
    wanted = {*found.named.values(), *found.prompts, *found.unknown, *_MEDIA}
    return [name for name in names if name in wanted]


def read_fields(row: Mapping[str, Any], columns: Mapping[str, str | None] | None, where: str) -> dict[str, Any]:
    """The values of a row by the names in `FIELDS`.

    Args:
        row: A row of the source.
        columns: The names that the user gives; see `read_rows`.
        where: What errors call the row.

    Returns:
        The fields that the row has. `prompt` is missing if the prompt is implicit, and None if its column is null.
        `unknown` holds the names of columns that may hold the text of an implicit prompt, for errors.

    Raises:
        ValueError: If columns are missing, or several may hold the prompt and differ.
    """
    found = find_columns(row, columns, where)
    fields = {name: row[column] for name, column in found.named.items() if column in row}
    if "input" in found.prompts and isinstance(row["input"], Mapping) and "preferred_output" in row:  # OpenAI's
        fields |= {name: row["input"].get(key) for name, key in (("prompt", "messages"), ("tools", "tools"))}
    elif _is_swift(found.named) and isinstance(row["messages"], (list, tuple)):
        fields["prompt"], fields["chosen"] = row["messages"][:-1], row["messages"][-1:]
        if isinstance(fields["rejected"], str):
            fields["rejected"] = {"role": "assistant", "content": fields["rejected"]}
    else:
        _read_prompt(fields, row, found, where)
    fields = {name: _parse_json(name, value, where) for name, value in fields.items()}
    _refuse_media(row, where)
    fields["unknown"] = [name for name in found.unknown if _is_text(row[name])]
    return fields


def holds_pairs(names: Any, columns: Mapping[str, str | None] | None) -> bool:
    """Whether a row or table with columns of these names holds pairs, and not prompts alone."""
    try:
        return _find_columns(tuple(names), tuple((columns or {}).items())) is not None
    except ValueError:
        return False


def read_prompt_fields(row: Mapping[str, Any], columns: Mapping[str, str | None] | None, where: str) -> dict[str, Any]:
    """The values of a row without completions, by the names in `FIELDS`.

    Args:
        row: A row of the source.
        columns: The names that the user gives; see `read_rows`.
        where: What errors call the row.

    Raises:
        ValueError: If there is no column with the prompt.
    """
    named = {name: name for name in FIELDS if name not in _REQUIRED} | dict(columns or {})
    if named["prompt"] not in row:
        raise ValueError(
            f"{where}: Expected the column `{named['prompt']}` with the prompt, or a preference pair, but got "
            f'{in_words(row)}. Name the prompt\'s column: `columns={{"prompt": ...}}`.'
        )
    _refuse_media(row, where)
    found = {name: row[column] for name, column in named.items() if column is not None and column in row}
    return {name: _parse_json(name, value, where) for name, value in found.items()}


def _refuse_media(row: Mapping[str, Any], where: str) -> None:
    for name in _MEDIA:
        if name in row and _filled(row[name]):
            got = f"content in the column `{name}` too. Media cannot be read: remove it"
            raise malformed(where, "texts", got)


def _is_swift(named: dict[str, str]) -> bool:
    """Whether the chosen answer is the last of the prompt's messages, as in ms-swift."""
    return (named["chosen"], named["rejected"]) == ("messages", "rejected_response")


@lru_cache(maxsize=256)
def _find_columns(names: tuple[str, ...], columns: tuple[tuple[str, str | None], ...]) -> Columns | None:
    chosen_by_user = dict(columns)
    named = {name: column for name, column in columns if column is not None}
    for name in ("prompt", *_REQUIRED):
        if name in named and named[name] not in names:
            raise ValueError(
                f"Expected the column `{named[name]}`, which `columns` names for `{name}`, but got {in_words(names)}."
            )
    left = [name for name in names if name not in named.values()]
    for sides in _SIDES:
        if all(ours in named or side in left for ours, side in zip(_REQUIRED, sides, strict=True)):
            named = dict(zip(_REQUIRED, sides, strict=True)) | named
            break
    else:
        return None
    left = [name for name in left if name not in named.values()]
    for name in ("prompt", "tools", "chat_template_kwargs", "tag"):
        if name in left and name not in chosen_by_user:
            named[name] = name
    systems = [name for name in _SYSTEMS if name in left and "system" not in chosen_by_user]
    if len(systems) > 1:
        raise ValueError(
            f"Expected one column with the system message, but got {in_words(systems)}. "
            f'Name it: `columns={{"system": "{systems[0]}"}}`.'
        )
    if systems:
        named["system"] = systems[0]
    by_user = "prompt" in chosen_by_user
    prompts = () if by_user else tuple(name for name in _PROMPTS if name in left)
    known = {*named.values(), *chosen_by_user.values(), *_PROMPTS, *_SYSTEMS, *_MEDIA, *FIELDS}
    has_prompt = by_user or "prompt" in named or prompts
    unknown = (
        () if has_prompt else tuple(name for name in left if name not in known and not _ABOUT.match(str(name).lower()))
    )
    return Columns(named, prompts, unknown)


def _read_prompt(fields: dict[str, Any], row: Mapping[str, Any], found: Columns, where: str) -> None:
    """Puts the prompt into `fields` from the column that holds it."""
    filled = [name for name in found.prompts if _filled(row[name])]
    if _filled(fields.get("prompt")):
        kept = [text for name in ("prompt", *_REQUIRED) for text in _texts(fields[name])]
        others = [
            name for name in filled if not all(any(text in whole for whole in kept) for text in _texts(row[name]))
        ]
        if others:  # their text would be lost
            raise _several(where, ["prompt", *others])
    elif "instruction" in filled and set(filled) <= {"instruction", "input", "history"}:  # Alpaca
        parts = [row[name] for name in ("instruction", "input") if name in filled]
        if not all(isinstance(part, str) for part in parts):
            raise malformed(where, "`instruction` and `input` to be strings", ", ".join(map(kind, parts)))
        fields["prompt"] = "\n".join(parts)
        if "history" in filled:
            fields["prompt"] = [*_turns(row["history"], where), {"role": "user", "content": fields["prompt"]}]
    elif any(_texts(row[name]) != _texts(row[filled[0]]) for name in filled[1:]):
        raise _several(where, filled)
    elif filled:
        fields["prompt"] = row[filled[0]]
    elif found.prompts:  # such as a question that is empty
        fields.setdefault("prompt", None)


def _several(where: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{where}: Expected one column with the prompt, but got {in_words(names)} with different texts. "
        f'Name the one to use: `columns={{"prompt": "{names[0]}"}}`.'
    )


def _turns(history: Any, where: str) -> list[dict[str, str]]:
    """LLaMA-Factory's earlier turns, [[question, answer], ...], as messages."""
    turns = history if isinstance(history, (list, tuple)) else [history]
    if not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        raise malformed(where, "`history` to be a list of [question, answer]", kind(history))
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _texts(value: Any) -> list[str]:
    """The texts in a column that may hold a prompt: a string, or the contents of messages."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, Mapping):
        value = [value.get(key) for key in ("content", "value", "text")]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple, Mapping)) and not value)


def _is_text(value: Any) -> bool:
    return bool(isinstance(value, str) and value.strip()) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _parse_json(name: str, value: Any, where: str) -> Any:
    """Decodes a value that data sets may hold as a JSON text: tools, template arguments, and messages in CSV files."""
    if not isinstance(value, str) or name in ("system", "tag"):
        return value
    if name in ("tools", "chat_template_kwargs"):
        try:
            return json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise malformed(where, f"`{name}` to be JSON", f"invalid JSON: {error}") from None
    start = value.lstrip()[:40]
    if re.match(r"(\[\s*)?\{\s*'(role|content|from|value)'", start):
        raise malformed(
            where, f"`{name}` to be text or messages in JSON", "Python objects written as text (by pandas' to_csv?)"
        )
    if re.match(r'(\[\s*)?\{\s*"(role|content|from|value)"', start):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # a text that only begins like messages
    return value
