"""Where the prompt of a pair ends and its completions begin.

Data sets spell the prompt in three ways: in a column of its own, in both completions ("implicit"), or in both places
("repeated"). The functions here make it explicit, once.
"""

from __future__ import annotations

import re

from lit_did.data.errors import malformed, one_line, unusable
from lit_did.data.messages import Message

ASSISTANT = "\n\nAssistant:"
_LEAST_WORDS = 4

Texts = tuple[str, str, str]
Chats = tuple[list[Message], list[Message], list[Message]]


def split_text(chosen: str, rejected: str) -> tuple[Texts, bool]:
    """Prompt and completions of two texts that begin alike, and whether a dialogue's marker says where they part.

    For dialogues as in HH-RLHF the prompt is everything up to and with the last shared "\\n\\nAssistant:"; for other
    text the longest common prefix, cut back to the start of its last whitespace, so that no word is split and the
    completions keep that whitespace.
    """
    length = min(len(chosen), len(rejected))
    shared = chosen[: next((place for place in range(length) if chosen[place] != rejected[place]), length)]
    marker = shared.rfind(ASSISTANT)
    if marker >= 0:
        end = marker + len(ASSISTANT)
    else:
        # The last whitespace that both share, from its start; never all of the shorter text: a completion would be "".
        shared = shared[: length - 1]
        end = max((match.start() for match in re.finditer(r"\s+", shared)), default=0)
    return (chosen[:end], chosen[end:], rejected[end:]), marker >= 0


def join_text(prompt: str, chosen: str, rejected: str, where: str) -> Texts:
    """The pair of a prompt beside whole dialogues as in HH-RLHF, which have their prompt in what both share.

    Raises:
        UnusableRowError: if the prompt is not in what both share.
    """
    texts, is_dialogue = split_text(chosen, rejected)
    if not is_dialogue or prompt.strip() not in texts[0]:
        raise unusable(where, "`prompt` to be in the turns that `chosen` and `rejected` share", "another text")
    return texts


def split_chat(chosen: list[Message], rejected: list[Message]) -> Chats:
    """The messages that both conversations begin with, and what follows. A side's last message is always its own."""
    end = 0
    while end < min(len(chosen), len(rejected)) - 1 and chosen[end] == rejected[end]:
        end += 1
    return chosen[:end], chosen[end:], rejected[end:]


def num_repeats(prompt: str, chosen: str, rejected: str) -> int:
    """How many of two completions in plain text begin with the prompt, and do not go on in its last word: 0, 1 or 2."""
    start = prompt.rstrip()
    if not start.strip():
        return 0
    return sum(
        text.startswith(start) and not (_is_word(start[-1:]) and _is_word(text[len(start) :][:1]))
        for text in (chosen, rejected)
    )


def _is_word(character: str) -> bool:
    return character.isascii() and character.isalnum()  # other scripts may put no spaces between words


def strip_text(prompt: str, chosen: str, rejected: str, where: str, certain: bool) -> Texts:
    """Takes a prompt that both completions repeat off them.

    Args:
        prompt, chosen, rejected: plain text.
        where: what errors call the row.
        certain: whether the source is known to repeat its prompts. If not, what begins with the prompt is taken for an
            answer that does so by itself ("Hi" is answered by "Hi there"), unless both do and the prompt has at least
            four words.

    Raises:
        UnusableRowError: if one completion alone begins with the prompt, or a completion is nothing but the prompt.
    """
    repeats = num_repeats(prompt, chosen, rejected)
    if not repeats or not (certain or (repeats == 2 and len(prompt.split()) >= _LEAST_WORDS)):
        return prompt, chosen, rejected
    if repeats == 1:
        side = "chosen" if num_repeats(prompt, chosen, "") else "rejected"
        raise unusable(where, "both completions to begin with the prompt, or neither", f"it in `{side}` alone")
    # As it is, where both have it so; else without the whitespace at its end, which belongs to the completions then.
    start = prompt if chosen.startswith(prompt) and rejected.startswith(prompt) else prompt.rstrip()
    chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise unusable(where, f"`{name}` to have text after the prompt, which it repeats", "none")
    return start, chosen, rejected


def strip_chat(prompt: list[Message], chosen: list[Message], rejected: list[Message], where: str) -> Chats:
    """Takes prompt messages that both sides repeat off them; a system message may stand on one of the two alone.

    Raises:
        ValueError: if one side alone begins with the prompt, or a side begins with another message that no assistant
            wrote: what to answer is then unclear.
    """
    system, messages = (prompt[:1], prompt[1:]) if prompt[0]["role"] == "system" else ([], prompt)
    if not messages:
        system, messages = [], prompt
    repeated = []
    for side in (chosen, rejected):
        own_system = side[:1] if side[0]["role"] == "system" and messages[0]["role"] != "system" else []
        repeats = _same(side[len(own_system) : len(own_system) + len(messages)], messages)
        fits = not own_system or not system or _same(own_system, system)
        repeated.append((own_system, side[len(own_system) + len(messages) :]) if repeats and fits else None)
    if all(repeated):
        (first, chosen), (second, rejected) = repeated
        if not _same(first, second):
            raise malformed(where, "the same system message in `chosen` and `rejected`", "two different ones")
        if not chosen or not rejected:
            raise unusable(where, "`chosen` and `rejected` to go on after the prompt, which they repeat", "no message")
        return (system or first) + messages, chosen, rejected
    for name, side, whole in (("chosen", chosen, repeated[0]), ("rejected", rejected, repeated[1])):
        if whole or side[0]["role"] in ("system", "user"):
            raise malformed(
                where,
                "both sides to repeat the prompt's messages, or to begin with the answer to them",
                f"`{name}` beginning with a message of role '{one_line(side[0]['role'])}'"
                + (", and the prompt in it alone" if whole else ", which is not the prompt's"),
            )
    return prompt, chosen, rejected


def join_chat(prompt: str, chosen: list[Message], rejected: list[Message], where: str) -> Chats:
    """The pair of a prompt in plain text beside messages: the answers alone, or whole conversations as UltraFeedback's.

    Whole conversations have their prompt in the messages that both share; `prompt` must be among their texts.

    Raises:
        UnusableRowError: if there is no prompt, or it is not in the messages that both sides share.
    """
    begins = {side[0]["role"] in ("system", "user") for side in (chosen, rejected)}
    if begins == {False}:
        if not prompt.strip():
            raise unusable(where, "`prompt` to be non-empty", "an empty string")
        return [{"role": "user", "content": prompt}], chosen, rejected
    shared, chosen, rejected = split_chat(chosen, rejected)
    if not shared:
        raise unusable(
            where, "`chosen` and `rejected` to share their first message, as the prompt", "no shared message"
        )
    texts = [message.get("content", "").strip() for message in shared]
    asked = prompt.strip()
    if asked and not any(asked in text or (text and text in asked) for text in texts):
        raise unusable(where, "`prompt` to be among the messages that `chosen` and `rejected` share", "another text")
    return shared, chosen, rejected


def _same(some: list[Message], others: list[Message]) -> bool:
    """Whether messages are the same but for whitespace around their texts."""
    return len(some) == len(others) and all(
        a == b or {**a, "content": a.get("content", "").strip()} == {**b, "content": b.get("content", "").strip()}
        for a, b in zip(some, others, strict=True)
    )
