"""Copies to a device: which of them the CPU waits for."""

from __future__ import annotations

import pytest
import torch

from lit_did.batches.moving import to_device


class Placed:
    """A tensor that is on any device, and answers with whether the CPU does not wait."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device, *, non_blocking: bool) -> bool:
        return non_blocking


@pytest.mark.parametrize(
    ("source", "target", "without_waiting"),
    [("cpu", "cuda", True), ("cuda", "cpu", False), ("cuda:0", "cuda:1", False), ("cpu", "mps", False)],
)
def test_only_copies_from_the_cpu_to_cuda_are_not_waited_for(source, target, without_waiting):
    assert to_device(Placed(source), torch.device(target)) is without_waiting
