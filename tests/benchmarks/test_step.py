"""The step's benchmark with a tiny model: the same tokens and losses for all, parts that add up, its judgement."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import parts, step, trainers
from benchmarks.trainers import Run, Task
from lit_did.demo import PAIRS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Reads system from `system`", "ignore:.* pairs are longer than max_length"
)


@pytest.fixture
def task(tiny_model, tmp_path) -> Task:
    return Task(
        model=str(tiny_model),
        pairs=str(PAIRS),
        steps=3,
        batch_size=2,
        max_length=64,
        learning_rate=1e-3,  # so that the losses of three steps differ
        dtype="float32",
        lora=False,
        folder=str(tmp_path),
    )


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: the start of another takes seconds."""
    monkeypatch.setattr(step, "in_own_process", lambda threads, function, *arguments: function(*arguments))


@pytest.mark.parametrize("lora", [False, True])
def test_trl_and_lit_did_see_the_same_tokens_and_losses(task, lora, here):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    names = [step.TRL, step.OURS, "lit_did, padded"] + [step.CACHED, "trl, precomputed reference"] * (not lora)
    runs = step.measure(names, dataclasses.replace(task, lora=lora), rounds=1, threads=1)
    first = runs[step.TRL][0]
    assert len(set(first.tokens)) == 3
    assert len(set(first.losses)) == 3
    for (run,) in runs.values():
        assert run.tokens == first.tokens
        # Two trainers' float32 sums in another order, three steps of Adam.
        assert run.losses == pytest.approx(first.losses, rel=1e-4)
        assert len(run.seconds) == len(run.cpu_seconds) == 3
        assert min(run.seconds) > 0
        assert run.completion_tokens == first.completion_tokens
        assert all(
            c < r <= p for c, r, p in zip(run.completion_tokens, run.real_tokens, run.padded_tokens, strict=True)
        )


def test_other_tokens_are_refused(task, here, monkeypatch):
    shorter = dataclasses.replace(task, max_length=63)
    monkeypatch.setitem(step.CONTESTANTS, "cut", (lambda task: trainers.lit_did(shorter), {}))
    with pytest.raises(RuntimeError, match="cut is wrong: it trained on different tokens than lit_did"):
        step.measure([step.OURS, "cut"], task, rounds=1, threads=1)


def test_packed_and_padded_batches_hold_the_same_sequences():
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [5, 8, 9, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[6, 7, -100, -100], [-100, 9, 4, -100]]),
    }
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 5, 8, 9, 4]]),
        "labels": torch.tensor([[6, 7, -100, -100, 9, 4, -100]]),
        "cu_seqlens": torch.tensor([0, 3, 7]),
    }
    completion = padded["labels"].roll(1, 1) != -100
    theirs = {**padded, "completion_mask": completion.long()}
    del theirs["labels"]
    expected = [([5, 6, 7], 2), ([5, 8, 9, 4], 2)]
    for batch in (padded, packed, theirs):
        assert list(trainers._sequences(batch)) == expected


def test_the_parts_are_the_whole(task):
    profile = parts.profile(task, {})
    assert tuple(profile) == parts.PARTS
    assert min(profile.values()) >= 0
    for part in set(parts.PARTS) - {"data", "rest"}:
        assert profile[part] > 0, part


def test_parts_that_are_not_the_whole_are_refused():
    watch = parts.Parts()
    watch.steps = [dict.fromkeys(parts.PARTS, 1.0)] * 3
    whole = float(len(parts.PARTS))
    assert watch.mean(_run([0.0, whole, whole])) == dict.fromkeys(parts.PARTS, 1.0)
    with pytest.raises(RuntimeError, match="to be 10 s together, but got 9"):
        watch.mean(_run([0.0, 10.0, 10.0]))


def test_from_the_command_line_to_json_and_picture(tiny_model, tmp_path, capsys, here):
    arguments = ["--model", str(tiny_model), "--pairs", str(PAIRS), "--steps", "2", "--batch-size", "2"]
    arguments += ["--max-length", "64", "--threads", "1", "--contestants", "lit_did", "--output", str(tmp_path)]
    step.main(arguments)
    written = json.loads((tmp_path / "step.json").read_text())
    assert len(written["runs"]["lit_did"][0]["losses"]) == 2
    assert written["task"]["max_length"] == 64
    step.main([*arguments, "--profile"])
    step.main([*arguments, "--profile", "--before", str(tmp_path / "step_parts.json")])
    assert (tmp_path / "step_parts.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for words in ("steps/s over TRL", "Tokens a step, completion", "before: lit_did", "output layer and statistics"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--before", "x.json"], "--before needs --profile"),
        (["--profile", "--contestants", "trl"], "--profile: of lit_did, "),
        ([], "alpacaeval_pairs.jsonl is missing"),
    ],
)
def test_a_bad_option_gets_one_clear_error(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_DID_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        step.main(["--model", "nowhere", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_too_few_pairs_are_refused(task):
    with pytest.raises(ValueError, match="to hold 900 steps of 2 pairs"):
        dataclasses.replace(task, steps=900).data()


def test_the_targets_are_those_that_were_set(task):
    met = {
        step.TRL: [_run([9.0, 6.6, 6.6], peak=1000.0)],
        step.OURS: [_run([9.0, 3.0, 3.0], peak=500.0, loss=0.5004)],
        step.CACHED: [_run([9.0, 2.2, 2.2], peak=400.0)],
    }
    verdicts = step.judge(met, task)
    assert len(verdicts) == 5
    assert all(verdict.met for verdict in verdicts)
    missed = {
        step.TRL: met[step.TRL],
        step.OURS: [_run([1.0, 3.1, 3.1], peak=610.0, loss=0.501)],
        step.CACHED: [_run([1.0, 2.3, 2.3], peak=400.0, loss=0.499)],
    }
    assert not any(verdict.met for verdict in step.judge(missed, task))


def _run(seconds: list[float], peak: float = 0.0, loss: float = 0.5) -> Run:
    steps = len(seconds)
    return Run(
        seconds=seconds,
        cpu_seconds=seconds,
        losses=[loss] * steps,
        tokens=["a"] * steps,
        completion_tokens=[1] * steps,
        real_tokens=[2] * steps,
        padded_tokens=[3] * steps,
        setup_seconds=0.0,
        peak_mib=peak,
    )
