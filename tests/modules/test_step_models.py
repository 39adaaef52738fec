"""LitDPO's step with models checkpointed, compiled, adapted or with dropout; and without logits in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_did import LitDPO
from lit_did.batches.sequences import read_sequences
from lit_did.models import policy_and_reference
from lit_did.models.trial import find
from tests.modules.steps import OPTIMISER, PLAIN, SWITCHES, assert_same, loader, make, train
from tests.modules.tiny import tiny_gpt2, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def test_gradient_checkpointing():
    expected = train(make(**PLAIN))
    for switches in SWITCHES[1:4]:
        runs = {}
        for checkpointing in (False, True):
            module = make(gradient_checkpointing=checkpointing, **switches)
            runs[checkpointing] = []
            mlp = module.policy.model.layers[0].mlp
            # Before, not after: what runs again stops at the last tensor that is wanted.
            mlp.register_forward_pre_hook(  # not those of the trial, in eval mode
                lambda m, _, of=runs[checkpointing]: of.append(torch.is_grad_enabled() and m.training)
            )
            assert_same(train(module), expected)
        assert sum(runs[True]) == 2 * sum(runs[False])  # the premise: layers run again


def test_lora():
    def run(**switches):
        torch.manual_seed(3)  # of the adapter, which does not start at zero
        module = LitDPO(tiny_llama(0), lora=LORA, **OPTIMISER, **switches)
        return module, train(module)

    expected = run(**PLAIN)[1]
    assert expected.logged[0]["train/kl"] > 1e-3  # the premise
    for switches in SWITCHES:
        assert_same(run(**switches)[1], expected)
    module = run()[0].eval()
    batch = next(iter(loader()))
    base = make(**PLAIN).eval().pair_statistics(batch)  # whose policy is what the adapter was added to
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(
            getattr(module.pair_statistics(batch), side).reference_logprob, getattr(base, side).policy_logprob
        )


@pytest.mark.parametrize("how", ["function", "method", "module"])
def test_compiled(how, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{"backend": "eager", **k}))
    models = [tiny_llama(seed, num_hidden_layers=1) for seed in (0, 1)]
    expected = train(LitDPO(*copy.deepcopy(models), **OPTIMISER, **PLAIN), loader(2, 2), max_epochs=2)
    if how == "function":
        module = LitDPO(*map(torch.compile, models), **OPTIMISER)
    else:
        module = LitDPO(*models, **OPTIMISER)
        if how == "module":
            module = torch.compile(module)
        else:
            module.policy.compile()
            module.reference.compile()
    assert_same(train(module, loader(2, 2), max_epochs=2), expected)


def test_dropout_that_is_left_on():
    def run(**switches) -> LitDPO:
        policy, reference = (tiny_gpt2(seed, resid_pdrop=0.2, attn_pdrop=0.2) for seed in (0, 1))
        return LitDPO(policy, reference, disable_dropout=False, gradient_checkpointing=True, **OPTIMISER, **switches)

    batch = next(iter(loader()))
    exact = run(**PLAIN).eval().pair_statistics(batch).chosen
    for switches in SWITCHES[:4]:
        module = run(**switches).train()
        dropped = [module.pair_statistics(batch).chosen for _ in range(2)]
        for statistics in dropped:  # none in the reference
            torch.testing.assert_close(statistics.reference_logprob, exact.reference_logprob, rtol=1e-4, atol=1e-4)
            assert (statistics.policy_logprob - exact.policy_logprob).abs().max() > 1e-2
        assert not torch.equal(dropped[0].policy_logprob, dropped[1].policy_logprob)
        torch.testing.assert_close(module.eval().pair_statistics(batch).chosen.log_ratio, exact.log_ratio)
        record = train(module)  # where layers that run again draw the same numbers, or gradients would be wrong
        assert all(g.isfinite().all() for step in record.gradients for g in step)


def test_models_have_their_own_attention_back():
    module = make()
    seen = []
    module.policy.model.layers[0].register_forward_hook(
        lambda *_: seen.append(module.policy.config._attn_implementation)
    )
    for stage in ("fit", "validate", "predict"):
        seen.clear()
        getattr(trainer(max_steps=2), stage)(module, loader())
        assert seen[-1] == "lit_did_sdpa"  # the premise
        assert {m.config._attn_implementation for m in (module.policy, module.reference)} == {"sdpa"}
    module = make(padding_free=False)
    train(module)
    assert module.policy.config._attn_implementation == "sdpa"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is no [vocabulary, hidden] of weights and their gradients."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.sizes, self.elements = (vocabulary, hidden), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else (result,):
            if isinstance(x, Tensor) and sorted(x.shape)[-2:] != sorted(self.sizes):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_logits_in_memory(monkeypatch):
    vocabulary, hidden, bound = 20_000, 8, 2**20
    rows, bounds = [], {}
    kernel = policy_and_reference.linear_sequence_statistics

    def watched(policy_hidden, *arguments, **options):
        rows.append(len(policy_hidden))
        return kernel(policy_hidden, *arguments, **options, **bounds)

    monkeypatch.setattr(policy_and_reference, "linear_sequence_statistics", watched)
    data = loader()
    labels = [int((batch["labels"] != -100).sum()) for batch in data]

    def largest() -> int:
        rows.clear()
        options = {"vocab_size": vocabulary, "hidden_size": hidden, "head_dim": 4}
        module = LitDPO(*(tiny_llama(seed, **options) for seed in (0, 1)), **OPTIMISER)
        for model in (module.policy, module.reference):
            for batch in data:
                find(model, read_sequences(batch))  # tried with logits of a few tokens
        with Largest(vocabulary, hidden) as watch:
            trainer(max_epochs=1).fit(module, data)
        assert rows == labels  # what the output layer is given: completion tokens, each once
        return watch.elements

    assert largest() >= min(labels) * vocabulary  # the premise: they fit in what is allowed
    bounds["max_extra_bytes"] = bound
    assert largest() * 4 <= bound < min(labels) * vocabulary * 4
