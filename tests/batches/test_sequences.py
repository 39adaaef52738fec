"""Sequences read from batches, selected and split into micro-batches: against plain Python over lists of tokens."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from lit_did.batches.sequences import read_sequences, split_into, split_pairs
from tests.batches.samples import examples, expected, packed_batch, padded_batch, unpacked


@pytest.mark.parametrize(
    "batch", [padded_batch(examples()), padded_batch(examples(), "left"), packed_batch(examples())]
)
def test_every_batch_holds_the_same_sequences(batch):
    sequences = read_sequences(batch)
    assert unpacked(sequences) == expected(examples())
    assert sequences.num_labels == sum(len(c) for _, c in examples())
    lengths = [len(ids) for ids, _ in expected(examples())]
    assert sequences.position_ids.tolist() == [t for length in lengths for t in range(length)]
    assert np.diff(sequences.cu_seqlens).tolist() == lengths


def test_position_ids_of_the_batch_are_kept():
    batch = padded_batch(examples(), "left")
    length = batch["input_ids"].shape[1]
    for position_ids in (torch.arange(length).expand_as(batch["input_ids"]), torch.arange(length)[None]):
        sequences = read_sequences(batch | {"position_ids": position_ids})
        for row, (prompt, completion) in enumerate(examples()):
            start = length - len(prompt + completion) - 2  # the tail
            kept = sequences.position_ids[sequences.slice(row)]
            assert kept.tolist() == list(range(start, start + len(prompt + completion) - 1))


def test_select():
    sequences = read_sequences(padded_batch(examples()))
    chosen = sequences.select([3, 0, 3])
    assert unpacked(chosen) == [expected(examples())[i] for i in (3, 0, 3)]
    nothing = sequences.select([])
    assert (nothing.num_sequences, nothing.num_labels, len(nothing.position_ids)) == (0, 0, 0)


@pytest.mark.parametrize("form", [padded_batch, packed_batch])
def test_whole_sequences_have_what_follows_their_last_label(form):
    given = examples()
    batch = form(given)
    if form is padded_batch:
        rows = [row[mask != 0].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    else:
        rows = [row.tolist() for row in batch["input_ids"][0].split(batch["cu_seqlens"].diff().tolist())]
    sequences = read_sequences(batch)
    assert sequences.num_labels == sequences.whole().num_labels
    for indices in (range(len(given)), [3, 1]):
        whole = sequences.select(indices).whole()
        assert whole.positions_count_from_zero
        got = [whole.input_ids[whole.slice(i)].tolist() for i in range(whole.num_sequences)]
        assert got == [rows[i] for i in indices]
        for index, row in enumerate(indices):
            own, labels = sequences.slice(row), whole.labels[whole.slice(index)]
            assert labels.tolist() == [*sequences.labels[own].tolist(), *[-100] * (len(labels) - own.stop + own.start)]
        assert whole.whole() is whole


def test_parts_hold_every_pair_once_in_order_and_within_the_budget():
    sequences = read_sequences(padded_batch(examples()))
    truth, pairs = expected(examples()), sequences.num_sequences // 2
    sizes = [len(truth[i][0]) + len(truth[pairs + i][0]) for i in range(pairs)]
    for tokens in (1, max(sizes), sizes[0] + sizes[1], sizes[0] + sizes[1] - 1, 50, sum(sizes) - 1, sum(sizes)):
        parts = split_pairs(sequences, tokens)
        halves = [
            (unpacked(part)[: part.num_sequences // 2], unpacked(part)[part.num_sequences // 2 :]) for part in parts
        ]
        assert [s for first, _ in halves for s in first] == truth[:pairs]
        assert [s for _, second in halves for s in second] == truth[pairs:]
        lengths = [len(part.input_ids) for part in parts]
        assert all(length <= tokens or part.num_sequences == 2 for length, part in zip(lengths, parts, strict=True))
        # Of all ways to cut the pairs: the fewest parts, and of those the smallest largest one.
        ways = [
            [sum(sizes[a:b]) for a, b in pairwise((0, *cuts, pairs))]
            for count in range(pairs)
            for cuts in combinations(range(1, pairs), count)
        ]
        fits = [way for way in ways if all(size <= tokens or size in sizes for size in way)]
        best = min((len(way), max(way)) for way in fits)
        assert (len(lengths), max(lengths)) == best


def test_a_given_number_of_parts_holds_every_pair_once_in_order():
    sequences = read_sequences(padded_batch(examples()))
    truth, pairs = expected(examples()), sequences.num_sequences // 2
    for count in range(1, pairs + 1):
        parts = split_into(sequences, count)
        assert len(parts) == count
        assert min(part.num_sequences for part in parts) >= 2
        halves = [
            (unpacked(part)[: len(part.cu_seqlens) // 2], unpacked(part)[len(part.cu_seqlens) // 2 :]) for part in parts
        ]
        assert [s for first, _ in halves for s in first] == truth[:pairs]
        assert [s for _, second in halves for s in second] == truth[pairs:]


@pytest.mark.parametrize(("lengths", "counts"), [([9, 1, 1, 1], [1, 3]), ([1, 1, 1, 9], [3, 1]), ([3] * 6, [2, 2, 2])])
def test_a_given_number_of_parts_has_even_tokens(lengths, counts):
    tokens = torch.ones(1, 2 * sum(lengths), dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *np.cumsum([*lengths, *lengths])])
    batch = {"input_ids": tokens, "labels": tokens, "cu_seqlens": cu_seqlens}
    parts = split_into(read_sequences(batch), len(counts))
    assert [part.num_sequences // 2 for part in parts] == counts
