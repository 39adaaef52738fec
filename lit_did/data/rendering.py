"""Renders a pair as text before tokenising: plain text stays unchanged, chats go through the tokenizer's template.

- The completion of a chat is what the template adds to the prompt when the completion's messages follow. The prompt is
  rendered with the generation prompt (the header of the assistant's turn), or without it if the completions do not
  start with it.
- Only the assistant's turns are scored, not the text between them (messages of users and tools, headers).
- The template's own end of turn ends the completion. The whitespace after it is dropped, and nothing is added. EOS is
  added later if the template has no end of turn, and for plain text.
- Control tokens that the text of a row spells are marked; see `lit_did.data.special_tokens`. Two are dropped instead,
  because tokenising adds them anyway: a BOS before plain text if the tokenizer adds BOS, and an EOS at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lit_did.data.pairs import Message, PreferencePair, UnusableRowError
from lit_did.data.special_tokens import control_tokens, is_marked, unmark

_TAKEN = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    ]
)
"""arguments of `apply_chat_template` that are not variables of a template"""
_THOUGHTS = frozenset(["reasoning", "reasoning_content", "thinking", "tool_calls"])
"""keys whose values templates put before the content of a message"""
_OTHER_TURNS = re.compile(r"(\n\nHuman:.*?(?:\n\nAssistant:|\Z))", re.DOTALL)


class RenderedCompletion(NamedTuple):
    """A completion as text."""

    pieces: tuple[str, ...]
    """text that is scored, text that is not, text that is scored, ..."""
    ended: bool
    """whether it has its own end, so that no EOS is added"""


class RenderedPair(NamedTuple):
    """Prompt and completions as text. The prompt followed by the pieces of a completion is the whole text."""

    prompt: str
    chosen: RenderedCompletion
    rejected: RenderedCompletion
    is_chat: bool
    """whether a template made it"""
    spelled: str = ""
    """the first control token that the row spells, or ""; all are then marked as text"""
    header: str = ""
    """what the template puts before the answer, which is then a part of the completion"""


class Renderer:
    """Turns pairs into text for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template, such as {"enable_thinking": False}. A row's own override them.
        parse_special_tokens: Whether to read control tokens that the text of a row spells as control tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        check_template_kwargs(chat_template_kwargs)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.parse_special_tokens = parse_special_tokens
        self.adds_bos = adds_bos(tokenizer)
        self.has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        self._closing, self._in_parts, turns = "", False, ""
        if self.has_template:
            self._try_template()
            with suppress(UnusableRowError):  # a template for other messages: special tokens must suffice
                turns = self._apply([_say("user", "a"), _say("assistant", "b"), _say("user", "c")], False, {})
        self.control = control_tokens(tokenizer, turns)

    def __call__(self, pair: PreferencePair) -> RenderedPair:
        """The text of `pair`.

        Raises:
            UnusableRowError: If the template refuses or fails on the messages of a chat, or renders earlier messages
                differently when others follow.
            ValueError: For a chat, if there is no template or its Jinja is invalid. For an empty prompt, if the
                tokenizer has neither BOS nor EOS.
        """
        texts: list[Any] = [*(pair.chats if pair.is_chat else self._bare(*pair.texts))]
        texts += [pair.tools, pair.chat_template_kwargs]
        spelled = "" if self.parse_special_tokens else self.control.first(texts)
        prompt, chosen, rejected, tools, kwargs = self.control.mark(texts) if spelled else texts
        if pair.is_chat:
            return self._chat(prompt, chosen, rejected, self._options(tools, kwargs))._replace(spelled=spelled)
        if not prompt:
            first_token(self.tokenizer)  # raises if no token can replace the empty prompt
        # Two whole dialogues as in HH-RLHF may differ before their last turn.
        sides = [_OTHER_TURNS.split(text) if pair.holds_turns else [text] for text in (chosen, rejected)]
        first, second = (RenderedCompletion(tuple(pieces), ended=False) for pieces in sides)
        return RenderedPair(prompt, first, second, is_chat=False, spelled=spelled)

    def prompt(self, pair: PreferencePair) -> RenderedPair:
        """The text of a prompt that is to be answered: that of a chat ends in the header of the assistant's turn.

        Args:
            pair: A prompt whose completions are empty.

        Raises:
            UnusableRowError, ValueError: As for a pair.
        """
        nothing = RenderedCompletion(("",), ended=True)
        bare = pair.prompt if pair.is_chat else self._bare(*pair.texts)[0]
        given: list[Any] = [bare, pair.tools, pair.chat_template_kwargs]
        spelled = "" if self.parse_special_tokens else self.control.first(given)
        text, tools, kwargs = self.control.mark(given) if spelled else given
        if pair.is_chat:
            text = self._apply(text, True, self._options(tools, kwargs))
        elif not text:
            first_token(self.tokenizer)  # raises if no token can replace the empty prompt
        return RenderedPair(text, nothing, nothing, is_chat=pair.is_chat, spelled=spelled)

    def _options(self, tools: list | None, kwargs: dict | None) -> dict[str, Any]:
        """The variables of the template for one row."""
        check_template_kwargs(kwargs)
        options = {**self.chat_template_kwargs, **(kwargs or {})}
        return {**options, "tools": tools} if tools else options

    def _bare(self, prompt: str, chosen: str, rejected: str) -> list[str]:
        """Plain text without a BOS that the tokenizer adds, and completions without the EOS at their end."""
        texts = [prompt, *(_without_eos(text, self.tokenizer.eos_token) for text in (chosen, rejected))]
        return [text.removeprefix(self.tokenizer.bos_token) for text in texts] if self.adds_bos else texts

    def _chat(
        self, prompt: list[Message], chosen: list[Message], rejected: list[Message], options: Mapping[str, Any]
    ) -> RenderedPair:
        sides = (chosen, rejected)
        whole = [self._apply(prompt + side, False, options) for side in sides]
        answers = all(side[0]["role"] == "assistant" for side in sides)
        start = self._apply(prompt, answers, options)
        unused = None  # what the generation prompt adds, if the completions do not start with it
        if answers and not all(text.startswith(start) for text in whole):
            opening, start = start, self._apply(prompt, False, options)
            unused = opening[len(start) :]
        if not all(text.startswith(start) for text in whole):
            raise UnusableRowError(
                "Expected a chat template that keeps the text of the prompt when a completion follows, but the prompt "
                f"{unmark(start)!r} became {unmark(whole[0][: len(start)])!r}. Pass another to `chat_template`."
            )
        header = _header([text[len(start) :] for text in whole], [side[0] for side in sides], unused) if answers else ""
        first, second = (
            self._completion(prompt, side, text, len(start), answers, options)
            for side, text in zip(sides, whole, strict=True)
        )
        return RenderedPair(start, first, second, is_chat=True, header=header)

    def _completion(
        self,
        prompt: list[Message],
        side: list[Message],
        whole: str,
        position: int,
        answers: bool,
        options: Mapping[str, Any],
    ) -> RenderedCompletion:
        """What follows `position` in `whole`, in pieces that are scored and pieces that are not."""
        pieces: list[str] = []
        ended = True
        for number, message in enumerate(side):
            if message["role"] != "assistant":
                continue
            start = position if answers and number == 0 else self._start(prompt + side[:number], whole, options)
            stop = len(whole)
            if number < len(side) - 1:
                stop = self._stop(prompt + side[: number + 1], whole, start, options)
            text, ended = self._ending(whole[start:stop])
            if pieces or start > position:
                pieces = [*(pieces or [""]), whole[position:start]]
            pieces.append(text)
            position = start + len(text)
        return RenderedCompletion(tuple(pieces or [""]), ended)

    def _start(self, messages: list[Message], whole: str, options: Mapping[str, Any]) -> int:
        """Where in `whole` the assistant's answer to `messages` starts."""
        for add_generation_prompt in (True, False):
            text = self._apply(messages, add_generation_prompt, options)
            if whole.startswith(text):
                return len(text)
        raise _rewritten(text, whole)

    def _stop(self, messages: list[Message], whole: str, start: int, options: Mapping[str, Any]) -> int:
        """Where in `whole` the last of `messages`, an answer that starts at `start`, stops."""
        text = self._apply(messages, False, options)
        if whole.startswith(text):
            return len(text)
        # Some templates end every conversation with EOS, or drop the thoughts of earlier turns: find the answer itself.
        content = _content(messages[-1]).strip()
        place = whole.find(content or self._closing, start) if content or self._closing else -1
        if place < 0 or is_marked(whole, place):
            raise _rewritten(text, whole)
        if not content:  # tool calls
            return place + len(self._closing)
        stop = place + len(content)
        blank = len(whole) - stop - len(whole[stop:].lstrip())
        token = self.control.start(whole[stop + blank :])
        return stop + blank + len(token) if token else stop

    def _ending(self, text: str) -> tuple[str, bool]:
        """An answer up to and including the template's own end of turn, and whether it has one."""
        tail, eos = text.rstrip(), self.tokenizer.eos_token
        token = self.control.end(tail)
        if token == eos and eos:
            tail = _without_eos(tail, eos) + eos  # once
        if token:
            return ("", True) if not tail.removesuffix(token).strip() else (tail, True)
        if self._closing and tail.endswith(self._closing):
            return tail, True
        return text, False

    def _try_template(self) -> None:
        """Finds what the template puts after an answer, and whether it expects content as text or as parts."""
        answer = "An answer."
        for self._in_parts in (False, True):  # templates that also take images drop content that is text
            with suppress(UnusableRowError):
                text = self._apply([_say("user", "A question."), _say("assistant", answer)], False, {})
                if answer in text:
                    self._closing = text.rpartition(answer)[2].strip()
                    return
        self._in_parts = False

    def _apply(self, messages: list[Message], add_generation_prompt: bool, options: Mapping[str, Any]) -> str:
        tokenizer = self.tokenizer
        if not self.has_template:
            raise ValueError(
                f"Expected a tokenizer with a chat template for chat messages, but {type(tokenizer).__name__} "
                f"{getattr(tokenizer, 'name_or_path', '')!r} has none. Pass one to `chat_template`, or use the "
                "tokenizer of an instruction-tuned model."
            )
        from jinja2 import TemplateError, TemplateSyntaxError

        if self._in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        try:
            return tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except ImportError:
            raise
        except TemplateSyntaxError as error:
            raise ValueError(
                f"Expected the chat template to be valid Jinja, but got an error in its line {error.lineno}: {error}."
            ) from error
        except Exception as error:  # a template is a program and can raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            reason = str(error) if type(error) is TemplateError else f"{type(error).__name__}: {error}"
            if "content" in reason and any("content" not in message for message in messages):
                reason += ". The template cannot render a message without content: pass another to `chat_template`"
            raise UnusableRowError(
                f"Expected messages that the chat template takes, but it raised for the roles {roles}: {reason}"
            ) from error


def check_template_kwargs(kwargs: Any) -> None:
    """Raises TypeError or ValueError unless `kwargs` can be variables of a chat template."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"Expected `chat_template_kwargs` to be a dict or None, but got {kwargs!r}.")
    taken = sorted(_TAKEN.intersection(kwargs or ()))
    if taken:
        raise ValueError(
            f"Expected `chat_template_kwargs` to be variables of the chat template, but got `{taken[0]}`, which "
            "lit_did sets itself."
        )


def first_token(tokenizer: Any) -> int:
    """The id that replaces an empty prompt: BOS, or EOS if there is no BOS.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("Expected a prompt, or a tokenizer with a BOS or EOS token to replace it, but got neither.")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before every text. It may have a BOS token and not do so."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]


def _header(texts: list[str], answers: list[Message], opening: str | None) -> str:
    """What the template puts before the answers; "" if that is only whitespace.

    Args:
        texts: The completions.
        answers: Their first messages.
        opening: The generation prompt, if the completions do not start with it.
    """
    started = "" if opening is None else _common_start([opening, texts[0]])
    if any(_THOUGHTS & answer.keys() for answer in answers):
        return started  # the rest is the row's own
    stripped = [_content(answer).strip() for answer in answers]
    for contents in ([_content(answer) for answer in answers], stripped):  # some templates strip answers
        shared = [_common_start(texts), _common_start(contents)]
        header = texts[0][: max(0, len(shared[0]) - len(shared[1]))]
        if all(text[len(header) :].lstrip().startswith(content) for text, content in zip(texts, stripped, strict=True)):
            return header if header.strip() else ""
    return "" if opening is None else started or _common_start(texts)


def _common_start(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _without_eos(text: str, eos: str | None) -> str:
    """`text` without the EOS tokens at its end and the whitespace around them."""
    while eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text


def _rewritten(text: str, whole: str) -> UnusableRowError:
    shared = len(_common_start([text, whole]))
    return UnusableRowError(
        "Expected a chat template that keeps the text of earlier messages when others follow, because a completion has "
        f"several messages, but {unmark(text[shared : shared + 80])!r} became "
        f"{unmark(whole[shared : shared + 80])!r}. Pass another to `chat_template`."
    )
