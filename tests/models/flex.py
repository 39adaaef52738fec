"""Flex attention on the CPU with gradients, which PyTorch has on GPUs alone: compiled, but by its own dense form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention import flex_attention as of_torch

from lit_did.models import flex

calls: list[Tensor] = []
"""The queries of every call, in order."""
graphs: list[torch.fx.GraphModule] = []
"""What was compiled, in order."""


def _backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    graphs.append(graph)
    return lookup_backend("aot_eager")(graph, inputs)


_compiled = torch.compile(flex._attend, backend=_backend)


def _attend(query: Tensor, *others: Any) -> Any:
    calls.append(query.detach())
    return _compiled(query, *others)


def dense(
    query: Tensor, key: Tensor, value: Tensor, parts: list[Tensor], scale: str, softcap: None, sinks: None
) -> Tensor:
    """As flex attention on a GPU, but in plain torch, for devices that PyTorch does not compile for."""
    calls.append(query)
    places = torch.arange(query.shape[2], device=query.device)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    there = flex.block_mask(parts, len(places)).mask_mod(None, None, places[:, None], places)
    return (query @ key.mT * float(scale)).masked_fill(~there, -torch.inf).softmax(-1) @ value


def _no_check(*tensors: Tensor) -> None:
    """In place of what refuses gradients on the CPU."""


def replaced_by(function: Any) -> Any:
    """A context in which `function` takes the place of what is compiled."""
    return mock.patch.object(flex, "_compiled", mock.Mock(return_value=function))


@contextmanager
def on_the_cpu() -> Iterator[list[Tensor]]:
    """Yields `calls`, empty."""
    calls.clear()
    graphs.clear()
    with (
        mock.patch.object(of_torch, "_validate_device", _no_check),
        replaced_by(_attend),
        torch._dynamo.config.patch(recompile_limit=64),  # the tests have many sizes of heads
    ):
        yield calls
