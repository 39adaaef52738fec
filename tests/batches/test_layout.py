"""How the sequences of a batch lie in what a model is given: against plain Python over lists of tokens."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from lit_did.batches.layout import SHORTEST_SHARED, packed_layout, padded_layout
from lit_did.batches.sequences import read_sequences, split_pairs

CPU = torch.device("cpu")
PROMPT = list(range(20, 20 + SHORTEST_SHARED))
PAIRS = [  # (prompt, chosen, rejected)
    (PROMPT, [1, 2, 3], [4, 5]),
    (PROMPT, [1, 2, 3, 4], [1, 2, 9, 9, 9]),  # in common: more than the prompt
    (PROMPT, [6, 7, 8], [6, 7, 8]),  # identical
    (PROMPT, [6, 7], [6, 7, 8, 9]),  # one is the beginning of the other
    ([20, 21], [1, 2], [3]),  # too little in common
    (PROMPT, [1], [2]),  # nothing but the prompt in common, and nothing after it but labels
]


def examples() -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every sequence, the chosen ones first; the last pair has no beginning in common."""
    chosen = [(p, c) for p, c, _ in PAIRS] + [([*PROMPT[:3], 50, *PROMPT[4:]], [5, 6])]
    rejected = [(p, r) for p, _, r in PAIRS] + [(PROMPT[::-1], [5, 6, 7])]
    return chosen + rejected


def expected(examples) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of every sequence: a completion's last token is no input."""
    return [((p + c)[:-1], [-100] * (len(p) - 1) + c) for p, c in examples]


def padded_batch(examples, side: str = "right") -> dict[str, torch.Tensor]:
    """Longer by two than the longest, with a tail that nothing is asked of after every completion."""
    tail = [60, 61]
    length = max(len(p) + len(c) for p, c in examples) + len(tail) + 2
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: torch.full((len(examples), length), -100 if name == "labels" else 0) for name in names}
    for row, (prompt, completion) in enumerate(examples):
        ids = prompt + completion + tail
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][row, place] = torch.tensor(ids)
        batch["attention_mask"][row, place] = 1
        first = place.start + len(prompt) - 1
        batch["labels"][row, first : first + len(completion)] = torch.tensor(completion)
    return batch


def packed_batch(examples) -> dict[str, torch.Tensor]:
    lengths = [len(p) + len(c) for p, c in examples]
    return {
        "input_ids": torch.tensor([[token for p, c in examples for token in p + c]]),
        "labels": torch.tensor([[x for p, c in examples for x in [-100] * (len(p) - 1) + c + [-100]]]),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    }


def unpacked(sequences) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        tuple(array[sequences.slice(i)].tolist() for array in (sequences.input_ids, sequences.labels))
        for i in range(sequences.num_sequences)
    ]


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
