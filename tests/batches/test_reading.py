"""read_batch: one reading of every form in which trainers hold a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import BatchEncoding
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lit_did.batches.reading import read_batch
from tests.modules.tiny import collate, make_pairs


def test_every_form_is_read_alike():
    pairs = make_pairs(5)
    shifted = collate(pairs)
    transformers_labels = shifted | {"labels": shifted["labels"].roll(1, 1)}
    half = {
        side: {name: value[part] for name, value in transformers_labels.items()}
        for side, part in (("chosen_", slice(0, 5)), ("rejected_", slice(5, 10)))
    }
    by_side = {f"{side}{name}": value for side, batch in half.items() for name, value in batch.items()}
    # TRL's own collator, on the same ids
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    trl = DataCollatorForPreference(pad_token_id=0)(rows)
    packed, packed_trl = end_to_end(shifted), end_to_end(trl)
    for batch in (
        *(shifted, transformers_labels, BatchEncoding(transformers_labels), by_side, trl, packed, packed_trl),
        end_to_end(transformers_labels) | {"attention_mask": torch.ones_like(packed["input_ids"])},
    ):
        read = read_batch(batch)
        assert read.keys() == shifted.keys()
        for name, value in shifted.items():
            assert torch.equal(read[name], value), name


def end_to_end(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    present = batch["attention_mask"].bool()
    lengths = present.sum(1)
    values = {name: value[present][None] for name, value in batch.items() if name != "attention_mask"}
    return values | {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])}


def test_sides_of_unequal_lengths_are_padded():
    one = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    other = {"input_ids": torch.tensor([[5, 8]]), "labels": torch.tensor([[-100, 8]])}
    batch = {f"chosen_{n}": v for n, v in one.items()} | {f"rejected_{n}": v for n, v in other.items()}
    read = read_batch(batch)
    assert read["input_ids"].tolist() == [[5, 6, 7], [5, 8, 0]]
    assert read["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert read["labels"].tolist() == [[6, 7, -100], [8, -100, -100]]


def test_completions_that_begin_the_sequence_and_left_padding():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1]]),
    }
    # Nothing predicts a first token.
    assert read_batch(batch)["labels"].tolist() == [[-100, -100, 6, -100], [4, -100, 6, -100]]


def test_repeated_tokens_are_read_as_transformers_means_them():
    batch = {"input_ids": torch.tensor([[5, 5, 5, 5]]), "labels": torch.tensor([[-100, -100, 5, 5]])}
    assert read_batch(batch)["labels"].tolist() == [[-100, 5, 5, -100]]


def test_weight_and_position_ids():
    batch = collate(make_pairs(2)) | {"weight": torch.tensor([1.0, 0.0])}
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    read = read_batch(batch)
    assert [(row != -100).any().item() for row in read["labels"]] == [True, False, True, False]
    assert torch.equal(read["position_ids"], batch["position_ids"])
    assert torch.equal(
        read_batch(batch | {"position_ids": batch["position_ids"][:1]})["position_ids"], read["position_ids"]
    )


def test_inputs_and_labels_cut_from_longer_sequences():
    """x = ids[:, :-1] and y = ids[:, 1:]: the last label is no input."""
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    labels = torch.tensor([[-100, 3, 4], [6, 7, -100]])
    assert torch.equal(read_batch({"input_ids": ids[:, :-1], "labels": labels})["labels"], labels)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([IDS], TypeError, "the batch to be a mapping, but got list"),
        ({"input_ids": IDS, "labels": [[1, 2, 3]]}, TypeError, "`labels` of the batch to be a tensor, but got list"),
        ({}, ValueError, "hold `input_ids` and `labels` or `completion_mask`.*but got nothing"),
        ({"input_ids": IDS, "x": 1}, ValueError, "but got input_ids, x"),
        ({"input_ids": IDS, "labels": IDS[0]}, ValueError, r"`labels` to have the shape .*\(1, 3\), but got \(3,\)"),
        ({"input_ids": IDS, "labels": torch.tensor([[7, 7, 7]])}, ValueError, "shifted by one position or not, but"),
        ({"input_ids": IDS, "labels": IDS, "pixel_values": IDS}, ValueError, "text only"),
        ({"input_ids": IDS, "labels": IDS, "cu_seqlens": IDS[0]}, ValueError, "`cu_seqlens` to rise from 0"),
    ],
)
def test_other_batches_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        read_batch(batch)


ENDS = torch.tensor([0, 3, 5])
PACKED = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "labels": torch.tensor([[-100, 2, 3, -100, 5]])}


@pytest.mark.parametrize(
    "where",
    [
        {"cu_seqlens": ENDS},
        {"cu_seq_lens_q": ENDS.int(), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        {"position_ids": torch.tensor([[2, 3, 4, 2, 3]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "attention_mask": torch.ones(1, 5)},
    ],
    ids=lambda where: "-".join(where),
)
def test_sequences_end_to_end_in_every_spelling(where):
    read = read_batch(PACKED | where)
    assert read["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert read["labels"].tolist() == [[2, 3, -100], [5, -100, -100]]
    assert read["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_positions_that_do_not_begin_again_are_no_ends():
    ids = torch.tensor([[9, 9, 1, 2, 3], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "completion_mask": mask}
    assert read_batch(batch)["input_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="several rows, one of which holds several sequences"):
        read_batch(batch | {"position_ids": torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 0, 1]])})
