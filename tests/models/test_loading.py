"""Loading models by name: the dtype under its older name."""

from __future__ import annotations

import pytest
import torch

from lit_did import LitDPO
from lit_did.models.loading import load_pair
from tests.modules.tiny import tiny_llama


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_have_the_dtype_that_is_asked_for(tmp_path, name):
    tiny_llama().save_pretrained(tmp_path)
    module = LitDPO(tmp_path, tmp_path, model_kwargs={name: torch.bfloat16})
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    plain = LitDPO(tmp_path)
    plain.configure_model()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_two_dtypes_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    module = LitDPO(tmp_path, model_kwargs={"dtype": torch.float32, "torch_dtype": torch.bfloat16})
    with pytest.raises(ValueError, match=r"one of `dtype` and `torch_dtype`, but got float32 and bfloat16"):
        module.configure_model()


def test_a_reference_that_does_not_fit_is_refused_before_the_policy_gets_an_adapter():
    policy = tiny_llama(0)
    names = {name for name, _ in policy.named_parameters()}
    with pytest.raises(ValueError, match="policy's vocabulary, 67 entries, but got 68"):
        load_pair(policy, tiny_llama(1, vocab_size=68), {"r": 2}, model_kwargs={}, needs_reference=True)
    assert {name for name, _ in policy.named_parameters()} == names
