"""What a dataset keeps, drops and counts."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from lit_did.data.collating import collate_packed
from lit_did.data.dataset import PreferenceDataset
from lit_did.data.examples import FlatPairs, flat_pairs, lengths_of, tokens_file, tokens_of
from lit_did.data.pairs import PreferencePair, UnusableRowError
from lit_did.data.reading import SourceRow, read_pairs, read_rows
from lit_did.data.tokenizing import Context, TokenizedPair

ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a b c", "chosen": " ", "rejected": "c"},  # no tokens in chosen: skipped
    {"prompt": "a", "chosen": "b", "rejected": " b"},  # other text, the same tokens: kept
    {"prompt": "a b c", "chosen": "b", "rejected": "c"},  # too long: truncated
    {"prompt": "a", "chosen": "b c", "rejected": "b b c"},  # the same tokens once truncated
]

ROLES = ["user", "assistant", "user", "assistant"]


def _rows(rows) -> list[SourceRow]:
    """What the reader returns, but for its checks: whether a text has tokens is for the tokenizer to say."""
    return [SourceRow(number, f"source, row {number}", PreferencePair(**row)) for number, row in enumerate(rows)]


def _ids(example) -> tuple:
    return (*(ids.tolist() for ids in example[:3]), example.index, example.weight)


def test_rows_and_counts(no_specials):
    dataset = PreferenceDataset(_rows(ROWS), no_specials, max_length=3)
    assert [_ids(example) for example in dataset] == [
        ([0], [1], [2], 0, 1.0),
        ([0], [1], [1], 2, 1.0),
        ([1, 2], [1], [2], 3, 1.0),
        ([0], [1, 2], [1, 1], 4, 1.0),
    ]
    assert [dataset[position].index for position in range(len(dataset))] == [0, 2, 3, 4]
    counts = (dataset.num_rows, dataset.num_dropped, dataset.num_identical, dataset.num_truncated)
    assert counts == (5, 1, 1, 2)
    assert dataset.summary() == ("4 pairs of 5 rows: 1 skipped, 1 with identical chosen and rejected, 2 truncated")


def test_tokens_of_a_pair_count_its_prompt_twice(no_specials):
    dataset = PreferenceDataset(_rows(ROWS), no_specials, max_length=3)
    assert dataset.num_tokens.tolist() == [4, 4, 6, 6]
    assert dataset.num_tokens.dtype == "int64"


CHAT = [
    {
        "chosen": [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=False)],
        "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}],
    }
    for texts in (["hi", "a"], ["hi", "a", "so", "yes"])
]


def test_tokens_of_a_pair_count_other_turns(chatml):
    dataset = PreferenceDataset(read_pairs(CHAT), chatml, max_length=64)
    assert dataset.num_with_context == 1
    one, other = dataset
    assert other.chosen_context.ids.dtype == other.chosen_context.places.dtype == "int32"
    added = len(other.chosen_ids) - len(one.chosen_ids) + len(other.chosen_context.ids)
    assert np.diff(dataset.num_tokens).tolist() == [added]
    assert collate_packed([other])["input_ids"].numel() == dataset.num_tokens[1]


@pytest.mark.parametrize(
    ("arguments", "counts", "warned"),
    [
        ({"max_length": 9}, (20, 0, 0, 0, 0), None),
        ({"max_length": 8}, (20, 1, 0, 1, 0), None),  # one in twenty is few
        (
            {"max_length": 3},
            (20, 20, 20, 20, 0),
            "max_length=3: 20 lost the start of their prompt, 20 the end of a completion",
        ),
        (
            {"max_length": 4, "min_completion_tokens": 1},
            (20, 20, 0, 20, 0),
            "max_length=4: 0 lost the start of their prompt, 20 the end of a completion",
        ),
        (
            {"max_length": 5, "truncation": "prompt"},
            (20, 20, 20, 1, 0),
            "max_length=5: 20 lost the start of their prompt, 1 the end of a completion",
        ),
        ({"max_length": 8, "truncation": "drop"}, (19, 0, 0, 0, 1), None),
    ],
)
def test_what_is_cut_is_counted_and_warned_of_if_it_is_much(no_specials, arguments, counts, warned):
    rows = [{"prompt": "a b c", "chosen": "b c a", "rejected": "c"}] * 19
    rows.append({"prompt": "a b c", "chosen": "c b c c b a", "rejected": "c"})
    dataset = PreferenceDataset(read_pairs(rows), no_specials, **arguments)
    names = ("num_truncated", "num_cut_prompts", "num_cut_completions", "num_too_long")
    assert (len(dataset), *(getattr(dataset, name) for name in names)) == counts
    text = dataset.warnings("train").get("length")
    assert (text is None) == (warned is None)
    if warned:
        assert text.startswith("train: 20 of 20 pairs")
        assert warned in text
    assert dataset.num_dropped == dataset.num_too_long
    assert (f"{dataset.num_too_long} dropped as too long" in dataset.summary()) == (counts[-1] > 0)


def test_truncated_rows_have_their_numbers_in_the_source(no_specials):
    short, long = ({"prompt": "a", "chosen": answer, "rejected": "c"} for answer in ("b", "b c a b"))
    rows, skipped = read_rows([short, {**short, "chosen": ""}, long, short, long])
    dataset = PreferenceDataset(rows, no_specials, 4, skipped=skipped)
    assert (dataset.truncated, dataset.num_truncated) == ({2, 4}, 2)


def test_too_long_rows_are_dropped_where_bad_rows_raise(no_specials):
    rows = read_pairs([*ROWS[:1], {"prompt": "a b c", "chosen": "b", "rejected": "c"}])
    options = {"truncation": "drop", "on_bad_rows": "raise"}
    dataset = PreferenceDataset(rows, no_specials, max_length=3, **options)
    assert (len(dataset), dataset.num_too_long) == (1, 1)
    assert dataset.warnings()["length"].startswith("pairs: 1 of 2 pairs are longer than max_length=3 and are left out")
    message = r"got none in 1 rows\. 1 of 1 pairs are longer than max_length=3 .* Raise `max_length`"
    with pytest.raises(ValueError, match=message):
        PreferenceDataset(rows[1:], no_specials, max_length=3, **options)


def test_rows_that_a_template_refuses_are_skipped_or_raise(chatml):
    template = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + chatml.chat_template
    dataset = PreferenceDataset(read_pairs(CHAT), chatml, max_length=64, chat_template=template)
    assert [example.index for example in dataset] == [0]
    (skipped,) = dataset.skipped
    assert (skipped.where, skipped.index) == ("source, row 1", 1)
    assert "the roles user, assistant, user, assistant: too many" in skipped.reason
    with pytest.raises(UnusableRowError, match=r"^source, row 1: Expected messages .*: too many$"):
        PreferenceDataset(read_pairs(CHAT), chatml, max_length=64, chat_template=template, on_bad_rows="raise")


def test_repr_is_one_line(no_specials):
    dataset = PreferenceDataset(read_pairs(ROWS[2:]), no_specials, max_length=3)
    assert repr(dataset) == f"PreferenceDataset({dataset.summary()} to max_length=3)"


def test_identical_is_counted_after_truncation(no_specials):
    rows = [{"prompt": "a", "chosen": "b b", "rejected": "b c"}]
    assert PreferenceDataset(read_pairs(rows), no_specials, max_length=2).num_identical == 1


def test_positions_past_the_end_repeat_rows_with_weight_zero(no_specials):
    dataset = PreferenceDataset(_rows(ROWS), no_specials, max_length=3)
    for position in range(4, 12):
        assert _ids(dataset[position]) == (*_ids(dataset[position % 4])[:4], 0.0)
    assert dataset[-1].weight == 1.0


def test_rows_stay_in_order_over_many_tokenizer_calls(no_specials, monkeypatch):
    monkeypatch.setattr("lit_did.data.chunks._CHUNK", 3)
    rows = [{"prompt": "a", "chosen": "b " * (n + 1), "rejected": "c"} for n in range(10)]
    dataset = PreferenceDataset(read_pairs(rows), no_specials, max_length=50)
    assert [(example.index, len(example.chosen_ids)) for example in dataset] == [(n, n + 1) for n in range(10)]


def test_rows_that_cannot_be_rendered_are_skipped_and_counted_with_the_readers(llama3):
    rows, skipped = read_rows([ROWS[0] | {"rejected": ""}, ROWS[0]])
    rows.append(SourceRow(2, "source, row 2", PreferencePair(" ", "a", "b")))
    dataset = PreferenceDataset(rows, llama3, max_length=64, as_chat=True, skipped=skipped)
    assert [(row.index, row.where) for row in dataset.skipped] == [(0, "source, row 0"), (2, "source, row 2")]
    assert dataset.skipped[1].reason == "Expected a prompt to wrap as a user message (`as_chat=True`), but got ' '."
    assert (len(dataset), dataset.num_rows, dataset.num_dropped) == (1, 3, 2)


def test_nothing_left_is_an_error(no_specials):
    with pytest.raises(ValueError, match=r"Expected preference pairs with tokens in both .*none in 1 rows"):
        PreferenceDataset(_rows(ROWS[1:2]), no_specials, max_length=3)


@pytest.mark.filterwarnings("ignore:.*No row has a prompt")
def test_rendering_errors_name_the_line(no_bos, tmp_path):
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    lines = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": chat, "rejected": chat}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 2: Expected a tokenizer with a chat template"):
        PreferenceDataset(read_pairs(path), no_bos, max_length=8)
    path.write_text(json.dumps({"prompt": "", "chosen": "b", "rejected": "c"}))
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: Expected a prompt to wrap"):
        PreferenceDataset(read_pairs(path), no_bos, max_length=8, as_chat=True, on_bad_rows="raise")


def test_workers_get_only_the_tokens(no_bos):
    # Four bytes a token, and neither the tokenizer nor the text.
    dataset = PreferenceDataset(_rows(ROWS), no_bos, max_length=3)
    assert dataset[0].prompt_ids.dtype == "int32"
    assert b"okenizer" not in pickle.dumps(dataset).replace(b"lit_did.data.tokenizing", b"")


@pytest.mark.parametrize("in_files", [False, True])
def test_every_part_of_every_pair_comes_back(in_files, tmp_path):
    generator = np.random.default_rng(0)

    def ids() -> list[int]:
        return generator.integers(0, 1000, generator.integers(1, 5)).tolist()

    def context(number: int) -> Context | None:
        return Context(part := ids(), [0] * len(part)) if number % 2 else None

    pairs = [TokenizedPair(ids(), ids(), ids(), context(number // 2), context(number)) for number in range(8)]
    made = flat_pairs(tokens_of(pairs), lengths_of(pairs), np.arange(8))
    if in_files:
        tokens_file(tmp_path).write_bytes(made.tokens.tobytes())
        made.save(tmp_path)
        made = FlatPairs.open(tmp_path)
    for number, pair in enumerate(pairs):
        example = made.example(number)
        assert [part.tolist() for part in example[:3]] == [*pair[:3]]
        for found, expected in zip(example[-2:], pair[3:], strict=True):
            assert (found is None) == (expected is None)
            assert found is None or [part.tolist() for part in found] == [*expected]


def test_more_tokens_than_int32_counts(tmp_path):
    """A file of 12 GB with a hole: the places in it are above 2**31, in tokens and in bytes."""
    size = 2**30
    before = flat_pairs(np.empty(0, np.int32), np.array([[size] * 3 + [0] * 4, [1, 2, 1, 0, 0, 0, 0]]), np.arange(2))
    before.save(tmp_path)
    with open(tokens_file(tmp_path), "wb") as file:
        file.seek(4 * 3 * size)
        file.write(np.arange(5, 9, dtype=np.int32).data)
    pairs = FlatPairs.open(tmp_path)
    assert [part.tolist() for part in pairs.example(1)[:3]] == [[5], [6, 7], [8]]
    assert pairs.num_tokens().tolist() == [4 * size, 2 + 2 + 1]
    tokens_file(tmp_path).unlink()


def test_ids_of_large_vocabularies():
    ids = [70_000, 262_143]
    assert tokens_of([TokenizedPair(ids, ids[:1], ids[1:])]).tolist() == [*ids, *ids]
