"""What layout of a batch a model takes: decided against the untouched model, and right where the fast ones are not."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from functools import partial

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models import attention, trial
from lit_did.models.forward import completion_logits, output_layer
from lit_did.models.trial import find, layout_of, outputs_of
from tests.models.architectures import VOCABULARY, assert_right, build, logits_alone, logits_in, make_batch


def messages_of(record: list) -> list[str]:
    marks = ("kept in memory", "are padded", "one sequence at a time")
    return [str(w.message) for w in record if any(mark in str(w.message) for mark in marks)]


def of_lengths(*lengths: int, seed: int = 0) -> Sequences:
    """Sequences of random tokens, labelled from their third token on; an even number."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths) + 1  # the last token is a label alone
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) <= torch.tensor(lengths)[:, None]
    labels = torch.where(mask.roll(-1, 1) & mask, ids.roll(-1, 1), -100)
    labels[:, :2], labels[:, -1] = -100, -100
    return read_sequences({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})


def assert_right_on(model: nn.Module, sequences: Sequences) -> str:
    """That logits and gradients are those of every sequence alone; the kind of layout."""
    trained = [p for p in model.parameters() if p.requires_grad]
    truths = []
    for i in range(sequences.num_sequences):
        model(input_ids=torch.tensor([[1]]))  # forget the sequence before
        truths += logits_alone(model, sequences.select([i]))
    truth = torch.cat(truths).float()
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    layout = layout_of(model, sequences)
    outputs = outputs_of(model, layout)
    logits = outputs.logits if outputs.hidden is None else outputs.layer.logits(outputs.hidden)
    torch.testing.assert_close(logits, truth, rtol=0, atol=1e-4 * truth.abs().max().item())
    gradients, truths = (
        torch.autograd.grad((x * weights).sum(), trained, allow_unused=True, materialize_grads=True)
        for x in (logits, truth)
    )
    whole = torch.stack([g.norm() for g in truths]).norm()
    for gradient, expected in zip(gradients, truths, strict=True):
        assert (gradient - expected).norm() <= 1e-3 * (expected.norm() + 1e-2 * whole)
    return layout.kind


# ---------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------


def dynamic(**overrides) -> nn.Module:
    """A Llama that stretches its positions with the longest sequence from 32 tokens on."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return build("Llama", max_position_embeddings=32, rope_parameters=rope, **overrides)


def longrope() -> nn.Module:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope["original_max_position_embeddings"] = 32
    return build("Llama", max_position_embeddings=128, rope_parameters=rope)


def warm(**overrides) -> nn.Module:
    """A Llama 4 whose attention grows colder with the position in the row, from the eighth on."""
    return build(
        "Llama4Text", floor_scale=8, attn_scale=0.5, attention_chunk_size=4096, num_hidden_layers=4, **overrides
    )


@pytest.mark.parametrize(
    ("make", "lengths", "kind"),
    [
        (partial(build, "Llama"), (20, 15, 9, 20), "packed"),
        (partial(build, "Mistral"), (20, 15, 9, 20), "packed"),  # a window of 5
        (partial(build, "Mamba"), (20, 15, 9, 20), "padded"),
        (partial(build, "Bloom"), (20, 15, 9, 20), "padded"),
        (partial(build, "Falcon"), (20, 15, 9, 20), "padded"),  # asks for its attention by name
        (warm, (20, 15, 9, 20), "padded"),
        (longrope, (20, 15, 9, 20), "packed"),
        (longrope, (40, 15, 9, 20), "alone"),
        (dynamic, (20, 15, 9, 20), "packed"),
        (dynamic, (60, 40, 50, 20), "alone"),
    ],
)
def test_every_layout_is_right(make, lengths, kind):
    model = make()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for seed in (0, 1):
            assert assert_right_on(model, of_lengths(*lengths, seed=seed)) == kind
    messages = [m for m in messages_of(record) if "memory" not in m]
    assert len(messages) == (kind != "packed")
    assert type(model).__name__ in "".join(messages) or kind == "packed"


def test_each_size_of_batch_is_tried():
    """What is right of short sequences may be wrong of long ones, and short ones stay packed afterwards."""
    model = longrope()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        kinds = [assert_right_on(model, of_lengths(*lengths)) for lengths in ((20, 9), (40, 9), (33, 33), (20, 12))]
    assert kinds == ["packed", "alone", "alone", "packed"]
    assert len(messages_of(record)) == 1


@pytest.mark.filterwarnings("ignore:.* does not support batches with sequences of 64 tokens")
def test_order_does_not_matter_to_a_model_that_keeps_its_longest_sequence():
    model = dynamic()
    fresh = {n: torch.cat(logits_alone(dynamic(), of_lengths(n, n)))[: n - 2].detach().float() for n in (40, 60)}
    with torch.no_grad():
        for lengths in ((60, 60), (40, 40), (60, 40), (40, 60), (40, 40)):
            sequences = of_lengths(*lengths)
            outputs = outputs_of(model, layout_of(model, sequences))
            first = outputs.layer.logits(outputs.hidden)[: lengths[0] - 2]
            if lengths[0] == max(lengths):  # else its tokens are others
                torch.testing.assert_close(first, fresh[lengths[0]], rtol=1e-4, atol=1e-4)
            again = outputs_of(model, layout_of(model, sequences))
            torch.testing.assert_close(again.hidden, outputs.hidden)


def test_a_wrong_gradient_is_found_though_the_values_are_right():
    class Detached(LlamaForCausalLM):
        """Of several sequences in a row, no gradient reaches the embeddings."""

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
            embeddings = self.get_input_embeddings()(input_ids)
            if position_ids is not None and (position_ids[:, 1:] == 0).any():
                embeddings = embeddings.detach()
            return super().forward(None, attention_mask, position_ids, inputs_embeds=embeddings, **options)

    model = of_class(Detached)
    model.set_output_embeddings(copy.deepcopy(model.lm_head))
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: o)  # the whole model is called, not its body
    with torch.no_grad():
        assert layout_of(model, of_lengths(20, 15)).kind == "packed"
    assert assert_right_on(model, of_lengths(20, 15)) == "padded"


class Peeking(LlamaForCausalLM):
    """Sees the next token, and no other."""

    def forward(self, input_ids=None, **options):
        outputs = super().forward(input_ids, **options)
        following = self.get_input_embeddings()(input_ids.roll(-1, 1))
        keep = options.get("logits_to_keep", 0)
        seen = self.lm_head(following)
        outputs.logits = outputs.logits + (seen[:, keep] if isinstance(keep, Tensor) else seen)
        return outputs


@pytest.mark.parametrize("length", [20, 400])
def test_a_model_that_sees_the_next_token_alone_is_refused(length):
    with pytest.raises(TypeError, match="in Peeking a later token changes an earlier logit"):
        layout_of(of_class(Peeking), of_lengths(length, 15))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(partial(build, "Falcon"), "padded"), (partial(build, "Llama"), "packed"), (lambda: dynamic(), "alone")],
)
@pytest.mark.parametrize("distinct", [1, 2])
def test_batches_of_few_different_tokens_decide_as_others(make, kind, distinct):
    """Attention over equal values is the same for all positions that it may attend to."""
    sequences = of_lengths(60, 40, 50, 20)
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = sequences._replace(input_ids=sequences.input_ids % distinct + 5)
        assert layout_of(model, few).kind == kind
        assert assert_right_on(model, sequences) == kind
    with pytest.raises(TypeError, match="a later token changes"):
        layout_of(transformers.BertLMHeadModel(_bert()).eval(), few)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_decides_as_float32(name, how):
    model = build(name, num_hidden_layers=8, initializer_range=0.05)
    model = model.bfloat16() if how == "weights" else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for seed in range(3):
            again = copy.deepcopy(model)
            assert layout_of(again, of_lengths(60, 40, 50, 20, seed=seed)).kind == "packed"
        falcon = build("Falcon", num_hidden_layers=2)
        falcon = falcon.bfloat16() if how == "weights" else falcon
        with pytest.warns(UserWarning, match="so they are padded instead"):
            assert layout_of(falcon, of_lengths(60, 40, 50, 20)).kind == "padded"


def test_another_precision_or_attention_is_another_trial():
    model, seen = build("Llama"), []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    batch = of_lengths(20, 15)
    for change in (lambda: None, lambda: model.double(), lambda: model.set_attn_implementation("eager")):
        change()
        seen.clear()
        find(model, batch)
        assert seen
        seen.clear()
        find(model, batch)
        assert not seen


def test_what_cannot_be_packed_is_not_tried_with_every_row():
    model, rows = build("Falcon"), []
    model.transformer.word_embeddings.register_forward_hook(lambda _, ids, out: rows.append(ids[0].numel()))
    with pytest.warns(UserWarning, match="so they are padded instead"):
        layout_of(model, of_lengths(20, 15))
    rows.clear()
    assert layout_of(model, of_lengths(*[20] * 12)).kind == "padded"
    assert not rows
    assert assert_right_on(model, of_lengths(*[60] * 4)) == "padded"


def test_what_a_layout_raised_is_told():
    class Fussy(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
            if len(input_ids) > 1 or input_ids.shape[1] > 32:
                raise RuntimeError("one sequence, please")
            return super().forward(input_ids, attention_mask, position_ids, **options)

    model = of_class(Fussy)
    model.lm_head.register_forward_hook(lambda m, i, o: o)  # the whole model is called, not its body
    with pytest.warns(UserWarning, match=r"does not support batches .*raised RuntimeError: one sequence, please"):
        assert layout_of(model, of_lengths(20, 15)).kind == "alone"


def test_parts_of_a_batch_have_the_batch_s_layout():
    model, whole = longrope(), of_lengths(40, 20)
    with pytest.warns(UserWarning, match="one sequence at a time"):
        kinds = [layout_of(model, whole.select([i]), batch=whole).kind for i in (0, 1)]
    assert kinds == ["alone", "alone"]
    assert layout_of(model, whole.select([1])).kind == "packed"


def test_nothing_is_renamed_where_nothing_is_packed():
    model, names = build("Falcon", "sdpa"), []
    model.transformer.register_forward_hook(lambda *_: names.append(model.config._attn_implementation))
    layout = layout_of(model, of_lengths(20, 15))
    names.clear()
    outputs_of(model, layout)
    assert names == ["sdpa"]


def test_the_truth_is_the_untouched_model():
    """Also of a model that packed attention has been set on before."""
    model = build("Llama", "sdpa")
    names = []
    model.model.register_forward_hook(
        lambda _, args, kwargs, out: names.append((model.config._attn_implementation, kwargs["input_ids"].shape[1])),
        with_kwargs=True,
    )
    attention.use_packed_attention(model)
    find(model, of_lengths(20, 15))
    assert {name for name, length in names if length <= 32} == {"sdpa"}
    assert {name for name, length in names if length > 32} == {"lit_did_sdpa"}
    assert attention.uses_packed_attention(model)


@pytest.mark.parametrize("longest", [20, 32, 33, 100])
def test_trials_are_as_long_as_the_batch(longest):
    model = build("Llama", max_position_embeddings=128)
    seen = []
    model.model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    sequences = of_lengths(*[longest] * 6)
    found = find(model, sequences)
    assert found.length >= longest
    assert found.row >= sequences.cu_seqlens[-1]
    assert max(shape[1] for shape in seen if shape[1] <= found.length) >= longest
    # One token row holds what the whole batch would take.
    assert max(shape[1] for shape in seen) >= found.row - 8
    seen.clear()
    assert find(model, of_lengths(*[longest] * 6, seed=2)) is found
    assert find(model, of_lengths(longest, 3)) is found
    assert not seen


@pytest.mark.parametrize("name", ["GPT2", "OPT", "GPTBigCode"])
def test_positions_beyond_the_model(name):
    more = {"word_embed_proj_dim": 32, "ffn_dim": 48} if name == "OPT" else {}
    model = build(name, max_position_embeddings=48, **more)
    assert assert_right_on(model, of_lengths(48, 20)) in ("packed", "padded")
    with pytest.raises(ValueError, match=rf"at most 48 tokens, for which {name}.* has positions, but got 49"):
        layout_of(model, of_lengths(49, 20))


def test_a_sharded_model_is_tried_once_and_warns_once_of_longer_batches(monkeypatch):
    monkeypatch.setattr(trial, "is_sharded", lambda model: True)
    model = build("Llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout_of(model, of_lengths(20, 15))
        layout_of(model, of_lengths(40, 15))  # the trial was twice as long as needed
    with pytest.warns(
        UserWarning, match=r"checked only once .* up to 64 tokens .* has up to 70 tokens a sequence and 85 in"
    ):
        layout_of(model, of_lengths(70, 15))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout_of(model, of_lengths(80, 15))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.BertLMHeadModel(_bert()), "in BertLMHeadModel a later token changes an earlier logit"),
        (lambda: transformers.BertForMaskedLM(_bert()), "in BertForMaskedLM a later token changes an earlier logit"),
        (
            lambda: transformers.LlamaForSequenceClassification(build("Llama").config),
            "that returns `logits`.*LlamaForSequenceClassification returned `logits` of the shape",
        ),
        (
            lambda: transformers.LlamaForTokenClassification(build("Llama").config),
            "logits of LlamaForTokenClassification have 2 classes",
        ),
        (
            lambda: transformers.LlamaForQuestionAnswering(build("Llama").config),
            "that returns `logits`.*LlamaForQuestionAnswering returned no `logits`",
        ),
    ],
)
def test_models_that_are_no_causal_language_models(make, message):
    with pytest.raises(TypeError, match=f"Expected a causal language model.*{message}"):
        layout_of(make().eval(), of_lengths(20, 15))


def test_an_encoder_that_was_made_a_decoder():
    model = transformers.BertLMHeadModel(_bert(is_decoder=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert assert_right_on(model, of_lengths(20, 15, 9, 20)) in ("packed", "padded")


def _bert(**overrides):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return transformers.BertConfig(**sizes, num_attention_heads=2, initializer_range=0.3, **overrides)


def test_positions_that_do_not_restart_are_padded():
    model = build("Llama4Text")
    batch = make_batch()
    # The second sequence goes on where the first one ends: positions would not tell them apart.
    starts = torch.tensor([0, 20, 0, 0, 0, 0])[:, None]
    batch["position_ids"] = starts + torch.arange(batch["input_ids"].shape[1])
    sequences = read_sequences(batch)
    with torch.no_grad():
        expected = torch.cat(logits_alone(model, sequences)).float()
        torch.testing.assert_close(logits_in(model, sequences), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# The output layer
# ---------------------------------------------------------------------------------------------------------------


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
    "make",
    [
        subclassed_head,
        lora_on_head,
        hooked_head,
        patched_head,
        partial(of_class, Scaled),
        partial(of_class, Scaled, 1.5),
    ],
)
def test_logits_where_no_linear_layer_makes_them(make):
    model = make()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert_right(model)
    assert len(messages_of(record)) == 1
    assert "does not expose last hidden states" in messages_of(record)[0]
    layout = layout_of(model, read_sequences(make_batch()))
    assert layout.kind == "packed"
    assert outputs_of(model, layout).hidden is None


@pytest.mark.parametrize(
    "adapter",
    [
        {"trainable_token_indices": [38, 39]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": None},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_on_embeddings(adapter, tied):
    if tied and "modules_to_save" in adapter:
        pytest.skip("peft keeps one of two tied layers")
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **adapter})
    torch.manual_seed(0)
    model = peft.get_peft_model(build("Llama", tie_word_embeddings=tied), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert assert_right_on(model, read_sequences(make_batch())) == "packed"


def test_without_logits_to_keep():
    model = of_class(WithoutLogitsToKeep)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="kept in memory"):
        assert_right(model)


def test_the_output_layer_is_given_completion_positions_alone():
    model, sequences = build("Llama"), read_sequences(make_batch())
    with torch.no_grad():
        layout = layout_of(model, sequences)
        seen = []
        model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
        hidden = outputs_of(model, layout).hidden
        assert (hidden.shape, seen) == ((sequences.num_labels, 32), [])  # not used at all
        logits, _ = completion_logits(model, layout)
        assert seen == [len(layout.rows.unique())]
        assert seen[0] < sequences.num_labels  # some predict for both sequences of a pair
        torch.testing.assert_close(output_layer(model).logits(hidden), logits)


def test_a_trial_leaves_modes_and_random_numbers_and_happens_once():
    model = build("GPT2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    calls, batch = [], read_sequences(make_batch())
    model.transformer.register_forward_hook(lambda *_: calls.append(torch.rand(())))  # not only dropout draws
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert layout_of(model, batch).kind == "packed"  # whatever it drops in training
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    tried = len(calls)
    layout_of(model, batch)
    assert 0 < tried == len(calls)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_broken_weights_are_no_inability(broken):
    model = build("Llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(broken)[3] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layout = layout_of(model, read_sequences(make_batch()))
        assert layout.kind == "packed"
        assert outputs_of(model, layout).hidden is not None


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
    find(model, read_sequences(make_batch()))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
