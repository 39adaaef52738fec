"""Turns one raw row into a checked `PreferencePair`. `lit-did docs data` lists the formats of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_did.data.errors import UnusableRowError, in_words, kind, malformed, one_line, unusable
from lit_did.data.formats import read_fields
from lit_did.data.messages import Message, check_unicode, drop_nulls, has_content, parse_messages
from lit_did.data.prompts import (
    ASSISTANT,
    Chats,
    Texts,
    join_chat,
    join_text,
    num_repeats,
    split_chat,
    split_text,
    strip_chat,
    strip_text,
)

Text = str | list[Message]

_SIDES = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_DIALOGUE = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class PreferencePair(NamedTuple):
    """A checked pair with an explicit prompt."""

    prompt: Text
    """a string for plain text, or a list of messages for a chat; so are both completions"""
    chosen: Text
    rejected: Text
    tag: str = ""
    """the kind of pair"""
    tools: list | None = None
    """the variable `tools` of the chat template"""
    chat_template_kwargs: dict | None = None
    """other variables of the chat template"""
    system: str | None = None
    """the system message of a plain-text pair; that of a chat is the first message of its prompt"""
    holds_turns: bool = False
    """whether the completions of a plain-text pair, cut from two dialogues, hold further turns"""

    @property
    def is_chat(self) -> bool:
        """Whether the pair has messages instead of plain text."""
        return not isinstance(self.prompt, str)

    @property
    def texts(self) -> Texts:
        """The prompt and both completions of a plain-text pair."""
        prompt, chosen, rejected = self[:3]
        assert isinstance(prompt, str)
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        return prompt, chosen, rejected

    @property
    def chats(self) -> Chats:
        """The prompt and both completions of a chat pair."""
        prompt, chosen, rejected = self[:3]
        assert isinstance(prompt, list)
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        return prompt, chosen, rejected


def parse_pair(
    row: Mapping[str, Any], where: str = "row", columns: Mapping[str, str | None] | None = None
) -> PreferencePair:
    """Checks one row and makes its prompt explicit.

    An implicit prompt is the shared beginning of `chosen` and `rejected`: for chat the common messages, for plain text
    see `split_text`. A prompt that both completions repeat is removed from them; see `strip_text` and `strip_chat`.

    Args:
        row: A mapping in one of the formats that `lit-did docs data` lists, such as one with strings `prompt`, `chosen`
            and `rejected`.
        where: What errors call this row, such as "train.jsonl, line 3".
        columns: Names of the row's columns by field, such as {"prompt": "question"}. None leaves a field out.

    Returns:
        The checked pair.

    Raises:
        UnusableRowError: If the row is well-formed but cannot be trained on, such as one with an empty answer.
        ValueError: If the row is in none of the formats. The message starts with `where`.
    """
    pair = parse_row(row, where, columns)
    return strip_repeated(pair, where, certain=not pair.is_chat and num_repeats(*pair.texts) == 2)


def parse_row(row: Any, where: str, columns: Mapping[str, str | None] | None = None) -> PreferencePair:
    """Like `parse_pair`, but keeps a prompt that plain-text completions begin with.

    Only the whole source shows whether they repeat it or begin with it by chance; see `read_rows`.
    """
    if not isinstance(row, Mapping):
        raise malformed(where, "an object with `chosen` and `rejected`", kind(row))
    try:
        return _parse(read_fields(row, columns, where), where)
    except RecursionError:
        raise malformed(where, "values within Python's recursion limit", "values that are nested too deeply") from None


def strip_repeated(pair: PreferencePair, where: str, certain: bool) -> PreferencePair:
    """Removes the prompt from plain-text completions that repeat it; see `strip_text`."""
    if pair.is_chat:
        return pair
    prompt, chosen, rejected = strip_text(*pair.texts, where, certain)
    return pair._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def to_chat(pair: PreferencePair) -> PreferencePair:
    """Wraps a plain-text pair as messages: the prompt as the user's, the completions as the assistant's.

    A dialogue as in HH-RLHF becomes its turns, without the whitespace around each. An answer beside an explicit prompt
    stays one message, even if it quotes a dialogue. `system` becomes the first message. Chat pairs are returned
    unchanged.

    Raises:
        UnusableRowError: If the prompt is empty, because chat templates need a message to answer.
    """
    if pair.is_chat:
        return pair
    prompt, chosen, rejected = pair.texts
    if prompt.endswith(ASSISTANT) and _TURN.match(prompt):
        messages = _turns(prompt)[:-1]  # the last turn is the one to complete
        if pair.holds_turns:
            sides = [_turns(ASSISTANT + text) for text in (chosen, rejected)]
        else:
            sides = [[_answer(text.strip())] for text in (chosen, rejected)]
    elif prompt.strip():
        messages = [{"role": "user", "content": prompt}]
        sides = [[_answer(text)] for text in (chosen, rejected)]
    else:
        raise UnusableRowError(f"Expected a prompt to wrap as a user message (`as_chat=True`), but got {prompt!r}.")
    if pair.system:
        messages = [{"role": "system", "content": pair.system}, *messages]
    return pair._replace(prompt=messages, chosen=sides[0], rejected=sides[1], system=None)


def prepare_pair(pair: PreferencePair, as_chat: bool) -> PreferencePair:
    """The pair to render. With `as_chat`, plain text becomes messages; see `to_chat`.

    Raises:
        UnusableRowError: If the prompt is empty and `as_chat` needs one.
        ValueError: For plain text beside `system`, `tools` or `chat_template_kwargs`, which need a chat template.
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


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _turns(dialogue: str) -> list[Message]:
    """Splits "\\n\\nHuman: a\\n\\nAssistant: b" into messages."""
    _, *parts = _TURN.split(dialogue)
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def parse_prompt(fields: dict[str, Any], where: str) -> PreferencePair:
    """The pair of a row without completions, which are then empty.

    Args:
        fields: From `read_prompt_fields`.
        where: What errors call the row.
    """
    prompt = _parse_text("prompt", fields["prompt"], where)
    nothing: Any = "" if isinstance(prompt, str) else []
    return _with_others(PreferencePair(prompt, nothing, nothing), fields, where)


def _parse(fields: dict[str, Any], where: str) -> PreferencePair:
    prompt = None if fields.get("prompt") is None else _parse_text("prompt", fields["prompt"], where)
    chosen, rejected = (_parse_text(name, fields[name], where) for name in _SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            pair = _split_chat(prompt, [_answer(chosen)], [_answer(rejected)], fields["unknown"], where)
        else:
            pair = _split_text(prompt, chosen, rejected, fields, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        pair = _split_chat(prompt, chosen, rejected, fields["unknown"], where)
    else:
        got = f"`chosen`: {kind(chosen)}, `rejected`: {kind(rejected)}"
        raise malformed(where, "all strings or all lists of messages", got)
    return _with_others(pair, fields, where)


def _with_others(pair: PreferencePair, fields: dict[str, Any], where: str) -> PreferencePair:
    return pair._replace(
        tag=_optional(fields, "tag", str, "a string", where) or "",
        tools=_read_tools(fields, where),
        chat_template_kwargs=_optional(fields, "chat_template_kwargs", dict, "an object, or a JSON text of one", where),
        **_place_system(pair, _optional(fields, "system", str, "a string", where), where),
    )


def _split_text(prompt: str | None, chosen: str, rejected: str, fields: dict[str, Any], where: str) -> PreferencePair:
    if prompt is not None:
        parts, is_dialogue = (prompt, chosen, rejected), False
        if all(_DIALOGUE.match(text) for text in (chosen, rejected)) and not num_repeats(*parts):
            parts, is_dialogue = join_text(prompt, chosen, rejected, where), True
    else:
        parts, is_dialogue = split_text(chosen, rejected)
        if not is_dialogue:
            if "prompt" in fields:
                raise unusable(where, "`prompt` to be a string or a list of messages", "null")
            _check_unknown(fields["unknown"], where)
            if all(_DIALOGUE.match(text) and ASSISTANT in text for text in (chosen, rejected)):
                what = "dialogues to share their first turn of the human, as the prompt"
                raise unusable(where, what, "two that begin with different ones")
    for name, text in zip(_SIDES, parts[1:], strict=True):
        if not text.strip():
            raise unusable(where, f"`{name}` to be non-empty", "whitespace" if text else "an empty string")
    return PreferencePair(*parts, holds_turns=is_dialogue and any(_TURN.search(text) for text in parts[1:]))


def _split_chat(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], unknown: list[str], where: str
) -> PreferencePair:
    if isinstance(prompt, str):
        parts = join_chat(prompt, chosen, rejected, where)
    elif prompt is not None:
        parts = strip_chat(prompt, chosen, rejected, where)
    else:
        parts = split_chat(chosen, rejected)
        if not parts[0]:
            _check_unknown(unknown, where)
            raise unusable(
                where, "`chosen` and `rejected` to share their first message, as the prompt", "no shared message"
            )
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in parts[0]):
        raise unusable(where, "`prompt` to be non-empty", "messages without content")
    for name, side in zip(_SIDES, parts[1:], strict=True):
        _check_side(name, side, where)
    return PreferencePair(*parts)


def _check_unknown(unknown: list[str], where: str) -> None:
    """Refuses to guess the prompt from two answers if a column with an unknown name may hold it."""
    if unknown:
        raise ValueError(
            f"{where}: Expected a column `prompt`, or no other text than `chosen` and `rejected`, but got "
            f'{in_words(unknown)}. Name the prompt\'s column: `columns={{"prompt": {unknown[0]!r}}}`. If both texts '
            'begin with the prompt, pass `columns={"prompt": None}`.'
        )


def _parse_text(name: str, value: Any, where: str) -> Text:
    if value is None:
        raise unusable(where, f"`{name}` to be a string or a list of messages", "null")
    if isinstance(value, str):
        check_unicode(f"`{name}`", value, where)
        return value
    if isinstance(value, (list, tuple, Mapping)):
        return parse_messages(name, value, where)
    raise malformed(where, f"`{name}` to be a string or a list of messages", kind(value))


def _check_side(name: str, side: list[Message], where: str) -> None:
    if side[-1]["role"] != "assistant":
        raise malformed(where, f"`{name}` to end in a message of the assistant", f"role '{one_line(side[-1]['role'])}'")
    if not has_content(side):
        raise unusable(where, f"`{name}` to be non-empty", "messages without content")


def _place_system(pair: PreferencePair, system: str | None, where: str) -> dict[str, Any]:
    """The fields with the system message: the prompt of a chat, or `system` beside plain text."""
    if not system or not system.strip():
        return {}
    if not pair.is_chat:
        return {"system": system}
    prompt = pair.chats[0]
    first = prompt[0]
    if first["role"] != "system":
        return {"prompt": [{"role": "system", "content": system}, *prompt]}
    if first.get("content", "").strip() != system.strip():
        raise malformed(where, "one system message", "a column `system` beside another in the messages")
    return {}


def _read_tools(fields: dict[str, Any], where: str) -> list | None:
    tools = _optional(fields, "tools", list, "a list, or a JSON text of one", where)
    for tool in tools or ():
        if not isinstance(tool, Mapping) and not callable(tool):  # chat templates accept functions too
            raise malformed(where, "`tools` to be a list of objects", f"{kind(tool)} in it")
    return tools


def _optional(fields: dict[str, Any], name: str, of: type, expected: str, where: str) -> Any:
    """The value of an optional column; None if it is missing or empty."""
    value = drop_nulls(fields.get(name))
    if value is None or value == of():
        return None
    if not isinstance(value, of):
        raise malformed(where, f"`{name}` to be {expected}", kind(value))
    check_unicode(f"`{name}`", value, where)
    return value
