"""Planted faults are found, row by row, in real and in synthetic pairs; clean data raises no flag."""

from __future__ import annotations

import itertools
import json
import tracemalloc
import unicodedata

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the extra audit is not installed")
pytest.importorskip("rensa", reason="the extra audit is not installed")

from lit_did.audit.data import examine_data
from lit_did.audit.data.kinds import tables_of_kinds
from lit_did.audit.data.length import surplus
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from tests.audit.data.clean import KINDS, clean


def examine(rows, val=None):
    data = AuditData(rows, "pairs")
    part = examine_data(data, Settings(), val=None if val is None else AuditData(val, "val"))
    return {finding.name: finding for finding in part.findings}, part, data


def check(finding, planted):
    found = set(finding.rows)
    assert finding.raised
    assert len(found & planted) >= 0.95 * len(planted), sorted(planted - found)
    assert len(found & planted) >= 0.95 * len(found), [finding.evidence[row] for row in sorted(found - planted)]


@pytest.fixture(params=["random words", "templates", "several pairs a prompt", "alpacaeval_pairs.jsonl"])
def pairs(request):
    if request.param in KINDS:
        return clean(request.param, 1, 300)
    path = request.getfixturevalue("real_data")(request.param)
    data = AuditData(path, "real")
    rows = [dict(zip(("prompt", "chosen", "rejected"), data.texts(place), strict=True)) for place in range(400)]
    return [row for row in rows if row["chosen"].split() != row["rejected"].split()]


def changed(text, rng):
    """The text with one of every 25 words changed."""
    words = text.split()
    for place in rng.choice(len(words), max(1, len(words) // 25), replace=False) if len(words) > 12 else ():
        words[place] = f"changed{rng.integers(1000)}"
    return " ".join(words)


def test_planted_faults_of_rows(pairs):
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pairs))
    copied, swapped, leaked, equal, thinking = np.split(order[:52], [12, 22, 37, 45])
    long = [place for place in order[52:] if len(pairs[place]["chosen"].split()) >= 20][:12]
    rows = [dict(row) for row in pairs]
    for place in equal:
        rows[place]["rejected"] = " " + rows[place]["chosen"].replace(" ", "  ")
    for place in thinking:
        rows[place]["chosen"] = "<think>\n\n</think>\n\n" + rows[place]["chosen"]
    planted = {}
    planted["duplicates"] = set(range(len(rows), len(rows) + len(copied)))
    rows += [dict(rows[place]) for place in copied]
    planted["contradictions"] = {*swapped.tolist(), *range(len(rows), len(rows) + len(swapped))}
    rows += [rows[n] | {"chosen": rows[n]["rejected"], "rejected": rows[n]["chosen"]} for n in swapped]
    near = [place for place in long if len(rows[place]["rejected"].split()) >= 20 and place not in equal]
    planted["near_duplicates"] = set(range(len(rows), len(rows) + len(near)))
    rows += [rows[n] | {side: changed(rows[n][side], rng) for side in ("chosen", "rejected")} for n in near]
    prompts = {rows[place]["prompt"] for place in leaked}
    val = [{"prompt": f" {prompt.upper()}\n", "chosen": "a", "rejected": "b"} for prompt in sorted(prompts)]
    planted["leaked"] = {number for number, row in enumerate(rows) if row["prompt"] in prompts}
    planted["identical"] = set(equal.tolist())
    planted["empty_think"] = {number for number, row in enumerate(rows) if "<think>" in row["chosen"] + row["rejected"]}
    findings, _, _ = examine(rows, val)
    assert near
    for name, numbers in planted.items():
        check(findings[name], numbers)
    # What is kept contradicts nothing.
    kept = sorted(set(range(len(rows))) - set(findings["contradictions"].dropped))
    again, _, _ = examine([rows[number] for number in kept])
    assert not again["contradictions"].rows
    assert len(findings["contradictions"].dropped) == len(swapped)


def test_no_flag_in_clean_data():
    raised = []
    for seed, kind in enumerate([*KINDS, *KINDS, *KINDS, "random words", "short answers"]):
        findings, _, _ = examine(clean(kind, seed, 150), clean(kind, seed + 100, 20))
        raised += [(kind, seed, finding.sentence) for finding in findings.values() if finding.raised]
    assert not raised


@pytest.mark.parametrize("bias", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_length_bias(bias, seed):
    rows, rng = clean("random words", seed, 300), np.random.default_rng(seed)
    for row in rows:
        longer = len(row["chosen"].split()) >= len(row["rejected"].split())
        if bias and rng.random() < abs(bias) and longer != (bias > 0):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    findings, part, _ = examine(rows)
    finding = findings["length_bias"]
    assert finding.raised == bool(bias)
    if bias:
        assert ("longer" if bias > 0 else "shorter") in finding.sentence
        kept = sorted(set(range(len(rows))) - set(finding.rows))
        chosen, rejected = (np.array(part.columns[f"{side}_words"])[kept] for side in ("chosen", "rejected"))
        assert (chosen > rejected).sum() == (chosen < rejected).sum() > 50


def test_the_surplus_balances_each_size_of_the_difference():
    ratios = np.concatenate([np.full(60, 0.1), np.full(40, -0.1), np.full(70, 2.0), np.full(30, -2.0), np.zeros(200)])
    places = surplus(ratios, 0)
    kept = np.delete(ratios, places)
    for size in (0.1, 2.0):
        assert (kept == size).sum() == (kept == -size).sum()
    assert len(places) == 60
    assert (np.diff(np.abs(ratios[places])) <= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_contradictions_are_the_pairs_on_cycles(seed):
    rng = np.random.default_rng(seed)
    edges = [tuple(rng.choice(6, 2, replace=False)) for _ in range(9)]
    rows = [{"prompt": "p", "chosen": f"a{a}", "rejected": f"a{b}"} for a, b in edges]
    rows += [{"prompt": "q", "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]  # another prompt

    def reaches(start, end, left):
        seen, waiting = set(), [start]
        while waiting:
            node = waiting.pop()
            seen.add(node)
            waiting += [b for a, b in left if a == node and b not in seen]
        return end in seen

    truth = {number for number, (a, b) in enumerate(edges) if reaches(b, a, edges)}
    findings, _, _ = examine(rows)
    finding = findings["contradictions"]
    assert {row for row in finding.rows if row < 9} == truth
    left = [edge for number, edge in enumerate(edges) if number not in finding.dropped]
    assert not any(reaches(b, a, left) for a, b in left)


def test_near_duplicates_against_brute_force():
    rng = np.random.default_rng(0)
    rows = clean("random words", 5, 60)
    for place in range(40):  # copies that differ more and more
        row = {name: text.split() for name, text in rows[place].items()}
        for words in row.values():
            for at in rng.choice(len(words), len(words) * place // 80, replace=False):
                words[at] = f"w{rng.integers(10**6)}"
        rows.append({name: " ".join(words) for name, words in row.items()})
    findings, _, data = examine(rows)

    def shingles(text):
        words = ["", *text.split()]
        return set(itertools.pairwise(words))

    parts = [[{(part, s) for s in shingles(text)} for part, text in enumerate(data.texts(n))] for n in range(len(rows))]
    share = {}
    for shingle in itertools.chain(*(set.union(*part) for part in parts)):
        share[shingle] = share.get(shingle, 0) + 1

    def weight(some):
        return sum(np.log((len(rows) + 1) / share[shingle]) for shingle in some)

    truth = set()
    for a, b in itertools.combinations(range(len(rows)), 2):
        shared = [weight(x & y) for x, y in zip(parts[a], parts[b], strict=True)]
        either = [weight(x | y) for x, y in zip(parts[a], parts[b], strict=True)]
        few = [
            len(x & y) >= 2 and max(len(x), len(y)) - len(x & y) <= 4 for x, y in zip(parts[a], parts[b], strict=True)
        ]
        alike = [x >= 0.5 * y or small for x, y, small in zip(shared, either, few, strict=True)]
        if sum(shared) >= 0.6 * sum(either) and all(alike):
            truth.add(b)
    truth -= set(findings["duplicates"].rows)  # the first ones are exact copies
    assert 5 < len(truth) < 35
    assert set(findings["near_duplicates"].rows) == truth


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace(" ", ", "),
        str.upper,
        lambda text: text.replace("река", "гора"),
        lambda text: text.translate(str.maketrans("", "", ".,!?")),
    ],
    ids=["punctuation added", "case of Cyrillic letters", "a word of a short prompt", "punctuation removed"],
)
def test_near_copies_in_other_punctuation_and_case(edit):
    rows = clean("random words", 0, 40)
    rows.append(
        {
            "prompt": "Где течёт эта длинная река сегодня?",
            "chosen": "Она течёт на север, через леса и поля, и впадает в холодное море.",
            "rejected": "Никто не знает, где она начинается и куда она идёт, говорят старые люди.",
        }
    )
    rows.append({name: edit(text) for name, text in rows[-1].items()})
    findings, _, _ = examine(rows)
    assert [*findings["duplicates"].rows, *findings["near_duplicates"].rows] == [41]


def test_pairs_of_one_prompt_with_other_short_answers_are_no_near_duplicates():
    prompt = (
        "Which city is the capital of the country in the north where the people speak the language of the text below?"
    )
    rows = [{"prompt": prompt, "chosen": "Oslo", "rejected": wrong} for wrong in ("Rome", "Paris", "Berlin")]
    findings, _, _ = examine([*rows, *clean("random words", 0, 40)])
    assert not findings["near_duplicates"].rows


def test_pairs_that_are_not_compared_are_counted():
    row = {
        "prompt": "How old is Bergen?",
        "chosen": "Its oldest houses are very old.",
        "rejected": "Nobody knows that.",
    }
    short = [row, row | {"chosen": row["chosen"] + " Yes."}, row | {"rejected": "Nobody knows."}]
    findings, _, _ = examine([*short, short[0], *clean("random words", 0, 40)])
    left_out = "3 pairs with fewer than 20 words were not compared."
    assert findings["near_duplicates"].sentence == f"No pair nearly repeats another one; {left_out}"
    long = {"prompt": "a " * 9, "chosen": "b " * 9, "rejected": "c " * 9}
    findings, _, _ = examine([short[0], *([long | {"rejected": "c " * (n + 9)} for n in range(30)])])
    left_out = (
        "1 pair with fewer than 20 words was not compared; 30 pairs with no words but common ones were not compared."
    )
    assert findings["near_duplicates"].sentence == f"No pair nearly repeats another one; {left_out}"


def test_one_row_has_sentences_of_its_own():
    rows = clean("random words", 0, 30)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4]["chosen"] = "<think></think>a"
    findings, _, _ = examine([*rows, rows[5], {"prompt": "p", "chosen": "", "rejected": "b"}], rows[:1])
    said = {name: f"{finding.sentence} {finding.advice}" for name, finding in findings.items() if finding.rows}
    assert said == {
        "unusable": "1 row of 32 (3.1%) cannot be trained on and is left out. The reason is: Expected `chosen` to be "
        "non-empty, but got an empty string. Fix or remove it.",
        "identical": "1 pair of 31 (3.2%) has two sides that are equal or differ in whitespace alone. Remove it: it "
        "holds no preference.",
        "duplicates": "1 pair of 31 (3.2%) repeats an earlier pair. Remove the copy.",
        "leaked": "1 pair of 31 (3.2%) has the prompt of a validation pair. This concerns 1 of 1 "
        "validation pair. Remove it from one of both.",
        "empty_think": "1 pair of 31 (3.2%) has an empty think block in a completion. Remove the empty think block, "
        "unless the model is to answer without thinking.",
    }


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_the_rows_to_keep_without_length_bias_are_not_few(share):
    rng, rows = np.random.default_rng(0), clean("random words", 1, 200)
    for row in rows:
        longer, shorter = row["chosen"] + " " + row["chosen"], row["chosen"]
        row["chosen"], row["rejected"] = (longer, shorter) if rng.random() < share else (shorter, longer)
    finding = examine(rows)[0]["length_bias"]
    kept = len(rows) - len(finding.rows if finding.dropped is None else finding.dropped)
    assert finding.raised
    assert kept >= len(rows) / 2


def test_swapped_near_copies_and_shared_boilerplate_are_no_near_duplicates():
    text = "The tower was built in the year 1889 by many workers, and it is 330 metres high, as every guide there says."
    row = {"prompt": "How high is it, and who built it, and when was that?", "chosen": text, "rejected": text + " So."}
    swapped = row | {"chosen": row["rejected"] + " Yes", "rejected": row["chosen"]}
    findings, _, _ = examine([row, swapped, *clean("random words", 0, 40)])
    assert not findings["near_duplicates"].rows


def test_empty_thinking_of_messages():
    user = [{"role": "user", "content": "Why?"}]

    def row(text, **thoughts):
        answers = [{"role": "assistant", "content": said, **more} for said, more in ((text, thoughts), ("No.", {}))]
        return {"prompt": user, "chosen": [answers[0]], "rejected": [answers[1]]}

    rows = [
        row("So.", reasoning_content=" "),
        row("So.", reasoning_content="Because."),
        row("<THINK> </think>So."),
        row("[THINK][/THINK]So."),
        row("<think>a</think>So."),
        row("a < b [c]"),
        row("<think/>So."),
        row("<think>\u200b\n</think>So."),
        row("<|START_THINKING|><|END_THINKING|>So."),
    ]
    findings, _, _ = examine(rows)
    assert findings["empty_think"].rows == [0, 2, 3, 6, 7, 8]
    assert "chosen" in findings["empty_think"].evidence[0]


def test_sides_that_differ_in_their_reasoning_are_not_identical():
    user = [{"role": "user", "content": "Why?"}]
    sides = [[{"role": "assistant", "content": "So.", "reasoning_content": thought}] for thought in ("a", "b")]
    findings, _, _ = examine([{"prompt": user, "chosen": sides[0], "rejected": sides[1]}])
    assert not findings["identical"].rows


def test_refused_rows_are_counted_by_reason():
    rows = [*clean("random words", 0, 20), {"prompt": "p", "chosen": "", "rejected": "a"}]
    findings, _, _ = examine(rows)
    assert findings["unusable"].rows == [20]
    assert findings["unusable"].sentence.startswith("1 row of 21 (4.8%) cannot be trained on and is left out.")


def test_nearly_leaked_prompts():
    rng, rows = np.random.default_rng(0), clean("random words", 3, 60)
    for row in rows:
        row["prompt"] = row["rejected"] + " " + row["prompt"]
    near = [row | {"prompt": changed(row["prompt"], rng)} for row in rows[:10]]
    findings, _, _ = examine(rows, [*near, *clean("random words", 9, 30)])
    long = {n for n in range(10) if len(rows[n]["prompt"].split()) >= 25}
    assert long <= set(findings["leaked"].rows) <= set(range(10))
    assert "nearly the prompt of a validation pair" in findings["leaked"].sentence
    assert "leaked" not in examine(rows)[0]


@pytest.mark.filterwarnings("ignore:.*No row has a prompt")
def test_data_without_prompts_leaks_none():
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}]
    assert not AuditData(rows, "pairs").texts(0)[0]
    assert not examine(rows, rows)[0]["leaked"].rows


@pytest.mark.filterwarnings("ignore:.*No row has a prompt")
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_pairs_without_a_prompt_are_independent(system):
    """But for copies, which are in one fold."""
    rows = [{"prompt": "", "chosen": f"a {n} b c d e", "rejected": f"f {n}"} for n in range(60)]
    rows = [row | ({"system": system} if system else {}) for row in [*rows, rows[3] | {"chosen": "a  3 b c d e"}]]
    findings, part, data = examine(rows)
    assert data.prompt_groups.tolist() == [*range(60), 3]
    assert findings["length_bias"].raised
    assert part.figures["num_prompts"] == 60
    assert findings["duplicates"].rows == [60]
    again, _, _ = examine([*rows, rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}], rows)
    assert again["contradictions"].rows == [0, 61]
    assert not again["leaked"].rows


def test_prompts_that_differ_in_case_and_whitespace_are_one():
    prompts = ("Why so?", " Why\nso?", "why so", "Why not so?", "?", "!")
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]
    assert AuditData(rows, "pairs").prompt_groups.tolist() == [0, 0, 0, 1, 2, 3]


EDITS = {
    "case": str.upper,
    "whitespace": lambda text: f" {text} ".replace(" ", " \n"),
    "accents": lambda text: unicodedata.normalize("NFD", text),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_copies_in_another_case_or_layout(edit):
    rows = clean("random words", 0, 20)
    rows[0] = {"prompt": "Où est le café ?", "chosen": "À côté.", "rejected": "Là-bas."}
    copy = {name: edit(text) for name, text in rows[0].items()}
    swapped = {"prompt": edit(rows[1]["prompt"]), "chosen": edit(rows[1]["rejected"]), "rejected": rows[1]["chosen"]}
    findings, _, _ = examine([*rows, copy, swapped, rows[0]], [copy | {"prompt": copy["prompt"].strip(" ?\n")}])
    assert findings["duplicates"].rows == [20, 22]
    assert findings["duplicates"].evidence == {
        20: "Repeats row 0, but for case, whitespace or marks around the prompt.",
        22: "Repeats row 0.",
    }
    assert findings["contradictions"].rows == [1, 21]
    assert findings["contradictions"].dropped == [21]
    differs = "" if edit is EDITS["accents"] else ", but for case, whitespace or marks around the prompt"
    assert findings["contradictions"].evidence[1] == f"The sides are swapped in row 21{differs}."
    assert findings["leaked"].rows == [0, 20, 22]
    assert not findings["identical"].rows


def test_case_counts_where_it_is_all_that_differs():
    """It is what such a pair prefers."""
    rows = [{"prompt": "Capital of France?", "chosen": a, "rejected": b} for a, b in (("Paris", "paris"), ("A", "a"))]
    findings, _, _ = examine([*rows, {"prompt": "Capital of France?", "chosen": "paris", "rejected": "Paris"}])
    assert not findings["identical"].rows
    assert not findings["duplicates"].rows
    assert findings["contradictions"].rows == [0, 2]


def test_rows_are_called_by_their_lines(tmp_path):
    """Blank lines count, as in an editor."""
    rows = [json.dumps({"prompt": "p", "chosen": side, "rejected": "b"}) for side in "aca"]
    one, two = (tmp_path / name for name in ("one.jsonl", "two.jsonl"))
    one.write_text("\n".join([rows[0], "", *rows[1:]]))
    findings, _, _ = examine(one)
    assert findings["duplicates"].evidence == {2: "Repeats line 1."}
    two.write_text(rows[0])
    findings, _, _ = examine([one, two])
    assert findings["duplicates"].evidence == {2: f"Repeats {one}, line 1.", 3: f"Repeats {one}, line 1."}


def test_columns_of_the_source_hide_none_of_the_audit():
    rows = [row | {"turns of the user": "ab"[n % 2]} for n, row in enumerate(clean("random words", 0, 40))]
    rows[0]["prompt"] = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    _, part, _ = examine(rows)
    tables = {block.title: block for block in part.blocks if getattr(block, "title", "").startswith("Pairs by")}
    assert list(tables) == ["Pairs by turns of the user", "Pairs by turns of the user_source"]
    assert [row[:2] for row in tables["Pairs by turns of the user"].rows] == [["1", 39], ["2", 1]]
    assert [row[:2] for row in tables["Pairs by turns of the user_source"].rows] == [["a", 20], ["b", 20]]


def test_long_values_of_a_column_need_little_memory():
    rows = [row | {"kind": "ab"[n % 2] * 20_000} for n, row in enumerate(clean("short answers", 0, 2_000))]
    data, shape = AuditData(rows, "pairs"), np.ones(2_000)
    tracemalloc.start()
    try:
        found = tables_of_kinds(data, np.ones((2_000, 3)), shape, shape, data.prompt_groups)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert [table.title for table in found] == ["Pairs by kind"]


def test_the_surplus_of_a_habit_is_that_of_all_pairs(monkeypatch):
    from lit_did.audit.data import sample

    monkeypatch.setattr(sample, "SAMPLE", 200)
    rows, rng = clean("random words", 4, 400), np.random.default_rng(1)
    for row in rows:
        side = "chosen" if rng.random() < 0.9 else "rejected"
        row[side] = "Certainly " + row[side]
    finding = examine(rows)[0]["habits"]
    starts = [row["chosen"].startswith("Certainly") for n, row in enumerate(rows) if n not in set(finding.rows)]
    assert sum(starts) * 2 == len(starts)
    assert finding.value.count == 400


def test_words_are_judged_by_models_that_did_not_see_the_prompt():
    # Labels at random: a model that had seen a prompt would remember them.
    rows = clean("several pairs a prompt", 2, 400)
    _, part, _ = examine(rows)
    assert part.figures["baselines"]["words"].value < 0.6
    _, part, _ = examine(clean("hidden reward", 2, 300))
    right = np.array(part.columns["words_probability"]) > 0.5
    assert part.figures["baselines"]["words"].value == pytest.approx(right.mean())
    assert part.figures["baselines"]["words"].value > 0.62


def test_a_habit_is_found_beyond_length():
    rows, rng = clean("random words", 4, 300), np.random.default_rng(1)
    for row in rows:
        side = "chosen" if rng.random() < 0.8 else "rejected"
        row[side] = "Certainly " + row[side]
    findings, part, _ = examine(rows)
    assert findings["habits"].raised
    assert '"stock opening"' in findings["habits"].sentence
    assert [name for name, habit in part.figures["habits"].items() if habit["is_fault"]] == ["stock opening"]
    kept = [row for number, row in enumerate(rows) if number not in set(findings["habits"].rows)]
    starts = [row["chosen"].startswith("Certainly") for row in kept]
    assert sum(starts) * 2 == len(kept)


@pytest.mark.parametrize(
    "edit", [str.upper, lambda text: text.rstrip("?"), lambda text: f" {text.replace(' ', '  ')}."]
)
def test_short_prompts_leak_in_other_case_and_punctuation(edit):
    rows = [
        row | {"prompt": f"How old is the {name}?"}
        for name, row in zip("abc", clean("random words", 0, 3), strict=True)
    ]
    findings, _, _ = examine(rows, [rows[1] | {"prompt": edit(rows[1]["prompt"])}])
    assert findings["leaked"].rows == [1]
