"""The tokens of a pair: one shared prompt, two completions, each with its end, within a budget.

Where a rule has a reason:

- Completion tokens are those that follow the prompt's in the joint tokenisation of prompt + completion: that is how
  the whole text reads. But where joint tokenisation merges across the boundary ("foo" + "bar" read as "fo" + "obar"),
  the prompt would no longer be the same for chosen and rejected, nor what a model sees when it generates; there the
  completion is tokenised by itself, as the continuation of a text: without the space that SentencePiece puts before
  the first word of a text. Prompt and completion together always decode to the whole text.
- Control tokens that a row spells are tokenised as text, see `lit_did.data.special_tokens`.
- BOS comes first once: from the template for chat, else from us where the tokenizer adds it by itself.
- An empty prompt becomes BOS (else EOS), because the first completion token needs a position that predicts it.
- EOS comes last once, where the template does not end the answer itself, see `lit_did.data.rendering`.
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
_BEFORE = ("\n", "-", "a")  # texts to continue, to see how a completion reads in the middle of a text


class Context(NamedTuple):
    """Tokens between a completion's: `ids[i]` stands before completion token `places[i]`; read, but not scored."""

    ids: list[int]
    places: list[int]


class TooLongError(UnusableRowError):
    """A pair longer than `max_length` where `truncation="drop"`."""


class TokenizedPair(NamedTuple):
    """Token ids; `prompt_ids` belongs to both completions. An empty completion stays empty, without EOS.

    `chosen_ids` and `rejected_ids` are the completion tokens, those that are scored. A completion of several turns
    has a `Context`, the tokens between them.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_context: Context | None = None
    rejected_context: Context | None = None


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
    """Tokenises one pair; the rules are at the top of this file, in `lit_did.data.rendering` and in `truncate_pair`.

    Args:
        row: A raw row in any of the formats of `parse_pair`, or its result.
        tokenizer: A transformers tokenizer.
        max_length: The most tokens that prompt and completion may have together, at least 2.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template; the row's own go before.
        as_chat: Wrap plain text as messages of user and assistant, see `to_chat`.
        parse_special_tokens: Read control tokens that the row's text spells as control tokens, not as text.
        truncation, min_completion_tokens: What loses tokens where `max_length` is exceeded, see `truncate_pair`.

    Raises:
        UnusableRowError: If the row is whole but cannot be trained on: messages that the template refuses, or with
            `truncation="drop"` a pair that is too long.
        ValueError: If the row is malformed, cannot be rendered, or an argument is out of range.
    """
    check_truncation(max_length, truncation, min_completion_tokens)
    whole = tokenize_whole(
        row,
        tokenizer,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        as_chat=as_chat,
        parse_special_tokens=parse_special_tokens,
    )
    return truncate_pair(
        whole, max_length, tokenizer.bos_token_id, truncation=truncation, min_completion_tokens=min_completion_tokens
    )


def tokenize_whole(
    row: Mapping[str, Any] | PreferencePair, tokenizer: Any, *, as_chat: bool = False, **options: Any
) -> TokenizedPair:
    """As `tokenize_pair`, without truncation."""
    pair = row if isinstance(row, PreferencePair) else parse_pair(row)
    renderer = Renderer(tokenizer, **options)
    return tokenize_rendered([renderer(prepare_pair(pair, as_chat))], tokenizer)[0]


def tokenize_rendered(pairs: Sequence[RenderedPair], tokenizer: Any) -> list[TokenizedPair]:
    """Tokenises many pairs without truncating them, in three calls, which fast tokenizers spread over threads.

    A completion of which nothing is to be scored has no tokens.
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
            prompt = prompt if prompt[:1] == [bos] else [bos, *prompt]  # a parsed text may spell BOS out
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

    Completions lose tokens, and so their end, from the right, each by itself. Prompts lose tokens from the left, the
    same for both completions; a BOS that was first stays (but not a turn marker that only goes by that name: ChatML's
    <|im_start|>, known by its coming again in the prompt). Neither ever loses its last token.

    Args:
        pair: What `tokenize_rendered` returns.
        max_length: At least 2.
        bos_token_id: The tokenizer's.
        truncation: "completion" cuts the completions that are too long. It cuts the prompt only where it leaves less
            than `min_completion_tokens` of a completion that has them. "prompt" cuts the prompt before it cuts a
            completion. "drop" refuses a pair that is too long.
        min_completion_tokens: By default a quarter of `max_length`, at least 1.

    Raises:
        TooLongError: With "drop", if the pair is too long.
        UnusableRowError: If other turns before the first completion token fill
            `max_length`.
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
            f"{len(prompt)} and a completion of {longest}."
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
        """The ids of each text; those that are `marked` hold control tokens to encode as text."""
        if not any(marked):
            return self._encode(texts)
        plain = iter(self._encode([text for text, is_marked in zip(texts, marked, strict=True) if not is_marked]))
        return [
            self._encode_marked(text) if is_marked else next(plain)
            for text, is_marked in zip(texts, marked, strict=True)
        ]

    def continuation(self, text: str, marked: bool) -> list[int]:
        """The ids of `text` where other text comes before it."""
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
        """A text whose marked control tokens are text, and the others control tokens."""
        ids: list[int] = []
        for number, part in enumerate(split_marked(text)):
            if part:
                encode = self._spell if number % 2 else self._part
                ids += encode(part, bool(ids) or continues)
        return ids

    def _part(self, text: str, continues: bool) -> list[int]:
        return self.continuation(text, marked=False) if continues else self._encode([text])[0]

    def _spell(self, token: str, continues: bool) -> list[int]:
        """The ids of a control token's text, without the control token's own."""
        ids = self._as_text(token, continues)
        if self.tokenizer.convert_tokens_to_ids(token) in ids:  # not every tokenizer can switch that off
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
            verbose=False,  # no remark on texts longer than the model's context: they are cut later
            **options,
        )["input_ids"]


def _completion(
    pair: RenderedPair, side: RenderedCompletion, prompt: list[int], joint: list[int], encoder: _Encoder
) -> tuple[list[int], Context | None]:
    """The completion tokens, and those between them.

    Args:
        pair, side: The pair and its completion.
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
    """What follows the ids `before` in the joint ids; `text` by itself where those differ or nothing follows."""
    # Nothing follows an empty text, but also one that merged into the last unknown token.
    if joint[: len(before)] == before and (len(joint) > len(before) or not text):
        return joint[len(before) :]
    return encoder.continuation(text, marked)


def _positions(ids: list[int], context: Context | None) -> np.ndarray:
    """Where each completion token stands among all that follow the prompt."""
    tokens = np.arange(len(ids))
    return tokens if context is None else tokens + np.searchsorted(context.places, tokens, side="right")


def _reach(ids: list[int], context: Context | None, count: int) -> int:
    """How many tokens after the prompt hold the first `count` completion tokens."""
    if context is None or not count:
        return count
    return int(_positions(ids, context)[count - 1]) + 1


def _cut(ids: list[int], context: Context | None, room: int) -> tuple[list[int], Context | None]:
    """What is left of a completion in `room` tokens."""
    if context is None:
        return ids[:room], None
    ids = ids[: int(np.searchsorted(_positions(ids, context), room))]
    count = int(np.searchsorted(context.places, len(ids)))  # those after the last completion token are not kept
    return ids, Context(context.ids[:count], context.places[:count]) if count else None
