"""Policy and reference, padded, packed and with shared beginnings: against every sequence alone, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models.policy_and_reference import completion_statistics
from lit_did.models.trial import layout_of, outputs_of
from tests.models.architectures import (
    LAYOUTS,
    PACKED,
    VOCABULARY,
    build,
    double,
    logits_in,
    make_batch,
    true_statistics,
)


def statistics(policy: nn.Module, reference: nn.Module, sequences: Sequences, padding_free: bool, share: bool):
    layout = layout_of(policy, sequences, padding_free=padding_free, share=share)
    with torch.no_grad():
        outputs = outputs_of(reference, layout_of(reference, sequences, padding_free=padding_free, share=share))
    return completion_statistics(outputs_of(policy, layout), outputs, layout.labels, layout.cu_labels)


@pytest.mark.parametrize(("name", "implementation"), PACKED)
def test_statistics_and_gradients_of_every_layout(name, implementation):
    sequences = read_sequences(make_batch())
    models = [build(name, implementation, seed) for seed in (0, 1)]
    exact = [double(model) for model in models]
    weights = torch.linspace(-1, 1, sequences.num_sequences, dtype=torch.float64)

    def gradients(model: nn.Module, statistics) -> list[Tensor | None]:
        objective = (statistics.log_ratio * weights).sum() + statistics.token_did_entropy.sum()
        return torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)

    truth = true_statistics(*exact, sequences)
    truths = gradients(exact[0], truth)
    assert truth.log_ratio.abs().max() > 0.5  # the premise: the models differ
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(kept in memory|are padded).*")
        assert outputs_of(models[0], layout_of(models[0], sequences)).hidden is not None
    sizes = set()
    if True:
        for padding_free, share in LAYOUTS.values():
            sizes.add(
                layout_of(models[0], sequences, padding_free=padding_free, share=share).inputs["input_ids"].numel()
            )
            ours = statistics(*models, sequences, padding_free, share)
            for field, value in ours._asdict().items():
                torch.testing.assert_close(
                    value.double(),
                    getattr(truth, field).double(),
                    rtol=1e-5,
                    atol=1e-4,
                    msg=f"{padding_free, share, field}",
                )
            for (parameter, _), gradient, expected in zip(
                models[0].named_parameters(), gradients(models[0], ours), truths, strict=True
            ):
                assert (gradient is None) == (expected is None), parameter
                if gradient is not None:  # norms below a thousandth of the largest are sums that cancel
                    floor = 1e-3 * max(g.norm() for g in truths if g is not None)
                    assert (gradient - expected).norm() <= 1e-4 * (expected.norm() + floor), (
                        padding_free,
                        share,
                        parameter,
                    )
    assert len(sizes) == 3  # the premise: neither padding nor what is shared


@pytest.mark.parametrize(("name", "implementation"), [("Llama", "sdpa"), ("Gemma2", "eager")])
def test_bfloat16(name, implementation):
    sequences = read_sequences(make_batch())
    models = [build(name, implementation, seed).bfloat16() for seed in (0, 1)]
    with torch.no_grad():
        truth = true_statistics(*map(double, models), sequences)
        errors = {}
        for layout, (padding_free, share) in LAYOUTS.items():
            ours = statistics(*models, sequences, padding_free, share)
            errors[layout] = (ours.log_ratio - truth.log_ratio).square().mean().sqrt().item()
    assert layout_of(models[0], sequences).packing == "segments"
    # As wrong as the model itself is in its precision: other roundings, no more of them.
    assert errors["packed"] <= 2 * errors["padded"]
    assert errors["shared"] <= 2 * errors["padded"]
    assert errors["padded"] < 0.05 * truth.log_ratio.abs().max()


@pytest.mark.parametrize(("name", "implementation"), PACKED)
def test_no_sequence_sees_another(name, implementation):
    model, batch = build(name, implementation), make_batch()
    other = {key: value.clone() for key, value in batch.items()}
    inside = other["attention_mask"][1].bool()
    other["input_ids"][1, inside] = (other["input_ids"][1, inside] + 7) % VOCABULARY
    one, two = (read_sequences(b) for b in (batch, other))
    for share in (False, True):
        before, after = (logits_in(model, s, share=share).split([12, 7, 2, 7, 12, 6]) for s in (one, two))
        for i in (0, 2, 3, 5):  # 1 and 4 are a pair: what they share changes shape
            torch.testing.assert_close(after[i], before[i], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[1], before[1], atol=1e-2)
