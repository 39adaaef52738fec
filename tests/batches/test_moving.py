"""Copies to a device: which of them the CPU waits for."""

from __future__ import annotations

import pytest
import torch

from lit_did.batches.moving import to_device


class Placed:
    """A tensor that is on any device, and answers with whether the CPU does not wait for a copy.

    CUDA may wait where memory is not pinned.
    """

    def __init__(self, device: str, pinned: bool = False) -> None:
        self.device, self.pinned = torch.device(device), pinned

    def pin_memory(self) -> Placed:
        return Placed(str(self.device), pinned=True)

    def to(self, device: torch.device, *, non_blocking: bool) -> bool:
        return non_blocking and (self.pinned or device.type != "cuda")


@pytest.mark.parametrize(
    ("source", "target", "without_waiting"),
    [("cpu", "cuda", True), ("cuda", "cpu", False), ("cuda:0", "cuda:1", False), ("cpu", "mps", False)],
)
def test_only_copies_from_the_cpu_to_cuda_are_not_waited_for(source, target, without_waiting):
    assert to_device(Placed(source), torch.device(target)) is without_waiting
