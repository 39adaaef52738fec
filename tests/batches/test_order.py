"""Batches whose pairs are out of order are refused, and no batch in order is."""

from __future__ import annotations

import pytest
import torch

from lit_did import LitDPO
from lit_did.batches.checks import checked_sequences
from lit_did.batches.order import check_pairs
from lit_did.batches.reading import read_batch
from lit_did.batches.sequences import read_sequences
from lit_did.data.collating import collate_packed
from lit_did.data.dataset import Example
from tests.modules.tiny import collate, make_pairs, tiny_llama


def in_turn(batch: dict) -> dict:
    order = torch.arange(len(batch["labels"])).view(2, -1).T.flatten()
    return {name: value[order] for name, value in batch.items()}


def rows(*pairs) -> dict:
    """A batch of (prompt of the chosen one, its completion, prompt of the rejected one, its completion)."""
    sequences = [(p, c) for p, c, _, _ in pairs] + [(q, r) for _, _, q, r in pairs]
    doubled = collate([(prompt, completion, completion) for prompt, completion in sequences])
    return {name: value[: len(sequences)] for name, value in doubled.items()}


@pytest.mark.parametrize("pairs", [2, 3, 8])
def test_chosen_and_rejected_in_turn_are_refused(pairs):
    batch = in_turn(collate(make_pairs(pairs)))
    message = rf"chosen sequences first .* in turn: .* sequences k and k \+ {pairs} do not.*rows\[0::2\], rows\[1::2\]"
    with pytest.raises(ValueError, match=message):
        checked_sequences(batch)
    module = LitDPO(tiny_llama())
    for step in (module, module.pair_statistics, lambda b: module.training_step(b, 0)):
        with pytest.raises(ValueError, match="in turn"):
            step(batch)
    remedy = {name: torch.cat([value[0::2], value[1::2]]) for name, value in batch.items()}
    checked_sequences(remedy)


def test_packed_batches_too():
    examples = [
        Example(*(torch.tensor(ids).numpy() for ids in pair), index=i, weight=1.0)
        for i, pair in enumerate(make_pairs(3))
    ]
    batch = collate_packed(examples)
    checked_sequences(batch)
    lengths, bounds = batch["cu_seqlens"].diff(), batch["cu_seqlens"]
    pieces = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in (0, 3, 1, 4, 2, 5)])
    turned = {name: batch[name][:, pieces] for name in ("input_ids", "labels")}
    turned["cu_seqlens"] = torch.cat([torch.zeros(1), lengths[[0, 3, 1, 4, 2, 5]].cumsum(0)]).to(bounds.dtype)
    with pytest.raises(ValueError, match="in turn"):
        checked_sequences(turned)


A, B, C, D = [5, 6, 7, 8], [9, 10, 11], [12, 13], [14, 15, 16]


@pytest.mark.parametrize(
    "pairs",
    [
        [(A, [1, 2], A, [3])],  # one pair
        [(A, [1, 2], B, [3])],
        [(A, [1], A, [2]), (A, [3], A, [4]), (A, [2], A, [2])],  # the same prompt everywhere
        [(A, [1], A, [2]), (A, [3], A, [4]), (B, [1], B, [2]), (B, [3], B, [4])],  # two pairs a prompt, in order
        [(A, [1], B, [2]), (C, [3], D, [4])],  # pairs without a common prompt
        [(A, [1], A[1:], [2]), (A, [3], A[1:], [4])],  # the longer side's prompt was cut
        [(A, [1], A[:3], [2]), (A, [3], A[:3], [4])],
        [(A, [1], B, [2]), (A, [3], C, [4])],  # some rows beside each other alike by chance
    ],
)
def test_batches_in_order_are_no_alarm(pairs):
    checked_sequences(rows(*pairs))


def test_a_shared_prompt_does_not_hide_the_others():
    """Two of three pairs have the same prompt, so that one row agrees with the one half a batch later."""
    batch = collate([(A, [1], [2]), (A, [3], [4]), (B, [1], [2])])
    checked_sequences(batch)
    with pytest.raises(ValueError, match="in turn"):
        checked_sequences(in_turn(batch))


def unpadded(*rows):
    """The sequences of (prompt, completion) token lists, as another trainer's batch gives them."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    completion_mask = torch.zeros_like(mask)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, : len(prompt) + len(completion)] = 1
        completion_mask[row, len(prompt) : len(prompt) + len(completion)] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion_mask}
    return read_sequences(read_batch(batch))


MERGED = (A, A, [*A[:-1], 19], [*A[:-1], 19])


@pytest.mark.parametrize(
    "prompts",
    [(A, B, A, B), (A, A), (A, A, A, A), ([10], [11]), (B, B[2:]), (B, B[:2]), MERGED[1:3], MERGED, (A, B, A, C)],
    ids=["pairs", "one", "of one prompt", "a token", "cut left", "cut right", "merged", "merged twice", "one of two"],
)
def test_pairs_are_recognised(prompts):
    check_pairs({}, unpadded(*((prompt, [20 + row]) for row, prompt in enumerate(prompts))))


@pytest.mark.parametrize(
    ("batch", "prompts", "message"),
    [
        ({"label": torch.ones(2)}, (A, A), "got a batch with a `label` for each sequence. Pass `pairs=False`"),
        ({}, (A, A, A), "an even number of sequences, .* but got 3. Pass `pairs=False`"),
        ({}, (A, A, B, B), "got them in turn"),
        ({}, (A, A, A, A, B, B), "got them in turn"),
        ({}, (A, B), "no sequence of the first half has the prompt of its partner .* Pass `pairs=False`"),
        ({}, (A, B, C, A), "no sequence of the first half has the prompt"),
    ],
    ids=["label", "odd", "interleaved", "interleaved, a prompt twice", "others", "another order"],
)
def test_what_is_no_pair_is_refused(batch, prompts, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(batch, unpadded(*((prompt, [20]) for prompt in prompts)))
