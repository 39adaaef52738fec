"""The folder of an audit: its files, the rows of each flag from every kind of source, and nothing by halves."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pytest

from lit_did.audit import audit, writing
from lit_did.audit.report import Finding
from lit_did.audit.source import AuditData
from lit_did.audit.writing import write_rows
from lit_did.data.reading import read_rows
from tests.audit.parts import ROWS, parts

__all__ = ["parts"]  # a fixture


def lines(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_the_files(parts, tmp_path):
    folder = tmp_path / "new" / "a.audit"
    files = audit(ROWS).save(folder)
    files_of_flags = ("flagged.csv", "flagged.jsonl", "kept.jsonl")
    names = [f"{name}/{file}" for name in ("contradictions", "identical", "unusable") for file in files_of_flags]
    assert [str(file.relative_to(folder)) for file in files] == [
        "audit.html",
        "audit.json",
        *(f"flags/{n}" for n in names),
        "pairs.csv",
    ]
    assert all(file.is_file() for file in files)
    assert (folder / "audit.html").read_text() == "<html>data</html>"
    with open(folder / "pairs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["flags"] for row in table] == ["contradictions", "unusable", "contradictions", "identical", ""]
    assert json.loads((folder / "audit.json").read_text())["num_pairs"] == 4
    flags = folder / "flags"
    assert lines(flags / "contradictions/flagged.jsonl") == [ROWS[0], ROWS[2]]
    assert lines(flags / "contradictions/kept.jsonl") == [ROWS[0], ROWS[3], ROWS[4]]
    assert lines(flags / "identical/kept.jsonl") == [ROWS[0], ROWS[2], ROWS[4]]
    assert lines(flags / "unusable/flagged.jsonl") == [ROWS[1]]
    assert lines(flags / "unusable/kept.jsonl") == [ROWS[0], *ROWS[2:]]
    assert (flags / "contradictions/flagged.csv").read_text() == (
        'index,where,evidence\n0,"pairs, row 0",\n2,"pairs, row 2",swaps row 0\n'
    )
    assert [path.name for path in folder.parent.iterdir()] == ["a.audit"]


def test_no_flags(parts, tmp_path):
    parts.findings["data"] = []
    assert [file.name for file in audit(ROWS).save(tmp_path / "a")] == ["audit.html", "audit.json", "pairs.csv"]


TEXTS = [{"id": str(i), "prompt": f"Question {i}?", "chosen": f'yes\n"{i}", ü', "rejected": "no"} for i in range(5)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"q{i}"}],
        "chosen": [{"role": "assistant", "content": "a \u2028 b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "score": i / 3,
    }
    for i in range(5)
]


def write_jsonl(folder, rows):
    path = folder / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return path


def write_gz(folder, rows):
    with gzip.open(folder / "a.json.gz", "wt") as file:
        json.dump(rows, file)
    return str(folder / "a.json.gz")


def write_csv(folder, rows):
    cells = [{name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()} for row in rows]
    with open(folder / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(cells)
    return folder / "a.csv"


def write_parquet(folder, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def as_dataset(folder, rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def as_frame(folder, rows):
    return pytest.importorskip("pandas").DataFrame(rows)


def two_files(folder, rows):
    for name, some in (("b", rows[:2]), ("a", rows[2:])):
        (folder / name).mkdir()
        write_jsonl(folder / name, some)
    return [folder / "b", str(folder / "a" / "*.jsonl")]


@pytest.mark.parametrize(
    "source",
    [write_jsonl, write_gz, write_csv, write_parquet, as_dataset, as_frame, two_files, lambda folder, rows: rows],
)
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "chats"])
def test_rows_of_every_source_load_again(tmp_path, source, rows):
    (tmp_path / "data").mkdir()
    made = source(tmp_path / "data", rows)
    data = AuditData(made, "pairs")
    write_rows(data, [Finding("identical", "", "", True, 0.1, [3, 1])], tmp_path / "flags")
    flagged, kept = (tmp_path / "flags/identical" / f"{name}.jsonl" for name in ("flagged", "kept"))
    if source is not write_csv:
        assert (lines(flagged), lines(kept)) == ([rows[1], rows[3]], [rows[0], rows[2], rows[4]])
    before = [row.pair for row in read_rows(made, "pairs")[0]]
    for path, numbers in ((flagged, [1, 3]), (kept, [0, 2, 4])):
        assert [row.pair for row in read_rows(path)[0]] == [before[i] for i in numbers]
        assert all(list(line) == list(rows[0]) for line in lines(path))


def test_values_that_json_lacks(tmp_path):
    import datetime

    rows = [{**TEXTS[0], "date": datetime.date(2026, 1, 2), "half": "\ud83d", "nan": float("nan")}, TEXTS[1]]
    write_rows(AuditData(rows, "pairs"), [Finding("identical", "", "", True, 0.1, [0])], tmp_path)
    (line,) = lines(tmp_path / "identical/flagged.jsonl")
    assert (line["date"], line["half"]) == ("2026-01-02", "\ud83d")
    assert line["nan"] != line["nan"]
    assert len(read_rows(tmp_path / "identical/flagged.jsonl")[0]) == 1


def test_rows_that_models_did_not_read_are_kept(tmp_path):
    data = AuditData(TEXTS, "pairs").select(np.array([1, 4]))
    assert data.row_numbers.tolist() == [1, 4]
    row = 1
    write_rows(data, [Finding("identical", "", "", True, 0.5, [row])], tmp_path)
    assert lines(tmp_path / "identical/kept.jsonl") == [TEXTS[i] for i in range(5) if i != row]


def test_data_that_changed(parts, tmp_path):
    path = write_jsonl(tmp_path, ROWS)
    found = audit(path)
    path.write_text(path.read_text() + "\n" + json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"a.jsonl: Expected 5 rows, as before, but got 6. The data changed"):
        found.save(tmp_path / "audit")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_there_is_kept(parts, tmp_path):
    found = audit(ROWS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="Expected `folder` to be a folder"):
        found.save(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"or that of an audit, but .* holds notes.txt"):
            found.save(tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    found.save(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="Choose another name, or pass `overwrite=True`"):
        found.save(tmp_path / "empty")
    parts.findings["data"] = []
    audit(ROWS).save(tmp_path / "empty", overwrite=True)
    assert not (tmp_path / "empty" / "flags").exists()


@pytest.mark.parametrize("names", [["pairs.csv"], ["pairs.csv", "audit.html"], ["flags"], ["audit.json"]])
def test_files_with_names_of_an_audit_are_none(parts, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"or that of an audit, but .* holds {min(names)}. Choose another name."):
        audit(ROWS).save(tmp_path, overwrite=True)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("pattern", ["a/pairs.csv", "*/pairs.csv", "a", "b/../a/*.csv"])
@pytest.mark.parametrize("argument", ["pairs", "val"])
def test_the_data_is_never_replaced(parts, tmp_path, monkeypatch, pattern, argument):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    parts.findings["data"] = []
    audit(ROWS).save("a")
    if pattern == "a":
        for name in ("audit.json", "audit.html"):
            (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    found = audit(**{"pairs": ROWS, argument: pattern})
    for name in ("audit.json", "audit.html"):
        (tmp_path / "a" / name).write_text("{}")
    with pytest.raises(FileExistsError, match="Expected `folder` to be a folder without the data"):
        found.save("a", overwrite=True)


def test_the_present_folder_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    found = audit(ROWS)
    monkeypatch.chdir(tmp_path / "b")
    for folder in (".", "../b"):
        with pytest.raises(FileExistsError, match="is the folder that you are in"):
            found.save(folder)
    (tmp_path / "c" / "d").mkdir(parents=True)
    found.save(tmp_path / "c" / "d" / "new" / "..")
    assert (tmp_path / "c" / "d" / "audit.html").exists()
    with pytest.raises(FileExistsError, match="Choose another name, or pass `overwrite=True`"):
        found.save(tmp_path / "c" / "d" / "new" / "..")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["page", "rows"])
def test_nothing_is_half_written(parts, tmp_path, monkeypatch, stop, where):
    def fail(*_):
        raise stop

    found = audit(ROWS)
    found.save(tmp_path / "a")
    before = (tmp_path / "a" / "audit.json").stat().st_ino
    if where == "page":
        parts.page.render = fail
    else:
        monkeypatch.setattr(writing, "_line", fail)
    with pytest.raises(stop):
        found.save(tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "audit.json").stat().st_ino == before


def test_files_that_would_be_read_otherwise(tmp_path):
    """One row in six begins with its prompt by chance. Among fewer rows it would count as a repeated prompt."""
    hello = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    data = AuditData([hello, *TEXTS], "pairs")
    assert data.rows[0].pair.chosen == "Hi there"
    with pytest.warns(UserWarning, match="identical/kept.jsonl: Some completions begin with their prompt") as caught:
        write_rows(data, [Finding("identical", "", "", True, 0.5, [1, 2, 3])], tmp_path)
    assert len(caught) == 1
    assert read_rows(tmp_path / "identical/kept.jsonl")[0][0].pair.chosen == " there"
    assert [row.pair.chosen for row in read_rows(tmp_path / "identical/flagged.jsonl")[0]] == [
        row["chosen"] for row in TEXTS[:3]
    ]


@pytest.mark.parametrize("hello", ["Hi", "What is the capital of France?"])
def test_repeated_prompts_are_read_alike(tmp_path, hello):
    """Without a warning: the share stays that of the source, or each row alone shows that it repeats the prompt."""
    long = [{"prompt": hello, "chosen": f"{hello} yes", "rejected": f"{hello} no"}] * (3 if hello == "Hi" else 1)
    data = AuditData([*long, *TEXTS], "pairs")
    write_rows(data, [Finding("identical", "", "", True, 0.5, [4, 5])], tmp_path)
    before = [row.pair for row in data.rows]
    kept = [row.pair for row in read_rows(tmp_path / "identical/kept.jsonl")[0]]
    assert kept == [pair for i, pair in enumerate(before) if i not in (4, 5)]
    assert before[0].chosen == " yes"
