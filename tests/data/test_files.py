"""Files of every kind, in folders and patterns; what blocks, never ends or breaks off is named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import socket
import tracemalloc

import pytest

from lit_did.data import files
from lit_did.data.pairs import PreferencePair
from lit_did.data.reading import read_pairs, read_rows

ROWS = [{"prompt": "q", "chosen": 'a, "x"\nb', "rejected": "naïve"}, {"prompt": "r", "chosen": "c", "rejected": "d"}]
PAIRS = [PreferencePair(**row) for row in ROWS]
LIMIT = csv.field_size_limit()
GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


def _csv(path, rows, **options) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["pairs.json", "PAIRS.JSON", "pairs.json.gz"])
def test_json_list(tmp_path, name, indent):
    data = ("\ufeff \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    rows = read_pairs(tmp_path / name)
    assert [row.pair for row in rows] == PAIRS
    assert [row.where for row in rows] == [f"{tmp_path / name}, line {line}" for line in ((3, 8) if indent else (2, 2))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n" + GOOD + ",\n\n{]", "line 4: Expected a list of JSON objects, but got invalid JSON: "),
        ("[\n" + GOOD + "\n" + GOOD + "]", "line 3: Expected a list of JSON objects, but got invalid JSON: '{' after"),
        ("[\n" + GOOD + ",\n", "line 2: Expected a list of JSON objects, but got invalid JSON: Expecting value"),
        ("[\n" + GOOD + "\n", "line 2: Expected a list of JSON objects, but got the end of the file within the list."),
        ("[" + GOOD + "]\n" + GOOD, "line 1: Expected one list of JSON objects, but got more text after it."),
        ("[\n" + GOOD + ",\n5]", "line 3: Expected an object with `chosen` and `rejected`, but got int 5."),
        ("[\n" + GOOD + ',\n{"a": 1,\n"a": 2}]', "line 3: Expected every key once, but got `a` more than once."),
        (
            "[\n" + GOOD + ",\n" + "[" * 100_000,
            "line 3: Expected a list of JSON objects, but got values that are nested",
        ),
        ("{\n", "line 1: Expected one list of JSON objects, or one object a line, but got invalid JSON"),
        ("[]", "Expected preference pairs, but got none."),
        ("", "Expected preference pairs, but got none."),
    ],
)
def test_malformed_json_is_named_by_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_pairs(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "q", "prompt": "r"}', "Expected every key once, but got `prompt` more than once."),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "Expected every key once, but got `a` more than once."),
        ('{"x": ' + "1" * 5000 + "}", "Expected numbers of at most 4300 digits, but got a longer one."),
        ('{"x": ' + "[" * 100_000, "Expected one JSON object a line, but got values that are nested too deeply."),
        ('{"prompt": "q', "Expected one JSON object a line, but got invalid JSON: Unterminated string"),
        (b'{"id": "\xff"}', "Expected UTF-8, but got byte 0xff at byte 9 of the line."),
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "tag": "\\ud83d"}', "Expected `tag` to be valid Unicode"),
    ],
)
def test_malformed_lines_are_named(write_jsonl, line, message):
    path = write_jsonl(GOOD, line)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {message}")):
        read_pairs(path)


def test_values_that_are_nested_deeply_below_the_limit_of_the_parser():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    row = {"prompt": [{"role": "user", "content": "q", "x": deep}], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match="source, row 0: Expected values within Python's recursion limit"):
        read_pairs([row])


def test_huge_numbers_in_rows_are_named():
    with pytest.raises(ValueError, match=r"source, row 0: Expected `chosen` .* but got a huge int"):
        read_pairs([{"prompt": "q", "chosen": 10**5000, "rejected": "b"}])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_lines_have_a_bound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_LINE", 200)
    start = {"a.csv": "prompt,chosen,rejected\n", "a.json": "[" + GOOD + ",\n"}.get(name, GOOD + "\n").encode()
    data = start + b'"' + b"x" * 1000
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ValueError, match=rf"{name}, line 2: Expected at most 200 bytes a line, but got more\."):
        read_pairs(tmp_path / name)


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.truncate(2**26)  # zeros that take no space on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="line 1: Expected at most 1000 bytes a line"):
            read_pairs(tmp_path / "a.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_list_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 100)
    (tmp_path / "a.json").write_text(json.dumps(ROWS * 2, indent=1))
    with pytest.raises(ValueError, match=r"a\.json: Expected a list of at most 100 bytes.* Write JSON Lines instead\."):
        read_pairs(tmp_path / "a.json")


def test_csv(tmp_path):
    _csv(tmp_path / "a.csv", ROWS)
    rows = read_pairs(tmp_path / "a.csv")
    assert [row.pair for row in rows] == PAIRS
    assert [row.where.rsplit(", ")[-1] for row in rows] == ["line 2", "line 4"]  # the first row has two lines
    _csv(tmp_path / "a.tsv", ROWS, delimiter="\t")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "a.tsv").read_bytes() + b"\n\n"))
    for name in ("a.tsv", "a.tsv.gz"):
        assert [row.pair for row in read_pairs(tmp_path / name)] == PAIRS


def test_csv_with_messages_numbers_and_empty_cells(tmp_path):
    chat = {"prompt": json.dumps([{"role": "user", "content": "q"}]), "chosen": "a", "rejected": "b", "tag": ""}
    _csv(tmp_path / "a.csv", [chat, {"prompt": "q", "chosen": "4", "rejected": "05", "tag": "t"}])
    pairs = [row.pair for row in read_pairs(tmp_path / "a.csv")]
    assert pairs[0].prompt == [{"role": "user", "content": "q"}]
    assert pairs[1] == PreferencePair("q", "4", "05", "t")
    _csv(tmp_path / "a.csv", [*ROWS, {"prompt": "q", "chosen": "", "rejected": "b"}])
    rows, skipped = read_rows(tmp_path / "a.csv")
    assert (len(rows), [row.where.rsplit(", ")[-1] for row in skipped]) == (2, ["line 5"])
    long = {"prompt": "q", "chosen": "a" * 200_000, "rejected": "b"}  # beyond the csv module's own limit
    _csv(tmp_path / "a.csv", [long])
    assert read_pairs(tmp_path / "a.csv")[0].pair == PreferencePair(**long)
    assert csv.field_size_limit() == LIMIT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\nq,a\n", "line 2: Expected 3 cells as in the header, but got 2."),
        ("prompt,chosen,rejected\nq,a,b\nq,a,b,c\n", "line 3: Expected 3 cells as in the header, but got 4."),
        ("prompt,chosen,chosen\nq,a,b\n", "line 1: Expected every column once, but got the header"),
        ('prompt,chosen,rejected\nq,a,b\nq,"a,b\n', "line 3: Expected CSV, but got: unexpected end of data."),
        (
            "prompt,chosen,rejected\nq,na\xefve,b\n".encode("latin-1"),
            "line 2: Expected UTF-8, but got byte 0xef at byte 5 of the line. Convert the file, for example",
        ),
        ("prompt|chosen|rejected\nq|a|b\n", "line 2: Expected the keys `chosen` and `rejected`, but got"),
        ("prompt,chosen;rejected\nq,a;b\n", "line 2: Expected the keys `chosen` and `rejected`, but got"),
        (
            "prompt,completion,label\nq,a,True\n",
            "Rows with one `completion` and its `label`, as for KTO, are not pairs: put a good and a bad completion of",
        ),
        ("", "a.csv: Expected preference pairs, but got none."),
        ("prompt,chosen,rejected\n", "a.csv: Expected preference pairs, but got none."),
    ],
)
def test_malformed_csv_is_named_by_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_without_commas_in_its_header(tmp_path, mark):
    lines = ["", '"prompt";chosen;rejected', 'q,1;"a; A";b', "r;c;d"]
    text = "\n".join(lines).replace(";", mark).replace(f"a{mark}", "a;")
    (tmp_path / "a.csv").write_text(text)
    rows = read_pairs(tmp_path / "a.csv")
    assert [row.pair[:3] for row in rows] == [("q,1", "a; A", "b"), ("r", "c", "d")]
    assert rows[0].where.endswith("a.csv, line 3")


def test_json_objects_around_and_over_lines(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps({"version": 1, "data": [pair]}, indent=indent))
        message = "line 1: Expected the keys .* The pairs seem to be in `data`: pass that list instead of the object"
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    path.write_text("\n" + json.dumps(pair, indent=2))
    (row,) = read_pairs(path)
    assert row.pair[:3] == ("q", "a", "b")
    assert row.where.endswith("a.json, line 2")


def test_several_files_patterns_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "chosen": "c", "rejected": "d"}))
    for name in ("README.md", ".hidden.jsonl"):
        (tmp_path / name).write_text("no pairs")
    (tmp_path / "empty.jsonl").write_text("")

    def prompts(source) -> list[str]:
        rows = read_pairs(source)
        assert [row.index for row in rows] == list(range(len(rows)))
        return [row.pair.prompt for row in rows]

    assert prompts(tmp_path) == prompts([tmp_path]) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert prompts(str(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert prompts(str(tmp_path / "**" / "[bc].jsonl")) == ["b.jsonl", "sub/c.jsonl"]
    assert prompts([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")]) == ["b.jsonl", "a.jsonl"]
    (tmp_path / "[x].jsonl").write_text(GOOD)  # a name that reads like a pattern
    assert prompts(str(tmp_path / "[x].jsonl")) == ["q"]
    with pytest.raises(FileNotFoundError, match=r"no path matches .*\*\.csv"):
        read_pairs(str(tmp_path / "*.csv"))
    with pytest.raises(ValueError, match=r"train: Expected every path once, but got .*a\.jsonl 2 times"):
        read_pairs([tmp_path / "a.jsonl", tmp_path / "a.jsonl"], "train")
    with pytest.raises(TypeError, match="Expected `train` to be a list of paths or a list of dicts, but got both"):
        read_pairs([tmp_path / "a.jsonl", ROWS[0]], "train")


def test_a_folder_of_several_splits_or_of_datasets_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(GOOD)
    with pytest.raises(ValueError, match=r"Expected the files of one split, but got those of test, train\. ") as caught:
        read_pairs(tmp_path)
    assert len(read_pairs(re.search(r'"(.*)"', str(caught.value))[1])) == 2  # the pattern that it names
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="that `datasets` wrote"):
        read_pairs(tmp_path)


def test_what_is_no_file_is_named_and_never_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("fifo.jsonl")
    os.symlink("/dev/zero", "zero.jsonl")
    os.symlink("fifo.jsonl", "link.jsonl")
    os.symlink("b.jsonl", "a.jsonl")
    os.symlink("a.jsonl", "b.jsonl")
    os.symlink("nowhere.jsonl", "broken.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
        for name, error, message in (
            ("fifo.jsonl", ValueError, "fifo.jsonl: Expected a data file, but got a FIFO (named pipe)."),
            ("zero.jsonl", ValueError, "but got a character device (through the link to /dev/zero)."),
            ("link.jsonl", ValueError, "but got a FIFO (named pipe) (through the link to fifo.jsonl)."),
            ("socket.jsonl", ValueError, "but got a socket."),
            ("a.jsonl", ValueError, "but got: a loop of links."),
            ("broken.jsonl", FileNotFoundError, "broken.jsonl links to nowhere.jsonl, which does not exist."),
            ("null\0.jsonl", ValueError, "Expected a data file, but got"),
            ("x" * 300 + ".jsonl", ValueError, "but got: File name too long."),
            ("fifo.jsonl/a.jsonl", ValueError, "but got: Not a directory."),
        ):
            for source in (name, [name]):
                with pytest.raises(error, match=re.escape(message)):
                    read_pairs(source)
        with pytest.raises(ValueError, match="a loop of links"):
            read_pairs(".")  # the folder's first file


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):  # as for a user without the right to; the superuser may read all
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        read_pairs(tmp_path)


def test_links_to_folders_that_form_a_loop_end(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    os.symlink(tmp_path, tmp_path / "again")
    assert len(read_pairs(tmp_path)) == 1
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")  # as in the hub's cache
    assert len(read_pairs(tmp_path)) == 2


def test_an_error_inside_parquet_is_named_with_file_and_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{"prompt": f"question {n}", "chosen": f"yes {n} " * 5, "rejected": f"no {n} " * 5} for n in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="snappy", row_group_size=1500)
    data = bytearray(path.read_bytes())
    place = len(data) * 3 // 4
    data[place : place + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a\.parquet, row \d+ or one of the next \d+: Expected Parquet data"
    ) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_utf8_inside_parquet_is_named_with_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a", b"b", b"\xff"], pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    good = pyarrow.array(["q", "r", "s"])
    table = pyarrow.table({"prompt": good, "chosen": bad, "rejected": good})
    with pytest.raises(ValueError, match="train, row 2: Expected values that Python can hold, but got: 'utf-8' codec"):
        read_pairs(table, "train")
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: Expected values that Python can hold"):
        read_pairs(tmp_path / "a.parquet")


def test_repeated_columns_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    names = ["prompt", "chosen", "rejected", "chosen"]
    table = pyarrow.table([pyarrow.array(["x"])] * 4, names=names)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    frame = pandas.DataFrame([["x"] * 4], columns=names)
    for source in (table, tmp_path / "a.parquet", frame):
        with pytest.raises(ValueError, match="Expected every column once, but got `chosen` more than once"):
            read_pairs(source)


@pytest.mark.filterwarnings("ignore:.*Reads system from")
def test_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    rows = [{**row, "score": 1.5, "embedding": [0.5]} for row in ROWS]
    table = pyarrow.Table.from_pylist(rows)
    for source in (table, table.to_batches()[0], pandas.DataFrame(rows), pandas.DataFrame(rows, index=[7, 9])):
        read = read_pairs(source, "train")
        assert [row.pair for row in read] == PAIRS
        assert [row.where for row in read] == ["train, row 0", "train, row 1"]
    # What pandas puts where a value is missing.
    frame = pandas.DataFrame({"prompt": ["q", "r"], "chosen": ["a", float("nan")], "rejected": ["b", "c"]})
    frame["system"] = [pandas.NA, None]
    frame["tag"] = [float("nan"), "t"]
    read, skipped = read_rows(frame)
    assert [row.pair for row in read] == [PreferencePair("q", "a", "b")]
    assert [row.index for row in skipped] == [1]


def test_only_the_columns_that_matter_are_decoded():
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"], pyarrow.binary()).buffers())
    table = pyarrow.table({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "thumbnail": bad})
    assert read_pairs(table)[0].pair == PreferencePair("q", "a", "b")
