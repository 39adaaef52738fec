"""Tokenises a pair: one shared prompt and two completions, each with its end, within `max_length`.

- Completion tokens are those that follow the prompt's in the joint tokenisation of prompt + completion. If a token
  spans the boundary ("foo" + "bar" become "fo" + "obar"), the completion is tokenised by itself instead. Otherwise the
  prompt would differ between chosen and rejected, and from what a model sees when it generates. SentencePiece's space
  before the first word of a text is left out then, so prompt and completion together always decode to the whole text.
- Control tokens that a row spells are tokenised as text; see `lit_did.data.special_tokens`.
- BOS comes first, once. In a chat the template adds it. In plain text we add it if the tokenizer does so.
- An empty prompt becomes BOS (or EOS), because a position must predict the first completion token.
- EOS comes last, once, unless the template ends the answer itself; see `lit_did.data.rendering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_did.arguments import check_choice, check_integer
from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair, prepare_pair
from lit_did.data.rendering import RenderedCompletion, RenderedPair, Renderer, adds_bos, first_token
from lit_did.data.special_tokens import split_marked

Truncation = Literal["completion", "prompt", "drop"]
_BEFORE = ("\n", "-", "a")  # texts to continue, which shows the tokens of a completion in the middle of a text


class Context(NamedTuple):
    """Tokens between the completion tokens, which the model reads but which are not scored: other turns, headers."""

    ids: list[int]
    """token ids"""
    places: list[int]
    """`ids[i]` stands before the completion token with the number `places[i]`"""


class TooLongError(UnusableRowError):
    """A pair longer than `max_length` with `truncation="drop"`."""


class TokenizedPair(NamedTuple):
    """The token ids of a pair."""

    prompt_ids: list[int]
    """the prompt of both completions"""
    chosen_ids: list[int]
    """the completion tokens, which are scored; an empty completion stays empty, without EOS"""
    rejected_ids: list[int]
    """as `chosen_ids`"""
    chosen_context: Context | None = None
    """the tokens between those of `chosen_ids`, if it has several turns"""
    rejected_context: Context | None = None
    """as `chosen_context`"""


def tokenize_pair(
    row: Mapping[str, Any] | PreferencePair,
    tokenizer: Any,
    max_length: int,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    as_chat: bool = False,
    parse_special_tokens: bool = False,
    truncation: Truncation = "completion",
    min_completion_tokens: int | None = None,
) -> TokenizedPair:
    """Tokenises one pair. `lit-did docs data` says which tokens count as a completion's.

    Args:
        row: A raw row in any of the formats of `parse_pair`, or its result.
        tokenizer: A transformers tokenizer.
        max_length: The most tokens that prompt and completion may have together, at least 2.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template. The row's own override them.
        as_chat: Whether to wrap plain text as messages of user and assistant.
        parse_special_tokens: Whether to read control tokens that the row's text spells as control tokens, not as text.
        truncation: What loses tokens in a pair that is too long: "completion", "prompt" or "drop"; see `truncate_pair`.
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some, with "completion"; by
            default a quarter of `max_length`.

    Returns:
        The tokens of the pair.

    Raises:
        UnusableRowError: If the row is well-formed but cannot be trained on: messages that the template refuses, or
            with `truncation="drop"` a pair that is too long.
        TypeError: If an argument has the wrong type.
        ValueError: If the row is malformed, cannot be rendered, or an argument is out of range.
    """
    check_truncation(max_length, truncation, min_completion_tokens)
    pair = row if isinstance(row, PreferencePair) else parse_pair(row)
    renderer = Renderer(
        tokenizer, chat_template, chat_template_kwargs=chat_template_kwargs, parse_special_tokens=parse_special_tokens
    )
    (whole,) = tokenize_rendered([renderer(prepare_pair(pair, as_chat))], tokenizer)
    return truncate_pair(
        whole, max_length, tokenizer.bos_token_id, truncation=truncation, min_completion_tokens=min_completion_tokens
    )


def tokenize_rendered(pairs: Sequence[RenderedPair], tokenizer: Any) -> list[TokenizedPair]:
    """Tokenises many pairs without truncation, in three calls, which fast tokenizers spread over threads.

    A completion without text to score has no tokens.
    """
    encoder = _Encoder(tokenizer)
    marked = [bool(pair.spelled) for pair in pairs]
    prompts = encoder([pair.prompt for pair in pairs], marked)
    sides = []
    for completions in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        texts = [pair.prompt + side.pieces[0] for pair, side in zip(pairs, completions, strict=True)]
        joint = encoder(texts, marked)
        sides.append([_completion(*row, encoder) for row in zip(pairs, completions, prompts, joint, strict=True)])
    tokenized = []
    for pair, prompt, (chosen, chosen_context), (rejected, rejected_context) in zip(
        pairs, prompts, *sides, strict=True
    ):
        if encoder.adds_bos and not pair.is_chat:
            bos = tokenizer.bos_token_id
            prompt = (
                prompt if prompt[:1] == [bos] else [bos, *prompt]
            )  # with `parse_special_tokens`, the text may spell BOS
        prompt = prompt or [first_token(tokenizer)]
        tokenized.append(TokenizedPair(prompt, chosen, rejected, chosen_context, rejected_context))
    return tokenized


def truncate_pair(
    pair: TokenizedPair,
    max_length: int,
    bos_token_id: int | None = None,
    *,
    truncation: Truncation = "completion",
    min_completion_tokens: int | None = None,
) -> TokenizedPair:
    """Cuts a pair to at most `max_length` tokens, prompt and completion together.

    A completion loses its end, independently of the other one. The prompt loses its start, the same for both
    completions, except a BOS in front. A BOS that comes again in the prompt may be cut, because it marks turns, such as
    ChatML's <|im_start|>. Neither loses its last token.

    Args:
        pair: A pair of any length.
        max_length: The most tokens that prompt and completion may have together, at least 2.
        bos_token_id: The tokenizer's BOS, if it has one.
        truncation: "completion" cuts the completions that are too long. It cuts the prompt only if a completion would
            keep less than `min_completion_tokens`. "prompt" cuts the prompt before it cuts a completion. "drop" refuses
            a pair that is too long.
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some, with "completion"; by
            default a quarter of `max_length`, at least 1.

    Returns:
        The pair, cut if it was too long.

    Raises:
        TooLongError: If the pair is too long, with "drop".
        UnusableRowError: If other turns before the first completion token fill `max_length`.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.
    """
    check_truncation(max_length, truncation, min_completion_tokens)
    prompt = pair.prompt_ids
    sides = ((pair.chosen_ids, pair.chosen_context), (pair.rejected_ids, pair.rejected_context))
    longest = max(_reach(ids, context, len(ids)) for ids, context in sides)
    if len(prompt) + longest <= max_length:
        return pair
    if truncation == "drop":
        raise TooLongError(
            f'Expected at most {max_length} tokens (`max_length`) with `truncation="drop"`, but got a prompt of '
            f"{len(prompt)} and a completion of {longest}. Raise `max_length`."
        )
    needed = longest
    if truncation == "completion":
        least = min_completion_tokens or max(1, max_length // 4)
        needed = max(_reach(ids, context, min(least, len(ids))) for ids, context in sides)
    room = max(1, max_length - needed)
    if len(prompt) > room:
        head = prompt[:1] if prompt[0] == bos_token_id and bos_token_id not in prompt[1:] else []
        prompt = head + prompt[len(prompt) - (room - len(head)) :]
    (chosen, chosen_context), (rejected, rejected_context) = (
        _cut(ids, context, max_length - len(prompt)) for ids, context in sides
    )
    if (pair.chosen_ids and not chosen) or (pair.rejected_ids and not rejected):
        raise UnusableRowError(
            f"Expected a completion token within `max_length={max_length}`, but other turns come first. Raise "
            "`max_length`."
        )
    return TokenizedPair(prompt, chosen, rejected, chosen_context, rejected_context)


def check_tokens(pair: TokenizedPair) -> None:
    """Raises UnusableRowError if a completion has no tokens."""
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        if not ids:
            raise UnusableRowError(f"Expected `{name}` to have tokens, but got none.")


def check_truncation(max_length: int, truncation: Truncation, min_completion_tokens: int | None) -> None:
    """Raises TypeError or ValueError unless the arguments are what `truncate_pair` documents."""
    check_integer("max_length", max_length, 2)
    check_choice("truncation", truncation, Truncation)
    if min_completion_tokens is not None:
        check_integer("min_completion_tokens", min_completion_tokens, 1)
        if min_completion_tokens >= max_length:
            raise ValueError(
                f"Expected `min_completion_tokens` to be below `max_length`, {max_length}, but got "
                f"{min_completion_tokens}."
            )


class _Encoder:
    """Encodes text with a tokenizer, without adding special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.adds_bos = adds_bos(tokenizer)
        alone = self._encode(["a"])[0]
        continued = self._continuation("a")
        self._adds_prefix = continued is not None and continued != alone

    def __call__(self, texts: Sequence[str], marked: Sequence[bool]) -> list[list[int]]:
        """The ids of each text. Texts that are `marked` contain control tokens to encode as text."""
        if not any(marked):
            return self._encode(texts)
        plain = iter(self._encode([text for text, is_marked in zip(texts, marked, strict=True) if not is_marked]))
        return [
            self._encode_marked(text) if is_marked else next(plain)
            for text, is_marked in zip(texts, marked, strict=True)
        ]

    def continuation(self, text: str, marked: bool) -> list[int]:
        """The ids of `text` if other text precedes it."""
        if marked:
            return self._encode_marked(text, continues=True)
        continued = self._continuation(text) if self._adds_prefix else None
        return self._encode([text])[0] if continued is None else continued

    def _continuation(self, text: str, **options: Any) -> list[int] | None:
        for before in _BEFORE:
            head, joint = (self._encode([part], **options)[0] for part in (before, before + text))
            if head and joint[: len(head)] == head and len(joint) > len(head):
                return joint[len(head) :]
        return None

    def _encode_marked(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text whose marked control tokens are text, and the others control tokens."""
        ids: list[int] = []
        for number, part in enumerate(split_marked(text)):
            if part:
                encode = self._spell if number % 2 else self._part
                ids += encode(part, bool(ids) or continues)
        return ids

    def _part(self, text: str, continues: bool) -> list[int]:
        return self.continuation(text, marked=False) if continues else self._encode([text])[0]

    def _spell(self, token: str, continues: bool) -> list[int]:
        """The ids of a control token's text, without the control token's own id."""
        ids = self._as_text(token, continues)
        if self.tokenizer.convert_tokens_to_ids(token) in ids:  # some tokenizers do not support `split_special_tokens`
            ids = self._as_text(token[:1], continues) + self._as_text(token[1:], True)
        return ids

    def _as_text(self, text: str, continues: bool) -> list[int]:
        continued = None
        if continues and self._adds_prefix:
            continued = self._continuation(text, split_special_tokens=True)
        return self._encode([text], split_special_tokens=True)[0] if continued is None else continued

    def _encode(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,  # a tokenizer.json may switch it on
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about texts longer than the model's context: they are cut later
            **options,
        )["input_ids"]


def _completion(
    pair: RenderedPair, side: RenderedCompletion, prompt: list[int], joint: list[int], encoder: _Encoder
) -> tuple[list[int], Context | None]:
    """The completion tokens, and the tokens between them.

    Args:
        pair: The rendered pair.
        side: One of its completions.
        prompt: The ids of the prompt.
        joint: The ids of the prompt and the first piece of the completion.
    """
    marked = bool(pair.spelled)
    ids = _following(prompt, joint, side.pieces[0], marked, encoder)
    between = Context([], [])
    if len(side.pieces) > 1:
        text, whole = pair.prompt + side.pieces[0], prompt + ids
        for number, piece in enumerate(side.pieces[1:], start=1):
            text += piece
            following = _following(whole, encoder([text], [marked])[0], piece, marked, encoder)
            whole = whole + following
            if number % 2 == 0:
                ids = ids + following
            else:
                between.ids.extend(following)
                between.places.extend([len(ids)] * len(following))
    while between.places and between.places[-1] == len(ids):  # nothing to score follows
        between.ids.pop()
        between.places.pop()
    eos = encoder.tokenizer.eos_token_id
    if ids and not side.ended and eos is not None:
        ids = [*ids, eos]
    return ids, between if between.ids else None


def _following(before: list[int], joint: list[int], text: str, marked: bool, encoder: _Encoder) -> list[int]:
    """The joint ids after `before`; the ids of `text` by itself if the joint ids begin otherwise or end there."""
    # They end there for an empty text, and for one that merged into the last unknown token.
    if joint[: len(before)] == before and (len(joint) > len(before) or not text):
        return joint[len(before) :]
    return encoder.continuation(text, marked)


def _positions(ids: list[int], context: Context | None) -> np.ndarray:
    """The place of each completion token among all tokens that follow the prompt."""
    tokens = np.arange(len(ids))
    return tokens if context is None else tokens + np.searchsorted(context.places, tokens, side="right")


def _reach(ids: list[int], context: Context | None, count: int) -> int:
    """How many tokens after the prompt contain the first `count` completion tokens."""
    if context is None or not count:
        return count
    return int(_positions(ids, context)[count - 1]) + 1


def _cut(ids: list[int], context: Context | None, room: int) -> tuple[list[int], Context | None]:
    """The part of a completion that fits into `room` tokens."""
    if context is None:
        return ids[:room], None
    ids = ids[: int(np.searchsorted(_positions(ids, context), room))]
    count = int(np.searchsorted(context.places, len(ids)))  # not those after the last completion token
    return ids, Context(context.ids[:count], context.places[:count]) if count else None
