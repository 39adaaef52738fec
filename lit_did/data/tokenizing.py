"""The tokens of a pair: one shared prompt, two completions, each ended by EOS, within a budget.

Where a rule has a reason:

- Completion tokens are those that follow the prompt's in the joint tokenisation of prompt + completion: that is how
  the whole text reads, and tokenising a completion alone would add SentencePiece's space before its first word. But
  where joint tokenisation merges across the boundary ("foo" + "bar" read as "fo" + "obar"), the prompt would no longer
  be the same for chosen and rejected, nor what a model sees when it generates; there the completion is tokenised alone.
- BOS comes first once: from the template for chat, else from us where the tokenizer adds it by itself.
- An empty prompt becomes BOS (else EOS), because the first completion token needs a position that predicts it.
- EOS comes last once. Templates may add whitespace after it (ChatML's newline), which no model has to learn: dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_did.data.pairs import PreferencePair, parse_pair, prepare_pair
from lit_did.data.rendering import RenderedPair, first_token, render_pair


class TokenizedPair(NamedTuple):
    """Token ids; `prompt_ids` belongs to both completions. An empty completion stays empty, without EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def tokenize_pair(
    row: Mapping[str, Any] | PreferencePair,
    tokenizer: Any,
    max_length: int,
    *,
    chat_template: str | None = None,
    as_chat: bool = False,
) -> TokenizedPair:
    """Tokenises one pair; the rules are at the top of this file and in `truncate_pair`.

    Args:
        row: a raw row in any of the formats of `parse_pair`, or its result.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens that prompt and completion may have together, at least 2.
        chat_template: a Jinja template to use instead of the tokenizer's.
        as_chat: wrap plain text as messages of user and assistant, see `to_chat`.

    Raises:
        ValueError: if the row is malformed, cannot be rendered, or `max_length` is below 2.
    """
    pair = row if isinstance(row, PreferencePair) else parse_pair(row)
    rendered = render_pair(prepare_pair(pair, as_chat), tokenizer, chat_template)
    return truncate_pair(tokenize_rendered([rendered], tokenizer)[0], max_length, tokenizer.bos_token_id)


def tokenize_rendered(pairs: Sequence[RenderedPair], tokenizer: Any) -> list[TokenizedPair]:
    """Tokenises many pairs without truncating them, in three calls, which fast tokenizers spread over threads."""
    adds_bos = _adds_bos(tokenizer)
    prompts = _encode(tokenizer, [pair.prompt for pair in pairs])
    sides = []
    for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        joint = _encode(tokenizer, [pair.prompt + text for pair, text in zip(pairs, texts, strict=True)])
        sides.append(_completions(tokenizer, prompts, joint, texts))
    tokenized = []
    for pair, prompt, chosen, rejected in zip(pairs, prompts, *sides, strict=True):
        if adds_bos and not pair.is_chat:
            bos = tokenizer.bos_token_id
            prompt = prompt if prompt[:1] == [bos] else [bos, *prompt]  # the text may spell BOS out
            chosen, rejected = (ids[1:] if ids[:1] == [bos] else ids for ids in (chosen, rejected))
        prompt = prompt or [first_token(tokenizer)]
        tokenized.append(TokenizedPair(prompt, _end(chosen, tokenizer), _end(rejected, tokenizer)))
    return tokenized


def truncate_pair(pair: TokenizedPair, max_length: int, bos_token_id: int | None = None) -> TokenizedPair:
    """Cuts a pair to at most `max_length` tokens, prompt and completion together.

    First the prompt loses tokens from its left, the same for both completions, down to one; a BOS that was first stays
    (but not a turn marker that only goes by that name: ChatML's <|im_start|>, known by its coming again in the prompt).
    If that is not enough, the completions that are still too long lose tokens, and so their EOS, from the right.

    Raises:
        ValueError: if `max_length` is below 2, the least for a prompt token and a completion token.
    """
    if max_length < 2:
        raise ValueError(f"Expected `max_length` to be an integer of at least 2, but got {max_length}.")
    prompt, chosen, rejected = pair
    room = max(1, max_length - max(len(chosen), len(rejected)))
    if len(prompt) > room:
        head = prompt[:1] if prompt[0] == bos_token_id and bos_token_id not in prompt[1:] else []
        prompt = head + prompt[len(prompt) - (room - len(head)) :]
    room = max_length - len(prompt)
    return TokenizedPair(prompt, chosen[:room], rejected[:room])


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,  # a tokenizer.json may switch it on
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no remark on texts longer than the model's context: they are cut later
    )["input_ids"]


def _completions(tokenizer: Any, prompts: list[list[int]], joint: list[list[int]], texts: list[str]) -> list[list[int]]:
    """What follows the prompt's ids in the joint ids, or the completion alone where those differ or nothing follows."""
    completions = [ids[len(prompt) :] for prompt, ids in zip(prompts, joint, strict=True)]
    # Nothing follows an empty text, but also one that merged into the prompt's last unknown token.
    alone = [row for row, prompt in enumerate(prompts) if joint[row][: len(prompt)] != prompt or not completions[row]]
    for row, ids in zip(alone, _encode(tokenizer, [texts[row] for row in alone]), strict=True):
        completions[row] = ids
    return completions


def _end(completion: list[int], tokenizer: Any) -> list[int]:
    """Ends a completion in exactly one EOS."""
    eos = tokenizer.eos_token_id
    if not completion or eos is None:
        return completion
    end = len(completion)
    while eos in completion[:end]:
        last = end - 1 - completion[:end][::-1].index(eos)
        if tokenizer.decode(completion[last + 1 : end]).strip():
            break
        end = last  # only whitespace follows this EOS
    return [*completion[:end], eos]


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text by itself (not only: whether it has a BOS token)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]
