"""The text of a pair before tokenising: plain text as it is, chat through the tokenizer's template."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_did.data.pairs import Message, PreferencePair


class RenderedPair(NamedTuple):
    """Prompt and completions as text, such that prompt + completion is the whole; `is_chat` if a template made it."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool


def render_pair(pair: PreferencePair, tokenizer: Any, chat_template: str | None = None) -> RenderedPair:
    """Turns a pair into text.

    A completion of a chat pair is what the template adds to the prompt when the completion's messages follow it. The
    prompt is rendered with the generation prompt (the header of the assistant's turn) or, where a completion is not
    rendered to start with that, without.

    Args:
        pair: the pair.
        tokenizer: a transformers tokenizer.
        chat_template: a Jinja template to use instead of the tokenizer's.

    Raises:
        ValueError: for a chat pair, if there is no template, if the template refuses the messages, or if it renders
            the prompt differently once a completion follows; for an empty prompt, see `first_token`.
    """
    if not pair.is_chat:
        if not pair.prompt:
            first_token(tokenizer)  # raises where nothing can stand for the empty prompt
        return RenderedPair(pair.prompt, pair.chosen, pair.rejected, is_chat=False)
    whole = [_apply(tokenizer, pair.prompt + side, chat_template, False) for side in (pair.chosen, pair.rejected)]
    for add_generation_prompt in (True, False):
        prompt = _apply(tokenizer, pair.prompt, chat_template, add_generation_prompt)
        if all(text.startswith(prompt) for text in whole):
            chosen, rejected = (text[len(prompt) :] for text in whole)
            return RenderedPair(prompt, chosen, rejected, is_chat=True)
    raise ValueError(
        "Expected a chat template that leaves the prompt as it is when a completion follows, "
        f"but the prompt {prompt!r} became {whole[0][: len(prompt)]!r}. Pass another to `chat_template`."
    )


def first_token(tokenizer: Any) -> int:
    """The id that stands for an empty prompt: BOS, else EOS.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("Expected a prompt, or a tokenizer with a BOS or EOS token to stand for it, but got neither.")


def _apply(tokenizer: Any, messages: list[Message], chat_template: str | None, add_generation_prompt: bool) -> str:
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"Expected a tokenizer with a chat template for chat messages, but {type(tokenizer).__name__} "
            f"{getattr(tokenizer, 'name_or_path', '')!r} has none. Pass one to `chat_template`, or use the tokenizer "
            "of an instruction-tuned model."
        )
    from jinja2 import TemplateError  # transformers needs jinja2 for templates, and only for them

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"Expected messages that the chat template takes, but it raised for the roles {roles}: {error}"
        ) from error
