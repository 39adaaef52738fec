"""Keeps the text of rows apart from control tokens: "<|im_end|>" in the text of a row is text and ends no turn.

Control tokens that a row spells are wrapped in two private characters before a template sees them, as transformers
does for `apply_chat_template(sanitize_control_tokens=True)`, which returns only ids. The template's own control tokens
are not wrapped, so tokenising can distinguish the two. A template may split or strip a message: a private character
that lost its partner is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

_START, _END = "\U000f0000", "\U000f0001"  # from a private-use area
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")


class ControlTokens:
    """Finds and marks a tokenizer's control tokens in other text.

    Args:
        tokens: The texts of the control tokens.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(token for token in tokens if token)
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)  # longest first
        # Some vocabularies have thousands of control tokens but few first characters, which are quicker to search.
        first = "".join(re.escape(character) for character in sorted({token[0] for token in self._tokens}))
        self._first = re.compile(f"[{first}]" if first else "(?!)")

    def first(self, value: Any) -> str:
        """The first control token spelled in `value`, a string or nested lists and dicts of strings; "" if none is."""
        if isinstance(value, str):
            start, stop = next(self._find(value), (0, 0))
            return value[start:stop]
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, list | tuple):
            return ""
        return next((token for token in map(self.first, value) if token), "")

    def mark(self, value: Any) -> Any:
        """`value` with every control token that its strings spell marked as text."""
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        if not isinstance(value, str):
            return value
        return self._wrap(unmark(value), _START, _END)

    def show(self, text: str) -> str:
        """`text` for a person to read: control tokens that it spells become "[as text: <|im_end|>]"."""
        return self._wrap(text, "[as text: ", "]")

    def ids(self, tokenizer: Any) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(tokenizer.convert_tokens_to_ids(sorted(self._tokens)))

    def end(self, text: str) -> str:
        """The control token, not marked, that `text` ends with; "" if there is none."""
        return next((text[-length:] for length in self._lengths if text[-length:] in self._tokens), "")

    def start(self, text: str) -> str:
        """The control token that `text` starts with; "" if there is none."""
        return next((text[:length] for length in self._lengths if text[:length] in self._tokens), "")

    def _wrap(self, text: str, before: str, after: str) -> str:
        parts, end = [], 0
        for start, stop in self._find(text):
            parts += [text[end:start], before, text[start:stop], after]
            end = stop
        return "".join([*parts, text[end:]])

    def _find(self, text: str) -> Iterator[tuple[int, int]]:
        end = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < end:
                continue
            for length in self._lengths:
                if text[start : start + length] in self._tokens:
                    end = start + length
                    yield start, end
                    break


def control_tokens(tokenizer: Any, turns: str = "") -> ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and added tokens that its chat template puts around turns.

    Added tokens need not be special: DeepSeek's "<|User|>" is not. Pairs such as "<think>" and "</think>" are markup,
    which an answer may contain, and no control tokens.

    Args:
        tokenizer: A transformers tokenizer.
        turns: A short conversation in the tokenizer's chat template.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {token.content for token in added}
    markup = {text for text in texts if f"</{text[1:]}" in texts or f"<{text[2:]}" in texts}
    around = {text for text in texts - markup if text in turns and not text.isspace()}
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return ControlTokens(special | around | set(getattr(tokenizer, "chat_control_tokens", None) or ()))


def split_marked(text: str) -> list[str]:
    """The text without marks, in parts that alternate: ordinary text, a marked control token, ordinary text, ..."""
    return [part or "" for part in _MARKED.split(text)]


def is_marked(text: str, place: int) -> bool:
    """Whether a marked control token starts at `place`."""
    return text[:place].endswith(_START)


def unmark(text: str) -> str:
    """The text without marks."""
    return text.replace(_START, "").replace(_END, "")
