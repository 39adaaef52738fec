"""elementwise_recomputed: the same gradients to the bit, of less memory, whatever happens to the memory in between."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lit_did.models import recompute
from lit_did.models.recompute import elementwise_recomputed
from tests.modules.tiny import tiny_gpt2, tiny_llama


def gradients(model: nn.Module, input_ids: torch.Tensor, context) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with context():
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_are_the_same_to_the_bit(make, dtype, monkeypatch):
    model = make(0).to(dtype).eval()  # dropout would draw anew
    input_ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = gradients(model, input_ids, contextlib.nullcontext)
    runs = []
    value = recompute._Expression.value
    monkeypatch.setattr(recompute._Expression, "value", lambda *given: runs.append(1) or value(*given))
    for name, gradient in gradients(model, input_ids, elementwise_recomputed).items():
        assert torch.equal(gradient, expected[name]), name
    assert runs  # the premise


def gated(down, gate, up):
    return down(F.silu(gate) * up)


def joined(down, *halves):
    return down(torch.cat([half[:, :500] * 2.0 for half in halves], dim=1))


def turned(down, one, other):
    return down(one.T.reshape(100, 1000)) + down(other.view(1000, 100).T.contiguous())


@pytest.mark.parametrize(("function", "kept", "still_kept"), [(gated, 2, 0), (joined, 1, 0), (turned, 2, 0)])
def test_results_are_not_held(function, kept, still_kept):
    tensor = 100 * 1000 * 4

    def held(context) -> float:
        """Tensors [100, 1000] float32 that are still there after the forward pass."""
        inputs = [torch.randn(100, 1000, requires_grad=True) for _ in range(2)]
        down = nn.Linear(1000, 1)
        with torch.profiler.profile(profile_memory=True) as profile, context():
            output = function(down, *inputs)
        total = sum(event.self_cpu_memory_usage for event in profile.key_averages())
        output.sum().backward()
        return total / tensor

    assert held(contextlib.nullcontext) == pytest.approx(kept, abs=0.1)
    assert held(elementwise_recomputed) == pytest.approx(still_kept, abs=0.1)


def test_what_a_result_came_from_is_let_go():
    a = torch.randn(16, requires_grad=True)

    def product() -> tuple[torch.Tensor, StorageWeakRef]:
        source = a.sin()  # autograd keeps it for no one
        return source * 2.0, StorageWeakRef(source.untyped_storage())

    with elementwise_recomputed():
        results = [product(), product()]
        sources = [source for _, source in results]
        assert not any(source.expired() for source in sources)  # the premise
        del results[1]
        assert sources[1].expired()
    assert sources[0].expired()
    assert torch.equal(results[0][0], a.sin() * 2.0)


def grad_of(function, context, *values: torch.Tensor) -> list[torch.Tensor]:
    inputs = [value.clone().requires_grad_() for value in values]
    with context():
        output = function(*inputs)
    output.sum().backward()
    return [value.grad for value in inputs]


def check(function, *values: torch.Tensor) -> None:
    expected = grad_of(function, contextlib.nullcontext, *values)
    for ours, theirs in zip(grad_of(function, elementwise_recomputed, *values), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_runs_twice(monkeypatch):
    runs = []
    value = recompute._Expression.value
    monkeypatch.setattr(recompute._Expression, "value", lambda *given: runs.append(given[0].function) or value(*given))
    down, gate, up = nn.Linear(6, 1), *(torch.randn(4, 6, requires_grad=True) for _ in range(2))
    with elementwise_recomputed():
        output = gated(down, gate, up)
    output.sum().backward()
    assert runs == [torch.Tensor.mul, F.silu]  # the product for its layer, and silu's for it and for the product's


def test_memory_that_others_took_over():
    def function(a, b):
        total = 0
        for step in range(20):  # each product's memory is free for the next step's sums, which are no products
            total = total + (a * (step + 1.0)).sum()
            total = total + torch.exp(a + step).sin().prod() + torch.exp(b - step).cos().square().sum()
        return total

    check(function, torch.randn(64), torch.randn(64))


def test_results_changed_in_place():
    def function(a, b):
        product = a * b
        product.add_(1)  # in the place of what the product was
        return product.square()

    check(function, torch.randn(64), torch.randn(64))


def test_views_parts_and_strides():
    def function(a, b):
        product = a * b
        return (
            product[2:].square().sum()
            + product[:2].square().sum()
            + product.T.square().sum()
            + product.view(-1).square().sum()
            + (F.silu(product).T * b.T).square().sum()
        )

    check(function, torch.randn(8, 6), torch.randn(8, 6))


def test_copies_and_lists():
    def function(a, b):
        both = torch.cat([a * b, F.silu(a)], dim=1).T.contiguous()
        return both.square().sum() + both.T.reshape(-1).square().sum() + torch.cat((a, both.T[:, :6])).square().sum()

    check(function, torch.randn(8, 6), torch.randn(8, 6))


def test_deep_expressions(monkeypatch):
    steps = 3 * recompute.DEEPEST
    runs = []
    value = recompute._Expression.value
    monkeypatch.setattr(recompute._Expression, "value", lambda *given: runs.append(1) or value(*given))

    def function(a, b):
        product = a
        for _ in range(steps):
            product = product * b
        return product.square()

    check(function, torch.rand(16), torch.rand(16) + 0.5)
    assert steps / 2 < len(runs) <= steps  # not each from the first on, nor any twice


def test_as_much_as_may_is_kept(monkeypatch):
    runs = []
    value = recompute._Expression.value
    monkeypatch.setattr(recompute._Expression, "value", lambda *given: runs.append(1) or value(*given))
    a = [torch.randn(100, requires_grad=True) for _ in range(3)]
    for kept, expected in ((0, 3), (399, 3), (400, 2), (1000, 1), (1200, 0)):
        runs.clear()
        with elementwise_recomputed(kept):
            products = [x * 2.0 for x in a]
            total = sum((product.square() + product.sin()).sum() for product in products)  # each saved twice
        del products
        total.backward()
        assert len(runs) == expected
        assert all(torch.allclose(x.grad, 8 * x + 2 * (2 * x).cos()) for x in a)
        for x in a:
            x.grad = None


def test_changes_in_place_that_torch_refuses():
    def function(a):
        result = a.exp()
        return result.add_(1)  # the gradient is what exp returned

    for context in (contextlib.nullcontext, elementwise_recomputed):
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation|changed a tensor of shape \[4\] in place"
        ):
            grad_of(function, context, torch.randn(4))


def test_an_activation_in_the_place_of_its_input():
    def function(a):
        values = a + a
        return F.silu(values, inplace=True).square()

    check(function, torch.randn(16))


def test_tensors_given_by_name():
    def function(a):
        twice = a + a
        product = torch.mul(input=twice, other=torch.tensor(2.0))
        both = torch.cat(tensors=[twice, twice])
        twice.add_(1)  # whose versions are not watched: the results are kept
        return product.square().sum() + both.square().sum()

    check(function, torch.randn(16))


def test_arguments_by_name_and_casts():
    def function(a, b):
        gelu = F.gelu(input=a, approximate="tanh") * b.to(torch.float64).to(dtype=torch.float32)
        return gelu.square() + F.gelu(a, approximate="tanh").square()

    check(function, torch.randn(16), torch.randn(16))


@pytest.mark.parametrize("change", [lambda a: a * 2.0, lambda a: a.to(torch.bfloat16), lambda a: torch.cat([a, a])])
def test_an_input_changed_in_place_is_an_error_and_no_wrong_gradient(change):
    def function(a):
        twice = a + a
        changed = change(twice)
        twice.add_(1)  # which autograd allows: it keeps `changed`
        return changed.square()

    grad_of(function, contextlib.nullcontext, torch.randn(4))  # the premise
    with pytest.raises(RuntimeError, match=r"changed it in place: use `recompute_elementwise=False`"):
        grad_of(function, elementwise_recomputed, torch.randn(4))


def test_nothing_is_kept_outside_of_it():
    with elementwise_recomputed():
        pass
    a = torch.randn(4, requires_grad=True)
    product = a * a
    assert torch.equal(product.grad_fn._saved_self, a)
