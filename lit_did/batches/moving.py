"""Copies to a device that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

ASYNCHRONOUS = ("cuda",)
"""the types of devices for which the CPU does not wait while a tensor is copied there"""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`.

    A copy from the CPU to a CUDA device is queued behind the device's earlier work, and the CPU does not wait. It goes
    through pinned memory, because CUDA may wait before it reads other memory. Other copies are complete when the
    function returns.
    """
    queued = tensor.device.type == "cpu" and device.type in ASYNCHRONOUS
    if queued and device.type == "cuda":
        tensor = tensor.pin_memory()  # PyTorch keeps this memory for later copies, and until this one is made
    return tensor.to(device, non_blocking=queued)
