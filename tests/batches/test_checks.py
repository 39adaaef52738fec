"""Every way in which a batch can be wrong is refused, and the error names it."""

from __future__ import annotations

import pytest
import torch

from lit_did.batches.checks import checked_sequences
from lit_did.data.collating import collate_packed
from tests.modules.steps import examples
from tests.modules.tiny import VOCABULARY, collate, make_pairs

SPOILED = [
    (lambda b: b.pop("labels"), "hold `labels`, but got input_ids, attention_mask"),
    (lambda b: b.clear(), "hold `input_ids`, but got nothing"),
    (lambda b: b.update(labels=b["labels"].roll(1, 1)), r"labels that are not shifted"),
    (
        lambda b: b["labels"].masked_fill_(b["labels"] == -100, 0),
        r"got 0 where \d+ follows, in row 0 at position 0\.",
    ),
    (lambda b: b["labels"].add_(200 * (b["labels"] != -100)), r"but got 2\d\d where \d+ follows, in row 0 at position"),
    (lambda b: b["labels"][3, -1:].fill_(9), r"but got 9 where no token follows, in row 3 at position \d+\."),
    (
        lambda b: b.update(labels=b["labels"][:, 1:]),
        r"`labels` to have the shape of `input_ids`, \(4, \d+\), but got \(4",
    ),
    (lambda b: b.update(attention_mask=b["attention_mask"][:1]), r"`attention_mask` to have the shape of `input_ids`"),
    (
        lambda b: b.update({k: v[0] for k, v in b.items()}),
        r"`input_ids` to have the shape \[2 pairs, T\], but got \(\d+,",
    ),
    (lambda b: b.update({k: v[:, :0] for k, v in b.items()}), r"`input_ids` to have the shape \[2 pairs, T\], but got"),
    (lambda b: b["labels"].fill_(-100), "4 of 4 sequences have none.* The first is sequence"),
    (lambda b: b["labels"][2].fill_(-100), "1 of 4 sequences have none.* The first is sequence"),
    (lambda b: b["attention_mask"][1].fill_(0), "1 of 4 sequences have none.* The first is sequence"),
    (lambda b: b.update({k: v[:3] for k, v in b.items()}), r"even number of sequences.* but got 3: `input_ids` of the"),
    (
        lambda b: b.update(position_ids=torch.arange(4)),
        r"`position_ids` to have the shape of `input_ids`, \(4, \d+\), or of one row, but got \(4,\)",
    ),
    (lambda b: b["input_ids"][0, :1].fill_(-1), "`input_ids` to be at least 0, but got -1"),
    (lambda b: b["input_ids"][0, :1].fill_(67), "`input_ids` to be below the policy's 67 embeddings, but got 67"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_padded_batches_in_another_form_are_refused(spoil, message):
    batch = collate(make_pairs(2))
    checked_sequences(batch, num_embeddings=VOCABULARY)
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        checked_sequences(batch, num_embeddings=VOCABULARY)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("labels"), "hold `labels`, but got"),
        (
            lambda b: b.update(labels=b["labels"][0]),
            r"`labels` to have the shape of `input_ids`, \(1, \d+\), but got \(\d+,\)",
        ),
        (lambda b: b.update({k: b[k].repeat(2, 1) for k in ("input_ids", "labels")}), r"shape \[1, tokens\] with"),
        (lambda b: b.update(cu_seqlens=b["cu_seqlens"][None]), "`cu_seqlens` to rise from 0 to the number of tokens"),
        (lambda b: b["labels"][0, -1:].fill_(42), "but got 42 where no token follows, in row 0 at position"),
        (
            lambda b: b.update(cu_seqlens=b["cu_seqlens"] - (b["cu_seqlens"] == b["cu_seqlens"][-1]).long()),
            "`cu_seqlens` to rise from 0 to the number of tokens",
        ),
        (lambda b: b.update(cu_seqlens=b["cu_seqlens"][[0, 2, 3, 4]]), "even number of .* 3: `cu_seqlens` with 4"),
        (lambda b: b.update(cu_seqlens=b["cu_seqlens"][[0, 2, 1, 3, 4]]), "`cu_seqlens` to rise"),
        (lambda b: b.update(cu_seqlens=b["cu_seqlens"] + 1), "`cu_seqlens` to rise from 0"),
        (lambda b: b.update(labels=b["labels"].roll(1, 1)), "`labels.*that are not shifted"),
        (
            lambda b: b["labels"][0, b["cu_seqlens"][1] - 1].copy_(b["input_ids"][0, b["cu_seqlens"][1]]),
            "no token",
        ),
        (lambda b: b["labels"][0, : b["cu_seqlens"][1]].fill_(-100), "sequence to have completion tokens"),
        (lambda b: b["input_ids"].fill_(VOCABULARY), f"where {VOCABULARY} follows, in row 0"),
    ],
)
def test_packed_batches_in_another_layout_are_refused(spoil, message):
    batch = collate_packed(examples(2))
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        checked_sequences(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "batch to be a mapping of tensors, but got list"),
        (torch.ones(2, 2), "batch to be a mapping of tensors, but got Tensor"),
        (
            {"input_ids": [[1]], "labels": 0, "attention_mask": 0},
            "`input_ids` of the batch to be a tensor, but got list",
        ),
        (
            collate(make_pairs(1)) | {"labels": torch.ones(2, 9)},
            "`labels` of .* signed integers, but",
        ),
        (
            collate(make_pairs(1)) | {"labels": torch.ones(2, 9).byte()},
            "signed integers, but got torch.uint8",
        ),
    ],
)
def test_batches_of_another_type_are_refused(batch, message):
    with pytest.raises(TypeError, match=message):
        checked_sequences(batch)


def test_a_last_token_of_another_vocabulary_is_refused():
    """It is not an input, but it is a label."""
    batch = collate(make_pairs(1))
    end = batch["attention_mask"][0].sum() - 1
    batch["input_ids"][0, end] = batch["labels"][0, end - 1] = 67
    with pytest.raises(ValueError, match="`input_ids` to be below the policy's 67 embeddings, but got 67"):
        checked_sequences(batch, num_embeddings=VOCABULARY)


def test_offsets_are_integers():
    batch = collate_packed(examples(2))
    with pytest.raises(TypeError, match=r"`cu_seqlens` of the batch to hold signed integers, but got torch\.float32"):
        checked_sequences(batch | {"cu_seqlens": batch["cu_seqlens"].float()})


def test_pairs_of_weight_0_need_no_labels_if_weights_are_read():
    batch = collate(make_pairs(2)) | {"weight": torch.tensor([1.0, 0.0], dtype=torch.bfloat16)}
    batch["labels"][[1, 3]] = -100
    checked_sequences(batch, weighted=True)
    for refused, weighted in ((batch, False), (batch | {"weight": batch["weight"].flip(0)}, True)):
        with pytest.raises(ValueError, match="2 of 4 sequences have none"):
            checked_sequences(refused, weighted=weighted)
