"""The code blocks of README and docs/ run as they stand, with tiny models in the place of real ones.

A page's Python blocks share their names, and its commands a folder. `STAND_INS` makes the files and models that a block
reads, and `names` what a block takes from the code around it. `<!-- not run: REASON -->` above a block leaves it out.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

from lit_did.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
PATHS = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
LANGUAGES = {"bash", "console", "json", "python", "text", "yaml"}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
MODELS = ("M", "P", "MODEL", "my-sft-model", "my-policy")


class Block(NamedTuple):
    """A code block of a page."""

    line: int
    language: str
    text: str
    reason: str | None
    """why it is not run"""


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text.count("\n", 0, m.start("language")) + 1, m["language"], inspect.cleandoc(m["text"]), m["reason"])
        for m in BLOCK.finditer(text)
    ]


# ----------------------------------------------------------------------------------------------------------
# What blocks read
# ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}, a number.", "rejected": f"{n} is a word.", "tag": "factual"}
    for n in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]


def write_pairs(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_prompts(path: Path) -> None:
    path.write_text("What is one?\nWhat is two?\n")


def write_adapter(path: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)


def train(path: Path, base: Path) -> None:
    write_pairs(pairs := path.with_suffix(".jsonl"))
    lora = json.dumps({"r": 2, "target_modules": "all-linear"})
    arguments = [
        "--model.policy",
        str(base),
        "--model.lora",
        lora,
        "--data.train",
        str(pairs),
        "--data.val_fraction",
        "0.2",
        "--quiet",
    ]
    assert main.main(["fit", *arguments, "--trainer.max_steps", "2", "--output", str(path)]) == 0


@pytest.fixture
def stand_ins(tiny_model) -> dict[str, Callable[[Path], object]]:
    """{a name that a block reads: what makes it}"""
    pairs = ("pairs", "val", "other", "held_out", "prompts", "a", "b")
    return {
        **{name: lambda path: path.symlink_to(tiny_model) for name in MODELS},
        **{f"{name}.jsonl": write_pairs for name in pairs},
        "prompts.txt": write_prompts,
        "my-adapter": lambda path: write_adapter(path, tiny_model),
        "runs/mine": lambda path: train(path, tiny_model),
    }


def prepare(text: str, stand_ins: dict[str, Callable[[Path], object]]) -> None:
    """Makes what a text reads, unless it is there or the text writes it."""
    for name, make in stand_ins.items():
        path = Path(name)
        written = re.search(rf"export(?:_policy\(.*,)? .*{re.escape(name)}\b", text)
        if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text) and not written and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


def trl_trainer(model: Path, tokenizer: Any) -> Any:
    """A DPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig("trl", use_cpu=True, report_to="none", bf16=False, max_steps=2)
    pairs = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS])
    policy = AutoModelForCausalLM.from_pretrained(model)
    return DPOTrainer(model=policy, args=args, train_dataset=pairs, processing_class=tokenizer)


def names(model: Path, text: str) -> dict[str, Any]:
    """What the blocks of a page, which has this text, take from the code around them."""
    import lightning
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_did import LitDPO, PreferenceDataModule
    from lit_did.callbacks import ScoreWriter
    from tests.modules.tiny import collate, make_pairs

    tokenizer = AutoTokenizer.from_pretrained(model)
    logits = torch.randn(2, 4, 6, 50)
    found = {"dpo_trainer": trl_trainer(model, tokenizer)} if "dpo_trainer" in text else {}
    return found | {
        "LitDPO": LitDPO,
        "PreferenceDataModule": PreferenceDataModule,
        "ScoreWriter": ScoreWriter,
        "Trainer": lightning.Trainer,
        "batch": collate(make_pairs(2)),
        "beta": 0.1,
        "data": PreferenceDataModule(ROWS, tokenizer=tokenizer, batch_size=2, val_fraction=0.2),
        "labels": torch.randint(50, (4, 6)),
        "lightning": lightning,
        "module": LitDPO(str(model)),
        "policy": AutoModelForCausalLM.from_pretrained(model),
        "policy_logits": logits[0],
        "reference_logits": logits[1],
        "self": SimpleNamespace(),
        "tokenizer": tokenizer,
    }


# ----------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model) -> Iterator[Path]:
    """An empty folder, in which the name smollm2 is the tiny model."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "SmolLM2-135M-Instruct").symlink_to(tiny_model)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("LIT_DID_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(main, "quieten", lambda: None)  # it changes loggers for good
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path / "work"


def commands(text: str) -> list[str]:
    """The commands of a shell block: a line each, without comments. In a block with prompts, other lines are output."""
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def run_command(command: str, monkeypatch) -> None:
    said, pipe, ours = command.rpartition(" | ")
    program, *arguments = shlex.split(ours.partition(" > ")[0])
    if program == "lit-did":
        if pipe:
            typed = subprocess.run(["bash", "-c", said], capture_output=True, text=True, check=True).stdout
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        remove_what_earlier_lines_wrote(arguments)
        try:
            status = main.main(arguments)
        except SystemExit as end:  # --print_config
            status = end.code
        assert status == 0 or (status == 1 and any(a.startswith("--fail-on") for a in arguments)), command
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {e for found in re.findall(r"lit-did\[(.*?)\]", command) for e in found.split(",")} <= extras.keys()
    elif program == "python":
        assert arguments[0] == "-c"
        exec(arguments[1], {})
    else:  # `test_docs.py` looks for its targets
        assert program == "make", f"Expected a command of lit-did, pip, make or python, but got {command}."


def remove_what_earlier_lines_wrote(arguments: list[str]) -> None:
    """The lines of a block are often alternatives, and no command replaces what another one wrote."""
    patterns = {"export": arguments[2:3], "entropy": ["entropy.*"], "score": ["*scores*"]}
    for pattern in patterns.get(arguments[0], ["*.audit", "*.compare"]):
        for path in Path().glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


NEWCOMERS = {"README.md", "getting_started.md"}
"""the pages whose commands `make test` runs; `make test-long` runs all"""


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[] if p.name in NEWCOMERS else pytest.mark.long, id=p.name) for p in PAGES]
)
def test_commands(page, folder, stand_ins, monkeypatch, capsys):
    for block in blocks_of(page):
        if block.reason is None and block.language in ("bash", "console"):
            lines = commands(block.text)
            if not any(re.match("lit-did|pip|make|python", line) for line in lines):
                subprocess.run(["bash", "-ec", block.text], check=True, env={**os.environ, **PATHS})
                continue
            for command in lines:
                prepare(command, stand_ins)
                run_command(command, monkeypatch)
        elif block.language == "yaml":
            prepare(block.text, stand_ins)
            assert yaml.safe_load(block.text)
            if name := re.match(r"# (\S+\.yaml)\n", block.text):
                Path(name[1]).write_text(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page, folder, stand_ins, tiny_model, capsys):
    blocks = [block for block in blocks_of(page) if block.reason is None and block.language == "python"]
    namespace = names(tiny_model, page.read_text()) if blocks else {}
    for block in blocks:
        prepare(block.text, stand_ins)
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * block.line + block.text, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks(page):
    text = page.read_text()
    blocks = blocks_of(page)
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE))
    assert {block.language for block in blocks} <= LANGUAGES
    assert text.count("<!-- not run") == sum(block.reason is not None for block in blocks)
    for block in blocks:
        if block.language == "json":
            [json.loads(line) for line in block.text.splitlines()]
