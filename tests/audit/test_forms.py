"""All forms of the command, end to end, with tiny random models: what they write, and that the parts fit together."""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from lit_did.audit.report import FLAGS
from lit_did.cli.main import main
from lit_did.data.reading import read_rows
from tests.modules.tiny import byte_tokenizer, tiny_llama

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "warm", "cold", "quick", "slow"]


def pairs(count: int) -> list[dict]:
    """Clean pairs, whose chosen side no habit gives away."""
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())

    lengths = torch.randint(2, 6, (count, 2), generator=generator).tolist()
    return [
        {
            "prompt": f"Number {i}: {text(3)}?",
            "chosen": f" {text(a)} {i}.",
            "rejected": f" {text(b)} {i}!" if i % 2 else f" {text(b)} {i}.",
            "source": "ab"[i % 2],
            "tag": "xyz"[i % 3],
        }
        for i, (a, b) in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with pairs, a reference, a policy and an adapter on the reference."""
    folder = tmp_path_factory.mktemp("forms")
    rows = pairs(24)
    rows += [rows[0], {**rows[1], "chosen": ""}, {**rows[2], "chosen": "<script>alert(1)</script>", "rejected": "no"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    for seed, name in enumerate(("reference", "policy")):
        tokenizer.save_pretrained(folder / name)
        tiny_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / name)
    return folder


REFERENCE = ("--reference", "reference")
FORMS = {
    "data": ("audit",),
    "tokens": ("audit", "--tokenizer", "reference"),
    "reference": ("audit", *REFERENCE),
    "policy": ("audit", *REFERENCE, "--policy", "policy"),
    "compare": ("compare", "reference", "policy"),
    "sides": ("audit", *REFERENCE, "--sides"),
    "adapter": ("audit", "--policy", "adapter", "--sides"),
}
PARTS = {
    "data": ["data"],
    "tokens": ["data", "tokens"],
    "reference": ["data", "tokens", "reference"],
    "policy": ["data", "tokens", "reference", "policy"],
    "compare": ["data", "tokens", "reference", "policy"],
    "sides": ["data", "tokens", "reference", "sides"],
    "adapter": ["data", "tokens", "reference", "policy", "sides"],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs(folder, form, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if form in ("sides", "adapter"):
        peft = pytest.importorskip("peft")
    if form == "adapter":
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = tiny_llama(0, vocab_size=len(byte_tokenizer()), max_position_embeddings=512)
        model.name_or_path = str(folder / "reference")
        peft.get_peft_model(model, config).save_pretrained("adapter")
    command, *options = FORMS[form]
    data = ["--data", "pairs.jsonl"] if command == "compare" else ["pairs.jsonl"]
    if form != "data":
        options += ["--max-length", "96"]
    if form not in ("data", "tokens"):
        options += ["--device", "cpu"]
    if PARTS[form][-1] in ("policy", "sides"):
        options += ["--by", "source"] if "policy" in PARTS[form] else []
        options += ["--num-prompts", "2", "--max-new-tokens", "4"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pairs.jsonl:")  # what the reader says of the pairs
        assert main([command, *options, *data, "--output", f"{form}.audit"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("26 pairs of 27 rows, 1 refused\n- ")
    figures = json.loads((folder / f"{form}.audit" / "audit.json").read_text())
    assert list(figures["parts"]) == PARTS[form]
    assert {finding["name"] for finding in figures["findings"] if finding["raised"]} <= set(FLAGS)
    assert {"unusable", "duplicates"} <= set(figures["flags"])
    assert len(figures["verdict"]) <= 5
    page = (folder / f"{form}.audit" / "audit.html").read_text()
    assert "<script>alert(1)" not in page
    with open(folder / f"{form}.audit" / "pairs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["index"] for row in table] == [str(i) for i in range(27)]
    assert [bool(row["refused"]) for row in table] == [i == 25 for i in range(27)]
    assert "duplicates" in table[24]["flags"]
    undocumented = {*table[0], *(name for part in figures["parts"].values() for name in part), *figures} - _documented()
    assert undocumented == {"source"}
    kept = [row.pair for row in read_rows(folder / f"{form}.audit" / "flags" / "duplicates" / "kept.jsonl")[0]]
    before = [row.pair for row in read_rows(folder / "pairs.jsonl", warn=lambda text: None)[0]]
    assert kept == [pair for i, pair in enumerate(before) if i != 24]


def _documented() -> set[str]:
    """What the pages about the audit and about scored pairs have as code. Both sides have the same columns."""
    pages = [Path(__file__).parents[2] / "docs" / name for name in ("audit.md", "scoring.md")]
    if not all(page.exists() for page in pages):
        pytest.skip("not a clone: there are no pages")
    names = {name for page in pages for name in re.findall(r"`(\w+)`", page.read_text())}
    return names | {name.replace("chosen_", "rejected_", 1) for name in names}
