"""One place looks through what is wrapped around a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_did.models.forward import num_embeddings, num_positions
from lit_did.models.loading import add_lora
from lit_did.models.wrappers import compiled_like, inner, is_peft, plain_name, unwrapped
from tests.modules.tiny import tiny_llama

LORA = {"target_modules": "all-linear", "r": 2}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_lora(model: nn.Module) -> nn.Module:
    return add_lora(model, LORA)


WAYS = {
    "nothing": [],
    "compiled": [torch.compile],
    "compiled in place": [compiled_in_place],
    "data parallel": [nn.DataParallel],
    "compiled data parallel": [nn.DataParallel, torch.compile],
    "adapter": [with_lora],
    "compiled adapter": [with_lora, torch.compile],
    "adapter of a compiled model": [torch.compile, with_lora],
    "data parallel adapter": [with_lora, nn.DataParallel],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_every_wrapper_is_looked_through(ways):
    model = wrapped = peft = tiny_llama()
    for wrap in ways:
        wrapped = wrap(wrapped)
        peft = wrapped if wrap is with_lora else peft
    assert unwrapped(wrapped) is peft
    assert is_peft(unwrapped(wrapped)) == (with_lora in ways)
    assert inner(wrapped) is model
    assert (num_embeddings(wrapped), num_positions(wrapped)) == (67, 64)
    names = {plain_name(name) for name, _ in peft.named_parameters()}
    assert not any("_orig_mod" in name for name in names)
    compiled = {torch.compile, compiled_in_place} & set(ways)
    assert (compiled_like(wrapped, model.model) is not model.model) == bool(compiled)
