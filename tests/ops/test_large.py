"""More than 2**31 logits a side: offsets that 32 bits do not hold. Up to 14 GB: run with `-m slow`."""

from __future__ import annotations

import pytest
import torch

from lit_did import token_statistics

pytestmark = pytest.mark.slow

VOCABULARY = 32768
ROWS = 70_000  # 2.3e9 logits: 4.6 GB in bfloat16


def test_offsets_beyond_31_bits():
    """Each distant row against the same row alone; the other rows are ignored, so that their pages stay untouched."""
    assert ROWS * VOCABULARY > 2**31
    policy = torch.empty(ROWS, VOCABULARY, dtype=torch.bfloat16)
    reference = torch.randn(1, VOCABULARY, dtype=torch.bfloat16).expand(ROWS, VOCABULARY)  # one row in memory
    rows = torch.tensor([0, 1, 65_535, 65_536, 65_537, ROWS - 1])
    policy[rows] = torch.randn(len(rows), VOCABULARY).bfloat16()
    labels = torch.full((ROWS,), -100)
    labels[rows] = torch.tensor([0, 5, VOCABULARY - 1, 3, 77, VOCABULARY - 1])
    policy.requires_grad_()
    statistics = token_statistics(policy, reference, labels, backend="fused")
    (grad,) = torch.autograd.grad(sum(s.sum() for s in statistics), policy)

    alone = policy.detach()[rows].requires_grad_()
    expected = token_statistics(alone, reference[: len(rows)], labels[rows], backend="fused")
    (expected_grad,) = torch.autograd.grad(sum(s.sum() for s in expected), alone)
    for value, of_alone in zip(statistics, expected, strict=True):
        assert torch.equal(value[rows], of_alone)
        assert value.count_nonzero() == len(rows)
    assert torch.equal(grad[rows], expected_grad)
    around = (rows[1:-1, None] + torch.tensor([-1, 1])).flatten()
    around = around[~torch.isin(around, rows)]
    assert len(around) > 0
    assert (grad[around] == 0).all()


def test_a_long_stride():
    """Two rows 2**31 entries and more apart in memory."""
    memory = torch.empty(2**31 + 2 * VOCABULARY, dtype=torch.bfloat16)
    logits = memory.as_strided((2, VOCABULARY), (2**31 + 5, 1))
    logits.copy_(torch.randn(2, VOCABULARY))
    reference, labels = torch.randn(2, VOCABULARY), torch.tensor([3, VOCABULARY - 1])
    ours = token_statistics(logits, reference, labels, backend="fused")
    expected = token_statistics(logits.clone(), reference, labels, backend="fused")
    for value, of_copy in zip(ours, expected, strict=True):
        assert torch.equal(value, of_copy)
