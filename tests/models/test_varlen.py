"""Attention in one call of flash attention: against a dense softmax, each model alone, and what is refused."""

from __future__ import annotations

import copy
import re
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from lit_did.batches import moving
from lit_did.batches.sequences import read_sequences
from lit_did.models import attention, trial, varlen
from lit_did.models.loading import checkpoint_activations
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.trial import attention_used, layout_of, outputs_of
from tests.models import flash, flex
from tests.models.architectures import assert_right, build, logits_in, make_batch
from tests.models.test_attention import DIM, HEADS, KEY_HEADS, SEGMENTS, dense

needs_torch = pytest.mark.skipif(varlen._of_torch() is None, reason="This torch has no varlen_attn with windows.")
KERNELS = [pytest.param(varlen.TORCH, marks=needs_torch), "flash_attention_2"]
CALLED = {varlen.TORCH: varlen.TORCH, "flash_attention_2": "flash_attn"}


@pytest.fixture(autouse=True)
def installed():
    with flash.flash_attn_installed():
        yield


def inputs(dtype: torch.dtype = torch.float64, dims: tuple[int, ...] = (DIM, DIM, DIM)) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(length for length, _ in SEGMENTS)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(1, n, tokens, dim, dtype=dtype, requires_grad=True) for n, dim in zip(heads, dims, strict=True)]


def attend(given: list[Tensor], kernel: str | None, segments: Tensor | None = None, **options) -> Tensor:
    """By the attention function that a packed model has. `kernel` None: one segment at a time."""
    model = build("Llama", "sdpa")
    attention.use_packed_attention(model)
    own = torch.tensor(SEGMENTS)[None, None]
    if kernel is not None:
        attention.prepare(own, torch.device("cpu"), kernel)
    function = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    layer = model.model.layers[0].self_attn
    with attention.running(own):
        output = function(layer, *given, own if segments is None else segments, scaling=DIM**-0.5, **options)[0]
    refused = attention.refused(own)
    assert refused is None, refused
    return output


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 7, 100])
def test_against_a_dense_softmax(kernel, sliding_window):
    given = inputs()
    with flash.on_the_cpu() as calls:
        output = attend(given, kernel, sliding_window=sliding_window)
    assert calls == [CALLED[kernel]]
    expected = dense(*given, sliding_window)
    by_turns = attend(given, None, sliding_window=sliding_window)
    for truth in (expected, by_turns):
        torch.testing.assert_close(output, truth, rtol=1e-9, atol=1e-10)
    torch.manual_seed(1)
    upstream = torch.randn_like(output)
    gradients, truths = (torch.autograd.grad(x, given, upstream) for x in (output, expected))
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_may_be_shorter_than_keys(kernel):
    given = inputs(dims=(16, 16, 8))
    with flash.on_the_cpu():
        output = attend(given, kernel)
    torch.testing.assert_close(output, attend(given, None), rtol=1e-9, atol=1e-10)


@needs_torch
def test_half_precision_and_autocast():
    given = inputs(torch.float32)
    expected = attend(given, None)
    with flash.on_the_cpu(varlen.HALF) as calls, torch.autocast("cpu", torch.bfloat16):
        mixed = [given[0], given[1], given[2].bfloat16()]  # as with RoPE in float32
        output = attend(mixed, varlen.TORCH)
    assert calls == [varlen.TORCH]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)


@needs_torch
def test_a_copy_of_the_segments_is_not_read():
    """FSDP puts them on the device. A meta tensor has no values."""
    given = inputs()
    with flash.on_the_cpu():
        output = attend(given, varlen.TORCH, torch.tensor(SEGMENTS, device="meta")[None, None])
    torch.testing.assert_close(output, attend(given, None))
    torch.testing.assert_close(attend(given, None, torch.tensor(SEGMENTS, device="meta")[None, None]), output)


class Copies(TorchDispatchMode):
    """The names of the operators that run, and whether one reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_torch
def test_the_real_function_takes_the_call():
    """Shapes alone, as on CUDA. The kernel and the copies of shared keys are all that a layer launches."""
    with FakeTensorMode(), torch.no_grad():
        device = torch.device("cuda")
        query, key, value = (torch.empty(1, n, 20, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2))
        bounds = torch.empty(2, 7, device=device, dtype=torch.int32)
        for keys in (None, torch.empty(29, device=device, dtype=torch.int64)):
            lengths = varlen.Lengths(varlen.TORCH, *bounds, 6, 9, keys)
            for window in (None, 4):
                with Copies() as copies:
                    output = varlen.attend(query, key, value, lengths, sliding_window=window, scaling=0.1)
                assert (output.shape, output.device, output.dtype) == ((1, 20, 4, 64), query.device, torch.bfloat16)
                launched = [name for name in copies.names if not re.search("select.int|transpose|alias|slice", name)]
                gathered = ["aten::index_select"] * (0 if keys is None else 2)
                assert [n for n in launched if n.startswith(("torch_attn", "aten::index"))] == [
                    *gathered,
                    "torch_attn::_varlen_attn",
                ]


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------

MODELS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Phi3", "Cohere", "Granite", "Mixtral", "GPT2", "GPTNeoX"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_models_are_right_with_one_call_a_layer(name, kernel, monkeypatch):
    monkeypatch.setattr(varlen, "kernels", lambda device: (kernel,))
    model = build(name, "sdpa")
    with flash.on_the_cpu() as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(model)
        sequences = read_sequences(make_batch())
        for share in (False, True):
            layout = layout_of(model, sequences, share=share)
            calls.clear()
            with torch.no_grad():
                outputs_of(model, layout)
            assert calls == [CALLED[kernel]] * model.config.num_hidden_layers
    assert attention_used(model) == f"{kernel}, one call a layer"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral"])
def test_flash_attention_of_the_model_itself(name, monkeypatch):
    """A softcap, a window, shared prompts, and no position that the host has to read."""
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
    model = build(name, "eager")
    expected = logits_in(copy.deepcopy(model), read_sequences(make_batch()))
    model.set_attn_implementation("flash_attention_2")
    with flash.on_the_cpu() as calls:
        assert_right(model)
        layout = layout_of(model, read_sequences(make_batch()))
        calls.clear()
        with torch.no_grad():
            outputs_of(model, layout)
        assert calls == ["flash_attn"] * model.config.num_hidden_layers
        logits = logits_in(model, read_sequences(make_batch()))
    assert (layout.packing, trial._known[model].found[-1].share) == ("segments", True)
    assert model.config._attn_implementation == "flash_attention_2"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_of_the_model_itself_under_autocast(monkeypatch):
    """The weights are in float32, as a model given by name has them. It has no results without autocast."""
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
    model = build("Llama", "sdpa")
    expected = logits_in(copy.deepcopy(model), read_sequences(make_batch()))
    model.set_attn_implementation("flash_attention_2")
    with flash.on_the_cpu(varlen.HALF), torch.autocast("cpu", torch.bfloat16):
        logits = logits_in(model, read_sequences(make_batch()))
    assert attention_used(model) == "flash_attention_2, one call a layer"
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.1)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    models = PolicyAndReference(model, build("Llama", "sdpa", seed=1))
    models(make_batch()).log_ratio.sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@needs_torch
@pytest.mark.parametrize("keep", [None, False, True])
def test_gradients_with_and_without_checkpointing(keep):
    model = build("Llama", "sdpa")
    expected = gradients(copy.deepcopy(model))
    with flash.on_the_cpu() as calls:
        layout_of(model, read_sequences(make_batch()))  # the trials
        if keep is not None:
            checkpoint_activations(model, keep)
            model.train()
        models = PolicyAndReference(model, build("Llama", "sdpa", seed=1))
        models.reference_outputs(models.read(make_batch()))
        statistics = models(make_batch())
        forward = len(calls)
        statistics.log_ratio.sum().backward()
        again = len(calls) - forward
    assert again == (2 if keep is False else 0)  # layers that run again; products are kept
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


@needs_torch
def test_processes_that_share_a_row(monkeypatch):
    """Between the two exchanges of `lit_did.models.context_parallel`."""
    given, sizes = inputs(), []
    expected = attend(given, None)

    def exchange(group, gather, *tensors):
        sizes.append([tuple(x.shape) for x in tensors])
        return [x.detach()[:, :1] for x in given] if gather else tensors

    monkeypatch.setattr(attention, "exchange", exchange)
    monkeypatch.setattr(attention, "context_group", lambda size: None)
    with flash.on_the_cpu() as calls:
        output = attend([x[:, :, :10] for x in given], varlen.TORCH)
    assert calls == [varlen.TORCH]
    assert [len(s) for s in sizes] == [3, 1]
    torch.testing.assert_close(output, expected[:, :, :1])


# ---------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------


@needs_torch
def test_dropout_appears_in_training():
    model = build("Llama", "sdpa", attention_dropout=0.5)
    sequences = read_sequences(make_batch())
    with flash.on_the_cpu() as calls:
        layout = layout_of(model, sequences)  # a trial is in eval mode
        calls.clear()
        model.train()
        trial._known[model].warned.clear()
        with pytest.warns(UserWarning, match="dropout of 0.5, which PyTorch's kernel lacks. Set `attention_dropout`"):
            outputs_of(model, layout)
        assert not calls
        model.eval()
        outputs_of(model, layout_of(model, sequences))
        assert len(calls) == model.config.num_hidden_layers


@needs_torch
@pytest.mark.parametrize("fault", ["aligned at the top left", "raises"])
def test_a_wrong_kernel_is_found(fault, monkeypatch):
    """Its causal mask would begin with the first key, as that of older versions of flash attention."""
    right = flash.attention

    def wrong(query, key, value, *options):
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return right(query, key[: len(query)], value[: len(query)], *options)

    monkeypatch.setattr(flash, "attention", wrong)
    monkeypatch.setattr(varlen, "kernels", lambda device: (varlen.TORCH,))
    model = build("Llama", "sdpa")
    warns = pytest.warns(UserWarning, match="a check found other results with varlen_attn")
    with flash.on_the_cpu(), flex.on_the_cpu(), warns:
        assert_right(model)
    assert attention_used(model) == "flex_attention, one call a layer"


def test_which_kernels(monkeypatch):
    device = torch.device("cpu")
    assert varlen.kernels(device) == ()
    of_torch = () if varlen._of_torch() is None else (varlen.TORCH,)
    with flash.on_the_cpu():
        assert varlen.kernels(device) == of_torch
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
        assert varlen.kernels(device) == ("flash_attention_2", *of_torch)
        monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: True)
        assert varlen.kernels(device) == ("flash_attention_3", "flash_attention_2", *of_torch)


def test_an_older_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert varlen._of_torch.__wrapped__() is None
    assert all(isinstance(operator, torch._ops.OpOverload) for operator in varlen.operators())


def test_copies_to_cuda_are_queued_from_pinned_memory():
    asked = []

    class Values:
        device = torch.device("cpu")

        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking):
            asked.append((device.type, non_blocking))
            return self

    moving.to_device(Values(), torch.device("cuda"))
    moving.to_device(Values(), torch.device("cpu"))
    assert asked == ["pinned", ("cuda", True), ("cpu", False)]
