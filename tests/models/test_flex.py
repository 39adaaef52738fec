"""Attention in one call of flex attention: against a dense softmax, each model alone, and when it is chosen."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_did.batches.sequences import read_sequences
from lit_did.models import attention, trial, varlen
from lit_did.models.flex import FLEX, block_mask, mask_parts
from lit_did.models.loading import checkpoint_activations
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.trial import attention_used, find, layout_of, outputs_of
from tests.models import flash, flex
from tests.models.architectures import assert_right, build, logits_alone, logits_in, make_batch
from tests.models.test_attention import DIM, SEGMENTS, LargestTensor, dense
from tests.models.test_trial import of_lengths
from tests.models.test_varlen import inputs

CPU = torch.device("cpu")
SOME = np.array([(400, -1), (300, 0), (56, 0), (1, -1), (700, -1), (430, 4)])  # length, what it continues


def attend(given: list[Tensor], segments: Tensor, **options) -> Tensor:
    """By the attention function that a packed model has."""
    model = build("Llama", "sdpa")
    attention.use_packed_attention(model)
    attention.prepare(segments, CPU, FLEX)
    function = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    output = function(model.model.layers[0].self_attn, *given, segments, scaling=DIM**-0.5, **options)[0]
    assert attention.refused(segments) is None
    return output


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 7, 100])
def test_against_a_dense_softmax(sliding_window):
    given = inputs()
    with flex.on_the_cpu() as calls:
        output = attend(given, torch.tensor(SEGMENTS)[None, None], sliding_window=sliding_window)
        assert len(calls) == 1
        expected = dense(*given, sliding_window)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
        upstream = torch.randn_like(output)
        gradients, truths = (torch.autograd.grad(x, given, upstream) for x in (output, expected))
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-10)


def test_autocast():
    given = inputs(torch.float32)
    with flex.on_the_cpu() as calls, torch.autocast("cpu", torch.bfloat16):
        output = attend([given[0], given[1], given[2].bfloat16()], torch.tensor(SEGMENTS)[None, None])
    assert calls[0].dtype == output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), dense(*given, None), rtol=0.05, atol=0.05)


def attends(segments: np.ndarray, window: int | None) -> Tensor:
    """[tokens, tokens] Whether a query attends to a key, from the places of tokens in their sequences."""
    own, continues = segments.T
    of = np.repeat(np.arange(len(own)), own)
    place = np.concatenate([np.arange(n) + (own[c] if c >= 0 else 0) for n, c in segments])
    known = (of[:, None] == of) | (continues[of][:, None] == of)
    far = place[:, None] - place
    return torch.from_numpy(known & (far >= 0) & (far < (window or len(of))))


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300, 699])
def test_a_block_mask_is_that_of_torch_without_its_large_mask(window):
    tokens = int(SOME[:, 0].sum())
    with LargestTensor() as watch:
        parts = mask_parts(SOME, window)
    assert watch.bytes < tokens**2 / 8
    mask, truth = block_mask(parts, tokens), attends(SOME, window)
    queries, keys = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert torch.equal(mask.mask_mod(0, 0, queries, keys), truth)
    theirs = create_block_mask(lambda b, h, q, k: truth[q, k], None, None, tokens, tokens, device="cpu")
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    for side in ("kv", "q"):
        masked, whole, their_whole = (
            blocks(getattr(m, f"{kind}{side}_num_blocks"), getattr(m, f"{kind}{side}_indices"))
            for m, kind in ((mask, ""), (mask, "full_"), (theirs, "full_"))
        )
        assert whole <= their_whole  # those that torch does not mask again
        assert 2 * len(whole) >= len(their_whole)
        dense = mask.to_dense()[0, 0] if side == "kv" else mask.to_dense()[0, 0].T
        assert masked.isdisjoint(whole)
        assert masked | whole == {tuple(place) for place in dense.nonzero().tolist()}


def blocks(counts: Tensor, columns: Tensor) -> set[tuple[int, int]]:
    return {(row, c) for row, n in enumerate(counts[0, 0].tolist()) for c in columns[0, 0, row, :n].tolist()}


@pytest.mark.parametrize("softcap", [1.5, 2.5])
def test_sinks_and_a_softcap(softcap):
    """As GPT-OSS and Gemma 2 have them: against a softmax with one more score for each head."""
    given, segments = inputs(), torch.tensor(SEGMENTS)[None, None]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    there = attends(np.array(SEGMENTS), 3)
    query, key, value = given[0], *(x.repeat_interleave(2, dim=1) for x in given[1:])
    scores = (softcap * torch.tanh(query @ key.mT / DIM**0.5 / softcap)).masked_fill(~there, -torch.inf)
    weights = torch.cat([scores, sinks[:, None, None].expand(1, -1, len(there), 1)], dim=-1).softmax(-1)
    expected = (weights[..., :-1] @ value).transpose(1, 2)
    with flex.on_the_cpu():
        output = attend(given, segments, sliding_window=3, softcap=softcap, s_aux=sinks)
        gradients = torch.autograd.grad(output.square().sum(), [*given, sinks])
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)  # sums of weights are in float32
    truths = torch.autograd.grad(expected.square().sum(), [*given, sinks])
    torch.testing.assert_close(gradients, truths, rtol=1e-5, atol=1e-5)


def test_masks_go_with_the_batch():
    segments = torch.tensor(SOME[None, None])
    attention.prepare(segments, CPU, FLEX)
    masks = weakref.ref(attention._prepared[segments])
    assert masks().of(1130) is masks().of(None) is not masks().of(1129)
    del segments
    gc.collect()
    assert masks() is None


@pytest.mark.long  # PyTorch compiles C++
def test_compiled_for_the_cpu():
    """Its kernel reads the lists of blocks, which the dense form does not."""
    segments, tokens = torch.from_numpy(SOME)[None, None], int(SOME[:, 0].sum())
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2))
    for window, softcap in ((None, None), (100, None), (100, 1.5), (100, 2.5)):
        output = attend([query, key, value], segments, sliding_window=window, softcap=softcap)
        scores = query @ key.repeat_interleave(2, dim=1).mT * DIM**-0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~attends(SOME, window), -torch.inf).softmax(-1)
        truth = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
        torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------

MODELS = [
    *[(name, "sdpa") for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Phi3", "Granite", "Mixtral")],
    *[(name, "sdpa") for name in ("GPT2", "GPTNeoX")],
    *[("Gemma2", "eager"), ("GptOss", "eager"), ("Llama", "eager"), ("Llama", FLEX), ("Mistral", FLEX)],
]


@pytest.fixture
def no_flash(monkeypatch):
    monkeypatch.setattr(varlen, "kernels", lambda device: ())


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    marks = "flex attention, which takes", "gets padded batches", "one sequence of a batch at a time"
    return [str(w.message) for w in caught if any(mark in str(w.message) for mark in marks)]


@pytest.mark.parametrize(("name", "implementation"), MODELS)
def test_models_are_right_with_one_call_a_layer(name, implementation, no_flash):
    """Each in float32, and every trial with gradients. One warning says that flash attention is not used."""
    model = build(name, implementation)
    truth = build(name, "eager")
    own = torch.compiler.set_stance("force_eager")  # transformers' flex attention
    with flash.on_the_cpu(), flex.on_the_cpu() as calls, own, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_right(model, truth)
        sequences = read_sequences(make_batch())
        sizes = []
        for share in (False, True):
            layout = layout_of(model, sequences, share=share)
            sizes.append(layout.inputs["input_ids"].numel())
            calls.clear()
            with torch.no_grad():
                outputs_of(model, layout)
            assert len(calls) == model.config.num_hidden_layers
    assert sizes[1] < sizes[0]
    assert attention_used(model) == "flex_attention, one call a layer"
    assert trial._known[model].found[-1].gradients
    assert len(messages(caught)) == (implementation != FLEX)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    models = PolicyAndReference(model, build("Gemma2", "eager", seed=1))
    models(make_batch()).log_ratio.sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("keep", [None, False, True])
def test_gradients_with_and_without_checkpointing(keep, no_flash):
    model = build("Gemma2", "eager")
    expected = gradients(copy.deepcopy(model))
    with flash.on_the_cpu(), flex.on_the_cpu() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout_of(model, read_sequences(make_batch()))  # the trial
        if keep is not None:
            checkpoint_activations(model, keep)
            model.train()
        calls.clear()
        models = PolicyAndReference(model, build("Gemma2", "eager", seed=1))
        models.reference_outputs(models.read(make_batch()))
        statistics = models(make_batch())
        calls.clear()
        statistics.log_ratio.sum().backward()
        assert len(calls) == (0 if keep is None else 2)  # layers that run again
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_kernels_are_compiled_once_for_all_lengths(no_flash):
    """After the trial and one step, steps with other numbers of tokens and sequences compile nothing."""
    torch._dynamo.reset()
    model = build("Mistral", "sdpa", max_position_embeddings=256)
    batches = (
        (20, 9, 20, 9),
        (70, 60, 60, 40),
        (70, 60, 20),
        (33, 44, 55, 60),
        (70, 60, 60, 60, 60, 1),
        (60,) * 12,
        (64,) * 6,
    )
    counts = []
    with flash.on_the_cpu(), flex.on_the_cpu() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout_of(model, of_lengths(*batches[0]))
        assert flex.graphs  # the trial compiles
        for seed, lengths in enumerate(batches):
            sequences = of_lengths(*lengths, *[2] * (len(lengths) % 2), seed=seed)
            for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
                model.train(context is torch.enable_grad)
                with context():
                    outputs = outputs_of(model, layout_of(model, sequences))
            outputs.hidden.sum().backward()
            counts.append(len(flex.graphs))
    assert len({len(query[0, 0]) for query in calls}) > 5
    assert set(counts) == {3}  # in inference mode, without gradients, and with gradients


# ---------------------------------------------------------------------------------------------------------------
# When it is chosen
# ---------------------------------------------------------------------------------------------------------------


def caught_in(model: torch.nn.Module, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout_of(model, read_sequences(make_batch()), **options)
    return messages(caught)


@pytest.mark.skipif(varlen._of_torch() is None, reason="This torch has no varlen_attn with windows.")
def test_flash_attention_comes_first():
    model = build("Llama", "sdpa")
    with flash.on_the_cpu(varlen.HALF), flex.on_the_cpu() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            assert caught_in(model) == []
        assert not calls
        assert attention_used(model) == "varlen_attn, one call a layer"
        (text,) = caught_in(model)
        assert attention_used(model) == "flex_attention, one call a layer"
        assert caught_in(model) == caught_in(model, share=False) == []
    assert "Flash attention, which needs no compilation, is not used: its numbers are float32" in text
    assert "Use precision='bf16-mixed'." in text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"attn_implementation": "eager"}, "attention 'eager' is the model's own."),
        ({"hidden_size": 24}, "its heads have 6 and 6 entries"),
    ],
)
def test_what_has_no_flash_attention(given, text):
    model = build("Llama", given.pop("attn_implementation", "sdpa"), **given)
    with flash.on_the_cpu() as flash_calls, flex.on_the_cpu():
        (message,) = caught_in(model)
    assert text in message
    assert attention_used(model) == "flex_attention, one call a layer"
    assert not flash_calls


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_padding_is_the_last_resort(fault, no_flash):
    def broken(query, *_):
        if fault == "raises":
            raise RuntimeError("no working triton installation")
        return torch.zeros_like(query)

    model, sequences = build("Llama", "sdpa"), read_sequences(make_batch())
    with flash.on_the_cpu(), flex.replaced_by(broken):
        (text,) = caught_in(model)
        assert "a check found other results with flex_attention" in text
        assert ("RuntimeError: no working triton" in text) == (fault == "raises")
        assert layout_of(model, sequences).kind == "padded"
        with torch.no_grad():
            expected = torch.cat(logits_alone(model, sequences)).float()
        torch.testing.assert_close(logits_in(model, sequences), expected, rtol=1e-4, atol=1e-4)
        assert caught_in(model) == []
        assert attention_used(model) == "attention 'sdpa', padded"
        # Processes that share a row cannot pad it.
        with pytest.warns(UserWarning, match="attends to one sequence of a batch at a time"):
            shared = find(model, sequences, processes=2)
        assert (shared.packing, shared.kernel) == ("segments", None)
        assert find(model, sequences).kind == "padded"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert layout_of(build("Llama", "sdpa"), sequences, padding_free=False).kind == "padded"


def test_dropout_appears_in_training(no_flash):
    model = build("Llama", "sdpa", attention_dropout=0.5)
    sequences = read_sequences(make_batch())
    with flash.on_the_cpu(), flex.on_the_cpu() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = layout_of(model, sequences)  # a trial is in eval mode
        assert calls
        calls.clear()
        model.train()
        warnings.simplefilter("error")
        with pytest.warns(
            UserWarning, match="flex attention lacks the model's dropout of 0.5. Set `attention_dropout`"
        ):
            outputs_of(model, layout)
        assert not calls


def test_nothing_changes_on_the_cpu():
    model = build("Llama", "sdpa")
    assert attention.kernels(model, CPU) == ()
    with warnings.catch_warnings(), flex.on_the_cpu() as calls:
        warnings.simplefilter("error")
        layout = layout_of(model, read_sequences(make_batch()))
    assert (layout.packing, calls) == ("segments", [])
    assert attention_used(model) == "attention 'sdpa', one segment at a time"
