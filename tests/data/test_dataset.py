"""What a dataset keeps, drops and counts."""

from __future__ import annotations

import json
import pickle

import pytest

from lit_did.data.dataset import PreferenceDataset
from lit_did.data.pairs import PreferencePair
from lit_did.data.reading import SourceRow, read_pairs, read_rows

ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a b c", "chosen": " ", "rejected": "c"},  # no tokens in chosen: skipped
    {"prompt": "a", "chosen": "b", "rejected": " b"},  # other text, the same tokens: kept
    {"prompt": "a b c", "chosen": "b", "rejected": "c"},  # too long: truncated
    {"prompt": "a", "chosen": "b c", "rejected": "b b c"},  # the same tokens once truncated
]


def _rows(rows) -> list[SourceRow]:
    """What the reader returns, but for its checks: whether a text has tokens is for the tokenizer to say."""
    return [SourceRow(number, f"source, row {number}", PreferencePair(**row)) for number, row in enumerate(rows)]


def _ids(example) -> tuple:
    return (*(ids.tolist() for ids in example[:3]), *example[3:])


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


def test_identical_is_counted_after_truncation(no_specials):
    rows = [{"prompt": "a", "chosen": "b b", "rejected": "b c"}]
    assert PreferenceDataset(read_pairs(rows), no_specials, max_length=2).num_identical == 1


def test_positions_past_the_end_repeat_rows_with_weight_zero(no_specials):
    dataset = PreferenceDataset(_rows(ROWS), no_specials, max_length=3)
    for position in range(4, 12):
        assert _ids(dataset[position]) == (*_ids(dataset[position % 4])[:4], 0.0)
    assert dataset[-1].weight == 1.0


def test_rows_stay_in_order_over_many_tokenizer_calls(no_specials, monkeypatch):
    monkeypatch.setattr("lit_did.data.dataset._CHUNK", 3)
    rows = [{"prompt": "a", "chosen": "b " * (n + 1), "rejected": "c"} for n in range(10)]
    dataset = PreferenceDataset(read_pairs(rows), no_specials, max_length=50)
    assert [(example.index, len(example.chosen_ids)) for example in dataset] == [(n, n + 1) for n in range(10)]


def test_rows_that_cannot_be_rendered_are_skipped_and_counted_with_the_readers(llama3):
    rows, skipped = read_rows([ROWS[0] | {"rejected": ""}, ROWS[0], ROWS[0] | {"prompt": " "}])
    dataset = PreferenceDataset(rows, llama3, max_length=64, as_chat=True, skipped=skipped)
    assert [(row.index, row.where) for row in dataset.skipped] == [(0, "source, row 0"), (2, "source, row 2")]
    assert dataset.skipped[1].reason == "Expected a prompt to wrap as a user message (`as_chat=True`), but got ' '."
    assert (len(dataset), dataset.num_rows, dataset.num_dropped) == (1, 3, 2)


def test_nothing_left_is_an_error(no_specials):
    with pytest.raises(ValueError, match=r"Expected preference pairs with tokens in both .*none in 1 rows"):
        PreferenceDataset(_rows(ROWS[1:2]), no_specials, max_length=3)


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
