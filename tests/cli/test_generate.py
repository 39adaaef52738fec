"""`lit-did generate`: the completions of both models, whatever the batch, and one line for what a user can mend."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did.cli import generate
from lit_did.cli.main import main
from tests.modules.tiny import byte_tokenizer, tiny_gpt2

PROMPTS = ["What is 2+2?", "Hi", "How are you today, my friend?", "Go"]
PAIR = {"chosen": " a", "rejected": " b"}


@pytest.fixture
def run(tmp_path, models, monkeypatch, capsys):
    """Runs the command on prompts and returns the rows of its file, and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(*options, prompts="prompts.txt", reference=models[1], policy=models[0]):
        both = ["--policy", str(policy), *(["--reference", str(reference)] if reference else [])]
        arguments = ["generate", str(prompts), *both, "--max_new_tokens", "6", "--device", "cpu", *options]
        assert main([*arguments, "--output", "out.jsonl", "--overwrite"]) == 0
        return list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())), capsys.readouterr().out

    return run


def plain(folder, prompts) -> list[str]:
    """Greedy completions of transformers, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
                if ids[0, -1] == model.generation_config.eos_token_id:
                    break
        start = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        texts.append(tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_greedy_completions_as_one_prompt_at_a_time(run, models, batch_size):
    rows, printed = run("--batch_size", batch_size)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["policy"] for row in rows] == plain(models[0], PROMPTS)
    assert [row["reference"] for row in rows] == plain(models[1], PROMPTS)
    assert all(row["policy_num_tokens"] <= 6 for row in rows)
    blocks = printed.split("\n\n")
    assert blocks[0].startswith(
        f"prompt: {PROMPTS[0]}\npolicy: {rows[0]['policy']} ...\nreference: {rows[0]['reference']}"
    )
    assert "Written: out.jsonl" in printed


def test_an_adapter_is_shown_beside_its_base(run, models, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), config).save_pretrained(tmp_path / "adapter")
    rows, _ = run(policy=tmp_path / "adapter", reference=None)
    assert [row["reference"] for row in rows] == plain(models[0], PROMPTS)
    assert [row["policy"] for row in rows] != [row["reference"] for row in rows]


def test_a_policy_alone(run):
    rows, printed = run("--quiet", reference=None)
    assert not any(name.startswith("reference") for row in rows for name in row)
    assert printed == "Written: out.jsonl\n"


@pytest.mark.parametrize("kind", ["rows", "pairs", "stdin"])
def test_prompts(run, tmp_path, monkeypatch, kind):
    hi = [{"role": "user", "content": "Hi"}]
    rows = {"rows": [{"prompt": hi, "tag": "x"}, {"prompt": "Go"}], "pairs": [{"prompt": "Hi", **PAIR}] * 2}
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows.get(kind, []))))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nGo\n"))
    expected, _ = run()
    given, _ = run(prompts="-" if kind == "stdin" else path)
    of = {row["prompt"]: row["policy"] for row in expected}
    assert [row["policy"] for row in given] == ([of["Hi"]] if kind == "pairs" else [of["Hi"], of["Go"]])
    assert kind != "rows" or [row["tag"] for row in given] == ["x", ""]


def test_samples_are_drawn_by_the_seed_whatever_the_batch(run):
    options = ("--temperature", "1.0", "--num_samples", "2")
    rows, _ = run(*options, "--batch_size", "3")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(4) for s in range(2)]
    assert len({row["policy"] for row in rows}) == 8
    assert run(*options, "--batch_size", "8")[0] == rows
    assert run(*options, "--max_prompts", "2")[0] == rows[:4]
    assert run(*options, "--seed", "1")[0] != rows


def test_plain_text(run, models):
    rows, _ = run("--as_chat", "false", "--max_prompts", "1")
    model, tokenizer = (kind.from_pretrained(models[0]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    assert rows[0]["policy"] == tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)


def test_a_table_on_a_terminal(run, monkeypatch, tmp_path):
    pytest.importorskip("rich")
    (tmp_path / "markup.txt").write_text("Say [bold]this[/bold].")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    run("--max_new_tokens", "1", prompts="markup.txt")
    assert "Say [bold]this" in screen.getvalue()
    assert "prompt:" not in screen.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "./nowhere"], "Expected `policy` to be a folder with a transformers model, but nowhere is not"),
        (["--reference", "MODEL2"], "Expected `reference` to have the policy's vocabulary, 258 entries, but got 70."),
        (["--output", "out.csv"], "Expected --output to end in .jsonl, but got 'out.csv'."),
        (["--output", "prompts.txt/out.jsonl"], "Expected --output to be a file that can be made, but got prompts.txt"),
        (["--num_samples", "2"], "Expected --temperature to be above 0 with --num_samples 2"),
        (["--temperature", "-1"], "Expected `temperature` to be in [0, inf), but got -1.0."),
        (["--max_new_tokens", "0"], "Expected `max_new_tokens` to be an integer of at least 1, but got 0."),
        (["--max_prompts", "0"], "Expected `max_prompts` to be an integer of at least 1, but got 0."),
        (["--device", "cude"], "Expected `device` to be a device of this machine"),
    ],
)
def test_what_a_user_can_mend(tmp_path, models, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Hi")
    options = [str(models[2]) if value == "MODEL2" else value for value in options]
    assert main(["generate", "prompts.txt", "--policy", str(models[0]), "--device", "cpu", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_prompt_that_is_too_long_is_found_before_anything_is_completed(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("policy", "reference")):
        byte_tokenizer().save_pretrained(tmp_path / name)
        options = {"vocab_size": len(byte_tokenizer()), "bos_token_id": None, "eos_token_id": None}
        tiny_gpt2(seed, **options).save_pretrained(tmp_path / name)
    prompts = tmp_path / "prompts.txt"
    completed = []
    monkeypatch.setattr(generate, "complete", lambda prompts, **_: completed.append(1) or [[1] for _ in prompts])
    command = ["generate", str(prompts), "--policy", str(tmp_path / "policy"), "--as_chat", "false", "--device", "cpu"]
    command += ["--reference", str(tmp_path / "reference"), "--batch_size", "1", "--max_new_tokens", "9"]
    positions = tiny_gpt2(0).config.n_positions
    for longest, status in ((positions - 8, 0), (positions - 7, 2)):
        prompts.write_text(f"Hi\n{'a' * longest}\n")
        assert main(command) == status
    err = capsys.readouterr().err
    assert f"error: {prompts}, line 2: Expected `prompt` and `max_new_tokens` to be at most {positions + 1}" in err
    assert len(completed) == 4  # those of the first command


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "Expected a data file, but none.txt does not exist."),
        ("empty.txt", " \n", "empty.txt: Expected prompts, but got none."),
        ("p.jsonl", '{"ask": "Hi"}', "p.jsonl, line 1: Expected the column `prompt` with the prompt"),
        ("p.jsonl", '{"prompt": "Hi"}\n{"prompt": 3}', "p.jsonl, line 2: Expected `prompt` to be a string"),
        ("p.md", "Hi", "p.md: Expected a file name ending in one of"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, models, monkeypatch, capsys, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["generate", name, "--policy", str(models[0])]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
