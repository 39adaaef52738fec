"""Models whose caches fail or give other results than their own forward passes: read whole, with one warning."""

from __future__ import annotations

import warnings
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lit_did.sampling import DIDLogitsProcessor, sample_did
from lit_did.sampling.readers import CachedModel
from tests.modules.tiny import VOCABULARY, tiny_llama

PROMPT = torch.tensor([[5, 6, 7]])
TOKENS = 8


def cache_name(model: nn.Module) -> str:
    """The installed transformers' name for a cache."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class Forgetful(nn.Module):
    """A Llama whose cache goes wrong once it holds `after` tokens, in one of several ways."""

    def __init__(self, seed: int, how: str, after: int) -> None:
        super().__init__()
        self.model = tiny_llama(seed).eval()
        self.how, self.after = how, after
        self.cached_reads = 0

    def forward(self, input_ids: Tensor, attention_mask=None, past_key_values=None, use_cache=None):
        options = {"attention_mask": attention_mask} if past_key_values is not None else {}
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        name = cache_name(self.model)
        outputs = self.model(input_ids=input_ids, use_cache=use_cache, **{name: past_key_values}, **options)
        self.cached_reads += use_cache is True
        if use_cache and held >= self.after:
            if self.how == "raises" or (self.how == "other, then raises" and held >= self.after + 2):
                raise IndexError("list index out of range")
            if self.how == "none":
                outputs[name] = None
            if self.how.startswith("other"):
                outputs.logits = outputs.logits.roll(1, -1)
        return outputs


def draw(policy: nn.Module, reference: nn.Module, seed: int = 0) -> tuple[Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        samples = sample_did(
            policy,
            reference,
            PROMPT,
            max_new_tokens=TOKENS,
            eos_token_id=None,
            num_samples=8,
            ess_threshold=1.0,
            seed=seed,
            progress=False,
        )
    return samples.policy_logprob, [str(warning.message) for warning in warned]


@pytest.mark.parametrize("after", [0, 6])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"cannot read on with its cache \(IndexError: list index out of range\)"),
        ("none", "returns no cache"),
        ("other", "gives other results with its cache than in its own forward pass"),
    ],
)
def test_draws_are_right_without_the_cache(how, words, after):
    expected, warned = draw(tiny_llama(0).eval(), tiny_llama(1).eval())
    assert warned == []
    broken = Forgetful(0, how, after)
    got, warned = draw(broken, tiny_llama(1).eval())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert broken.cached_reads > 0  # the premise
    (warning,) = warned
    assert warning.startswith("Forgetful ")
    assert words.replace("\\", "") in warning
    assert warning.endswith("Results are right, but sampling is slower.")


def test_a_cache_that_was_wrong_before_it_failed():
    """After 6 tokens it gives other logits, and after 8 it fails: the draws in between are not kept."""
    expected, _ = draw(tiny_llama(0).eval(), tiny_llama(1).eval())
    got, warned = draw(Forgetful(0, "other, then raises", 6), tiny_llama(1).eval())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    failed, wrong = warned
    assert "cannot read on with its cache (IndexError" in failed
    assert "own forward pass" in wrong
    processor = DIDLogitsProcessor(tiny_llama(0).eval(), Forgetful(1, "other, then raises", 6))
    ids = torch.arange(5, 14)[None]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for length in range(3, 10):  # the fourth read is compared, the fifth is wrong, the seventh fails
            processor(ids[:, :length], torch.zeros(1, VOCABULARY))
    assert "its cache (IndexError" in str(warned[0].message)
    assert str(warned[1].message).startswith("Up to the last 3 tokens may have been drawn from wrong logits")
    assert "own forward pass after 8 tokens" in str(warned[1].message)


def test_a_cache_that_cannot_be_reordered(monkeypatch):
    import transformers

    expected, _ = draw(tiny_llama(0).eval(), tiny_llama(1).eval())

    def fails(self, rows):
        raise NotImplementedError

    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", fails)
    got, warned = draw(tiny_llama(0).eval(), tiny_llama(1).eval())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert all("cannot reorder its cache (NotImplementedError" in warning for warning in warned)


def test_running_out_of_memory_is_no_reason_to_read_more(monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("too much")

    reader = CachedModel(tiny_llama(0).eval())
    reader.read(PROMPT)
    monkeypatch.setattr(torch.nn.functional, "embedding", fails)
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        reader.read(PROMPT)
    assert reader.caches


def test_processors_notice_within_twice_as_many_tokens():
    policy, reference = tiny_llama(0).eval(), Forgetful(1, "other", after=6)
    processor = DIDLogitsProcessor(policy, reference)

    def step(ids: Tensor) -> tuple[Tensor, bool]:
        with torch.no_grad():
            scores = policy(input_ids=ids).logits[:, -1]
            expected = (scores - reference.model(input_ids=ids).logits[:, -1]).log_softmax(-1)
        got = processor(ids, scores)
        return torch.cat([ids, got.argmax(-1)[:, None]], 1), torch.allclose(got, expected, atol=1e-3)

    ids, right = PROMPT, []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(10):
            ids, agrees = step(ids)
            right.append(agrees)
    # The first four find a cache of at most 5 tokens. The eighth is compared.
    assert right == [True] * 4 + [False] * 3 + [True] * 3
    (warning,) = warned
    assert str(warning.message).startswith("Up to the last 4 tokens may have been drawn from wrong logits")
    assert "own forward pass after 10 tokens" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(step(ids[:, :length])[1] for length in range(3, 11))  # the same processor, without the cache


def test_rows_with_padding_are_read_alone_without_a_cache():
    model = tiny_llama(0).eval()
    reader = CachedModel(model, cache=False)
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        expected = torch.cat([model(input_ids=row[None]).logits[:, -1] for row in (ids[0, 2:], ids[1])])
    torch.testing.assert_close(reader.read(ids, mask), expected, rtol=0, atol=1e-4)


def test_a_padding_token_that_was_drawn_is_no_padding():
    """RoBERTa counts positions by the tokens that are not padding: its cache counts others than its forward pass."""
    import transformers

    def roberta(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 40}
        config = transformers.RobertaConfig(
            **sizes, num_hidden_layers=1, num_attention_heads=2, is_decoder=True, pad_token_id=1, initializer_range=0.3
        )
        return transformers.RobertaForCausalLM(config).eval()

    policy, reference = roberta(0), roberta(1)
    got, warned = draw(policy, reference, seed=1)  # which draws the padding token
    assert any("RobertaForCausalLM" in warning and "own forward pass" in warning for warning in warned)
    assert got.isfinite().all()


class Renamed(nn.Module):
    """A Llama with transformers' newer name for a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama(0).eval()
        self.lengths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask=None, cache=None, use_cache=None):
        self.lengths.append(input_ids.shape[1])
        name = cache_name(self.model)
        outputs = self.model(input_ids, attention_mask, use_cache=use_cache, **{name: cache})
        return SimpleNamespace(logits=outputs.logits, cache=getattr(outputs, name))


def test_the_newer_name_of_a_cache():
    model = Renamed()
    reader = CachedModel(model)
    ids = torch.arange(5, 14)[None]
    read = [reader.read(ids[:, :5]), reader.read(ids[:, 5:6])]
    assert model.lengths == [5, 1]
    expected = model.model(input_ids=ids[:, :6]).logits[:, 4:]
    torch.testing.assert_close(torch.stack(read, 1), expected)
