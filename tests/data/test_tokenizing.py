"""Token ids against ids and text written out by hand: BOS, EOS, the boundary, truncation."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_did.data.pairs import PreferencePair, UnusableRowError
from lit_did.data.tokenizing import Context, TokenizedPair, tokenize_pair, truncate_pair

PLAIN = {"prompt": "Two plus two is", "chosen": " four.", "rejected": " five, of course."}
CHAT = {
    "prompt": [{"role": "user", "content": "What is two plus two?"}],
    "chosen": [{"role": "assistant", "content": "four."}],
    "rejected": [{"role": "assistant", "content": "not five"}],
}


def _texts(pair: TokenizedPair, tokenizer) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in pair[:3])


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


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_other_turns_stand_between_completion_tokens(request, kind):
    tokenizer = request.getfixturevalue(kind)
    more = [*CHAT["rejected"], {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}]
    pair = tokenize_pair({**CHAT, "rejected": more}, tokenizer, 512)
    plain = tokenize_pair(CHAT, tokenizer, 512)
    assert (pair.prompt_ids, pair.chosen_ids, pair.chosen_context) == (plain.prompt_ids, plain.chosen_ids, None)
    eos = tokenizer.eos_token
    assert tokenizer.decode(pair.rejected_ids) == f"not five{eos}yes{eos}"
    ids, places = pair.rejected_context
    assert set(places) == {len(plain.rejected_ids)}
    whole = tokenizer.apply_chat_template(CHAT["prompt"] + more, tokenize=False).rstrip()
    everything = pair.prompt_ids + np.insert(pair.rejected_ids, places, ids).tolist()
    assert everything == tokenizer(whole, add_special_tokens=False)["input_ids"]


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
    assert tokenize_pair({"prompt": "a", "chosen": "b", "rejected": "c a"}, no_specials, 8)[:3] == ([0], [1], [2, 0])


def test_empty_prompt_becomes_bos_else_eos(adds_bos, chatml, no_bos):
    row = {"prompt": "", "chosen": "Two", "rejected": "five"}
    for tokenizer, first in ((adds_bos, "<s>"), (chatml, "<|im_start|>"), (no_bos, "</s>")):
        assert _texts(tokenize_pair(row, tokenizer, 512), tokenizer)[:2] == (first, "Two" + tokenizer.eos_token)


def test_joint_tokenisation_has_no_space_before_a_completion(prefix_space):
    pair = tokenize_pair({"prompt": "ab", "chosen": "c", "rejected": " c"}, prefix_space, 512)
    assert prefix_space("c", add_special_tokens=False)["input_ids"] == [3, 6]  # the premise: alone, a space comes first
    assert pair[:3] == ([0, 3, 4, 5], [6, 1], [3, 6, 1])


def test_completion_is_tokenised_alone_where_joint_tokens_cross_the_boundary(merging):
    assert merging("fobar")["input_ids"] == [0, 5, 3, 4]  # the premise: f ob a r
    pair = tokenize_pair({"prompt": "fo", "chosen": "bar", "rejected": "ar"}, merging, 512)
    assert pair[:3] == ([0, 1], [2, 3, 4, 6], [3, 4, 6])


BYTES = ["add_prefix_space", "byte level"]
KINDS = ["legacy", "first whole", "first split", "always whole", "always split", *BYTES]


def _sentencepiece(kind: str, *merges: str) -> PreTrainedTokenizerFast:
    """One token a character, and merges; with the habits of Llama 2's tokenizer.json, of Metaspace, or of GPT-2."""
    space = "Ġ" if kind in BYTES else "▁"
    characters = ["</s>", "<unk>", space, *"abcdefghijklmnopqrstuvwxyz():.Ċ", "\n"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate([*characters, *merges])},
            merges=[(merge[0], merge[1]) for merge in merges],
            unk_token="<unk>",
        )
    )
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "add_prefix_space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        scheme, split = kind.split()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split == "split")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("q: ", "so", "no"),
        ("q:", " so", " no"),
        ("q:", "so", "no"),
        ("f(", ")", "x)"),
        ("f(", ") ", ")."),
        ("q:  ", "so a", "no"),
        ("q: ", " so", "so"),
        ("q\n", "\nso", "so"),
        (" ", "so", "no"),
        ("fo", "ob", "bo"),
    ],
)
def test_prompt_and_completion_read_as_the_whole_text(kind, prompt, chosen, rejected):
    space = "Ġ" if kind in BYTES else "▁"
    newline = "Ċ" if space == "Ġ" else "\n"
    tokenizer = _sentencepiece(kind, f"{space}s", f"{space}{space}", "()", ").", "ob", newline * 2)
    pair = tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer, 64)
    assert pair.prompt_ids == tokenizer(prompt)["input_ids"]  # what a model sees when it generates
    for text, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        assert ids[-1] == tokenizer.eos_token_id
        whole = tokenizer.decode(tokenizer(prompt + text)["input_ids"])
        assert tokenizer.decode(pair.prompt_ids + ids[:-1]) == whole
        assert whole.strip() == (prompt + text).strip()


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
    assert tokenize_pair({"prompt": "c", "chosen": "b", "rejected": " a"}, tokenizer, 8)[:3] == ([0], [2], [1])


@pytest.mark.parametrize(
    ("max_length", "truncation", "least", "expected"),
    [
        (9, "completion", None, ([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])),
        (8, "completion", None, ([0, 1, 2, 3, 4], [10, 11], [20, 21, 22])),  # the side that is too long
        (7, "completion", 2, ([0, 1, 2, 3, 4], [10, 11], [20, 21])),
        (6, "completion", 2, ([0, 2, 3, 4], [10, 11], [20, 21])),  # two tokens stay: BOS too, the prompt for both
        (6, "completion", 5, ([0, 4], [10, 11], [20, 21, 22, 23])),  # no completion has more than four
        (6, "completion", None, ([0, 1, 2, 3, 4], [10], [20])),  # a quarter of 6
        (5, "completion", 1, ([0, 2, 3, 4], [10], [20])),
        (2, "completion", None, ([0], [10], [20])),
        (8, "prompt", None, ([0, 2, 3, 4], [10, 11], [20, 21, 22, 23])),
        (6, "prompt", None, ([0, 4], [10, 11], [20, 21, 22, 23])),
        (5, "prompt", None, ([0], [10, 11], [20, 21, 22, 23])),
        (4, "prompt", None, ([0], [10, 11], [20, 21, 22])),
        (9, "drop", None, ([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])),
    ],
)
def test_truncation_by_hand(max_length, truncation, least, expected):
    pair = TokenizedPair([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])
    cut = truncate_pair(pair, max_length, bos_token_id=0, truncation=truncation, min_completion_tokens=least)
    assert cut[:3] == expected


def test_a_pair_that_is_too_long_can_be_dropped():
    pair = TokenizedPair([0, 1, 2, 3, 4], [10, 11], [20, 21, 22, 23])
    with pytest.raises(UnusableRowError, match=r"at most 8 tokens .* but got a prompt of 5 and a completion of 4"):
        truncate_pair(pair, 8, truncation="drop")


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
        max_length, bos, truncation = draw.randint(2, 26), draw.choice([0, None]), draw.choice(["completion", "prompt"])
        least = draw.randint(1, max_length - 1)
        got = truncate_pair(
            TokenizedPair(prompt, chosen, rejected), max_length, bos, truncation=truncation, min_completion_tokens=least
        )
        longest = max(len(chosen), len(rejected))
        needed = min(longest, least) if truncation == "completion" else longest
        lost = len(prompt) - len(got.prompt_ids)
        assert lost == min(max(len(prompt) + needed - max_length, 0), len(prompt) - 1)  # as few as needed; one stays
        keeps_bos = bos is not None and lost > 0
        assert got.prompt_ids == ([0, *prompt[lost + 1 :]] if keeps_bos else prompt[lost:])
        for ids, whole in ((got.chosen_ids, chosen), (got.rejected_ids, rejected)):
            assert ids == whole[: max_length - len(got.prompt_ids)]
            assert len(ids) >= min(needed, len(whole), max_length - 1)
            assert len(got.prompt_ids) + len(ids) <= max_length
        cut_prompts += lost > 0
        cut_completions += (got.chosen_ids, got.rejected_ids) != (chosen, rejected)
    assert cut_prompts > 500
    assert cut_completions > 500


def test_truncation_of_a_completion_with_other_turns():
    # The completion reads 10 (90 91) 11 12 (92) 13: four tokens that count and three that are read.
    context = Context([90, 91, 92], [1, 1, 3])
    pair = TokenizedPair([1, 2], [10, 11, 12, 13], [20], context, None)
    assert truncate_pair(pair, 9) == pair
    left = {8: ([10, 11, 12], Context([90, 91], [1, 1])), 6: ([10, 11], Context([90, 91], [1, 1])), 5: ([10], None)}
    for max_length, (chosen, chosen_context) in left.items():
        cut = truncate_pair(pair, max_length, min_completion_tokens=1)
        assert cut == ([1, 2], chosen, [20], chosen_context, None), max_length
    # The prompt makes place for the turns that come before the second token that counts.
    assert truncate_pair(pair, 5, min_completion_tokens=2).prompt_ids == [2]
    behind = TokenizedPair([1, 2], [10], [20], Context([90, 91, 92], [0, 0, 0]), None)
    with pytest.raises(UnusableRowError, match="Expected a completion token within `max_length=4`"):
        truncate_pair(behind, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"truncation": "left"},
            ValueError,
            "Expected `truncation` to be one of 'completion', 'prompt', 'drop', but got 'left'",
        ),
        ({"min_completion_tokens": 0}, ValueError, "`min_completion_tokens` to be an integer of at least 1, but got 0"),
        ({"min_completion_tokens": 64}, ValueError, "to be below `max_length`, 64, but got 64"),
        ({"min_completion_tokens": 2.0}, TypeError, "but got 2.0"),
    ],
)
def test_arguments_of_truncation_are_checked(no_bos, arguments, error, message):
    with pytest.raises(error, match=message):
        tokenize_pair(PLAIN, no_bos, 64, **arguments)


def test_truncated_completion_has_no_eos_and_a_whole_one_has(no_bos):
    pair = tokenize_pair(PLAIN, no_bos, 512)
    cut = tokenize_pair(PLAIN, no_bos, len(pair.prompt_ids) + len(pair.chosen_ids))
    assert len(pair.rejected_ids) > len(pair.chosen_ids)  # the premise
    assert cut.chosen_ids == pair.chosen_ids
    assert cut.chosen_ids[-1] == no_bos.eos_token_id
    assert cut.rejected_ids == pair.rejected_ids[: len(pair.chosen_ids)]


@pytest.mark.parametrize("max_length", [1, 0, -1])
def test_max_length_below_two_is_refused(no_bos, max_length):
    with pytest.raises(ValueError, match=f"Expected `max_length` to be .* at least 2, but got {max_length}"):
        tokenize_pair(PLAIN, no_bos, max_length)


@pytest.mark.parametrize("name", ["alpacaeval_pairs.jsonl", "hh_rlhf_harmless_test.jsonl.gz"])
def test_real_files_reassemble(real_data, adds_bos, name):
    open_file = gzip.open if name.endswith(".gz") else open
    with open_file(real_data(name), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:200]
    for row in rows:
        if row["chosen"].endswith("Assistant: "):
            continue  # an empty answer
        pair = tokenize_pair(row, adds_bos, 1_000_000)
        for ids, text in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
            assert adds_bos.decode(pair.prompt_ids + ids) == "<s>" + row.get("prompt", "") + text + "</s>"
        if "prompt" not in row:
            assert adds_bos.decode(pair.prompt_ids).endswith("\n\nAssistant:")
