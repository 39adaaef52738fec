"""Prompts to answer: from which sources, with which places in errors, and with the tokens of a pair's prompt."""

from __future__ import annotations

import io
import json

import pytest

from lit_did.data import PreferenceDataset, encode_prompts, read_prompts, read_rows

HI = [{"role": "user", "content": "Hi"}]
BYE = [{"role": "assistant", "content": "Bye"}]


def prompts(source, **options):
    return [row.prompt for row in read_prompts(source, **options)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "list", "strings"])
def test_sources(tmp_path, name):
    rows = [{"prompt": "One?", "tag": "x"}, {"prompt": "Two?", "tag": "y"}]
    source = tmp_path / name
    if name == "a.txt":
        source.write_bytes(b"One?\r\n\n \nTwo?")
    elif name == "a.jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    elif name == "a.json":
        source.write_text(json.dumps(rows))
    elif name == "a.csv":
        source.write_text("prompt,tag\nOne?,x\nTwo?,y\n")
    elif name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet")
        pyarrow.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), source)
    else:
        source = rows if name == "list" else [row["prompt"] for row in rows]
    read = read_prompts(source)
    assert [row.prompt for row in read] == ["One?", "Two?"]
    assert [row.index for row in read] == [0, 1]
    assert [row.tag for row in read] == (["", ""] if name in ("a.txt", "strings") else ["x", "y"])
    where = {"a.txt": "line 4", "a.jsonl": "line 2", "a.json": "line 1", "a.csv": "line 3"}.get(name, "row 1")
    assert read[1].where.endswith(where)


def test_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\nTwo?\n"))
    rows = read_prompts("-")
    assert [(row.prompt, row.where) for row in rows] == [("One?", "stdin, line 1"), ("Two?", "stdin, line 3")]


def test_messages_and_their_options():
    tools = [{"name": "f"}]
    rows = read_prompts([{"prompt": HI, "system": "Be short.", "tools": json.dumps(tools)}, {"prompt": json.dumps(HI)}])
    assert rows[0].prompt == [{"role": "system", "content": "Be short."}, *HI]
    assert rows[0].tools == tools
    assert rows[1].prompt == HI


def test_prompts_of_pairs_come_once():
    pair = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": "One?", **pair}, {"prompt": "Two?", **pair}, {"prompt": "One?", **pair}]
    assert prompts(rows) == ["One?", "Two?"]
    assert prompts([{"chosen": "Say one", "rejected": "Say two"}] * 2) == ["Say"]
    system = [{"prompt": "One?", "system": text, **pair} for text in ("A.", "B.", "A.")]
    with pytest.warns(UserWarning, match="Reads system"):
        assert [row.system for row in read_prompts(system)] == ["A.", "B."]
    with pytest.warns(UserWarning, match=r"1 of 2 pairs .* row 1: Expected `rejected` to be non-empty"):
        assert prompts([rows[0], {"prompt": "No?", "chosen": "a", "rejected": ""}]) == ["One?"]


def test_columns():
    assert prompts([{"ask": "One?"}], columns={"prompt": "ask"}) == ["One?"]
    with pytest.raises(ValueError, match=r"prompts: Expected the columns that `columns` names, but no row has .'kind'"):
        prompts([{"prompt": "One?"}], columns={"tag": "kind"})
    assert prompts([{"ask": "1?", "good": "a", "bad": "b"}], columns={"prompt": "ask"}) == ["1?"]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"question": "One?"}], r"prompts, row 0: Expected the column `prompt` .* but got `question`\. Name"),
        ([{"prompt": "One?"}, {"prompt": None}], "prompts, row 1: Expected `prompt` to be a string or a list of"),
        (
            [{"prompt": "One?"}, {"prompt": " "}],
            "row 1: Expected `prompt` to be non-empty, but got whitespace",
        ),
        ([{"prompt": []}], "prompts, row 0: Expected `prompt` to be non-empty"),
        ([{"prompt": HI + BYE}], "prompts, row 0: Expected `prompt` to end in a message to answer, but got one of the"),
        ([{"prompt": "One?", "image": "x.png"}], "prompts, row 0: .* Media cannot be read"),
        ([{"prompt": "One?"}, 3], "prompts, row 1: Expected an object with `prompt`, but got int 3"),
        ([{"prompt": "\ud83d"}], "prompts, row 0: .* lone surrogate"),
        (["One?", "\ud83d"], "prompts, row 1: .* lone surrogate"),
        ([], "prompts: Expected prompts, but got none"),
    ],
)
def test_errors_name_the_row(rows, error):
    with pytest.raises(ValueError, match=error):
        read_prompts(rows)


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a data file, but .*none.txt does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"One?\n\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt, line 2: Expected UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt: Expected prompts, but got none"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="Expected a file name ending in one of"):
        read_prompts(__file__)


@pytest.mark.parametrize("name", ["no_bos", "adds_bos", "chatml", "llama3", "prefix_space"])
@pytest.mark.parametrize("as_chat", [False, True])
def test_tokens_are_those_of_a_pairs_prompt(request, name, as_chat):
    tokenizer = request.getfixturevalue(name)
    if as_chat and not tokenizer.chat_template:
        pytest.skip("no template")
    texts = ["the dog", "\n\nHuman: the game?\n\nAssistant:", "<|im_end|> the <s> dog", "<s>the dog"]
    rows, _ = read_rows([{"prompt": text, "chosen": " yes", "rejected": " no"} for text in texts])
    dataset = PreferenceDataset(rows, tokenizer, 512, as_chat=as_chat)
    expected = [example.prompt_ids.tolist() for example in dataset]
    assert encode_prompts(read_prompts(texts), tokenizer, as_chat=as_chat) == expected


def test_the_template_is_the_default_where_there_is_one(chatml, no_bos):
    (row,) = read_prompts(["the dog"])
    assert chatml.decode(encode_prompts([row], chatml)[0]).endswith("<|im_start|>assistant\n")
    assert no_bos.decode(encode_prompts([row], no_bos)[0]) == "the dog"
    (plain,) = encode_prompts([row], chatml, as_chat=False)
    assert chatml.decode(plain) == "the dog"


def test_thinking_templates_keep_their_header(chatml):
    """The prompt to answer ends in the generation prompt, even where completions of pairs do not begin with it."""
    template = chatml.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    (ids,) = encode_prompts(read_prompts(["the dog"]), chatml, chat_template=template)
    assert chatml.decode(ids).endswith("assistant\n<think>\n")


def test_errors_of_encoding(chatml, no_bos):
    row = read_prompts([{"prompt": HI}])
    with pytest.raises(ValueError, match="prompts, row 0: Expected a tokenizer with a chat template"):
        encode_prompts(row, no_bos)
    with pytest.raises(ValueError, match="prompts, row 0: Expected a prompt of at most 3 tokens, but got"):
        encode_prompts(row, chatml, max_length=3)
    system = read_prompts([{"prompt": "Hi", "system": "Be short."}])
    with pytest.raises(ValueError, match="prompts, row 0: Expected chat messages beside the column `system`"):
        encode_prompts(system, no_bos)
