"""Batches against tensors written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_did.data.collating import IGNORE_INDEX, collate_packed, collate_pairs
from lit_did.data.dataset import Example
from lit_did.data.tokenizing import Context

X = IGNORE_INDEX
EOS = 9


def _example(prompt, chosen, rejected, index=0, weight=1.0) -> Example:
    return Example(*(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)), index, weight)


def test_batch_by_hand_with_pad_equal_to_eos():
    examples = [_example([1, 2], [3, EOS], [4, 5, EOS], 7), _example([6], [EOS, EOS], [8], 3, 0.0)]
    batch = collate_pairs(examples, pad_token_id=EOS)
    expected = {
        "input_ids": [[1, 2, 3, 9, 9], [6, 9, 9, 9, 9], [1, 2, 4, 5, 9], [6, 8, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        # EOS tokens of the completion are labels, the same id as padding is not.
        "labels": [[X, 3, 9, X, X], [9, 9, X, X, X], [X, 4, 5, 9, X], [8, X, X, X, X]],
        "index": [7, 3],
        "weight": [1.0, 0.0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        **dict.fromkeys(expected, torch.int64),
        "weight": torch.float32,
    }


def test_other_turns_have_no_labels():
    between = Context(*(np.array(values) for values in ([70, 71, 72], [1, 1, 2])))  # 3 (70 71) 4 (72) EOS
    first = Context(np.array([80]), np.array([0]))
    example = Example(*(np.array(ids) for ids in ([1, 2], [3, 4, EOS], [5])), 0, 1.0, between, first)
    padded, packed = collate_pairs([example], pad_token_id=0), collate_packed([example])
    assert padded["input_ids"].tolist() == [[1, 2, 3, 70, 71, 4, 72, EOS], [1, 2, 80, 5, 0, 0, 0, 0]]
    assert padded["labels"].tolist() == [[X, 3, X, X, 4, X, EOS, X], [X, X, 5, X, X, X, X, X]]
    assert padded["attention_mask"].sum(1).tolist() == [8, 4]
    assert packed["input_ids"].tolist() == [[1, 2, 3, 70, 71, 4, 72, EOS, 1, 2, 80, 5]]
    assert packed["labels"].tolist() == [[X, 3, X, X, 4, X, EOS, X, X, X, 5, X]]
    assert packed["cu_seqlens"].tolist() == [0, 8, 12]


def test_labels_are_the_next_token_and_each_completion_token_is_one_label():
    rng = np.random.default_rng(0)
    examples = [_example(*(rng.integers(0, 5, rng.integers(1, 9)) for _ in range(3)), index) for index in range(16)]
    batch = collate_pairs(examples, pad_token_id=0)  # an id that is a token too
    labels, ids = batch["labels"], batch["input_ids"]
    assert (labels[:, -1] == X).all()
    is_label = labels != X
    assert (labels[:, :-1][is_label[:, :-1]] == ids[:, 1:][is_label[:, :-1]]).all()
    for row in range(32):
        example = examples[row % 16]
        completion = (example.chosen_ids if row < 16 else example.rejected_ids).tolist()
        assert labels[row][is_label[row]].tolist() == completion
        tokens = ids[row][batch["attention_mask"][row] == 1].tolist()
        assert tokens == example.prompt_ids.tolist() + completion
    longest = max(len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in examples)
    assert ids.shape == (32, longest)


def test_causal_model_gives_a_sequence_the_same_logits_in_any_batch():
    # A causal stand-in: position t sees the tokens up to t.
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    short, long = _example([1], [2], [3]), _example([4], [5] * 9, [6])
    alone = table[collate_pairs([short], 0)["input_ids"]].cumsum(1)
    together = table[collate_pairs([long, short], 0)["input_ids"]].cumsum(1)
    assert together.shape[1] > alone.shape[1]  # the premise: padding was added
    torch.testing.assert_close(together[[1, 3], :2], alone)


def test_packed_batch_by_hand():
    examples = [_example([1, 2], [3, EOS], [4, 5, EOS], 7), _example([6], [EOS, EOS], [8], 3, 0.0)]
    batch = collate_packed(examples)
    expected = {
        "input_ids": [[1, 2, 3, 9, 6, 9, 9, 1, 2, 4, 5, 9, 6, 8]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1]],
        "labels": [[X, 3, 9, X, 9, 9, X, X, 4, 5, 9, X, 8, X]],
        "cu_seqlens": [0, 4, 7, 12, 14],
        "index": [7, 3],
        "weight": [1.0, 0.0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        **dict.fromkeys(expected, torch.int64),
        "cu_seqlens": torch.int32,
        "weight": torch.float32,
    }


@pytest.mark.parametrize("pairs", [1, 13])
def test_unpacked_rows_are_those_of_collate_pairs(pairs):
    rng = np.random.default_rng(1)
    examples = [_example(*(rng.integers(0, 5, rng.integers(1, 9)) for _ in range(3)), n, n % 2) for n in range(pairs)]
    packed, padded = collate_packed(examples), collate_pairs(examples, pad_token_id=0)
    bounds = packed["cu_seqlens"].tolist()
    assert len(bounds) == 2 * pairs + 1
    assert packed["input_ids"].shape == packed["labels"].shape == packed["position_ids"].shape == (1, bounds[-1])
    for row, mask in enumerate(padded["attention_mask"].bool()):
        here = slice(bounds[row], bounds[row + 1])
        assert packed["input_ids"][0, here].tolist() == padded["input_ids"][row][mask].tolist()
        assert packed["labels"][0, here].tolist() == padded["labels"][row][mask].tolist()
        assert packed["position_ids"][0, here].tolist() == list(range(mask.sum()))
    for name in ("index", "weight"):
        torch.testing.assert_close(packed[name], padded[name])
