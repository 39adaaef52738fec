"""Chat messages as data sets spell them, turned into {"role": ..., "content": text} as chat templates take them.

    {"role": "user", "content": "hi"}                                   as it is
    {"role": "user", "content": [{"type": "text", "text": "hi"}]}       the parts' texts become one
    {"from": "human", "value": "hi"}                                    ShareGPT
    {"from": "function_call", "value": "{\\"name\\": ...}"}               LLaMA-Factory's tool calls
    {"role": "assistant", "content": null, "tool_calls": [...]}         without content, as chat templates expect

Keys that are null are left out at every depth, whatever the source: Arrow gives each message the keys of all, as null,
and so do files that were written from Arrow. A null that is meant, such as an argument of a tool call, survives
inside a JSON string: {"arguments": "{\\"unit\\": null}"}. Nulls that are items of a list stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lit_did.data.errors import in_words, kind, malformed, one_line, unusable

Message = dict[str, Any]

# ShareGPT's names and those that its users added.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def parse_messages(name: str, value: Any, where: str) -> list[Message]:
    """Checks the messages of a column: a list of them, or a single one.

    Raises:
        UnusableRowError: for an empty list, or a message whose content is null.
        ValueError: for anything that is no message.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        raise unusable(where, f"`{name}` to be non-empty", "an empty list")
    return [_parse_message(f"message {number} of `{name}`", message, where) for number, message in enumerate(value)]


def has_content(messages: list[Message]) -> bool:
    """Whether the assistant says or calls anything."""
    answers = (message for message in messages if message["role"] == "assistant")
    return any(message.get("content", "").strip() or message.get("tool_calls") for message in answers)


def drop_nulls(value: Any) -> Any:
    """The value without keys that are null, at every depth; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [drop_nulls(item) for item in value]
    return value


def check_unicode(name: str, value: Any, where: str) -> None:
    """Raises ValueError for a lone surrogate in any text within `value`.

    JSON can spell half a surrogate pair ("\\ud83d"), which no tokenizer takes.
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
        # A null is an answer or a question that is missing; without the key, this is no message.
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
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise malformed(where, f"`from` of {name} to be one of {in_words(_ROLES)}", _named(speaker))
    if "value" in message:
        message["content"] = message.pop("value")
    return {"role": role, **message}


def _parse_calls(name: str, value: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn `function_call`: JSON of one {"name": ..., "arguments": ...}, or of a list of them."""
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
