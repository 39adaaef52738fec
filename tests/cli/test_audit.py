"""`lit-did audit` and `lit-did compare`: their options, --fail_on, what they print, and one line for what is wrong."""

from __future__ import annotations

import json
import sys

import pytest

from lit_did.audit.report import Finding
from lit_did.cli.main import main
from tests.audit.parts import ROWS, parts

__all__ = ["parts"]  # a fixture


@pytest.fixture
def folder(tmp_path, parts, monkeypatch):
    """A folder with pairs, which is the present one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.v2.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


PAIRS = "pairs.v2.jsonl"


def test_the_data_alone(folder, capsys):
    assert main(["audit", PAIRS]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "4 pairs of 5 rows, 1 refused",
        "- 2 pairs contradict. Keep one. [contradictions]",
        "- 1 pair is identical. Drop it. [identical]",
        "- 1 row is unusable. Drop it. [unusable]",
        "- 3 prompts are too few to tell what these pairs have in common, such as longer chosen sides, from chance.",
        "  Audit pairs of at least 20 prompts.",
        "Written: pairs.v2.audit/audit.html, audit.json, flags, pairs.csv",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["pairs.v2.audit", PAIRS]


@pytest.mark.parametrize("spelling", [["--fail-on", "identical"], ["--fail_on=identical"], ["--fail-on=[identical]"]])
def test_a_flag_fails(folder, capsys, spelling):
    assert main(["audit", PAIRS, "--quiet", "--output", "a", *spelling]) == 1
    written, raised = capsys.readouterr().out.splitlines()
    assert written.startswith("Written: a/audit.html, ")
    assert raised == "Raised, as --fail_on names: identical"
    assert (folder / "a" / "audit.json").exists()


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--fail-on", "length_bias"], 0),
        (["--fail-on", "unusable", "--fail-on", "length_bias"], 1),
        (["--fail-on", "length_bias,empty_think"], 0),
        (["--fail-on", "length_bias, unusable"], 1),
        (["--fail-on", "any"], 1),
        (["-c", "options.yaml"], 1),
        (["--fail-on", "leaked", "--val", PAIRS], 0),
    ],
)
def test_flags_that_fail(folder, options, status):
    (folder / "options.yaml").write_text("fail_on: [length_bias, identical]\n")
    assert main(["audit", PAIRS, "--quiet", *options]) == status


def test_nothing_raised(folder, parts, capsys):
    parts.findings["data"] = [Finding("length_bias", "Fine.", "", False, 0.5)]
    assert main(["audit", PAIRS, "--fail-on", "any"]) == 0
    assert "- No flag was raised in 4 pairs.\n" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "more"), [(5, "1 more flag"), (6, "2 more flags")])
def test_more_flags_than_the_verdict_has(folder, parts, capsys, count, more):
    parts.findings["data"] = [Finding("identical", f"Fault {i}.", "", True, 0.1) for i in range(count)]
    assert main(["audit", PAIRS]) == 0
    names = ", ".join(["identical"] * (count - 4))
    assert f"\nAnd {more} in the page: {names}\n" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(folder, parts, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["audit", PAIRS]) == main(["audit", PAIRS, "--quiet", "--output", "quiet"]) == 0
    shown = [json.loads((folder / name / "audit.json").read_text()) for name in ("pairs.v2.audit", "quiet")]
    assert [figures["settings"]["progress"] for figures in shown] == [terminal, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--fail-on", "identicle"],
            "Expected --fail_on to name flags or any, but got identicle. Did you mean identical?",
        ),
        (
            ["--fail-on", "zzz"],
            "Expected --fail_on to name flags or any, but got zzz. The flags are unusable, identical, ",
        ),
        (
            ["--fail-on", "truncated"],
            "Expected --tokenizer with --fail_on truncated, which cannot be raised without it",
        ),
        (["--fail-on", "mislabelled"], "Expected --reference with --fail_on mislabelled"),
        (["--fail-on", "identical", "--fail-on", "displacement"], "Expected --policy with --fail_on displacement"),
        (["--fail-on", "leaked"], "Expected --val with --fail_on leaked"),
        (["--fail-on"], "Expected a value after --fail_on, but got none."),
        (["--by", "--sides"], "Expected a value after --by, but got none."),
        (["--by", "score"], "Expected `policy` with `by`, which has no effect without it"),
        (["--max-pairz", "3"], "Expected an option of this command, but got --max_pairz. Did you mean --max_pairs?"),
        (["--max-pairs", "0"], "Expected `max_pairs` to be an integer of at least 1, but got 0."),
        (["--max-length", "9"], "Expected `tokenizer` or `reference` or `policy` with `max_length`"),
        (["--dtype", "bfloat16"], "Expected `reference` or `policy` with `dtype`"),
        (["--sides"], "Expected `reference` with `sides`"),
        (
            ["--reference", "./no"],
            "Expected `reference` to be a folder with a transformers model, but no is not a folder",
        ),
        (["--tokenizer", "./no"], "Expected `tokenizer` to be a folder with a transformers model"),
        (["--val", "no.jsonl"], "Expected a data file, but no.jsonl does not exist."),
        (["--output", PAIRS], f"Expected --output to be a folder, but {PAIRS} is a file."),
        (["--output", f"{PAIRS}/a"], f"Expected --output to be a folder that can be made, but got {PAIRS}/a"),
        (["--output", "."], f"Expected --output to be a new folder or that of an audit, but . holds {PAIRS}."),
        (["--columns", '{"ask": "q"}'], "Expected the keys of `columns` to be among"),
    ],
)
def test_what_a_user_can_mend(folder, parts, capsys, options, message):
    assert main(["audit", PAIRS, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert [path.name for path in folder.iterdir()] == [PAIRS]
    assert not parts.calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"Expected a data file, but {PAIRS} does not exist."),
        ("", f"{PAIRS}: Expected preference pairs, but got none."),
        ("{", f"{PAIRS}, line 1: Expected one JSON object a line, but got invalid JSON"),
        (
            '{"prompt": "a", "chosen": "", "rejected": "b"}',
            f"{PAIRS}: 1 row cannot be trained on and is skipped. 1 with the reason: Expected `chosen` to be "
            f"non-empty, but got an empty string. ({PAIRS}, line 1) No row is left. Fix the rows.",
        ),
    ],
)
def test_pairs_that_cannot_be_read(folder, capsys, text, message):
    (folder / PAIRS).unlink()
    if text is not None:
        (folder / PAIRS).write_text(text)
    assert main(["audit", PAIRS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (folder / "pairs.v2.audit").exists()


def test_the_present_folder(folder, monkeypatch, parts, capsys):
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    assert main(["audit", f"../{PAIRS}", "--output", "."]) == 2
    assert "but . is the folder that you are in. Choose another name." in capsys.readouterr().err
    assert not parts.calls


def test_an_audit_that_is_there(folder, capsys):
    assert main(["audit", PAIRS, "--quiet"]) == 0
    assert main(["audit", PAIRS, "--quiet"]) == 2
    assert "pairs.v2.audit exists. Choose another name, or pass --overwrite." in capsys.readouterr().err
    assert main(["audit", PAIRS, "--quiet", "--overwrite"]) == 0


def test_an_interrupt_leaves_nothing(folder, parts, capsys):
    def stop(audit):
        raise KeyboardInterrupt

    parts.page.render = stop
    assert main(["audit", PAIRS]) == 130
    assert capsys.readouterr().err == "Stopped.\n"
    assert [path.name for path in folder.iterdir()] == [PAIRS]


def test_an_interrupt_after_the_reference_leaves_what_was_found(folder, parts, monkeypatch, models, capsys):
    from lit_did.audit import running

    function = running._function

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        running, "_function", lambda module, name: stop if module == "policy" else function(module, name)
    )
    command = ["audit", PAIRS, "--reference", str(models[0]), "--policy", str(models[1]), "--device", "cpu"]
    for _ in range(2):  # nothing has to be overwritten
        assert main(command) == 130
        printed = capsys.readouterr()
        unfinished = "pairs.v2.audit.incomplete"
        assert printed.out == f"Written: {unfinished}/audit.html, with the parts data, tokens, reference\n"
        assert printed.err.endswith("Stopped.\n")
    assert json.loads((folder / unfinished / "audit.json").read_text())["stopped"] == "an interrupt"
    assert sorted(path.name for path in folder.iterdir()) == [unfinished, PAIRS]


def test_options_of_the_python_function(folder, parts, tiny_model):
    options = ["--columns", '{"prompt": "prompt", "tag": "tag"}', "--chat-template-kwargs", '{"a": true}', "--as-chat"]
    assert main(["audit", PAIRS, "--quiet", "--tokenizer", str(tiny_model), "--max-length", "9", *options]) == 0
    settings = json.loads((folder / "pairs.v2.audit" / "audit.json").read_text())["settings"]
    assert settings["columns"] == {"prompt": "prompt", "tag": "tag"}
    given = {"chat_template_kwargs": {"a": True}, "as_chat": True, "max_length": 9}
    assert settings["tokenization"].items() >= given.items()
    assert main(["audit", PAIRS, "--progress", "false"]) == 2


def test_a_warning_of_the_reader_comes_once(folder, parts, recwarn):
    parts.findings["data"] = []
    rows = [{"question": "a", "chosen": "b", "rejected": "c", "flags": 1}]
    (folder / PAIRS).write_text("\n".join(map(json.dumps, rows)))
    main(["audit", PAIRS, "--quiet"])
    texts = [str(warning.message) for warning in recwarn]
    assert len([text for text in texts if "prompt from `question`" in text]) == 1
    assert len([text for text in texts if "`flags` is `flags_source`" in text]) == 1


def test_compare_is_an_audit_with_both_models(folder, parts, models, capsys):
    options = ["--max-pairs", "3", "--device", "cpu", "--by", "score", "--beta", "0.3"]
    assert main(["compare", str(models[0]), str(models[1]), "--data", PAIRS, *options]) == 0
    figures = json.loads((folder / "pairs.v2.compare" / "audit.json").read_text())
    assert figures["inputs"] == {
        "pairs": PAIRS,
        "tokenizer": str(models[1]),
        "reference": str(models[0]),
        "policy": str(models[1]),
    }
    assert list(figures["parts"]) == ["data", "tokens", "reference", "policy"]
    assert (figures["num_pairs"], figures["settings"]["by"], figures["settings"]["beta"]) == (4, ["score"], 0.3)
    assert figures["settings"]["max_pairs"] == 3
    assert capsys.readouterr().out.startswith("4 pairs of 5 rows, 1 refused, 3 read by models\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "Expected `data` to be given, in a recipe (-c FILE) or as an option (--data)."),
        (["a", "--data", PAIRS], "Expected `tuned` to be given after the command's name, but it is not."),
        (["a", "b", "--data", PAIRS, "--policy", "c"], "Expected an option of this command, but got --policy."),
        (["./a", "./b", "--data", PAIRS], "Expected `policy` to be a folder with a transformers model, but b is not"),
    ],
)
def test_what_compare_needs(folder, capsys, arguments, message):
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
