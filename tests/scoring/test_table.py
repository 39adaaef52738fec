"""The table: names that are taken twice, nested values, and reading back what was written."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from lit_did.data.columns import read_columns
from lit_did.scoring.table import check_table_path, with_columns, write_table

ROWS = [{"index": 2, "margin": 0.1}, {"index": 5, "margin": float("nan")}]
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def test_taken_names_get_a_suffix():
    columns = {2: {"margin": "a", "margin_source": "b"}, 5: {"index": 7}}
    with pytest.warns(UserWarning, match="In the table `margin` is `margin_source`, .*`index` is `index_source`"):
        table = with_columns(ROWS, columns)
    assert table["margin"][0] == 0.1
    assert table["index"] == [2, 5]
    assert table["margin_source"] == ["a", None]
    assert table["margin_source_source"] == ["b", None]
    assert table["index_source"] == [None, 7]


def test_csv(tmp_path):
    table = with_columns(ROWS, {2: {"note": 'a "b",\nc', "meta": {"ü": [1, None]}}, 5: {"note": "\ud83d", "meta": []}})
    write_table(table, tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["margin"]) for row in rows] == [0.1, pytest.approx(float("nan"), nan_ok=True)]
    assert [row["note"] for row in rows] == ['a "b",\nc', "\\ud83d"]
    assert [json.loads(row["meta"]) for row in rows] == [{"ü": [1, None]}, []]
    assert (tmp_path / "scores.csv").read_bytes().count(b"\r") == 0


def test_csv_with_every_end_of_line(tmp_path):
    ends = ["a\rb", "a\nb", "a\r\nb", "\r", 'c"\r'] * 2
    write_table({"index": list(range(10)), "end\rof": ends}, tmp_path / "ends.csv")
    with open(tmp_path / "ends.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["index", "end\rof"], *([str(i), end] for i, end in enumerate(ends))]
    frame = pytest.importorskip("pandas").read_csv(tmp_path / "ends.csv")
    assert frame["end\rof"].tolist() == ends


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {2: {"score": 1, "mixed": 1, "meta": {"a": {}}, "huge": 2**70}, 5: {"score": 2.5, "mixed": "\ud83d"}}
    write_table(with_columns(ROWS, columns), tmp_path / "scores.parquet")
    read = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert read["index"] == [2, 5]
    assert read["score"] == [1.0, 2.5]
    assert read["mixed"] == ["1", "\\ud83d"]
    assert read["meta"] == ['{"a": {}}', None]
    assert read["huge"] == [str(2**70), None]


@pytest.mark.parametrize("name", ["scores", "scores.txt", "scores.csv.gz"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"Expected `output` to end in .csv or .parquet, but got"):
        check_table_path(tmp_path / name)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"scores.parquet needs pyarrow. Run pip install 'lit-did\[tables\]'"):
        check_table_path(tmp_path / "scores.parquet")


@pytest.mark.parametrize("kind", ["list", "jsonl", "csv", "parquet", "frame", "table"])
def test_the_columns_of_sources(tmp_path, kind):
    rows = [{**PAIR, "tag": "sums", "score_chosen": 0.5}, {**PAIR, "tag": "more", "score_chosen": 1.5}]
    expected = [{"tag": "sums", "score_chosen": 0.5}, {"tag": "more", "score_chosen": 1.5}]
    source = tmp_path / f"pairs.{kind}"
    if kind == "list":
        source = rows
    elif kind == "jsonl":
        source.write_text("\n".join(["", *map(json.dumps, rows)]))
    elif kind == "csv":
        source.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))
        expected = [{**row, "score_chosen": str(row["score_chosen"])} for row in expected]
    elif kind == "frame":
        source = pytest.importorskip("pandas").DataFrame(rows)
    else:
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        if kind == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, source)
        source = source if kind == "parquet" else table
    assert read_columns(source) == dict(enumerate(expected))


def test_which_columns_are_the_pairs():
    row = {"question": "2+2?", "good": "4", "bad": "5", "system": "Add.", "id": 3}
    columns = {"chosen": "good", "rejected": "bad"}
    assert read_columns([row], columns=columns) == {0: {"id": 3}}
    assert read_columns([row], columns=columns, texts=True) == {0: row}
