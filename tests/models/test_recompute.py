"""elementwise_recomputed: the same gradients to the bit, of less memory, whatever happens to the memory in between."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    monkeypatch.setattr(recompute._Expression, "value", lambda self: runs.append(1) or value(self))
    for name, gradient in gradients(model, input_ids, elementwise_recomputed).items():
        assert torch.equal(gradient, expected[name]), name
    assert runs  # the premise


def held(context) -> int:
    """Bytes that are still there after a gated layer's forward pass, of one [100, 1000] float32 tensor."""
    gate, up = (torch.randn(100, 1000, requires_grad=True) for _ in range(2))
    down = nn.Linear(1000, 1)
    with torch.profiler.profile(profile_memory=True) as profile, context():
        output = down(F.silu(gate) * up)
    total = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    output.sum().backward()
    return total


def test_results_are_not_held():
    tensor = 100 * 1000 * 4
    assert 2 * tensor < held(contextlib.nullcontext) < 2.1 * tensor  # silu's and the product
    assert held(elementwise_recomputed) < 0.1 * tensor


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


def test_deep_expressions(monkeypatch):
    steps = 3 * recompute.DEEPEST
    runs = []
    value = recompute._Expression.value
    monkeypatch.setattr(recompute._Expression, "value", lambda self: runs.append(1) or value(self))

    def function(a, b):
        product = a
        for _ in range(steps):
            product = product * b
        return product.square()

    check(function, torch.rand(16), torch.rand(16) + 0.5)
    assert steps <= len(runs) <= steps * recompute.DEEPEST  # not each from the first on


def test_an_activation_in_the_place_of_its_input():
    def function(a):
        values = a + a
        return F.silu(values, inplace=True).square()

    check(function, torch.randn(16))


def test_tensors_given_by_name():
    def function(a):
        twice = a + a
        product = torch.mul(input=twice, other=torch.tensor(2.0))
        twice.add_(1)  # whose versions are not watched: the product is kept
        return product.square()

    check(function, torch.randn(16))


def test_arguments_by_name_and_casts():
    def function(a, b):
        gelu = F.gelu(input=a, approximate="tanh") * b.to(torch.float64).to(dtype=torch.float32)
        return gelu.square() + F.gelu(a, approximate="tanh").square()

    check(function, torch.randn(16), torch.randn(16))


@pytest.mark.parametrize("change", [lambda a: a * 2.0, lambda a: a.to(torch.bfloat16)])
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
