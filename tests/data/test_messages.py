"""Messages in every spelling become role and content; nulls that Arrow adds are dropped at every depth."""

from __future__ import annotations

import json
import re

import pytest

from lit_did.data.messages import drop_nulls, parse_messages
from lit_did.data.pairs import UnusableRowError
from lit_did.data.reading import read_pairs

HI = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "walk", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HI, HI),
        ({"from": "human", "value": "hi"}, HI),
        ({"from": "User", "value": "hi", "weight": 0}, {**HI, "weight": 0}),
        ({"from": "gpt", "value": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"from": "observation", "value": "hi"}, {"role": "tool", "content": "hi"}),
        (
            {"from": "function_call", "value": '{"name": "walk", "arguments": {"x": 1}}'},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": json.dumps([CALL["function"]] * 2), "weight": 1},
            {"role": "assistant", "tool_calls": [CALL, CALL], "weight": 1},
        ),
        ({"from": "system", "value": "hi"}, {"role": "system", "content": "hi"}),
        ({"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, HI),
        ({"role": "user", "content": [{"type": "text", "text": "hi", "image": None}]}, HI),
        ({"role": "user", "content": [{"text": "hi"}]}, HI),
        ({**HI, "name": None, "tool_calls": None}, HI),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "tool_calls": [CALL]}),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "say", "arguments": {"x": None, "list": [{"y": None}, None]}}}],
            },
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "say", "arguments": {"list": [{}, None]}}}],
            },
        ),
    ],
)
def test_spellings_of_a_message(message, expected):
    assert parse_messages("chosen", [message], "row") == [expected]
    assert parse_messages("chosen", message, "row") == [expected]  # a single one


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "but got a part of type 'image'."),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "but got a part of type 'image_url'."),
        ({"role": "user", "content": [{"type": "image", "text": "alt"}]}, "but got a part of type 'image'."),
        ({"role": "user", "content": ["hi"]}, "but got a string."),
        ({"role": "user", "content": {"text": "hi"}}, "to have a string `content`, but got dict."),
        ({"role": "user"}, "to have a string `content`, but got no `content`."),
        ({"role": "user", "tool_calls": []}, "to have a string `content`, but got no `content`."),
        ({"role": 1, "content": "hi"}, "to have a string `role`, but got int 1."),
        ({"role": None, "content": "hi"}, "to have a string `role`, but got null."),
        ({"from": "narrator", "value": "hi"}, "but got 'narrator'."),
        ({"from": "function_call", "value": "walk"}, 'to be JSON of {"name": ..., "arguments": ...} or a list of them'),
        ({"from": "function_call", "value": "[]"}, "`value` of message 0 of `chosen` to be JSON of"),
        ({"from": "function_call", "value": '{"name": 1}'}, "but got a string."),
        ({"from": "function_call"}, "but got null."),
        ({"from": None, "value": "hi"}, "to have a string `role`"),
        ({"from": "human"}, "to have a string `content`, but got no `content`."),
        ({**HI, "tool_calls": [{"arguments": {"x": "\ud83d"}}]}, "to be valid Unicode, but got a lone surrogate"),
        ({**HI, "\ud83d": 1}, "Expected a key of message 0 of `chosen` to be valid Unicode"),
        ("hi", "to be an object with `role` and `content`, but got a string."),
        (None, "to be an object with `role` and `content`, but got null."),
    ],
)
def test_what_is_no_message_is_named(message, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        parse_messages("chosen", [message], "row 3")
    assert str(caught.value).startswith("row 3: Expected ")
    assert not isinstance(caught.value, UnusableRowError)


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"from": "gpt", "value": None}])
def test_content_that_is_null_is_unusable(message):
    with pytest.raises(UnusableRowError, match="to have a string `content`, but got null"):
        parse_messages("prompt", [message], "row")


def test_nulls_in_lists_stay_and_tuples_become_lists():
    assert drop_nulls({"a": None, "b": ({"c": None}, None), "d": {"e": {"f": None}}}) == {
        "b": [{}, None],
        "d": {"e": {}},
    }


@pytest.mark.parametrize("source", ["parquet", "datasets", "table", "pandas", "jsonl"])
def test_what_arrow_adds_is_dropped_from_every_source(tmp_path, source):
    pyarrow = pytest.importorskip("pyarrow")

    def row(name: str, arguments: dict, **more) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "prompt": [HI],
            "chosen": [{"role": "assistant", "tool_calls": [call], **more}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "tools": [{"name": name, **more}],
            "chat_template_kwargs": more,
        }

    rows = [row("walk", {"x": 1}), row("say", {"text": "hi", "to": {"name": "you"}}, content="c")]
    expected = [pair[:3] + pair[4:6] for pair in (row.pair for row in read_pairs(rows))]
    table = pyarrow.Table.from_pylist(rows)
    assert "null" in json.dumps(table.to_pylist())  # the premise
    if source == "parquet":
        data = tmp_path / "rows.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(table, data)
    elif source == "datasets":
        data = pytest.importorskip("datasets").Dataset(table)
    elif source == "table":
        data = table
    elif source == "pandas":
        pytest.importorskip("pandas")
        data = table.to_pandas()
    else:
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, table.to_pylist())))
    assert [pair[:3] + pair[4:6] for pair in (row.pair for row in read_pairs(data))] == expected
