"""The same rows from every kind of source; malformed files are named with line and reason."""

from __future__ import annotations

import gzip
import json
import re
import sys

import pytest

from lit_did.data.pairs import PreferencePair, UnusableRowError
from lit_did.data.reading import read_pairs, read_rows

ROWS = [
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "source": "x"},
    {"prompt": "naïve\u2028?", "chosen": " ja", "rejected": " né\r\n", "source": "y"},
]
PAIRS = [PreferencePair("2+2?", " 4", " 5"), PreferencePair("naïve\u2028?", " ja", " né\r\n")]
GOOD = '{"chosen": "a b", "rejected": "a c"}'


def _chat(answer: str) -> list[dict]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz", "pairs.json.gz"])
def test_json_lines(tmp_path, name):
    # Not escaped: U+2028 and "\r" inside strings must not end a line.
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for path in (tmp_path / name, str(tmp_path / name)):
        rows = read_pairs(path)
        assert [row.pair for row in rows] == PAIRS
        assert [(row.index, row.where) for row in rows] == [(0, f"{path}, line 1"), (1, f"{path}, line 2")]


def test_blank_lines_and_byte_order_mark_are_skipped(write_jsonl):
    rows = read_pairs(write_jsonl(b"\xef\xbb\xbf" + GOOD.encode(), "", "  \r", GOOD, ""))
    assert [(row.index, row.where.rsplit(", ")[-1]) for row in rows] == [(0, "line 1"), (1, "line 4")]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    rows = read_pairs(path)
    assert [row.pair for row in rows] == PAIRS
    assert [row.where for row in rows] == [f"{path}, row 0", f"{path}, row 1"]

    chats = [{"chosen": _chat("a"), "rejected": _chat("b")}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    assert read_pairs(path)[0].pair == PreferencePair(_chat("")[:1], _chat("a")[1:], _chat("b")[1:])


def test_parquet_errors(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.table({"chosen": ["a"], "text": ["b"]}), path)
    with pytest.raises(ValueError, match=r"pairs\.parquet: Expected the keys `chosen` and `rejected`.*`text`"):
        read_pairs(path)
    parquet.write_table(pyarrow.table({"chosen": ["a", "a"], "rejected": ["b", None]}), path)
    with pytest.raises(ValueError, match=r"pairs\.parquet, row 1: Expected `rejected` to be a string.*null"):
        read_pairs(path, on_bad_rows="raise")
    path.write_bytes(b"chosen,rejected")
    with pytest.raises(ValueError, match=r"pairs\.parquet: Expected Parquet data"):
        read_pairs(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pairs\.parquet needs pyarrow. Install it with: pip install pyarrow"):
        read_pairs(path)


def test_dataset_and_list():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    assert stream.column_names is None  # the premise
    for source in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset(), stream, ROWS, tuple(ROWS)):
        rows = read_pairs(source, "train")
        assert [row.pair for row in rows] == PAIRS
        assert [row.where for row in rows] == ["train, row 0", "train, row 1"]
    chats = datasets.Dataset.from_list([{"chosen": _chat("a"), "rejected": _chat("b")}])
    for source in (chats, chats.with_format("numpy"), chats.with_format("pandas")):
        assert read_pairs(source)[0].pair == PreferencePair(_chat("")[:1], _chat("a")[1:], _chat("b")[1:])
    with pytest.raises(ValueError, match=r"val: Expected the keys `chosen` and `rejected`, but got `text`"):
        read_pairs(datasets.Dataset.from_dict({"text": ["a"]}), "val")
    with pytest.raises(
        TypeError, match=r"Expected `train` to be a path.*DatasetDict of the splits \['a'\]; choose one"
    ):
        read_pairs(datasets.DatasetDict({"a": dataset}), "train")


@pytest.mark.parametrize("source", [None, 3, {"chosen": ["a"], "rejected": ["b"]}])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match=rf"Expected `train` to be a path, .*but got {type(source).__name__}\."):
        read_pairs(source, "train")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"chosen": "a", "rejected": }',
            "Expected one JSON object a line, but got invalid JSON: Expecting value (col",
        ),
        ("[", "Expected one JSON object a line, but got invalid JSON"),
        ('"text"', "Expected an object with `chosen` and `rejected`, but got a string."),
        ('{"chosen": "a"}', "Expected the keys `chosen` and `rejected`, but got `chosen`."),
        ('{"chosen": "a", "rejected": ""}', "Expected `rejected` to be non-empty, but got an empty string."),
        (b'{"chosen": "\xff", "rejected": "b"}', "Expected UTF-8, but got byte 0xff at byte 13 of the line."),
    ],
)
def test_malformed_lines_are_named(write_jsonl, line, reason):
    path = write_jsonl(GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {reason}")):
        read_pairs(path, on_bad_rows="raise")


def test_malformed_rows_of_a_list_are_named():
    with pytest.raises(ValueError, match="val, row 1: Expected the keys"):
        read_pairs([json.loads(GOOD), {"chosen": "a"}], "val")


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_empty_sources(write_jsonl, lines):
    with pytest.raises(ValueError, match=r"pairs\.jsonl: Expected preference pairs, but got none\."):
        read_pairs(write_jsonl(*lines))
    with pytest.raises(ValueError, match=r"val: Expected preference pairs, but got none\."):
        read_pairs([], "val")


def test_wrong_paths(tmp_path, write_jsonl):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(
        ValueError, match=r"https://host/a\.jsonl: Expected a path, .* but got a URL\. Download the file"
    ):
        read_pairs("https://host/a.jsonl")
    with pytest.raises(FileNotFoundError, match="Expected a path, but got an empty one"):
        read_pairs("")
    with pytest.raises(FileNotFoundError, match=r"has none ending in one of \.jsonl, .*\.parquet"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"ending in one of \.jsonl, .*\.parquet, but got 'pairs\.txt'"):
        read_pairs(write_jsonl(GOOD, name="pairs.txt"))


@pytest.mark.parametrize("cut", [5, -4])
def test_broken_gzip_is_named(tmp_path, cut):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode())[:cut])
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz, line \d+: Expected gzip data, but got"):
        read_pairs(path)
    path.write_bytes(GOOD.encode())
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz, line 1: Expected gzip data, but got: Not a gzipped file"):
        read_pairs(path)


def test_real_files(real_data):
    path = real_data("alpacaeval_pairs.jsonl")
    rows = read_pairs(path)
    expected = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 789
    assert [row.pair[:3] for row in rows] == [(row["prompt"], row["chosen"], row["rejected"]) for row in expected]
    with pytest.warns(UserWarning, match="4 of 2312 rows cannot be trained on"):
        assert len(read_pairs(real_data("hh_rlhf_harmless_test.jsonl.gz"))) == 2308


def test_column_of_broken_json_is_where_it_breaks(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"chosen": \n')
    with pytest.raises(ValueError, match=r"cut.jsonl, line 1: .*\(column 11\)"):
        read_pairs(path)


@pytest.mark.parametrize("missing", [{}, {"prompt": ""}, {"prompt": "  "}])
@pytest.mark.parametrize("sides", [("yes", "no"), ("a b", "c d")])
def test_rows_without_a_prompt_among_rows_with_one_are_skipped(missing, sides):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    bad = {**missing, **dict(zip(("chosen", "rejected"), sides, strict=True))}
    rows, skipped = read_rows([good, bad, good])
    assert [row.index for row in rows] == [0, 2]
    assert [row.where for row in skipped] == ["source, row 1"]
    assert "Expected a prompt, as other rows have" in skipped[0].reason
    with pytest.raises(UnusableRowError, match="source, row 1: Expected a prompt"):
        read_rows([good, bad, good], on_bad_rows="raise")


def test_a_source_without_any_prompt_is_a_warning():
    warned = []
    rows, skipped = read_rows([{"chosen": "yes", "rejected": "no"}] * 2, warn=warned.append)
    assert (len(rows), skipped) == (2, [])
    assert warned == [
        "source: No row has a prompt, so only BOS precedes each answer. If a column holds the prompts, name it: "
        '`columns={"prompt": ...}`. If there are none, ignore this.'
    ]


def test_a_role_that_templates_seldom_know_is_named_once():
    def row(role: str) -> dict:
        answers = ({"role": "assistant", "content": text} for text in "ab")
        return {"prompt": [{"role": role, "content": "q"}], **dict(zip(("chosen", "rejected"), answers, strict=True))}

    warned: list[str] = []
    read_rows([row("user"), row("human"), row("critic")], "train", warn=warned.append)
    assert len(warned) == 1
    assert warned[0].startswith("train, row 1: A message has the role 'human', which is not one of `system`, ")
    read_rows([row(role) for role in ("user", "developer", "tool")], warn=pytest.fail)
