"""Columns as well-known data sets and trainers name them reach the pair, or are refused by name; none is ignored."""

from __future__ import annotations

import json
import re

import pytest

from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair, prepare_pair
from lit_did.data.reading import read_pairs, read_rows


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict:
    return {"role": "system", "content": text}


TEXT = PreferencePair("q", "a", "b")
CHAT = PreferencePair([_user("q")], [_bot("a")], [_bot("b")])
SIDES = {"chosen": "a", "rejected": "b"}
CHATS = {"chosen": [_bot("a")], "rejected": [_bot("b")]}
WHOLE = {"chosen": [_user("q"), _bot("a")], "rejected": [_user("q"), _bot("b")]}
HUMAN = {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"question": "q", **SIDES}, TEXT),
        ({"query": "q", **SIDES}, TEXT),
        ({"input": "q", **SIDES}, TEXT),
        ({"instruction": "q", **SIDES}, TEXT),
        ({"instruction": "q", "input": "", **SIDES}, TEXT),
        ({"instruction": "q", "input": None, **SIDES}, TEXT),
        ({"instruction": "q", "input": "x", **SIDES}, TEXT._replace(prompt="q\nx")),
        ({"instruction": "q", "history": [], **SIDES}, TEXT),
        (
            {"instruction": "q", "history": [["p", "o"]], **SIDES},
            CHAT._replace(prompt=[_user("p"), _bot("o"), _user("q")]),
        ),
        ({"system": "s", "question": "q", **SIDES}, TEXT._replace(system="s")),
        ({"system": "", "question": "q", **SIDES}, TEXT),
        ({"system": None, "input": "q", **SIDES, "generations": ["a", "b"]}, TEXT),
        ({"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_model": "m"}, TEXT),
        ({"prompt": "q", "chosen_response": "a", "rejected_response": "b"}, TEXT),
        ({"messages": [_user("q")], **CHATS}, CHAT),
        ({"messages": [_user("q")], "chosen": _bot("a"), "rejected": _bot("b")}, CHAT),
        ({"messages": [_user("q")], **SIDES}, CHAT),
        ({"messages": [_user("q"), _bot("a")], "rejected_response": "b"}, CHAT),
        ({"messages": [_user("q"), _bot("a")], "rejected_response": [_bot("b")]}, CHAT),
        ({"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]}, CHAT),
        ({"messages": WHOLE["chosen"][:1], **WHOLE}, CHAT),
        ({"conversation": [_user("q")], **CHATS}, CHAT),
        (
            {
                "conversations": [HUMAN],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            CHAT,
        ),
        (
            {
                "chosen_conversations": [HUMAN, {"from": "gpt", "value": "a"}],
                "rejected_conversations": [HUMAN, {"from": "gpt", "value": "b"}],
            },
            CHAT,
        ),
        (
            {
                "conversations": [HUMAN],
                "system": "s",
                "tools": '[{"name": "t"}]',
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            CHAT._replace(prompt=[_system("s"), _user("q")], tools=[{"name": "t"}]),
        ),
        (
            {
                "input": {"messages": [_user("q")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [_bot("a")],
                "non_preferred_output": [_bot("b")],
            },
            CHAT,
        ),
        ({"prompt": "a\nq", "question": " q ", **SIDES}, TEXT._replace(prompt="a\nq")),
        ({"prompt": json.dumps(_user("q")), **{k: json.dumps(v[0]) for k, v in CHATS.items()}}, CHAT),
        # UltraFeedback's form, with all of its columns.
        ({"prompt": "q", "prompt_id": "7", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0}, CHAT),
        ({"prompt": "q", **CHATS}, CHAT),
        ({"prompt": _user("q"), "chosen": _bot("a"), "rejected": _bot("b")}, CHAT),
        ({"prompt": [_user("q")], **SIDES}, CHAT),
        ({"prompt": "q", "question": "q", **SIDES}, TEXT),
        ({"instruction": "q", "question": "q", **SIDES}, TEXT),
        ({"context": "q", **SIDES}, TEXT),
        ({"prompt": None, "question": "q", **SIDES}, TEXT),
        ({"prompt": None, **WHOLE}, CHAT),
        ({"prompt": json.dumps([_user("q")]), **{k: json.dumps(v) for k, v in CHATS.items()}}, CHAT),
        ({"prompt": [_user("q")], **CHATS, "system_prompt": "s"}, CHAT._replace(prompt=[_system("s"), _user("q")])),
        ({"prompt": [_system("s"), _user("q")], **CHATS, "system": "s"}, "kept"),
        ({**WHOLE, "system": "s"}, CHAT._replace(prompt=[_system("s"), _user("q")])),
        ({"prompt": "q", **SIDES, "tools": "", "chat_template_kwargs": None}, TEXT),
        (
            {"prompt": [_user("q")], **CHATS, "chat_template_kwargs": {"enable_thinking": False, "other": None}},
            CHAT._replace(chat_template_kwargs={"enable_thinking": False}),
        ),
        (
            {"prompt": [_user("q")], **CHATS, "chat_template_kwargs": '{"x": 1}', "tools": [{"a": {"b": None}}]},
            CHAT._replace(chat_template_kwargs={"x": 1}, tools=[{"a": {}}]),
        ),
    ],
)
def test_known_columns(row, pair):
    if pair == "kept":
        assert parse_pair(row).prompt == [_system("s"), _user("q")]
    else:
        assert parse_pair(row) == pair
        assert parse_pair(parse_pair(row)._asdict()) == pair  # what is read can be written and read again


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "instruction": "r", **SIDES},
            "Expected one column with the prompt, but got `question`, `instruction` with different texts.",
        ),
        ({"prompt": "q", "input": "a text", **SIDES}, "but got `prompt`, `input` with different texts."),
        ({"prompt": "q", "context": "a text", **SIDES}, "but got `prompt`, `context` with different texts."),
        ({"prompt": "q", "messages": [_user("r")], **SIDES}, "but got `prompt`, `messages` with different texts."),
        ({"question": "q", "history": [["x", "y"]], **SIDES}, "but got `question`, `history` with different texts."),
        ({"instruction": "q", "input": [1], **SIDES}, "Expected `instruction` and `input` to be strings, but got"),
        ({"instruction": "q", "history": ["x"], **SIDES}, "Expected `history` to be a list of [question, answer]"),
        (
            {"ask": "q", **SIDES},
            "Expected a column `prompt`, or no other text than `chosen` and `rejected`, but got `ask`. "
            "Name the prompt's column: `columns={\"prompt\": 'ask'}`.",
        ),
        ({"ask": "q", **CHATS}, "but got `ask`."),
        ({"dialogue": [_user("q")], **CHATS}, "but got `dialogue`."),
        ({"prompt": "q", "input": "a q and more", **SIDES}, "but got `prompt`, `input` with different texts."),
        (
            {"prompt": "q", "messages": [_user("p"), _bot("o"), _user("q")], **SIDES},
            "but got `prompt`, `messages` with different texts.",
        ),
        ({"prompt": "q", "chosen": "{'role': 'assistant'}", "rejected": "b"}, "but got Python objects written as text"),
        (
            {"prompt": "q", "image": "x.png", **SIDES},
            "content in the column `image` too. Media cannot be read: remove it.",
        ),
        ({"prompt": "q", "system": 5, **SIDES}, "Expected `system` to be a string, but got int 5."),
        ({"prompt": "q", "system": "s", "system_prompt": "t", **SIDES}, "Expected one column with the system message"),
        ({"prompt": [_system("s"), _user("q")], "system": "t", **CHATS}, "Expected one system message, but got"),
        ({"prompt": "q", "tools": "[", **SIDES}, "Expected `tools` to be JSON, but got invalid JSON"),
        ({"prompt": "q", "tools": {"a": 1}, **SIDES}, "Expected `tools` to be a list, or a JSON text of one, but got"),
        ({"prompt": "q", "tools": ["t"], **SIDES}, "Expected `tools` to be a list of objects, but got a string in it."),
        ({"prompt": "q", "tools": [{"a\ud83d": 1}], **SIDES}, "Expected a key of `tools` to be valid Unicode"),
        ({"prompt": "q", "chat_template_kwargs": [1], **SIDES}, "Expected `chat_template_kwargs` to be an object"),
        (
            {"conversations": [{"from": "narrator", "value": "{}"}], **CHATS},
            "Expected `from` of message 0 of `prompt` to be one of `human`, `user`, ",
        ),
        (
            {"prompt": "q", "chosen": "[{'role': 'assistant'}]", "rejected": "b"},
            "but got Python objects written as text",
        ),
        ({"a\nb\ud83d": "a", "é": "b"}, r"Expected the keys `chosen` and `rejected`, but got `a\nb\ud83d`, `é`."),
        ({f"column {n}": n for n in range(1000)}, "`column 18`, `column 19`, .... Name them"),
        ({"reply_a": "a", "reply_b": "b"}, "Expected the keys `chosen` and `rejected`, but got `reply_a`, `reply_b`."),
    ],
)
def test_refused_columns_are_named(row, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_pair(row, "pairs.jsonl, line 7")
    assert str(caught.value).startswith("pairs.jsonl, line 7: ")
    assert not isinstance(caught.value, UnusableRowError)


def test_columns_that_describe_a_pair_are_ignored():
    about = {
        "id": "x", "source": "x", "dataset_name": "x", "chosen_model": "x", "rejected_by": "x", "metadata": "x",
        "score_chosen": 1.5, "margin": 2, "Category": "x", "url": "x", "created": "x",
    }  # fmt: skip
    assert parse_pair({**about, "chosen": "two a", "rejected": "two b"}) == PreferencePair("two", " a", " b")
    # A dialogue's marker, and messages that both share, say where the prompt ends, even beside other columns.
    dialogue = "\n\nHuman: q\n\nAssistant:"
    assert parse_pair({"remark": "x", "chosen": dialogue + " a", "rejected": dialogue + " b"}).prompt == dialogue
    assert parse_pair({"remark": "x", **WHOLE}) == CHAT


@pytest.mark.parametrize(
    ("row", "columns", "pair"),
    [
        ({"ask": "q", **SIDES}, {"prompt": "ask"}, TEXT),
        ({"question": "q", "instruction": "r", **SIDES}, {"prompt": "question"}, TEXT),
        ({"prompt": "old", "question": "q", **SIDES}, {"prompt": "question"}, TEXT),
        ({"prompt": "q", "input": "other", **SIDES}, {"prompt": "prompt"}, TEXT),
        ({"prompt": "q", "good": "a", "bad": "b"}, {"chosen": "good", "rejected": "bad"}, TEXT),
        ({"prompt": "q", "chosen": "z", "good": "a", "rejected": "b"}, {"chosen": "good"}, TEXT),
        ({"prompt": "q", "system": "s", **SIDES}, {"system": None}, TEXT),
        ({"prompt": "q", "persona": "s", **SIDES}, {"system": "persona"}, TEXT._replace(system="s")),
        ({"prompt": "q", "tag": 5, "kind": "k", **SIDES}, {"tag": "kind"}, TEXT._replace(tag="k")),
        ({"prompt": "q", "tag": 5, **SIDES}, {"tag": None}, TEXT),
        ({"prompt": [_user("q")], "tools": [{"x": 1}], **CHATS}, {"tools": None}, CHAT),
        ({"ask": "x", "chosen": "two a", "rejected": "two b"}, {"prompt": None}, PreferencePair("two", " a", " b")),
        ({"question": "x", **WHOLE}, {"prompt": None}, CHAT),
        ({"prompt": "x", **WHOLE}, {"prompt": None}, CHAT),
    ],
)
def test_columns_named_by_the_user(row, columns, pair):
    assert parse_pair(row, columns=columns) == pair
    assert [row.pair for row in read_pairs([row, row], columns=columns)] == [pair, pair]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"prompts": "q"}, ValueError, "Expected the keys of `columns` to be among `prompt`, .* but got 'prompts'."),
        ({"prompt": 5}, TypeError, "Expected `columns.'prompt'.` to be the name of a column, but got 5."),
        ({"chosen": None}, TypeError, "Expected `columns.'chosen'.` to be the name of a column, but got None."),
        ("question", TypeError, "Expected `columns` to be a dict such as"),
        (
            {"prompt": "ask"},
            ValueError,
            "train, row 0: Expected the column `ask`, which `columns` names for `prompt`, but got `prompt`, `chosen`",
        ),
        ({"system": "ask"}, ValueError, r"train: Expected the columns that `columns` names, but no row has \['ask'\]"),
    ],
)
def test_columns_are_checked(columns, error, message):
    with pytest.raises(error, match=message):
        read_pairs([{"prompt": "q", **SIDES}], "train", columns=columns)


def test_columns_need_not_have_names_that_are_strings():
    assert parse_pair({0: 1, 1: "x", "prompt": "q", **SIDES}) == TEXT
    with pytest.raises(ValueError, match="but got `1`"):
        parse_pair({0: 1, 1: "x", **SIDES})


def test_columns_that_only_some_rows_have():
    rows = [{"prompt": "q", **SIDES}, {"prompt": "q", "persona": "s", **SIDES}]
    assert [row.pair.system for row in read_pairs(rows, columns={"system": "persona"})] == [None, "s"]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"prompt": "q", **SIDES}, None, None),
        ({"prompt": [_user("q")], **CHATS, "tools": [{"x": 1}], "tag": "t"}, None, None),
        ({"question": "q", **SIDES}, None, "train: Reads prompt from `question`."),
        ({"question": "q", **SIDES}, {"prompt": "question"}, None),
        ({"instruction": "q", "input": "", **SIDES}, None, "train: Reads prompt from `instruction` and `input`."),
        ({"prompt": "q", "system": "s", **SIDES}, None, "train: Reads system from `system`."),
        ({"prompt": "q", "system": "s", **SIDES}, {"system": "system"}, None),
        (
            {"prompt": "q", "chosen_response": "a", "rejected_response": "b"},
            None,
            "train: Reads chosen from `chosen_response`, rejected from `rejected_response`.",
        ),
    ],
)
def test_what_is_read_from_other_columns_is_said_once(row, columns, expected):
    texts = []
    read_rows([row] * 3, "train", columns=columns, warn=texts.append)
    assert [text.partition(" To choose ")[0] for text in texts] == ([expected] if expected else [])


@pytest.mark.parametrize("name", ["system", "tools", "chat_template_kwargs"])
def test_what_needs_a_template_is_refused_beside_plain_text(name):
    value = {"system": "s", "tools": [{"x": 1}], "chat_template_kwargs": {"x": 1}}[name]
    pair = parse_pair({"prompt": "q", **SIDES, name: value})
    with pytest.raises(ValueError, match=f"Expected chat messages beside the column `{name}`.*`as_chat=True`"):
        prepare_pair(pair, as_chat=False)
    chat = prepare_pair(pair, as_chat=True)
    assert chat.prompt == ([_system("s")] if name == "system" else []) + [_user("q")]
    assert name == "system" or getattr(chat, name) == value
