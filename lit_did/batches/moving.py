"""Copies to a device that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

ASYNCHRONOUS = ("cuda",)
"""the types of devices for which the CPU does not wait while a tensor is copied there"""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`.

    A copy from the CPU to a CUDA device is queued behind the device's earlier work, and the CPU does not wait. Other
    copies are complete when the function returns.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type in ASYNCHRONOUS)
