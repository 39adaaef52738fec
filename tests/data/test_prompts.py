"""A prompt is asked once: what both completions repeat is taken off them, what one repeats is refused or skipped."""

from __future__ import annotations

import re

import pytest

from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair
from lit_did.data.reading import read_rows


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict:
    return {"role": "system", "content": text}


def _pairs(*rows: dict) -> list[PreferencePair]:
    return [row.pair for row in read_rows(list(rows))[0]]


LONG = "Q: What is 2+2? A:"
OTHERS = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(30)]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": LONG, "chosen": LONG + " 4", "rejected": LONG + " 5"}, PreferencePair(LONG, " 4", " 5")),
        ({"prompt": "2+2?", "chosen": "2+2? 4", "rejected": "2+2? 5"}, PreferencePair("2+2?", " 4", " 5")),
        # Whitespace at the prompt's end goes with what the completions have.
        ({"prompt": LONG + "\n", "chosen": LONG + "\n4", "rejected": LONG + "\n5"}, (LONG + "\n", "4", "5")),
        ({"prompt": LONG + "\n", "chosen": LONG + " 4", "rejected": LONG + " 5"}, (LONG, " 4", " 5")),
        ({"question": LONG, "chosen": LONG + " 4", "rejected": LONG + " 5"}, (LONG, " 4", " 5")),
        ({"instruction": "Add", "input": "2 2", "chosen": "Add\n2 2 is 4", "rejected": "Add\n2 2 is 5"}, None),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, ("", "a", "b")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*No row has a prompt")
@pytest.mark.filterwarnings("ignore:.*Reads prompt from")
def test_text_that_both_repeat_is_taken_off(row, pair):
    expected = PreferencePair(*(pair or ("Add\n2 2", " is 4", " is 5")))
    assert parse_pair(row) == expected
    assert _pairs(row) == [expected]


def test_one_repeat_is_skipped_where_the_source_repeats_prompts():
    both = {"prompt": LONG, "chosen": LONG + " 4", "rejected": LONG + " 5"}
    rows, skipped = read_rows([both, {**both, "rejected": " 5"}, {**both, "chosen": "4"}])
    assert [row.index for row in rows] == [0]
    assert [(row.index, row.reason) for row in skipped] == [
        (1, "Expected both completions to begin with the prompt, or neither, but got it only in `chosen`."),
        (2, "Expected both completions to begin with the prompt, or neither, but got it only in `rejected`."),
    ]
    with pytest.raises(ValueError, match="got it only in `chosen`"):
        read_rows([{"prompt": "2+2?", "chosen": "2+2? 4", "rejected": "5"}])


def test_answers_that_begin_like_their_prompt_by_chance_are_kept():
    greeting = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi."}
    echo = {"prompt": LONG, "chosen": LONG + " 4", "rejected": "4"}
    assert _pairs(*OTHERS, greeting, echo)[-2:] == [PreferencePair(**greeting), PreferencePair(**echo)]
    # Two answers that begin with a whole question: too long for chance, independent of the other rows.
    both = {"prompt": LONG, "chosen": LONG + " 4", "rejected": LONG + " 5"}
    assert _pairs(*OTHERS, both)[-1] == PreferencePair(LONG, " 4", " 5")


@pytest.mark.parametrize("prompt", ["1", "the cat", "What is the word: cat"])
def test_completions_that_go_on_in_the_prompts_last_word_do_not_repeat_it(prompt):
    row = {"prompt": prompt, "chosen": prompt + "egory", "rejected": prompt + "s 5"}
    assert _pairs(row) == [PreferencePair(**row)]


def test_scripts_without_spaces_between_words():
    row = {"prompt": "介绍北京", "chosen": "介绍北京是首都", "rejected": "介绍北京很大"}
    assert _pairs(row) == [PreferencePair("介绍北京", "是首都", "很大")]


def test_a_completion_that_is_its_prompt_alone_is_unusable():
    row = {"prompt": LONG, "chosen": LONG + " 4", "rejected": LONG + " "}
    with pytest.raises(UnusableRowError, match="Expected `rejected` to have text after the prompt, which it repeats"):
        parse_pair(row)


CHAT = PreferencePair([_user("q")], [_bot("a")], [_bot("b")])


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ([_user("q")], [_user("q"), _bot("a")], [_user("q"), _bot("b")], CHAT),
        ([_user("q")], [_user(" q\n"), _bot("a")], [_user("q"), _bot("b")], CHAT),
        ([_user("q")], [_bot("a")], [_bot("b")], CHAT),
        (
            [_system("s"), _user("q")],
            [_user("q"), _bot("a")],
            [_user("q"), _bot("b")],
            CHAT._replace(prompt=[_system("s"), _user("q")]),
        ),
        (
            [_user("q")],
            [_system("s"), _user("q"), _bot("a")],
            [_system("s"), _user("q"), _bot("b")],
            CHAT._replace(prompt=[_system("s"), _user("q")]),
        ),
        (
            [_user("q"), _bot("o"), _user("r")],
            [_user("q"), _bot("o"), _user("r"), _bot("a"), _user("t"), _bot("c")],
            [_user("q"), _bot("o"), _user("r"), _bot("b")],
            PreferencePair([_user("q"), _bot("o"), _user("r")], [_bot("a"), _user("t"), _bot("c")], [_bot("b")]),
        ),
        # UltraFeedback's form.
        ("q", [_user("q"), _bot("a")], [_user("q"), _bot("b")], CHAT),
        ("q", [_system("s"), _user("q "), _bot("a")], [_system("s"), _user("q "), _bot("b")], "whole"),
        ("Human: q", [_user("q"), _bot("a")], [_user("q"), _bot("b")], CHAT),
        ("q", [_bot("a")], [_bot("b")], CHAT),
        ("", [_user("q"), _bot("a")], [_user("q"), _bot("b")], CHAT),
        ("q", [_user("q"), _bot("a")], [_user("q"), _bot("a")], CHAT._replace(rejected=[_bot("a")])),
    ],
)
def test_chat_that_both_repeat_is_taken_off(prompt, chosen, rejected, expected):
    pair = parse_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if expected == "whole":
        expected = CHAT._replace(prompt=[_system("s"), _user("q ")])
    assert pair == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        (
            [_user("q")],
            [_user("q"), _bot("a")],
            [_bot("b")],
            "but got `chosen` beginning with a message of role 'user'",
        ),
        (
            [_bot("hi"), _user("q")],
            [_bot("hi"), _user("q"), _bot("a")],
            [_bot("b")],
            "but got `chosen` beginning with a message of role 'assistant', and only it repeats the prompt.",
        ),
        (
            [_user(" ")],
            [_bot("a")],
            [_bot("b")],
            "Expected `prompt` to be non-empty, but got messages without content.",
        ),
        ([_user("q")], [_bot("a")], [_user("q"), _bot("b")], "but got `rejected` beginning with a message of role"),
        ([_user("q")], [_user("r"), _bot("a")], [_user("r"), _bot("b")], "'user', which is not in the prompt."),
        ([_user("q")], [_system("s"), _bot("a")], [_bot("b")], "beginning with a message of role 'system'"),
        (
            [_user("q")],
            [_system("s"), _user("q"), _bot("a")],
            [_system("t"), _user("q"), _bot("b")],
            "Expected the same system message in `chosen` and `rejected`, but got two different ones.",
        ),
        ("q", [_user("r"), _bot("a")], [_user("r"), _bot("b")], "Expected `prompt` to be among the messages that"),
        ("q", [_user("q"), _bot("a")], [_user("r"), _bot("b")], "to share their first message, as the prompt"),
        ("q", [_user("q"), _bot("a")], [_bot("b")], "to share their first message, as the prompt"),
        (" ", [_bot("a")], [_bot("b")], "Expected `prompt` to be non-empty, but got an empty string."),
        ([_user("q")], [_user("q")], [_user("q"), _bot("b")], "to go on after the prompt, which they repeat"),
    ],
)
def test_chat_that_one_side_repeats_is_refused(prompt, chosen, rejected, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("empty", ["", " \n", None, [], [_bot("")], [_bot(" ")], _bot(""), _bot(None)])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_answers_are_treated_alike(empty, side):
    """Explicit prompts and implicit ones, text and chat, a null and whitespace: skipped and counted, or raised."""
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    if empty is None or isinstance(empty, str):
        answer, prompts = "a", ["q", [_user("q")]]
    else:
        answer, prompts = [_bot("a")], ["q", [_user("q")]]
    for prompt in prompts:
        row = {"prompt": prompt, side: empty, other: answer}
        good = {"prompt": "q", "chosen": "a", "rejected": "b"}
        rows, skipped = read_rows([good, row])
        assert ([row.index for row in rows], [row.index for row in skipped]) == ([0], [1])
        with pytest.raises(UnusableRowError, match="source, row 1: Expected "):
            read_rows([good, row], on_bad_rows="raise")


def test_a_prompt_beside_whole_dialogues_is_asked_once():
    dialogue = "\n\nHuman: q\n\nAssistant:"
    whole = {"chosen": dialogue + " a", "rejected": dialogue + " b"}
    expected = PreferencePair(dialogue, " a", " b")
    for prompt in ("q", "Human: q", dialogue):
        assert parse_pair({"prompt": prompt, **whole}) == expected
    assert parse_pair({"question": "q", **{k: v.strip() for k, v in whole.items()}}).prompt == dialogue.strip()
    with pytest.raises(
        UnusableRowError, match="Expected `prompt` to be in the turns that `chosen` and `rejected` share"
    ):
        parse_pair({"prompt": "other", **whole})


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_answers_to_implicit_prompts(empty):
    dialogue = "\n\nHuman: q\n\nAssistant:"
    for row in (
        {"chosen": dialogue + " a", "rejected": dialogue + empty},
        {"chosen": [_user("q"), _bot("a")], "rejected": [_user("q"), _bot(empty)]},
        {"prompt": "q", "chosen": [_user("q"), _bot("a")], "rejected": [_user("q"), _bot(empty)]},
    ):
        with pytest.raises(UnusableRowError, match="Expected `rejected` to be non-empty"):
            parse_pair(row)
