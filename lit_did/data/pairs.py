"""One preference pair: from a raw row to a checked `PreferencePair`.

    explicit prompt, plain text     {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
    explicit prompt, chat           {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}
    implicit prompt, plain text     {"chosen": "2+2? 4", "rejected": "2+2? 5"}
    implicit prompt, chat           {"chosen": [user, assistant], "rejected": [user, assistant]}
    prompt beside conversations     {"prompt": "2+2?", "chosen": [user, assistant], "rejected": [user, assistant]}

where `user` and `assistant` stand for messages: {"role": ..., "content": ...}, or what `messages` lists. A single
message may stand for a list of one. A string beside messages is a message too: of the user in `prompt`, of the
assistant elsewhere. `formats` lists columns of other names that hold these fields. Besides, a row may have

    system                  the system message of a chat, or of text that is wrapped as one
    tools                   what the chat template is given as `tools`: a list, or a JSON text of one
    chat_template_kwargs    further arguments of the chat template: an object, or a JSON text of one
    tag                     a string that names the kind of pair, for results by kind

Other columns are ignored, but not where they may hold the prompt: see `formats`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_did.data.errors import UnusableRowError, in_words, kind, malformed, one_line, unusable
from lit_did.data.formats import read_fields
from lit_did.data.messages import Message, check_unicode, drop_nulls, has_content, parse_messages
from lit_did.data.prompts import (
    ASSISTANT,
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
    holds_turns: bool = False
    """whether the completions of a plain-text pair, cut from two dialogues, hold further turns"""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


def parse_pair(
    row: Mapping[str, Any], where: str = "row", columns: Mapping[str, str | None] | None = None
) -> PreferencePair:
    """Checks one row and makes its prompt explicit.

    An implicit prompt is what `chosen` and `rejected` share: see `split_text` for plain text; for chat the common
    leading messages. A prompt that both completions repeat is taken off them; see `strip_text` and `strip_chat`.

    Args:
        row: a mapping in one of the formats above.
        where: what errors call this row, such as "train.jsonl, line 3".
        columns: for each of our column names the row's, such as {"prompt": "question"}; None leaves a column out.

    Raises:
        UnusableRowError: if the row is whole but cannot be trained on, such as one with an empty answer.
        ValueError: if the row is in none of the formats. The message starts with `where`.
    """
    pair = parse_row(row, where, columns)
    return strip_repeated(pair, where, certain=not pair.is_chat and num_repeats(*pair[:3]) == 2)


def parse_row(row: Any, where: str, columns: Mapping[str, str | None] | None = None) -> PreferencePair:
    """As `parse_pair`, but completions in plain text that begin with the prompt are left as they are.

    Whether they repeat it or begin so by chance is for the whole source to say: see `read_rows`.
    """
    if not isinstance(row, Mapping):
        raise malformed(where, "an object with `chosen` and `rejected`", kind(row))
    try:
        return _parse(read_fields(row, columns, where), where)
    except RecursionError:
        raise malformed(where, "values within Python's recursion limit", "values that are nested too deeply") from None


def strip_repeated(pair: PreferencePair, where: str, certain: bool) -> PreferencePair:
    """Takes the prompt off completions in plain text that repeat it; see `strip_text`."""
    if pair.is_chat:
        return pair
    prompt, chosen, rejected = strip_text(*pair[:3], where, certain)
    return pair._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def to_chat(pair: PreferencePair) -> PreferencePair:
    """Wraps a plain-text pair as messages: the prompt as the user's, the completions as the assistant's.

    A dialogue as in HH-RLHF becomes its turns, without the whitespace around each. An answer beside an explicit prompt
    stays one message, also where it quotes a dialogue. `system` becomes the first message. Chat pairs are returned as
    they are.

    Raises:
        UnusableRowError: if the prompt is empty: chat templates need a message to answer.
    """
    if pair.is_chat:
        return pair
    if pair.prompt.endswith(ASSISTANT) and _TURN.match(pair.prompt):
        prompt = _turns(pair.prompt)[:-1]  # the last turn is the one to complete
        if pair.holds_turns:
            chosen, rejected = (_turns(ASSISTANT + text) for text in (pair.chosen, pair.rejected))
        else:
            chosen, rejected = ([_answer(text.strip())] for text in (pair.chosen, pair.rejected))
    elif pair.prompt.strip():
        prompt = [{"role": "user", "content": pair.prompt}]
        chosen, rejected = ([_answer(text)] for text in (pair.chosen, pair.rejected))
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


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _turns(dialogue: str) -> list[Message]:
    """Splits "\\n\\nHuman: a\\n\\nAssistant: b" into messages."""
    _, *parts = _TURN.split(dialogue)
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def _parse(fields: dict[str, Any], where: str) -> PreferencePair:
    texts = {name: _parse_text(name, fields[name], where) for name in ("prompt", *_SIDES) if name in fields}
    prompt, chosen, rejected = (texts.get(name) for name in ("prompt", *_SIDES))
    if isinstance(chosen, str) != isinstance(rejected, str):
        got = ", ".join(f"`{name}`: {kind(value)}" for name, value in texts.items())
        raise malformed(where, "all strings or all lists of messages", got)
    if isinstance(chosen, str) and not isinstance(prompt, list):
        pair = _split_text(prompt, chosen, rejected, fields, where)
    else:
        pair = PreferencePair(*_split_chat(prompt, chosen, rejected, fields["unknown"], where))
        if not any(message.get("content", "").strip() or message.get("tool_calls") for message in pair.prompt):
            raise unusable(where, "`prompt` to be non-empty", "messages without content")
        for name in _SIDES:
            _check_side(name, getattr(pair, name), where)
    return pair._replace(
        tag=_optional(fields, "tag", str, "a string", where) or "",
        tools=_read_tools(fields, where),
        chat_template_kwargs=_optional(fields, "chat_template_kwargs", dict, "an object, or a JSON text of one", where),
        **_place_system(pair, _optional(fields, "system", str, "a string", where), where),
    )


def _split_text(prompt: str | None, chosen: str, rejected: str, fields: dict[str, Any], where: str) -> PreferencePair:
    parts, is_dialogue = (prompt, chosen, rejected), False
    if prompt is not None:
        if all(_DIALOGUE.match(text) for text in (chosen, rejected)) and not num_repeats(prompt, chosen, rejected):
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


def _split_chat(prompt: Text | None, chosen: Text, rejected: Text, unknown: list[str], where: str) -> tuple:
    if isinstance(chosen, str):
        chosen, rejected = [_answer(chosen)], [_answer(rejected)]
    if isinstance(prompt, str):
        return join_chat(prompt, chosen, rejected, where)
    if prompt is not None:
        return strip_chat(prompt, chosen, rejected, where)
    parts = split_chat(chosen, rejected)
    if not parts[0]:
        _check_unknown(unknown, where)
        raise unusable(
            where, "`chosen` and `rejected` to share their first message, as the prompt", "no shared message"
        )
    return parts


def _check_unknown(unknown: list[str], where: str) -> None:
    """Refuses a prompt that would be guessed from two answers while a column of unknown name may hold it."""
    if unknown:
        raise ValueError(
            f"{where}: Expected a column `prompt`, or no other text than `chosen` and `rejected`, but got "
            f'{in_words(unknown)}. Name the prompt\'s column: `columns={{"prompt": {unknown[0]!r}}}`. If both texts '
            'begin with the prompt, pass `columns={"prompt": None}`.'
        )


def _parse_text(name: str, value: Any, where: str) -> Text | None:
    if value is None:
        if name == "prompt":
            return None
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
    """Where the system message goes: to the front of a chat's prompt, or beside plain text."""
    if not system or not system.strip():
        return {}
    if not pair.is_chat:
        return {"system": system}
    first = pair.prompt[0]
    if first["role"] != "system":
        return {"prompt": [{"role": "system", "content": system}, *pair.prompt]}
    if first.get("content", "").strip() != system.strip():
        raise malformed(where, "one system message", "a column `system` beside another in the messages")
    return {}


def _read_tools(fields: dict[str, Any], where: str) -> list | None:
    tools = _optional(fields, "tools", list, "a list, or a JSON text of one", where)
    for tool in tools or ():
        if not isinstance(tool, Mapping) and not callable(tool):  # chat templates take functions too
            raise malformed(where, "`tools` to be a list of objects", f"{kind(tool)} in it")
    return tools


def _optional(fields: dict[str, Any], name: str, of: type, expected: str, where: str) -> Any:
    """The value of a column that need not be there, or None where it is missing or empty."""
    value = drop_nulls(fields.get(name))
    if value is None or value == of():
        return None
    if not isinstance(value, of):
        raise malformed(where, f"`{name}` to be {expected}", kind(value))
    check_unicode(f"`{name}`", value, where)
    return value
