"""Checks a chat template, and finds variables that it is given but does not use, which templates ignore silently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_did.data.pairs import PreferencePair


def check_chat_template(chat_template: Any) -> None:
    """Raises TypeError or ValueError unless `chat_template` is None or the text of a Jinja template."""
    if chat_template is not None and not isinstance(chat_template, str):
        raise TypeError(f"Expected `chat_template` to be a Jinja template or None, but got {chat_template!r}.")
    if chat_template is not None and "{" not in chat_template:
        raise ValueError(
            f"Expected `chat_template` to be a Jinja template, but got {chat_template[:100]!r}, which has no "
            "expression. Pass the text of the template, not the name of a file."
        )


def describe_unread(
    name: str,
    pairs: Iterable[PreferencePair],
    tokenizer: Any,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A warning that names the variables without effect on the chat template; "" if there are none, or no template.

    Args:
        name: What the warning calls the source.
        pairs: The pairs of the source.
        tokenizer: A transformers tokenizer.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the template, besides those of the pairs.
    """
    given: set[str] = set(chat_template_kwargs or ())
    for pair in pairs:
        given.update(pair.chat_template_kwargs or (), ("tools",) if pair.tools else ())
        if pair.is_chat and any(message.get("tool_calls") for side in pair.chats for message in side):
            given.add("tool_calls")
    templates = chat_template or getattr(tokenizer, "chat_template", None)
    if not given or not templates:
        return ""
    # A tokenizer may have several templates by name, one of them for tools.
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    unread = sorted(variable for variable in given if not re.search(rf"\b{re.escape(variable)}\b", text))
    if not unread:
        return ""
    names = ", ".join(f"`{variable}`" for variable in unread)
    return (
        f"{name}: The chat template does not use {names}, so their values in the rows or in `chat_template_kwargs` "
        "have no effect. If they should have one, pass another `chat_template`. Otherwise leave them out: "
        '`columns={"tools": None}` or `columns={"chat_template_kwargs": None}` leaves out columns of the rows.'
    )
