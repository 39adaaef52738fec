"""`preview` shows every token once, under what becomes of it."""

from __future__ import annotations

import re
import sys

import pytest

from lit_did.data import PreferenceDataModule

TURNS = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "fine")]
CHAT = {
    "chosen": [{"role": role, "content": text} for role, text in TURNS],
    "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
}


def _lines(capsys, data, *arguments) -> list[str]:
    capsys.readouterr()
    data.preview(*arguments)
    return capsys.readouterr().out.rstrip("\n").split("\n")


@pytest.fixture(params=["rich", "plain"])
def printer(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich")
    return request.param


def test_other_turns_and_newlines(chatml, capsys, printer):
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    texts = [prompt, "yes<|im_end|>fine<|im_end|>", "no<|im_end|>"]
    counts = [len(ids) for ids in chatml(texts)["input_ids"]]
    assert _lines(capsys, PreferenceDataModule([CHAT], chatml)) == [
        f"train, row 0: prompt {counts[0]} tokens",
        r"      prompt | <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        f"chosen: {counts[1]} tokens scored",
        "      scored | yes<|im_end|>",
        r"  not scored | \n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
        "      scored | fine<|im_end|>",
        f"rejected: {counts[2]} tokens scored",
        "      scored | no<|im_end|>",
    ]


@pytest.mark.filterwarnings("ignore:.*are longer than max_length")
def test_what_is_cut(adds_bos, capsys, printer):
    row = {"prompt": "[b]Two plus two[/b]", "chosen": " four" * 9, "rejected": " five"}
    data = PreferenceDataModule([row], adds_bos, max_length=12, min_completion_tokens=6)
    lines = _lines(capsys, data)
    parts = [tuple(line.split(" | ")) for line in lines if " | " in line]
    assert [kind.strip() for kind, _ in parts] == ["prompt", "cut", "prompt", "scored", "cut", "scored"]
    texts = [text for _, text in parts]
    assert texts[0] == "<s>"  # BOS stays
    assert "".join(texts[:3]) == "<s>[b]Two plus two[/b]"
    assert "".join(texts[3:5]) == " four" * 9 + "</s>"
    assert texts[5] == " five</s>"
    data.setup("fit")
    example = data.train_dataset[0]
    assert adds_bos.decode(example.prompt_ids) == texts[0] + texts[2]
    assert adds_bos.decode(example.chosen_ids) == texts[3]
    assert re.fullmatch(rf"train, row 0: prompt {len(example.prompt_ids)} of \d+ tokens", lines[0])


def test_spaces_of_sentencepiece_are_shown(prefix_space, capsys, printer):
    lines = _lines(capsys, PreferenceDataModule([{"prompt": "ab", "chosen": " c", "rejected": "c d"}], prefix_space))
    assert lines[1::2] == ["      prompt | <s> ab", "      scored |  c</s>", "      scored | c d</s>"]


def test_as_many_pairs_as_asked_for_and_why_others_are_left_out(no_bos, capsys, printer):
    rows = [{"prompt": "a", "chosen": "b" * length, "rejected": "c"} for length in (1, 3000, 2, 3)]
    data = PreferenceDataModule(None, no_bos, predict=rows, max_length=1000, truncation="drop")
    lines = _lines(capsys, data, 2)
    assert [line for line in lines if "predict" in line] == [
        "predict, row 0: prompt 1 tokens",
        'predict, row 1 is left out: Expected at most 1000 tokens (`max_length`) with `truncation="drop"`, but got a '
        "prompt of 1 and a completion of 3001. Raise `max_length`.",
        "predict, row 2: prompt 1 tokens",
    ]
    data = PreferenceDataModule(rows, no_bos, max_length=4000)
    long = next(line for line in _lines(capsys, data, 9) if "..." in line)
    assert long == f"      scored | {'b' * 500} ...2,004 characters... {'b' * 496}</s>"
    with pytest.raises(ValueError, match="Expected `n` to be an integer of at least 1, but got 0"):
        data.preview(0)
    with pytest.raises(ValueError, match="or `predict` to preview, but got none of them"):
        PreferenceDataModule(None, no_bos).preview()


def test_dropped_rows_are_shown_with_their_reasons(no_bos, capsys, printer):
    rows = [{"prompt": "a", "chosen": "", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    lines = _lines(capsys, PreferenceDataModule([*rows, rows[0]], no_bos), 1)
    assert lines[:2] == [
        "train, row 0 is left out: Expected `chosen` to be non-empty, but got an empty string.",
        "train, row 1: prompt 1 tokens",
    ]
    assert not any("row 2" in line for line in lines)


def test_control_tokens_that_a_row_spells_are_marked(chatml, capsys, printer):
    spelled = {"role": "user", "content": "hi<|im_end|>"}
    answers = {name: {"role": "assistant", "content": text} for name, text in (("chosen", "yes"), ("rejected", "no"))}
    row = {"prompt": spelled, **answers}
    prompt = "      prompt | <|im_start|>user\\nhi{}<|im_end|>\\n<|im_start|>assistant\\n"
    lines = _lines(capsys, PreferenceDataModule([row], chatml))
    assert prompt.format("[as text: <|im_end|>]") in lines
    assert "      scored | yes<|im_end|>" in lines
    lines = _lines(capsys, PreferenceDataModule([row], chatml, parse_special_tokens=True))
    assert prompt.format("<|im_end|>") in lines
