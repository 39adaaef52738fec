"""Chat messages as data sets spell them, turned into {"role": ..., "content": text} as chat templates take them.

    {"role": "user", "content": "hi"}                                   unchanged
    {"role": "user", "content": [{"type": "text", "text": "hi"}]}       the texts of the parts are joined
    {"from": "human", "value": "hi"}                                    ShareGPT
    {"from": "function_call", "value": "{\\"name\\": ...}"}               LLaMA-Factory's tool calls
    {"role": "assistant", "content": null, "tool_calls": [...]}         without the key `content`

Keys that are null are dropped at every depth. Arrow gives each message the keys of all messages and fills them with
null, and files that were written from Arrow hold these nulls. A null that is part of the data, such as an argument of a
tool call, is kept inside a JSON string: {"arguments": "{\\"unit\\": null}"}. Nulls that are items of a list are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_did.data.errors import in_words, kind, malformed, one_line, unusable

Message = dict[str, Any]

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""the roles that chat templates of well-known models have"""
# ShareGPT's names and those that its users added.
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def parse_messages(name: str, value: Any, where: str) -> list[Message]:
    """Checks the messages of a column, which may be a list or a single message.

    Args:
        name: The column, for errors.
        value: What it holds.
        where: What errors call the row.

    Returns:
        The messages, each with `role` and `content` or `tool_calls`.

    Raises:
        UnusableRowError: For an empty list, or a message whose content is null.
        ValueError: For anything that is not a message.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        raise unusable(where, f"`{name}` to be non-empty", "an empty list")
    return [_parse_message(f"message {number} of `{name}`", message, where) for number, message in enumerate(value)]


def has_content(messages: list[Message]) -> bool:
    """Whether an assistant message has text or calls a tool."""
    answers = (message for message in messages if message["role"] == "assistant")
    return any(message.get("content", "").strip() or message.get("tool_calls") for message in answers)


def drop_nulls(value: Any) -> Any:
    """The value without keys that are null, at every depth. Tuples become lists."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [drop_nulls(item) for item in value]
    return value


def check_unicode(name: str, value: Any, where: str) -> None:
    """Raises ValueError for a lone surrogate in any text within `value`.

    JSON can hold half a surrogate pair ("\\ud83d"), which no tokenizer accepts.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise malformed(
                where, f"{name} to be valid Unicode", f"a lone surrogate at character {error.start}"
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(f"a key of {name}", key, where)
            check_unicode(name if isinstance(item, (Mapping, list)) else f"{one_line(key)} of {name}", item, where)
    elif isinstance(value, list):
        for item in value:
            check_unicode(name, item, where)


def _parse_message(name: str, raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise malformed(where, f"{name} to be an object with `role` and `content`", kind(raw))
    message = drop_nulls(raw)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(name, message, where)
        raw = {"content": raw.get("value")} if "value" in raw else {}
    if not isinstance(message.get("role"), str):
        raise malformed(where, f"{name} to have a string `role`", _got(raw, "role"))
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_of_part(name, part, where) for part in message["content"])
    if "content" not in message and not message.get("tool_calls"):
        # A null is a missing answer or question. Without the key, this is not a message.
        raise (unusable if "content" in raw else malformed)(
            where, f"{name} to have a string `content`", _got(raw, "content")
        )
    if not isinstance(message.get("content", ""), str):
        raise malformed(where, f"{name} to have a string `content`", kind(message["content"]))
    check_unicode(name, message, where)
    return message


def _from_sharegpt(name: str, message: Message, where: str) -> Message:
    speaker = message.pop("from")
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _parse_calls(name, message.pop("value", None), where), **message}
    role = _SHAREGPT.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise malformed(where, f"`from` of {name} to be one of {in_words(_SHAREGPT)}", _named(speaker))
    if "value" in message:
        message["content"] = message.pop("value")
    return {"role": role, **message}


def _parse_calls(name: str, value: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a `function_call` turn: JSON of one {"name": ..., "arguments": ...} or of a list of them."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise malformed(
            where, f'`value` of {name} to be JSON of {{"name": ..., "arguments": ...}} or a list of them', kind(value)
        )
    return [{"type": "function", "function": drop_nulls(call)} for call in calls]


def _text_of_part(name: str, part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    got = f"a part of type {_named(part['type'])}" if isinstance(part, Mapping) and "type" in part else kind(part)
    raise malformed(where, f'the parts of {name} to be {{"type": "text", "text": ...}}', got)


def _named(value: Any) -> str:
    return f"'{one_line(value)}'" if isinstance(value, str) else kind(value)


def _got(message: Mapping, key: str) -> str:
    return kind(message[key]) if key in message else f"no `{key}`"
