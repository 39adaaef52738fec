"""`lit-did entropy`: its files, going on after a kill, and one line for what a user can mend."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lit_did.cli.entropy import summary
from lit_did.cli.main import main
from lit_did.models.loading import add_lora
from lit_did.sampling import sample_did
from tests.modules.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

ROWS = [
    {"prompt": "What is 2 + 2?", "tag": "factual"},
    {"prompt": "Tell me a story about the sea.", "tag": "open-ended"},
    {"prompt": "Who are you?", "tag": "factual"},
    {"prompt": [{"role": "user", "content": "Write a poem."}], "tag": "open-ended"},
    {"prompt": "Hi", "tag": "open-ended"},
]
SMALL = ["--max_new_tokens=3", "--num_samples=12", "--num_islands=3", "--quiet", "--device=cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model) -> tuple[Path, Path, Path]:
    """Two models, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    for name, options in (("other", {}), ("larger", {"vocab_size": 300})):
        tokenizer.save_pretrained(folder / name)
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **options}
        tiny_llama(1, **sizes).save_pretrained(folder / name)
    return tiny_model, folder / "other", folder / "larger"


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arguments(models, prompts: Path, output: Path, *more: str) -> list[str]:
    given = ["--policy", models[0], "--reference", models[1], "--prompts", prompts, "--output", output]
    return ["entropy", *map(str, given), *SMALL, *more]


def test_the_files(models, prompts, tmp_path, capsys):
    output = tmp_path / "new" / "found.json"
    assert main(arguments(models, prompts, output, "--batch_size=2")) == 0
    assert capsys.readouterr().out == f"Written: {output} and {output.with_suffix('.png')}\n"
    assert sorted(path.name for path in output.parent.iterdir()) == ["found.json", "found.png"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.read_text())
    assert [result["where"] for result in report["prompts"]] == [f"{prompts}, line {n}" for n in range(1, 6)]
    assert report["prompts"][3]["prompt"] == "Write a poem."
    assert report["arguments"]["num_samples"] == 12
    assert report["digests"]["policy"] != report["digests"]["reference"]
    assert report["versions"]["torch"] == torch.__version__
    # A prompt's numbers are those of `sample_did`.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models[:2])
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    last = report["prompts"][4]
    alone = sample_did(
        policy,
        reference,
        ids,
        max_new_tokens=3,
        num_samples=12,
        num_islands=3,
        seed=last["seed"],
        progress=False,
    )
    assert last["num_tokens"] == len(ids)
    for name in ("entropy", "lower", "upper", "standard_error", "effective_sample_size"):
        assert last[name] == pytest.approx(getattr(alone.estimate, name), abs=1e-3)
    assert last["concentration"] == pytest.approx(alone.concentration, abs=1e-3)
    assert last["reason"].startswith("Effective sample size")
    texts = [tokenizer.decode(c[c >= 0]) for c in alone.completions]
    assert len(last["completions"]) == 3
    assert set(last["completions"]) <= set(texts)
    # Means over prompts, and over those of each tag.
    entropies = np.array([result["entropy"] for result in report["prompts"]])
    mean = report["overall"]["entropy"]
    assert mean["mean"] == pytest.approx(entropies.mean())
    assert mean["upper"] == pytest.approx(stats.t.interval(0.95, 4, entropies.mean(), stats.sem(entropies))[1])
    assert report["overall"]["num_reliable"] == 0  # of 12 samples
    assert not report["overall"]["reliable"]
    assert {tag: found["num_prompts"] for tag, found in report["by_tag"].items()} == {"factual": 2, "open-ended": 3}
    assert report["by_tag"]["factual"]["entropy"]["mean"] == pytest.approx(entropies[[0, 2]].mean())
    per_token = report["overall"]["entropy_per_token"]
    assert per_token["upper_of_these"] == pytest.approx(mean["upper_of_these"] / 3)


def test_the_summary(models, prompts, tmp_path, capsys):
    shown = [argument for argument in arguments(models, prompts, tmp_path / "a.json") if argument != "--quiet"]
    assert main([*shown, "--no_picture"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress bar
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["all prompts", "factual", "open-ended"]
    assert "Unreliable estimates" in out
    assert "--num_samples 48" in out
    assert "open-ended: it lies on many completions" in out
    assert max(map(len, lines[:4])) <= 100
    assert not (tmp_path / "a.png").exists()


def test_an_adapter_is_compared_with_its_base(models, prompts, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    adapter = add_lora(AutoModelForCausalLM.from_pretrained(models[0]), {"r": 4, "target_modules": "all-linear"})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    adapter.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    found = []
    for reference in ("null", models[0]):
        output = tmp_path / f"{len(found)}.json"
        assert main(arguments([tmp_path / "adapter", reference], prompts, output, "--max_prompts=2")) == 0
        found.append(json.loads(output.read_text()))
    assert not found[0]["prompts"][0]["same_models"]
    for ours, theirs in zip(*(report["prompts"] for report in found), strict=True):
        assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-3)


def test_progress(models, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command = [x for x in arguments(models, prompts, tmp_path / "a.json", "--no_picture") if x != "--quiet"]
    assert main([*command, "--max_prompts=2"]) == 0
    assert "2.0/2 prompts" in capsys.readouterr().err
    assert main([*command, "--max_prompts=2", "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_policy_that_is_its_reference(models, prompts, tmp_path, capsys):
    same = [models[0], models[0]]
    shown = [argument for argument in arguments(same, prompts, tmp_path / "a.json") if argument != "--quiet"]
    assert main([*shown, "--no_picture", "--max_prompts=1"]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    (result,) = report["prompts"]
    assert result["entropy"] == pytest.approx(report["log_num_completions"], abs=1e-5)  # float32
    assert report["overall"]["entropy"]["lower"] is None  # one prompt
    out = capsys.readouterr().out
    assert "Policy and reference give the same probabilities: nothing was learned" in out
    assert "(one prompt)" in out


@pytest.mark.filterwarnings("error:Glyph")
def test_tags_of_any_text(models, tmp_path, capsys):
    tags = ["all prompts", "", "no tag", "two\nlines"]
    rows = [{"prompt": "\u4f60\u597d \ud55c", "tag": tag} for tag in [*tags, "all prompts"]]
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [x for x in arguments(models, tmp_path / "tags.jsonl", tmp_path / "a.json") if x != "--quiet"]
    assert main(command) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert {tag: found["num_prompts"] for tag, found in report["by_tag"].items()} == dict.fromkeys(tags, 1) | {
        "all prompts": 2
    }
    lines = capsys.readouterr().out.splitlines()[1:6]
    assert [line[:32].split() for line in lines] == [
        ["all", "prompts", "5"],
        ["all", "prompts", "2"],
        ["no", "tag", "1"],
        ["no", "tag", "1"],
        ["two", "lines", "1"],
    ]


def test_no_tags_no_rows_by_tag(models, tmp_path):
    (tmp_path / "a.txt").write_text("Hello\n\nTwo\n")
    assert main(arguments(models, tmp_path / "a.txt", tmp_path / "a.json", "--num_completions=0")) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["by_tag"] == {}
    assert [result["completions"] for result in report["prompts"]] == [[], []]


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_the_same_numbers(models, prompts, tmp_path):
    """SIGKILL after the second batch is on disk; what is done is not done again, and the files have the same bytes."""
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    assert main(arguments(models, prompts, whole, "--batch_size=2")) == 0
    command = arguments(models, prompts, killed, "--batch_size=2")
    program = (
        "import sys, time, lit_did.cli.entropy as entropy\n"
        "from lit_did.cli.main import main\n"
        "add = entropy.Finished.add\n"
        "def slow(self, result):\n"
        "    add(self, result)\n"
        "    if len(self.results) == 2: time.sleep(600)\n"
        "entropy.Finished.add = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    record = tmp_path / "killed.json.part"
    process = subprocess.Popen([sys.executable, "-c", program, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while process.poll() is None and not (record.exists() and record.read_bytes().count(b"\n") == 3):
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    assert not killed.exists()
    record.write_bytes(record.read_bytes() + b'[{"number": 0, "entr')  # a line that the kill cut off
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        import lit_did.sampling.prompts as prompts_module

        draw = prompts_module.draw
        patch.setattr(prompts_module, "draw", lambda *a: drawn.append(len(a[2])) or draw(*a))
        assert main(command) == 0
    assert drawn == [1]
    assert not record.exists()
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.with_suffix(".png").read_bytes() == whole.with_suffix(".png").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num_samples=15"], "Expected --num_samples to be 12, as in the run that left"),
        (["--seed=1"], "Expected --seed to be 0, as in the run that left"),
        (["--batch_size=1"], "Expected --batch_size to be 2, as in the run that left"),
        (["--prompts", "{other}"], "Expected --prompts to be"),
        (["--reference", "{policy}"], "Expected --reference to be"),
    ],
)
def test_a_record_of_something_else(models, prompts, tmp_path, monkeypatch, capsys, change, words):
    import lit_did.cli.entropy as module

    add = module.Finished.add

    def stops(self, result):
        add(self, result)
        raise KeyboardInterrupt

    command = arguments(models, prompts, tmp_path / "a.json", "--batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr(module.Finished, "add", stops)
        assert main(command) == 130
    assert "Run the same command again to go on" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("Hello\n")
    named = {"other": tmp_path / "other.txt", "policy": models[0]}
    assert main([*command, *(part.format(**named) for part in change)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_prompts_that_changed_in_their_file(models, prompts, tmp_path, capsys, monkeypatch):
    import lit_did.cli.entropy as module

    command = arguments(models, prompts, tmp_path / "a.json")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_plain", lambda report: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)
    prompts.write_text(prompts.read_text().replace("2 + 2", "2 + 3"))
    assert main(command) == 2
    assert "Expected the digest of the prompts to be" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--prompts=missing.jsonl"], "missing.jsonl"),
        (["--prompts={empty}"], "Expected prompts, but got none"),
        (["--num_samples=13"], "`num_samples` to be a multiple of `num_islands`, 3, but got 13"),
        (["--num_islands=2"], "`num_islands` to be an integer of at least 3, but got 2"),
        (["--reference={larger}"], "`reference` to have the policy's vocabulary"),
        (["--reference=null"], "Expected `reference` for a policy without an adapter"),
        (["--policy=./missing"], "`policy` to be a folder with a transformers model, but missing is not a folder"),
        (["--batch_size=0"], "`batch_size` to be an integer of at least 1, but got 0"),
        (["--seed=-1"], "`seed` to be an integer of at least 0, but got -1"),
        (["--confidence=2"], "`confidence` to be in (0, 1), but got 2"),
        (["--max_prompts=0"], "`max_prompts` to be an integer of at least 1, but got 0"),
        (["--output=found.txt"], "--output to end in .json, but got 'found.txt'"),
        (["--output={empty}/a.json"], "--output to be a file that can be made"),
        (["--device=nowhere"], "`device` to be a device of this machine"),
        (["--num_particles=3"], "num_particles"),
        (["--num_samples=many"], "num_samples"),
    ],
)
def test_what_a_user_can_mend_is_one_line(models, prompts, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    named = {"empty": tmp_path / "empty.jsonl", "larger": models[2]}
    command = arguments(models, prompts, tmp_path / "a.json", *(part.format(**named) for part in change))
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "a.json").exists()


def test_a_prompt_that_is_too_long_is_named_by_its_place(prompts, tmp_path, capsys):
    prompts.write_text(prompts.read_text().replace("the sea", "the sea " * 9))
    tokenizer = byte_tokenizer()
    for seed, name in enumerate(("policy", "reference")):
        tokenizer.save_pretrained(tmp_path / name)
        tiny_gpt2(seed, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None).save_pretrained(
            tmp_path / name
        )
    assert main(arguments([tmp_path / "policy", tmp_path / "reference"], prompts, tmp_path / "a.json")) == 2
    assert f"error: {prompts}, line 2: Expected `prompt` and `max_new_tokens` to be" in capsys.readouterr().err


def test_files_are_not_replaced_unless_asked(models, prompts, tmp_path, capsys):
    for name in ("a.json", "b.png"):
        (tmp_path / name).write_text("mine")
        command = arguments(models, prompts, tmp_path / f"{name[0]}.json")
        assert main(command) == 2
        assert "exists. Choose another name, or pass --overwrite" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
    assert main([*command, "--overwrite", "--max_prompts=1"]) == 0


def test_a_picture_without_matplotlib(models, prompts, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *x: None if name == "matplotlib" else find_spec(name))
    assert main(arguments(models, prompts, tmp_path / "a.json")) == 2
    assert "pip install 'lit-did[plot]'`, or pass --no_picture" in capsys.readouterr().err


def test_means_without_enough_reliable_prompts_are_named():
    mean = {"mean": 5.0, "lower": 4.0, "upper": 6.0, "lower_of_these": 4.5, "upper_of_these": 5.5}
    overall = {"num_prompts": 8, "num_reliable": 2, "reliable": False} | dict.fromkeys(
        ("entropy", "entropy_per_token", "concentration"), mean
    )
    report = {
        "arguments": {"confidence": 0.9, "max_new_tokens": 4, "num_samples": 64},
        "overall": overall,
        "by_tag": {},
        "log_num_completions": math.log(1000),
        "prompts": [{"where": f"line {i}", "reliable": i < 2, "same_models": False} for i in range(8)],
    }
    text = summary(report)
    assert "Unreliable estimates: line 2; line 3; line 4; line 5; line 6 and 1 more." in text
    assert "Do not believe the mean over all prompts. Use more particles, such as --num_samples 256." in text
    assert "5.00 ± 1" in text
    assert "± half of the 90% interval for prompts such as these. For these prompts alone it is ± 0.5." in text
    assert "is 6.9 nats" in text
