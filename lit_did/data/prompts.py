"""Finds where the prompt of a pair ends and its completions begin.

Data sets hold the prompt in a column of its own, in both completions ("implicit"), or in both places ("repeated"). The
functions here return it once.
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
    """Splits two texts that begin alike into prompt and completions.

    For dialogues as in HH-RLHF, the prompt ends with the last shared "\\n\\nAssistant:". For other text, it is the
    longest common prefix, cut back to the start of its last whitespace. So no word is split, and the completions keep
    that whitespace.

    Returns:
        The texts, and whether they are such dialogues.
    """
    length = min(len(chosen), len(rejected))
    shared = chosen[: next((place for place in range(length) if chosen[place] != rejected[place]), length)]
    marker = shared.rfind(ASSISTANT)
    if marker >= 0:
        end = marker + len(ASSISTANT)
    else:
        # The start of the last whitespace that both share, not the whole shorter text: no completion is empty.
        shared = shared[: length - 1]
        end = max((match.start() for match in re.finditer(r"\s+", shared)), default=0)
    return (chosen[:end], chosen[end:], rejected[end:]), marker >= 0


def join_text(prompt: str, chosen: str, rejected: str, where: str) -> Texts:
    """The pair of a prompt beside two whole dialogues as in HH-RLHF, whose shared beginning is the full prompt.

    Raises:
        UnusableRowError: If the shared beginning does not contain the prompt.
    """
    texts, is_dialogue = split_text(chosen, rejected)
    if not is_dialogue or prompt.strip() not in texts[0]:
        raise unusable(where, "`prompt` to be in the turns that `chosen` and `rejected` share", "another text")
    return texts


def split_chat(chosen: list[Message], rejected: list[Message]) -> Chats:
    """The messages that both conversations begin with, and what follows. The last message is never a shared one."""
    end = 0
    while end < min(len(chosen), len(rejected)) - 1 and chosen[end] == rejected[end]:
        end += 1
    return chosen[:end], chosen[end:], rejected[end:]


def num_repeats(prompt: str, chosen: str, rejected: str) -> int:
    """How many of two plain-text completions begin with the prompt and do not continue its last word: 0, 1 or 2."""
    start = prompt.rstrip()
    if not start.strip():
        return 0
    return sum(
        text.startswith(start) and not (_is_word(start[-1:]) and _is_word(text[len(start) :][:1]))
        for text in (chosen, rejected)
    )


def surely_repeats(prompt: str, repeats: int) -> bool:
    """Whether a row alone shows that its completions, of which `repeats` begin with the prompt, repeat it."""
    return repeats == 2 and len(prompt.split()) >= _LEAST_WORDS


def are_repeated(num_repeating: int, num_rows: int) -> bool:
    """Whether in a quarter of a source's plain-text rows a completion begins with the prompt: too many for chance."""
    return 4 * num_repeating >= num_rows > 0


def _is_word(character: str) -> bool:
    return character.isascii() and character.isalnum()  # other scripts may put no spaces between words


def strip_text(prompt: str, chosen: str, rejected: str, where: str, certain: bool) -> Texts:
    """Removes a repeated prompt from both completions.

    Args:
        prompt, chosen, rejected: Plain text.
        where: What errors call the row.
        certain: Whether the source is known to repeat its prompts. If not, a completion may begin with the prompt by
            chance ("Hi" is answered by "Hi there"). Then the prompt is removed only if both completions begin with it
            and it has at least four words.

    Raises:
        UnusableRowError: If only one completion begins with the prompt, or a completion has no other text.
    """
    repeats = num_repeats(prompt, chosen, rejected)
    if not repeats or not (certain or surely_repeats(prompt, repeats)):
        return prompt, chosen, rejected
    if repeats == 1:
        side = "chosen" if num_repeats(prompt, chosen, "") else "rejected"
        raise unusable(where, "both completions to begin with the prompt, or neither", f"it only in `{side}`")
    # Exact if both repeat it exactly. Otherwise without the whitespace at its end, which the completions then keep.
    start = prompt if chosen.startswith(prompt) and rejected.startswith(prompt) else prompt.rstrip()
    chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise unusable(where, f"`{name}` to have text after the prompt, which it repeats", "none")
    return start, chosen, rejected


def strip_chat(prompt: list[Message], chosen: list[Message], rejected: list[Message], where: str) -> Chats:
    """Removes repeated prompt messages from both sides. The system message may stand in the prompt or the sides only.

    Raises:
        ValueError: If only one side begins with the prompt, or a side begins with another message that is not the
            assistant's, because it is then unclear what is answered.
    """
    has_system = prompt[0]["role"] == "system" and len(prompt) > 1
    system, messages = (prompt[:1], prompt[1:]) if has_system else ([], prompt)
    repeated: list[tuple[list[Message], list[Message]] | None] = []
    for side in (chosen, rejected):
        own_system = side[:1] if side[0]["role"] == "system" and messages[0]["role"] != "system" else []
        repeats = _same(side[len(own_system) : len(own_system) + len(messages)], messages)
        fits = not own_system or not system or _same(own_system, system)
        repeated.append((own_system, side[len(own_system) + len(messages) :]) if repeats and fits else None)
    ours, theirs = repeated
    if ours and theirs:
        (first, chosen), (second, rejected) = ours, theirs
        if not _same(first, second):
            raise malformed(where, "the same system message in `chosen` and `rejected`", "two different ones")
        if not chosen or not rejected:
            raise unusable(where, "`chosen` and `rejected` to go on after the prompt, which they repeat", "no message")
        return (system or first) + messages, chosen, rejected
    for name, side, whole in (("chosen", chosen, ours), ("rejected", rejected, theirs)):
        if whole or side[0]["role"] in ("system", "user"):
            raise malformed(
                where,
                "both sides to repeat the prompt's messages, or to begin with the answer to them",
                f"`{name}` beginning with a message of role '{one_line(side[0]['role'])}'"
                + (", and only it repeats the prompt" if whole else ", which is not in the prompt"),
            )
    return prompt, chosen, rejected


def join_chat(prompt: str, chosen: list[Message], rejected: list[Message], where: str) -> Chats:
    """The pair of a plain-text prompt beside messages: answers only, or whole conversations as in UltraFeedback.

    The prompt of whole conversations is the messages that both share. These must contain the text of `prompt`.

    Raises:
        UnusableRowError: If there is no prompt, or the shared messages do not contain it.
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
    """Whether messages are equal, apart from whitespace around their texts."""
    return len(some) == len(others) and all(
        a == b or {**a, "content": a.get("content", "").strip()} == {**b, "content": b.get("content", "").strip()}
        for a, b in zip(some, others, strict=True)
    )
