"""What a model allows: packing, and to be passed by its output layer; the numbers are right where it does not."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from functools import partial

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lit_did.models import attention
from lit_did.models.forward import abilities, completion_hidden, completion_logits, layout_of, output_layer
from lit_did.models.layout import read_sequences
from tests.models.architectures import VOCABULARY, assert_right, build, logits_alone, logits_in, make_batch


def told(record: list) -> list[str]:
    return [str(w.message) for w in record if "held in memory" in str(w.message) or "are padded" in str(w.message)]


@pytest.mark.parametrize(("name", "packing"), [("Llama", "blocks"), ("Mistral", "positions")])
def test_flex_attention(name, packing):
    model = build(name, head_dim=16)  # flex attention takes no smaller heads; Mistral has a window
    flex = copy.deepcopy(model)
    flex.set_attn_implementation("flex_attention")
    # Forward only, and not compiled: the CPU has no backward.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are padded.*")
        assert_right(flex, model)
    assert abilities(flex).packing == packing
    batch = read_sequences(make_batch())
    sizes = [layout_of(flex, batch, share=share).inputs["input_ids"].numel() for share in (False, True)]
    assert (sizes[1] < sizes[0]) == (packing == "blocks")


def test_positions_that_do_not_restart_are_padded():
    model = build("Llama4Text")
    batch = make_batch()
    # The second sequence goes on where the first one ends: positions would not tell them apart.
    starts = torch.tensor([0, 20, 0, 0, 0, 0])[:, None]
    batch["position_ids"] = starts + torch.arange(batch["input_ids"].shape[1])
    sequences = read_sequences(batch)
    with torch.no_grad():
        expected = torch.cat(logits_alone(model, sequences)).float()
    with pytest.warns(UserWarning, match="held in memory"):
        assert abilities(model).packing == "positions"
    torch.testing.assert_close(logits_in(model, sequences), expected, rtol=1e-4, atol=1e-4)


class Shifted(nn.Linear):
    """With something that it learns, and that starts at 0."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, bias=False)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.shift


class Scaled(LlamaForCausalLM):
    """Its logits times a number that it learns, and that starts at 1."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        outputs = super().forward(input_ids, attention_mask, position_ids, **options)
        outputs.logits = self.factor * outputs.logits
        return outputs


class WithoutLogitsToKeep(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return super().forward(input_ids, attention_mask, position_ids)


def of_class(kind: type, changed: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = kind(build("Llama").config).eval()
    if changed is not None:
        model.factor.data.fill_(changed)
    return model


def subclassed_head() -> nn.Module:
    model = build("Llama")
    head = Shifted(32, VOCABULARY)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    return model


def lora_on_head() -> nn.Module:
    config = peft.LoraConfig(target_modules=["lm_head"], r=4)  # starts at zero: nothing shows yet
    return peft.get_peft_model(build("Llama"), config).eval()


def hooked_head() -> nn.Module:
    model = build("Llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
    return model


def patched_head() -> nn.Module:
    model = build("Llama")
    forward_ = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward_(hidden)  # such as one that fetches the weight first
    return model


@pytest.mark.parametrize(
    ("make", "packing"),
    [
        (subclassed_head, "segments"),
        (lora_on_head, "segments"),
        (hooked_head, "segments"),
        (patched_head, "segments"),
        (partial(of_class, Scaled), "segments"),
        (partial(of_class, Scaled, 1.5), "segments"),
        (partial(build, "Llama4Text"), "positions"),
    ],
)
def test_logits_where_no_linear_layer_makes_them(make, packing):
    model = make()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert_right(model)
        assert abilities(model) == (packing, None)
    assert len(told(record)) == 1
    assert "are no linear layer's of last hidden states" in told(record)[0]
    layout = layout_of(model, read_sequences(make_batch()))
    assert completion_hidden(model, layout) is None


@pytest.mark.parametrize("name", ["Mamba", "Bloom"])
def test_models_that_do_not_take_sequences_end_to_end(name):
    model = build(name)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert_right(model)
    assert abilities(model).packing is None
    assert abilities(model).body is not None
    assert len(told(record)) == 1
    assert f"{name}ForCausalLM does not take sequences end to end" in told(record)[0]


def test_without_logits_to_keep():
    model = of_class(WithoutLogitsToKeep)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="held in memory"):
        assert_right(model)


def test_the_output_layer_is_given_completion_positions_alone():
    model, sequences = build("Llama"), read_sequences(make_batch())
    layout = layout_of(model, sequences)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    with torch.no_grad(), attention.packed_attention(model):
        hidden = completion_hidden(model, layout)
        assert (hidden.shape, seen) == ((sequences.num_labels, 32), [])  # not used at all
        logits = completion_logits(model, layout)
    assert seen == [len(layout.rows.unique())]
    assert seen[0] < sequences.num_labels  # some predict for both sequences of a pair
    torch.testing.assert_close(output_layer(model).logits(hidden), logits)


def test_a_trial_leaves_modes_and_random_numbers_and_happens_once():
    model = build("GPT2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(torch.rand(())))  # not only dropout draws
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert abilities(model).packing == "segments"  # whatever it drops in training
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    tried = len(calls)
    assert abilities(model) is abilities(model)
    assert 0 < tried == len(calls)


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_broken_weights_are_no_inability(broken):
    model = build("Llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(broken)[3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abilities(model).packing == "segments"
        assert abilities(model).body is not None


@pytest.mark.parametrize("how", ["function", "method"])
def test_what_is_compiled_stays_so(how, monkeypatch):
    model, sequences = build("Llama", num_hidden_layers=1), read_sequences(make_batch())
    expected = logits_in(copy.deepcopy(model), sequences)
    body, compiled = model.model, []
    if how == "function":
        model = torch.compile(model, backend="eager")
        compile_ = model.dynamo_ctx  # with the options that were given to it
        monkeypatch.setattr(model, "dynamo_ctx", lambda target: compiled.append(target) or compile_(target))
    else:  # which does not tell its options
        model.compile(backend="eager")
        compile_ = partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", lambda target: compiled.append(target) or compile_(target))
    torch.testing.assert_close(logits_in(model, sequences), expected, rtol=1e-5, atol=1e-5)
    assert [target is body for target in compiled] == [True]


def test_models_can_be_let_go():
    model = build("Llama")
    abilities(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
