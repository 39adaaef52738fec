"""Token ids against ids and text written out by hand: BOS, EOS, the boundary, truncation."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_did.data.pairs import PreferencePair
from lit_did.data.tokenizing import TokenizedPair, tokenize_pair, truncate_pair

PLAIN = {"prompt": "Two plus two is", "chosen": " four.", "rejected": " five, of course."}
CHAT = {
    "prompt": [{"role": "user", "content": "What is two plus two?"}],
    "chosen": [{"role": "assistant", "content": "four."}],
    "rejected": [{"role": "assistant", "content": "not five"}],
}


def _texts(pair: TokenizedPair, tokenizer) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in pair)


@pytest.mark.parametrize(("kind", "bos", "eos"), [("no_bos", "", "</s>"), ("adds_bos", "<s>", "</s>")])
def test_plain_text(request, kind, bos, eos):
    tokenizer = request.getfixturevalue(kind)
    pair = tokenize_pair(PLAIN, tokenizer, 512)
    assert _texts(pair, tokenizer) == (f"{bos}Two plus two is", f" four.{eos}", f" five, of course.{eos}")
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids.count(tokenizer.eos_token_id) == 1
        if bos:
            assert (pair.prompt_ids + ids).count(tokenizer.bos_token_id) == 1


def test_plain_text_stays_plain_with_a_chat_tokenizer(chatml):
    # SmolLM2 has a BOS token but does not put it before a text.
    assert _texts(tokenize_pair(PLAIN, chatml, 512), chatml) == (
        "Two plus two is",
        " four.<|im_end|>",
        " five, of course.<|im_end|>",
    )


def test_chatml(chatml):
    expected = (
        "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n",
        "four.<|im_end|>",  # without the template's last newline
        "not five<|im_end|>",
    )
    pair = tokenize_pair(CHAT, chatml, 512)
    assert _texts(pair, chatml) == expected
    assert pair.chosen_ids.count(chatml.eos_token_id) == pair.rejected_ids.count(chatml.eos_token_id) == 1
    plain = {name: messages[0]["content"] for name, messages in CHAT.items()}
    assert tokenize_pair(plain, chatml, 512, as_chat=True) == pair


def test_llama3_has_bos_once_though_template_and_tokenizer_both_add_it(llama3):
    assert llama3("a")["input_ids"][0] == llama3.bos_token_id  # the premise
    pair = tokenize_pair(CHAT, llama3, 512)
    assert _texts(pair, llama3) == (
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\nWhat is two plus two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "four.<|eot_id|>",
        "not five<|eot_id|>",
    )
    assert (pair.prompt_ids + pair.chosen_ids).count(llama3.bos_token_id) == 1


def test_template_without_bos_has_the_last_word(llama3):
    template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    pair = tokenize_pair(CHAT, llama3, 512, chat_template=template)
    assert _texts(pair, llama3) == ("What is two plus two?<|eot_id|>", "four.<|eot_id|>", "not five<|eot_id|>")


def test_ends_of_turns_inside_a_completion_stay(chatml):
    more = [*CHAT["rejected"], {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}]
    pair = tokenize_pair({**CHAT, "rejected": more}, chatml, 512)
    assert chatml.decode(pair.rejected_ids) == (
        "not five<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_bos_spelled_out_in_the_text_is_not_doubled(adds_bos):
    pair = tokenize_pair({"prompt": "<s>Two", "chosen": "<s> plus", "rejected": " two"}, adds_bos, 512)
    assert _texts(pair, adds_bos) == ("<s>Two", " plus</s>", " two</s>")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (" four", " four</s>"),
        (" four</s>", " four</s>"),
        (" four</s> \n", " four</s>"),
        (" four</s></s>\n</s>", " four</s>"),
        (" four\n", " four\n</s>"),  # whitespace that no EOS comes before is text
        (" a</s> b", " a</s> b</s>"),
    ],
)
def test_eos_once_at_the_end(no_bos, chosen, expected):
    pair = tokenize_pair({**PLAIN, "chosen": chosen}, no_bos, 512)
    assert no_bos.decode(pair.chosen_ids) == expected
    assert pair.chosen_ids[-1] == no_bos.eos_token_id
    assert pair.chosen_ids[-2:-1] != [no_bos.eos_token_id]


def test_no_eos_without_an_eos_token(no_specials):
    assert tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "c a"}, no_specials, 8) == ([0], [1], [2, 0])


def test_empty_prompt_becomes_bos_else_eos(adds_bos, chatml, no_bos):
    row = {"prompt": "", "chosen": "Two", "rejected": "five"}
    for tokenizer, first in ((adds_bos, "<s>"), (chatml, "<|im_start|>"), (no_bos, "</s>")):
        assert _texts(tokenize_pair(row, tokenizer, 512), tokenizer)[:2] == (first, "Two" + tokenizer.eos_token)


def test_joint_tokenisation_has_no_space_before_a_completion(prefix_space):
    pair = tokenize_pair({"prompt": "ab", "chosen": "c", "rejected": " c"}, prefix_space, 512)
    assert prefix_space("c", add_special_tokens=False)["input_ids"] == [3, 6]  # the premise: alone, a space comes first
    assert pair == ([0, 3, 4, 5], [6, 1], [3, 6, 1])


def test_completion_is_tokenised_alone_where_joint_tokens_cross_the_boundary(merging):
    assert merging("fobar")["input_ids"] == [0, 5, 3, 4]  # the premise: f ob a r
    pair = tokenize_pair({"prompt": "fo", "chosen": "bar", "rejected": "ar"}, merging, 512)
    assert pair == ([0, 1], [2, 3, 4, 6], [3, 4, 6])


def test_completion_without_tokens_stays_empty(no_specials):
    assert tokenize_pair(PreferencePair("a", " \n", "b"), no_specials, 8).chosen_ids == []
    # The same where an EOS could have been added.
    row = PreferencePair("\n\nHuman: a\n\nAssistant:", "", " b")
    no_specials_eos = no_specials.__class__(tokenizer_object=no_specials.backend_tokenizer, eos_token="c")
    assert tokenize_pair(row, no_specials_eos, 8).chosen_ids == []


def test_completion_that_merges_into_an_unknown_token_is_tokenised_alone():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tokenizer("cb")["input_ids"] == tokenizer("c")["input_ids"] == [0]  # the premise
    assert tokenize_pair({"prompt": "c", "chosen": "b", "rejected": " a"}, tokenizer, 8) == ([0], [2], [1])


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (9, ([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])),
        (8, ([0, 2, 3, 4], [10, 11], [20, 21, 22, 23])),  # BOS stays, the prompt is the same for both
        (6, ([0, 4], [10, 11], [20, 21, 22, 23])),
        (5, ([0], [10, 11], [20, 21, 22, 23])),
        (4, ([0], [10, 11], [20, 21, 22])),
        (2, ([0], [10], [20])),
    ],
)
def test_truncation_by_hand(max_length, expected):
    pair = TokenizedPair([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])
    assert truncate_pair(pair, max_length, bos_token_id=0) == expected


def test_truncation_without_bos_and_with_turn_markers():
    pair = TokenizedPair([7, 1, 7, 3], [10], [20])
    assert truncate_pair(pair, 4, bos_token_id=9).prompt_ids == [1, 7, 3]
    assert truncate_pair(pair, 4, bos_token_id=None).prompt_ids == [1, 7, 3]
    assert truncate_pair(pair, 4, bos_token_id=7).prompt_ids == [1, 7, 3]  # 7 begins each turn: not kept apart
    assert truncate_pair(pair, 2, bos_token_id=7).prompt_ids == [3]


def test_truncation_properties():
    draw = random.Random(0)
    cut_prompts = cut_completions = 0
    for _ in range(3000):
        prompt, chosen, rejected = ([*range(start, start + draw.randint(1, 12))] for start in (0, 100, 200))
        max_length, bos = draw.randint(2, 26), draw.choice([0, None])
        got = truncate_pair(TokenizedPair(prompt, chosen, rejected), max_length, bos)
        excess = len(prompt) + max(len(chosen), len(rejected)) - max_length
        lost = len(prompt) - len(got.prompt_ids)
        assert lost == min(max(excess, 0), len(prompt) - 1)  # as few as needed, and one token stays
        keeps_bos = bos is not None and lost > 0
        assert got.prompt_ids == ([0, *prompt[lost + 1 :]] if keeps_bos else prompt[lost:])
        for ids, whole in ((got.chosen_ids, chosen), (got.rejected_ids, rejected)):
            assert ids == whole[: max_length - len(got.prompt_ids)]
            assert ids
            assert len(got.prompt_ids) + len(ids) <= max_length
            assert ids == whole or len(got.prompt_ids) == 1  # completions only after the whole prompt
        cut_prompts += lost > 0
        cut_completions += (got.chosen_ids, got.rejected_ids) != (chosen, rejected)
    assert cut_prompts > 500
    assert cut_completions > 500


def test_truncated_completion_has_no_eos_and_a_whole_one_has(no_bos):
    pair = tokenize_pair(PLAIN, no_bos, 512)
    cut = tokenize_pair(PLAIN, no_bos, len(pair.chosen_ids) + 1)
    assert len(pair.rejected_ids) > len(pair.chosen_ids)  # the premise
    assert cut.chosen_ids == pair.chosen_ids
    assert cut.chosen_ids[-1] == no_bos.eos_token_id
    assert cut.rejected_ids == pair.rejected_ids[: len(pair.chosen_ids)]


@pytest.mark.parametrize("max_length", [1, 0, -1])
def test_max_length_below_two_is_refused(no_bos, max_length):
    with pytest.raises(ValueError, match=f"Expected `max_length` to be .* at least 2, but got {max_length}"):
        tokenize_pair(PLAIN, no_bos, max_length)


@pytest.mark.parametrize("name", ["alpacaeval_pairs.jsonl", "hh_rlhf_harmless_test.jsonl.gz"])
def test_real_files_reassemble(shared_data, adds_bos, name):
    open_file = gzip.open if name.endswith(".gz") else open
    with open_file(shared_data / name, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:200]
    for row in rows:
        if row["chosen"].endswith("Assistant: "):
            continue  # an empty answer
        pair = tokenize_pair(row, adds_bos, 1_000_000)
        for ids, text in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
            assert adds_bos.decode(pair.prompt_ids + ids) == "<s>" + row.get("prompt", "") + text + "</s>"
        if "prompt" not in row:
            assert adds_bos.decode(pair.prompt_ids).endswith("\n\nAssistant:")
