"""How the sequences of a batch lie in a model's arguments: against plain Python over lists of tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lit_did.batches.layout import SHORTEST_SHARED, packed_layout, padded_layout
from lit_did.batches.sequences import read_sequences
from tests.batches.samples import PROMPT, examples, expected, packed_batch, padded_batch, unpacked

CPU = torch.device("cpu")


def test_a_sequence_without_labels_keeps_one_token_and_one_without_tokens_none():
    batch = padded_batch(examples()[:4])
    batch["labels"][1] = -100
    batch["attention_mask"][2] = 0
    sequences = read_sequences(batch)
    truth = expected(examples()[:4])
    truth[1], truth[2] = ([PROMPT[0]], [-100]), ([], [])
    assert unpacked(sequences) == truth
    for layout in (packed_layout(sequences, CPU, share=True), padded_layout(sequences, CPU)):
        assert layout.cu_labels.diff().tolist() == [3, 0, 0, 2]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("odd", [False, True])
def test_packed(share, odd):
    given = examples()[:-1] if odd else examples()
    sequences = read_sequences(padded_batch(given))
    layout = packed_layout(sequences, CPU, share=share)
    segments = layout.inputs["attention_mask"][0, 0].tolist()
    bounds = np.cumsum([0, *(length for length, _ in segments)]).tolist()
    ids, positions = (layout.inputs[name][0].tolist() for name in ("input_ids", "position_ids"))
    assert len(ids) == len(positions) == bounds[-1]

    def visible(place: int) -> list[int]:
        """Where the tokens are that the one at `place` attends to."""
        segment = next(i for i, (start, stop) in enumerate(pairwise(bounds)) if start <= place < stop)
        before = segments[segment][1]
        assert before < segment
        shared = [] if before < 0 else list(range(bounds[before], bounds[before + 1]))
        assert before < 0 or segments[before][1] == -1  # what is continued continues nothing
        return shared + list(range(bounds[segment], place + 1))

    starts = layout.cu_labels.tolist()
    for i, (inputs, labels) in enumerate(expected(given)):
        rows = layout.rows[starts[i] : starts[i + 1]].tolist()
        labelled = [t for t, label in enumerate(labels) if label != -100]
        assert layout.labels[starts[i] : starts[i + 1]].tolist() == [labels[t] for t in labelled]
        for row, t in zip(rows, labelled, strict=True):  # every prediction is made of its sequence's own tokens
            assert [ids[place] for place in visible(row)] == inputs[: t + 1]
            assert [positions[place] for place in visible(row)] == list(range(t + 1))
    assert starts[-1] == len(layout.rows) == len(layout.labels)

    saved = len(sequences.input_ids) - len(ids)
    if share and not odd:
        beginnings = [8, 10, 10, 9, 0, 8, 0]  # of the pairs' inputs, which end before the last completion token
        assert saved == sum(beginnings)
    else:
        assert saved == 0
        assert [before for _, before in segments] == [-1] * len(given)


def test_beginnings_at_other_positions_are_not_shared():
    batch = packed_batch([(PROMPT, [1, 2]), (PROMPT, [3, 4])])
    positions = torch.arange(len(PROMPT) + 2).repeat(2)[None]
    assert len(packed_layout(read_sequences(batch), CPU, share=True).inputs["input_ids"][0]) == 8 + 2
    moved = positions + 3 * (torch.arange(positions.shape[1]) >= len(PROMPT) + 2)
    layout = packed_layout(read_sequences(batch | {"position_ids": moved}), CPU, share=True)
    assert layout.inputs["position_ids"].tolist() == [[*range(9), *range(3, 12)]]


def test_how_much_in_common_is_shared():
    for length in (SHORTEST_SHARED - 1, SHORTEST_SHARED):
        sequences = read_sequences(packed_batch([(PROMPT[:length], [1, 2]), (PROMPT[:length], [3, 4])]))
        saved = len(sequences.input_ids) - packed_layout(sequences, CPU, share=True).inputs["input_ids"].shape[1]
        assert saved == (length if length == SHORTEST_SHARED else 0)


def test_padded():
    sequences = read_sequences(packed_batch(examples()))
    layout = padded_layout(sequences, CPU)
    truth = expected(examples())
    longest = max(len(ids) for ids, _ in truth)
    assert set(layout.inputs) == {"input_ids", "attention_mask"}
    present = layout.inputs["attention_mask"]
    assert present.tolist() == [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in truth]
    for row, (ids, _) in enumerate(truth):
        assert layout.inputs["input_ids"][row, : len(ids)].tolist() == ids
    places = [(row, t) for row, (_, labels) in enumerate(truth) for t, label in enumerate(labels) if label != -100]
    assert layout.rows.tolist() == [row * longest + t for row, t in places]
    assert layout.labels.tolist() == [truth[row][1][t] for row, t in places]
    assert layout.cu_labels.tolist() == [0, *np.cumsum([len(c) for _, c in examples()])]


def test_padded_gives_positions_that_a_model_would_not_count():
    batch = padded_batch(examples(), "left")
    positions = 5 + torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    sequences = read_sequences(batch | {"position_ids": positions})
    layout = padded_layout(sequences, CPU)
    present = layout.inputs["attention_mask"].bool()
    assert layout.inputs["position_ids"][present].tolist() == sequences.position_ids.tolist()


def test_no_sequences():
    nothing = read_sequences(padded_batch(examples())).select([])
    for layout in (padded_layout(nothing, CPU), packed_layout(nothing, CPU, share=True)):
        assert (layout.rows.tolist(), layout.labels.tolist(), layout.cu_labels.tolist()) == ([], [], [0])
