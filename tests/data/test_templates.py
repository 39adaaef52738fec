"""Columns for the chat template that it does not use raise a warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from lit_did.data import PreferenceDataModule
from lit_did.data.pairs import PreferencePair
from lit_did.data.templates import describe_unread

PAIR = PreferencePair([], [], [], tools=[{"name": "t"}], chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "unread"),
    [
        ("{{ messages }}", "`enable_thinking`, `tools`"),
        ("{% if tools %}{{ tools }}{% endif %}", "`enable_thinking`"),
        ("{{ tools }}{{ enable_thinking }}", None),
        ("{{ enable_thinking_more }}{{ builtin_tools }}", "`enable_thinking`, `tools`"),
        ({"default": "{{ enable_thinking }}", "tool_use": "{{ tools }}"}, None),
        (None, None),
    ],
)
def test_what_a_template_does_not_use_is_named(template, unread):
    text = describe_unread("train", [PAIR], SimpleNamespace(chat_template=template), None)
    assert ("does not use " in text) == bool(unread)
    assert not unread or f"does not use {unread}, so" in text
    assert not describe_unread(
        "train", [PAIR], SimpleNamespace(chat_template=template), "{{ tools }}{{ enable_thinking }}"
    )
    assert not describe_unread("train", [PAIR._replace(tools=None, chat_template_kwargs=None)], None, "{{ messages }}")


def test_variables_of_the_data_module_are_looked_for_too(chatml):
    chat = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "q"}], **chat}
    with pytest.warns(UserWarning, match="The chat template does not use `enable_thinking`, so"):
        PreferenceDataModule([row], chatml, chat_template_kwargs={"enable_thinking": False}).setup("fit")


def test_a_template_that_is_a_files_name_is_refused(chatml):
    with pytest.raises(ValueError, match=r"a Jinja template, but got 'chat.jinja', which has no expression"):
        PreferenceDataModule([], chatml, chat_template="chat.jinja")


def test_it_is_a_warning_once_a_source(chatml):
    chat = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "q"}], **chat, "tools": [{"name": "t"}]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PreferenceDataModule([row, row], chatml).setup("fit")
        PreferenceDataModule([row, row], chatml, columns={"tools": None}).setup("fit")
    assert sum("The chat template does not use `tools`" in str(warning.message) for warning in caught) == 1


def test_arguments_for_all_rows_are_named_too(chatml):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    data = PreferenceDataModule(rows, chatml, as_chat=True, chat_template_kwargs={"thinking": False})
    with pytest.warns(
        UserWarning, match="train: The chat template does not use `thinking`, so their values in the rows or"
    ):
        data.setup("fit")


@pytest.mark.parametrize("template", ["{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_tool_calls_that_the_template_leaves_out_are_named(template):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    pair = PreferencePair([{"role": "user", "content": "q"}, call], [call], [call])
    warned = describe_unread("train", [pair], SimpleNamespace(chat_template=template), None)
    assert "does not use `tool_calls`" in warned
    assert not describe_unread("train", [pair], SimpleNamespace(chat_template="{{ m.tool_calls }}"), None)


def test_a_template_that_wants_content_is_named_as_the_cause(chatml):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [call], "rejected": [call | {"content": "no"}]}
    template = "{% for m in messages %}{{ m.content + '' }}{{ m.tool_calls }}{% endfor %}"
    with pytest.raises(ValueError, match=r"cannot render a message without content: pass another to `chat_template`"):
        PreferenceDataModule([row], chatml, chat_template=template, on_bad_rows="raise").setup("fit")
