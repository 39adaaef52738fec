"""Attention by segments: against a dense masked softmax, and every model what it was afterwards."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import weakref

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_did.batches.sequences import read_sequences
from lit_did.models import attention
from lit_did.models.attention import (
    implementation,
    packed_attention,
    packings,
    use_own_attention,
    use_packed_attention,
)
from lit_did.models.trial import layout_of
from tests.models.architectures import PACKED, build, make_batch
from tests.processes import run_program

SEGMENTS = [(5, -1), (3, 0), (4, 0), (1, -1), (6, -1), (1, 4)]  # length, what it continues
HEADS, KEY_HEADS, DIM = 4, 2, 8


def dense(query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over what each token may attend to, in float64: [1, tokens, heads, dim]."""
    segment = [i for i, (length, _) in enumerate(SEGMENTS) for _ in range(length)]
    starts = [0]
    for length, _ in SEGMENTS:
        starts.append(starts[-1] + length)
    # A token's place in its own sequence.
    before = [SEGMENTS[i][1] for i in range(len(SEGMENTS))]
    place = [t - starts[s] + (SEGMENTS[before[s]][0] if before[s] >= 0 else 0) for t, s in enumerate(segment)]
    tokens = range(len(segment))

    def attends(q: int, k: int) -> bool:
        known = segment[k] in (segment[q], before[segment[q]]) and place[k] <= place[q]
        return known and (sliding_window is None or place[q] - place[k] < sliding_window)

    mask = torch.tensor([[attends(q, k) for k in tokens] for q in tokens])
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    scores = (q @ k.mT / DIM**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 6, 7, 100])
def test_against_a_dense_softmax(name, sliding_window):
    model = build("Llama", name)
    use_packed_attention(model)
    tokens = sum(length for length, _ in SEGMENTS)
    torch.manual_seed(0)
    query, key, value, upstream = (
        torch.randn(1, heads, tokens, DIM, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    output, _ = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](
        model.model.layers[0].self_attn,
        query,
        key,
        value,
        torch.tensor(SEGMENTS)[None, None],
        scaling=DIM**-0.5,
        sliding_window=sliding_window,
    )
    expected = dense(query, key, value, sliding_window)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    inputs, weight = (query, key, value), upstream.detach().transpose(1, 2)
    gradients, truths = (torch.autograd.grad((x * weight).sum(), inputs) for x in (output, expected))
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 7])
def test_queries_attend_in_blocks(name, sliding_window, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(attention, "ALIGNED", 2)
    test_against_a_dense_softmax(name, sliding_window)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("sliding_window", [None, 150])
def test_masks_of_shared_prompts_are_linear_in_the_tokens(sliding_window, monkeypatch):
    """There is no [tokens, tokens] tensor, not even of bools."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    model, beginning, completion = build("Llama", "sdpa"), 100, 400
    use_packed_attention(model)
    segments = torch.tensor([(beginning, -1), (completion, 0), (completion, 0)])[None, None]
    query, key, value = (torch.randn(1, 1, beginning + 2 * completion, 4, requires_grad=True) for _ in range(3))
    with LargestTensor() as watch:
        output, _ = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](
            model.model.layers[0].self_attn, query, key, value, segments, sliding_window=sliding_window
        )
        output.sum().backward()
    assert watch.bytes <= 4 * 16 * (beginning + completion)  # a mask of one block


@pytest.mark.parametrize("heads", [HEADS, KEY_HEADS, 1])
def test_what_transformers_sdpa_says(heads, monkeypatch):
    """Whether keys are shared by query heads or not; and what it does not know goes to transformers' own."""
    model = build("Llama", "sdpa", num_attention_heads=HEADS, num_key_value_heads=heads)
    use_packed_attention(model)
    layer = model.model.layers[0].self_attn
    torch.manual_seed(0)
    tokens = sum(length for length, _ in SEGMENTS)
    inputs = [torch.randn(1, n, tokens, DIM, requires_grad=True) for n in (HEADS, heads, heads)]

    def run(**unusual):
        attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
        output, _ = attend(layer, *inputs, torch.tensor(SEGMENTS)[None, None], scaling=0.5, **unusual)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    ours = run()
    with monkeypatch.context() as patch:
        patch.setattr("lit_did.models.attention._sdpa", sdpa_attention_forward)
        theirs = run()
    for one, other in zip(ours, theirs, strict=True):  # float32's rounding: strides differ, and sums' order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    assert run(is_causal=False)[0][:, :5].ne(ours[0][:, :5]).any()
    with pytest.raises(ValueError, match="`sdpa` attention does not support `softcap`"):
        run(softcap=30.0)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_all_layers_share_a_mask_that_goes_with_the_batch(name, monkeypatch):
    model, made, alive = build("Llama", name), [], []
    mask = attention._mask

    def make_mask(*given):
        made.append(given)
        alive.append(weakref.ref(result := mask(*given)))
        return result

    monkeypatch.setattr(attention, "_mask", make_mask)
    layout = layout_of(model, read_sequences(make_batch()))
    made.clear()  # those of the trial
    with packed_attention(model), torch.inference_mode():
        model(**layout.inputs, use_cache=False)
    assert len(made) == len(set(made)) > 0
    del layout
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_shared_keys_are_not_copied_for_every_query_head():
    model = build("Llama", "sdpa", num_attention_heads=HEADS, num_key_value_heads=1)
    layout = layout_of(model, read_sequences(make_batch()), share=False)
    kept = []
    with packed_attention(model), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**layout.inputs, use_cache=False)
    # Expanded over the query heads: a head's stride is 0.
    expanded = [t for t in kept if t.dim() == 4 and t.shape[:2] == (1, HEADS) and t.stride(1) == 0]
    assert len(expanded) == 2 * len(layout.inputs["attention_mask"][0, 0]) * len(model.model.layers)


class LargestScores(TorchDispatchMode):
    """How many queries times keys the largest [sequences, heads, queries, keys] is of."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, Tensor) and x.dim() == 4:
                self.largest = max(self.largest, x.shape[-1] * x.shape[-2])
        return result


def test_no_scores_between_sequences():
    model, sequences = build("Llama", "eager", head_dim=2), read_sequences(make_batch())
    longest = max(b - a for a, b in zip(sequences.cu_seqlens, sequences.cu_seqlens[1:], strict=False))
    layout = layout_of(model, sequences, share=False)
    assert layout.inputs["input_ids"].numel() > 3 * longest
    with packed_attention(model), torch.no_grad(), LargestScores() as watch:
        model(**layout.inputs, use_cache=False)
    assert watch.largest == longest**2


def test_what_a_model_may_take():
    assert {packings(build(*given)) for given in PACKED} == {("segments", "positions")}
    for name in ("Mamba", "Bloom"):  # no attention; its own
        assert packings(build(name)) == ("positions",)
    assert packings(build("Llama", "flex_attention", head_dim=16)) == ("segments", "positions")
    assert packings(torch.nn.Linear(2, 2)) == ("positions",)


def test_eager_attention_is_that_of_the_class_or_of_its_base():
    from transformers.models.llama import modeling_llama

    class Mine(modeling_llama.LlamaAttention):
        """In a file that has no eager attention."""

    assert attention._eager(Mine) is attention._eager(modeling_llama.LlamaAttention)
    assert attention._eager(Mine) is modeling_llama.eager_attention_forward
    with pytest.raises(TypeError, match="Expected the file of Linear to define eager_attention_forward"):
        attention._eager(torch.nn.Linear)


# ---------------------------------------------------------------------------------------------------------------
# Models are what they were
# ---------------------------------------------------------------------------------------------------------------


def left_padded() -> dict[str, Tensor]:
    batch = make_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(len(row) - n) for row, n in zip(batch[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }


@torch.no_grad()
def answers(model) -> list[Tensor]:
    """What a model says that is not given segments."""
    right, left = make_batch(), left_padded()
    del right["labels"]
    options = {"max_new_tokens": 5, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    generated = [model.generate(**left, do_sample=sample, **options) for sample in (False, True)]
    return [
        model(**right).logits,
        model(**left).logits,
        model(input_ids=right["input_ids"][:1]).logits,
        *(x for g in generated for x in (g.sequences, *g.logits)),
    ]


@pytest.mark.parametrize(
    ("name", "given"), [*PACKED, ("Llama4Text", "sdpa"), ("Mamba", None), ("Bloom", None)], ids=str
)
def test_a_model_does_what_it_did(name, given):
    model = build(name, given)
    before, config = answers(model), copy.deepcopy(model.config.to_dict())
    for mode, undo in ((use_packed_attention, use_own_attention), (use_packed_attention, use_packed_attention)):
        mode(model)
        for one, other in zip(answers(model), before, strict=True):
            assert torch.equal(one, other)
        assert model.config.to_dict() == config
        undo(model)
    use_own_attention(model)
    assert model.config._attn_implementation == (given or "eager") == implementation(model)
    assert all(torch.equal(one, other) for one, other in zip(answers(model), before, strict=True))


def test_it_is_ours_for_a_while():
    one, other = build("Llama", "sdpa"), build("Gemma2", "eager")
    use_packed_attention(other)
    with packed_attention(one), packed_attention(other):
        assert one.config._attn_implementation == "lit_did_sdpa"
        with pytest.raises(IndexError), packed_attention(one):
            one(torch.tensor([[10**6]]))
        assert one.config._attn_implementation == "lit_did_sdpa"
    assert one.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "lit_did_eager"  # as it was given
    assert implementation(other) == "eager"
    with packed_attention(other, packed=False):
        assert other.config._attn_implementation == "eager"
    assert other.config._attn_implementation == "lit_did_eager"


def test_configurations_within_others():
    """A model of text inside one of text and images, whose two parts have attention of their own."""
    parts = {
        "text_config": build("Gemma3Text").config.to_dict(),
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    config = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "flex_attention"})
    use_packed_attention(model)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text._attn_implementation, vision._attn_implementation) == ("lit_did_eager", "lit_did_flex_attention")
    use_own_attention(model)
    assert [c._attn_implementation for c in (model.config, text, vision)] == ["sdpa", "eager", "flex_attention"]


def test_other_attention_stays():
    model = build("Llama")
    model.config._attn_implementation = "another"
    use_packed_attention(model)
    assert model.config._attn_implementation == "another"


def test_what_is_saved_and_copied_meanwhile(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("Llama", "sdpa")
    use_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert not any("lit_did" in json.dumps(json.loads(file.read_text())) for file in tmp_path.glob("*.json"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    batch = make_batch()
    del batch["labels"]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    use_own_attention(twin)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "lit_did_sdpa")


def test_another_process_takes_a_model_as_it_is(tmp_path):
    model, sequences = build("Llama", "sdpa"), read_sequences(make_batch())
    layout = layout_of(model, sequences)
    with torch.no_grad(), packed_attention(model):
        expected = model(**layout.inputs, use_cache=False).logits
        (tmp_path / "model").write_bytes(pickle.dumps((model, layout.inputs)))
    program = """
import pickle, sys, torch
from lit_did.models.attention import use_packed_attention
model, inputs = pickle.load(open(sys.argv[1] + "/model", "rb"))
assert model.config._attn_implementation == "lit_did_sdpa"
use_packed_attention(model)
with torch.no_grad():
    torch.save(model(**inputs, use_cache=False).logits, sys.argv[1] + "/logits")
"""
    run_program(sys.executable, "-c", program, tmp_path)
    # Another number of threads may add in another order.
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)
