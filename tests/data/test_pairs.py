"""Rows of every documented format become the pair written out by hand; malformed rows are named with their reason."""

from __future__ import annotations

import re

import pytest

from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair, to_chat


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_explicit_plain_text_is_kept_as_it_is():
    row = {"prompt": " 2+2? ", "chosen": " 4\n", "rejected": "5", "score": 3, "messages": None}
    assert parse_pair(row) == PreferencePair(" 2+2? ", " 4\n", "5")


def test_plain_prompt_may_be_empty():
    assert parse_pair({"prompt": "", "chosen": "a", "rejected": "b"}) == PreferencePair("", "a", "b")


def test_explicit_chat():
    row = {"prompt": [_user("hi")], "chosen": [_bot("a")], "rejected": [_bot("b"), _user("c"), _bot("d")]}
    assert parse_pair(row) == PreferencePair(row["prompt"], row["chosen"], row["rejected"])


def test_null_keys_of_messages_are_left_out():
    # Parquet gives each message the keys of all messages.
    row = {"prompt": [{**_user("hi"), "name": None}], "chosen": [_bot("a")], "rejected": [_bot("b")]}
    assert parse_pair(row).prompt == [_user("hi")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: x\n\nAssistant: yes", "\n\nHuman: x\n\nAssistant: yet no", "\n\nHuman: x\n\nAssistant:"),
        # The last marker that both share, not the last of one side.
        ("\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant: a", "\n\nHuman: x\n\nAssistant: n", 0),
        # A marker shared only in part does not count.
        ("\n\nHuman: x\n\nAssistant: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: a\n\nAssistance", 0),
    ],
)
def test_implicit_prompt_of_a_dialogue_ends_in_the_last_shared_marker(chosen, rejected, prompt):
    pair = parse_pair({"chosen": chosen, "rejected": rejected})
    assert pair.prompt == (prompt or "\n\nHuman: x\n\nAssistant:")
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Two plus two is four.", "Two plus two is five.", "Two plus two is"),
        ("the cat sat", "the category", "the"),  # "the cat" would split a word
        ("Q: x\n\nA: yes", "Q: x\n\nA:\tno", "Q: x"),  # from the start of the last whitespace both share
        ("a b  c", "a b  d", "a b"),
        ("a b c", "a b c d", "a b"),  # chosen is a prefix of rejected: it keeps its last word
        ("a b ", "a b c", "a"),
        ("same text", "same text", "same"),
        ("yes", "no", ""),
        ("word", "words", ""),
        ("a", "a", ""),
    ],
)
def test_implicit_prompt_of_other_text_ends_before_shared_whitespace(chosen, rejected, prompt):
    pair = parse_pair({"chosen": chosen, "rejected": rejected})
    assert pair == PreferencePair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_implicit_prompt_of_chat_is_the_shared_messages():
    row = {"chosen": [_user("hi"), _bot("a")], "rejected": [_user("hi"), _bot("b")]}
    assert parse_pair(row) == PreferencePair([_user("hi")], [_bot("a")], [_bot("b")])


def test_implicit_prompt_of_identical_chats_leaves_the_last_message():
    chat = [_user("hi"), _bot("a"), _user("so?"), _bot("b")]
    assert parse_pair({"chosen": chat, "rejected": chat}) == PreferencePair(chat[:3], chat[3:], chat[3:])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "Expected an object with `chosen` and `rejected`, but got a list."),
        (
            {"prompt": "x", "text": "y"},
            "Expected the keys `chosen` and `rejected`, but got `prompt`, `text`.",
        ),
        ({}, "Expected the keys `chosen` and `rejected`, but got no keys."),
        (
            {"prompt": None, "chosen": "a", "rejected": "b"},
            "Expected `prompt` to be a string or a list of messages, but got null.",
        ),
        (
            {"chosen": "a", "rejected": 3},
            "Expected `rejected` to be a string or a list of messages, but got int 3.",
        ),
        ({"prompt": "x", "chosen": "", "rejected": "b"}, "Expected `chosen` to be non-empty, but got an empty string."),
        ({"prompt": [], "chosen": [_bot("a")], "rejected": [_bot("b")]}, "Expected `prompt` to be non-empty"),
        (
            {"prompt": [_user("x")], "chosen": [_bot("a")], "rejected": []},
            "Expected `rejected` to be non-empty, but got an empty list.",
        ),
        (
            {"prompt": [_user("x")], "chosen": [_bot("a")], "rejected": [_bot("")]},
            "Expected `rejected` to be non-empty, but got messages without content.",
        ),
        (
            {"chosen": "a", "rejected": [_bot("b")]},
            "Expected all strings or all lists of messages, but got `chosen`: a string, `rejected`: a list.",
        ),
        (
            {"prompt": [_user("x"), {"content": "y"}], "chosen": [_bot("a")], "rejected": [_bot("b")]},
            "Expected message 1 of `prompt` to have a string `role`, but got no `role`.",
        ),
        (
            {"prompt": [_user("x")], "chosen": [{"role": "assistant", "content": 5}], "rejected": [_bot("b")]},
            "Expected message 0 of `chosen` to have a string `content`, but got int 5.",
        ),
        (
            {"prompt": ["x"], "chosen": [_bot("a")], "rejected": [_bot("b")]},
            "Expected message 0 of `prompt` to be an object with `role` and `content`, but got a string.",
        ),
        (
            {"prompt": [_user("x")], "chosen": [_bot("a"), _user("y")], "rejected": [_bot("b")]},
            "Expected `chosen` to end in a message of the assistant, but got role 'user'.",
        ),
        (
            {"chosen": [_bot("a")], "rejected": [_bot("b")]},
            "Expected `chosen` and `rejected` to share their first message, as the prompt, but got no shared message.",
        ),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
            "Expected dialogues to share their first turn of the human, as the prompt, but got two that begin with",
        ),
        (
            {"prompt": "x", "chosen": "a\ud83d", "rejected": "b"},
            "Expected `chosen` to be valid Unicode, but got a lone surrogate at character 1.",
        ),
    ],
)
def test_malformed_rows_are_named_with_the_reason(row, message):
    with pytest.raises(ValueError, match=re.escape(f"pairs.jsonl, line 7: {message}")):
        parse_pair(row, "pairs.jsonl, line 7")


def test_other_texts_that_begin_with_a_human_share_what_they_share():
    pair = parse_pair({"chosen": "Human: hi\nAI: yes", "rejected": "Human: hi\nAI: no"})
    assert pair[:3] == ("Human: hi\nAI:", " yes", " no")


def test_tool_calls_are_content():
    call = {**_bot(""), "tool_calls": [{"name": "add"}]}
    assert parse_pair({"prompt": [_user("x")], "chosen": [call], "rejected": [_bot("b")]}).chosen == [call]


def test_to_chat_wraps_plain_text_unchanged():
    assert to_chat(PreferencePair("x ", " a", "b")) == PreferencePair([_user("x ")], [_bot(" a")], [_bot("b")])


def test_to_chat_turns_a_dialogue_into_its_turns():
    first = "\n\nHuman: hello \n\nAssistant: hi\n\nHuman: and?\n\nAssistant:"
    pair = to_chat(PreferencePair(first, " so\n\nHuman: go on\n\nAssistant: on", " no", holds_turns=True))
    assert pair.prompt == [_user("hello"), _bot("hi"), _user("and?")]
    assert pair.chosen == [_bot("so"), _user("go on"), _bot("on")]
    assert pair.rejected == [_bot("no")]


@pytest.mark.parametrize("answer", [" no\n\nHuman: more", " A scene:\n\nHuman: a\n\nAssistant: b"])
def test_to_chat_keeps_an_answer_beside_its_prompt_as_one_message(answer):
    pair = to_chat(parse_pair({"prompt": "\n\nHuman: x\n\nAssistant:", "chosen": answer, "rejected": " n"}))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([_user("x")], [_bot(answer.strip())], [_bot("n")])


def test_to_chat_keeps_chat_and_refuses_an_empty_prompt():
    pair = PreferencePair([_user("x")], [_bot("a")], [_bot("b")])
    assert to_chat(pair) is pair
    with pytest.raises(ValueError, match=re.escape("Expected a prompt to wrap as a user message (`as_chat=True`)")):
        to_chat(PreferencePair(" ", "a", "b"))


def test_real_dialogues_split_at_the_marker_and_reassemble(real_data):
    import gzip
    import json

    with gzip.open(real_data("hh_rlhf_harmless_test.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 2312
    empty = 0
    for row in rows:
        try:
            pair = parse_pair(row)
        except UnusableRowError:
            empty += 1
            continue
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])
    assert empty == 4  # answers of a space


def test_tag_is_optional_and_survives_wrapping():
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse_pair(row).tag == ""
    assert parse_pair(row | {"tag": None}).tag == ""
    assert to_chat(parse_pair(row | {"tag": "factual"})).tag == "factual"
    with pytest.raises(ValueError, match="line 3: Expected `tag` to be a string, but got int 7"):
        parse_pair(row | {"tag": 7}, "line 3")
