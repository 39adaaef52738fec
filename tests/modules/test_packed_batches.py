"""Batches that lie end to end, as `PreferenceDataModule(padding_free=True)` makes them."""

from __future__ import annotations

import pytest
import torch

from lit_did.data.collating import collate_packed
from tests.modules.steps import PLAIN, assert_same, examples, loader, make, train
from tests.modules.tiny import trainer


@pytest.mark.parametrize("switches", [PLAIN, {}])
def test_packed_batches_are_what_padded_ones_are(switches, recwarn):
    assert_same(train(make(**switches), loader(packed=True)), train(make(**PLAIN)))
    module, plain = make(**switches), make(**PLAIN)
    run, expected = trainer(), trainer()
    run.validate(module, loader(packed=True), verbose=False)
    expected.validate(plain, loader(), verbose=False)
    assert run.callback_metrics.keys() == expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        assert run.callback_metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    for one, other in zip(
        trainer().predict(module, loader(packed=True)), trainer().predict(plain, loader()), strict=True
    ):
        assert torch.equal(one.index, other.index)
        torch.testing.assert_close(one.reward_margin, other.reward_margin, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.rejected.kl, other.rejected.kl, rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "batch_size" in str(w.message) and "ambiguous" in str(w.message)]


def test_packed_batches_have_no_use_for_a_mask():
    batch, module = collate_packed(examples(2)), make()
    expected = module.pair_statistics(batch).loss
    for mask in (torch.zeros_like(batch["input_ids"]), torch.ones(1, 1, 5, 5)):
        assert torch.equal(module.pair_statistics(batch | {"attention_mask": mask}).loss, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding_free": 1}, TypeError, "`padding_free` to be a bool, but got 1"),
        ({"share_prompts": None}, TypeError, "`share_prompts` to be a bool, but got None"),
        (
            {"micro_batch_tokens": 0},
            ValueError,
            "`micro_batch_tokens` to be an integer of at least 1, 'auto' or None, but got 0",
        ),
        ({"micro_batch_tokens": True}, TypeError, "`micro_batch_tokens` to be an integer of at least 1, .* got True"),
        ({"micro_batch_tokens": "all"}, TypeError, "`micro_batch_tokens` to be an integer of at least 1, .* got 'all'"),
    ],
)
def test_switches_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)
