"""One preference pair: from a raw row (any of the formats that TRL documents) to a checked `PreferencePair`.

    explicit prompt, plain text     {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
    explicit prompt, chat           {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}
    implicit prompt, plain text     {"chosen": "2+2? 4", "rejected": "2+2? 5"}
    implicit prompt, chat           {"chosen": [user, assistant], "rejected": [user, assistant]}

where `user` and `assistant` stand for {"role": ..., "content": ...}. A string `tag` names the kind of pair, for results
by kind. Other columns are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, Any]
Text = str | list[Message]

_FIELDS = ("prompt", "chosen", "rejected")
_ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class UnusableRowError(ValueError):
    """A row that is whole but cannot be trained on, such as one with an empty answer. Readers may skip it."""


class PreferencePair(NamedTuple):
    """A checked pair with its prompt made explicit: three strings, or three lists of messages.

    `tools` and `chat_template_kwargs` are arguments of the chat template. `system` is the system message of a
    plain-text pair; that of a chat pair is the first message of its prompt.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tag: str = ""
    tools: list | None = None
    chat_template_kwargs: dict | None = None
    system: str | None = None

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


def parse_pair(row: Mapping[str, Any], where: str = "row") -> PreferencePair:
    """Checks one row and makes its prompt explicit.

    An implicit prompt is what `chosen` and `rejected` share: for dialogues as in HH-RLHF everything up to and with the
    last shared "\\n\\nAssistant:"; for other text the longest common prefix, cut back to the start of its last
    whitespace, so that no word is split and the completions keep that whitespace; for chat the common leading messages.

    Args:
        row: a mapping with `chosen`, `rejected` and perhaps `prompt`; strings, or lists of messages.
        where: what errors call this row, such as "train.jsonl, line 3".

    Raises:
        ValueError: if the row is in none of the formats above. The message starts with `where`.
    """
    if not isinstance(row, Mapping):
        raise _error(where, "an object with `chosen` and `rejected`", _kind(row))
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        keys = ", ".join(f"`{key}`" for key in row) or "no keys"
        raise _error(where, "the keys `chosen` and `rejected`", keys)
    fields = {name: row[name] for name in _FIELDS if name in row}
    for name, value in fields.items():
        _check_field(name, value, where)
    if len({isinstance(value, str) for value in fields.values()}) > 1:
        got = ", ".join(f"`{name}`: {_kind(value)}" for name, value in fields.items())
        hint = ""
        if isinstance(fields.get("prompt"), str) and isinstance(fields["chosen"], list):
            hint = " (without the column `prompt`, the prompt is taken from the messages both sides share)"
        raise _error(where, "all strings or all lists of messages" + hint, got)
    for name, value in fields.items():
        if isinstance(value, list):
            # Parquet gives every message the keys of all, as null; templates ask whether a key is there.
            fields[name] = [{key: item for key, item in message.items() if item is not None} for message in value]
    if "prompt" in fields:
        pair = PreferencePair(**fields)
    elif isinstance(fields["chosen"], str):
        pair = _split_text(**fields)
    else:
        pair = _split_chat(**fields)
    if pair.is_chat:
        _check_chat(pair, where)
    tag = row.get("tag") or ""
    if not isinstance(tag, str):
        raise _error(where, "`tag` to be a string", _kind(tag))
    return pair._replace(tag=tag)


def to_chat(pair: PreferencePair) -> PreferencePair:
    """Wraps a plain-text pair as messages: the prompt as the user's, the completions as the assistant's.

    A dialogue as in HH-RLHF becomes its turns, without the whitespace around each. Chat pairs are returned as they are.

    Raises:
        UnusableRowError: if the prompt is empty: chat templates need a message to answer.
    """
    if pair.is_chat:
        return pair
    if pair.prompt.endswith(_ASSISTANT) and _TURN.match(pair.prompt):
        prompt = _turns(pair.prompt)[:-1]  # the last turn is the one to complete
        chosen, rejected = (_turns(_ASSISTANT + text) for text in (pair.chosen, pair.rejected))
    elif pair.prompt.strip():
        prompt = [{"role": "user", "content": pair.prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    else:
        raise UnusableRowError(
            f"Expected a prompt to wrap as a user message (`as_chat=True`), but got {pair.prompt!r}."
        )
    if pair.system:
        prompt = [{"role": "system", "content": pair.system}, *prompt]
    return pair._replace(prompt=prompt, chosen=chosen, rejected=rejected, system=None)


def prepare_pair(pair: PreferencePair, as_chat: bool) -> PreferencePair:
    """The pair to render: with `as_chat` in messages, see `to_chat`.

    Raises:
        UnusableRowError: if the prompt is empty and `as_chat` needs one.
        ValueError: for plain text beside `system`, `tools` or `chat_template_kwargs`, which need a chat template.
    """
    if as_chat:
        return to_chat(pair)
    for name in ("system", "tools", "chat_template_kwargs"):
        if not pair.is_chat and getattr(pair, name):
            raise ValueError(
                f"Expected chat messages beside the column `{name}`, which a chat template places, but got plain text. "
                f"Pass `as_chat=True` to wrap the text as messages, or `columns={{{name!r}: None}}` to leave it out."
            )
    return pair


def _turns(dialogue: str) -> list[Message]:
    """Splits "\\n\\nHuman: a\\n\\nAssistant: b" into messages."""
    _, *parts = _TURN.split(dialogue)
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _split_text(chosen: str, rejected: str) -> PreferencePair:
    length = min(len(chosen), len(rejected))
    shared = chosen[: next((place for place in range(length) if chosen[place] != rejected[place]), length)]
    marker = shared.rfind(_ASSISTANT)
    if marker >= 0:
        end = marker + len(_ASSISTANT)
    else:
        # The last whitespace that both share, from its start; never all of the shorter text: a completion would be "".
        shared = shared[: length - 1]
        end = max((match.start() for match in re.finditer(r"\s+", shared)), default=0)
    return PreferencePair(chosen[:end], chosen[end:], rejected[end:])


def _split_chat(chosen: list[Message], rejected: list[Message]) -> PreferencePair:
    end = 0
    # The last message of the shorter side is a completion even where both sides share it.
    while end < min(len(chosen), len(rejected)) - 1 and chosen[end] == rejected[end]:
        end += 1
    return PreferencePair(chosen[:end], chosen[end:], rejected[end:])


def _check_field(name: str, value: Any, where: str) -> None:
    if isinstance(value, str):
        if not value and name != "prompt":
            raise UnusableRowError(f"{where}: Expected `{name}` to have text, but got an empty string.")
        _check_unicode(name, value, where)
    elif isinstance(value, list):
        if not value:
            raise _error(where, f"`{name}` to be non-empty", "an empty list")
        for number, message in enumerate(value):
            _check_message(f"message {number} of `{name}`", message, where)
    else:
        raise _error(where, f"`{name}` to be a string or a list of messages", _kind(value))


def _check_message(name: str, message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise _error(where, f"{name} to be an object with `role` and `content`", _kind(message))
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            got = _kind(message[key]) if key in message else f"no `{key}`"
            raise _error(where, f"{name} to have a string `{key}`", got)
        _check_unicode(f"{key} of {name}", message[key], where)


def _check_chat(pair: PreferencePair, where: str) -> None:
    if not pair.prompt:
        raise _error(where, "`chosen` and `rejected` to share their first message, as the prompt", "no shared message")
    for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if completion[-1]["role"] != "assistant":
            raise _error(where, f"`{name}` to end in a message of the assistant", f"role {completion[-1]['role']!r}")
        if not any(message["content"] or message.get("tool_calls") for message in completion):
            raise _error(where, f"`{name}` to be non-empty", "messages without content")


def _check_unicode(name: str, text: str, where: str) -> None:
    try:
        text.encode("utf-8")  # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer takes
    except UnicodeEncodeError as error:
        raise _error(where, f"`{name}` to be valid Unicode", f"a lone surrogate at character {error.start}") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else type(value).__name__


def _error(where: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{where}: Expected {expected}, but got {got}.")
