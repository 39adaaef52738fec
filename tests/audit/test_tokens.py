"""examine_tokens: what max_length cuts, counted by hand, and what is scored, in stretches."""

import re

import pytest

from lit_did.audit import tokens
from lit_did.audit.blocks import ScoredPairs
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.tokens import examine_tokens
from tests.modules.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a byte a token; a completion ends in EOS
ROWS = [{"prompt": f"{n:04}", "chosen": "c" * n, "rejected": "r" * 3} for n in range(1, 101)]


def examine(rows, **tokenization):
    return examine_tokens(
        AuditData(rows, "pairs"), Settings(tokenization={"max_length": 1024, **tokenization}), TOKENIZER
    )


def scored(part):
    (block,) = [block for block in part.blocks if isinstance(block, ScoredPairs)]
    return block.pairs


def test_what_max_length_cuts():
    part = examine(ROWS, max_length=95)
    finding = part.findings[0]
    # 4 + n + 1 tokens: more than 95 from n = 91 on, which lose 1 to 10 tokens.
    assert part.figures["num_cut_completions"] == 10
    assert part.figures["lost_completion_tokens"] == sum(range(1, 11))
    assert part.figures["num_cut_prompts"] == part.figures["lost_prompt_tokens"] == 0
    assert part.figures["max_length_for"] == {"95%": 100, "99%": 104, "100%": 105}
    assert part.figures["truncated_share"].value == 0.1
    assert list(finding.rows) == list(range(99, 89, -1))  # the worst first
    assert finding.raised
    assert finding.sentence == (
        f"10 pairs (10%) lose completion tokens to the `max_length` of 95: 55 tokens, {100 * 55 / (5150 + 400):.2g}% "
        "of all completion tokens."
    )
    assert finding.advice.startswith("Set `max_length` to 104, ")
    assert part.columns["lost_tokens"] == [max(0, n - 90) for n in range(1, 101)]
    assert part.columns["chosen_whole_tokens"] == [n + 1 for n in range(1, 101)]


@pytest.mark.parametrize(("max_length", "raised"), [(103, False), (100, True)])
def test_two_pairs_in_a_hundred_raise_nothing(max_length, raised):
    """A share of .02 may be .01 by chance, one of .05 not."""
    assert examine(ROWS, max_length=max_length).findings[0].raised is raised


def test_nothing_is_cut():
    finding = examine(ROWS).findings[0]
    assert (finding.sentence, finding.advice, finding.raised) == (
        "No completion loses tokens to the `max_length` of 1,024.",
        "",
        False,
    )


def test_prompts_are_cut():
    part = examine(ROWS, max_length=20, truncation="prompt")
    assert part.figures["num_cut_prompts"] == 85
    # 1 to 3 tokens of the first three of these prompts, then all but the last one
    assert part.figures["lost_prompt_tokens"] == 1 + 2 + 3 * 83


def test_pairs_that_are_left_out():
    part = examine(ROWS, max_length=95, truncation="drop")
    assert part.figures["num_too_long"] == 10
    assert list(part.findings[0].rows) == list(range(99, 89, -1))
    assert part.findings[0].evidence[99] == "105 tokens; left out"


def test_a_sample_of_large_data(monkeypatch):
    monkeypatch.setattr(tokens, "MOST_PAIRS", 40)
    part = examine(ROWS)
    assert "A random sample of 40 of the 100 pairs" in part.blocks[0].text
    assert "No completion of a random sample of 40 pairs loses tokens" in part.findings[0].sentence
    assert sum(count == count for count in part.columns["lost_tokens"]) == 40
    assert re.match(r"\d+ pairs? of a random sample of 40 pairs \(", examine(ROWS, max_length=60).findings[0].sentence)


def test_stretches_of_a_pair_that_is_cut():
    (pair,) = scored(examine([{"prompt": "abcdef", "chosen": "0123456789", "rejected": "xy"}], max_length=9))
    chosen, rejected = pair.sides
    # The prompt keeps its end; a completion keeps a quarter of max_length first.
    assert chosen.stretches == [("prompt", "abcdef"), ("scored", "012"), ("cut", "3456789"), ("cut", "<|im_end|>")]
    assert rejected.stretches == [("prompt", "abcdef"), ("scored", "xy"), ("control", "<|im_end|>")]
    assert "max_length cuts it" in pair.remark


def test_stretches_of_think_blocks():
    row = {"prompt": "p", "chosen": "<think>a <|im_end|> b</think>c<think></think>", "rejected": "<think>open"}
    (pair,) = scored(examine([row]))
    chosen, rejected = (side.stretches[1:-1] for side in pair.sides)
    assert chosen == [
        ("think", "<think>a [as text: <|im_end|>] b</think>"),
        ("scored", "c"),
        ("think", "<think></think>"),
    ]
    assert rejected == [("think", "<think>open")]
    assert pair.remark.endswith("a think block")


@pytest.mark.parametrize(
    ("start", "end"), [("<Thought>", "</thought>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")]
)
def test_think_blocks_of_other_spellings(start, end):
    (pair,) = scored(examine([{"prompt": "p", "chosen": f"a{start}b</x>{end}c", "rejected": "d"}]))
    assert pair.sides[0].stretches[1:-1] == [("scored", "a"), ("think", f"{start}b</x>{end}"), ("scored", "c")]
    assert pair.remark.endswith("a think block")


def test_a_think_block_goes_on_after_a_control_token():
    row = {"prompt": "p", "chosen": "<think>a<|im_end|>b</think>c", "rejected": "d"}
    (pair,) = scored(examine([row], parse_special_tokens=True))
    assert pair.sides[0].stretches[1:-1] == [
        ("think", "<think>a"),
        ("control", "<|im_end|>"),
        ("think", "b</think>"),
        ("scored", "c"),
    ]


def test_stretches_of_a_chat_with_a_header():
    template = TOKENIZER.chat_template.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    )
    part = examine([{"prompt": "hi", "chosen": "yes", "rejected": "no"}], as_chat=True, chat_template=template)
    (pair,) = scored(part)
    assert pair.sides[0].stretches == [
        ("control", "<|im_start|>"),
        ("prompt", "user\nhi"),
        ("control", "<|im_end|>"),
        ("prompt", "\n"),
        ("control", "<|im_start|>"),
        ("prompt", "assistant\n"),
        ("header", "<think>\n\n</think>\n\n"),
        ("scored", "yes"),
        ("control", "<|im_end|>"),
    ]
    assert [finding.name for finding in part.findings] == ["truncated", "header_scored"]


def test_notes_of_tokenising():
    part = examine([{"prompt": "p", "chosen": "a<|im_end|>b", "rejected": "c"}, *ROWS[:2]])
    assert [finding.name for finding in part.findings] == ["truncated", "control_as_text", "no_turns"]
    assert not any(finding.raised for finding in part.findings)
    text = " ".join(getattr(block, "text", "") for block in part.blocks)
    assert "spells control tokens" in text
    assert "as_chat=True" in text


def test_turns_within_a_completion():
    turns = [{"role": r, "content": c} for r, c in (("assistant", "one"), ("user", "two"), ("assistant", "three"))]
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": turns, "rejected": turns[:1]}
    (pair,) = scored(examine([row]))
    kinds = [kind for kind, _ in pair.sides[0].stretches[6:]]
    assert kinds == [
        "scored",
        "control",
        "not scored",
        "control",
        "not scored",
        "control",
        "not scored",
        "control",
        "not scored",
        "scored",
        "control",
    ]
    assert "turns within a completion" in pair.remark
