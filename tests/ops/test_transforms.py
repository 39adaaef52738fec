"""Forward-mode differentiation and torch.func's transforms: every operator is right, or says what to use instead."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lit_did import linear_sequence_statistics, linear_token_statistics, sequence_statistics, token_statistics
from lit_did.ops import sequence_reduction

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([[1, -100, 3], [0, 2, 4]])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


LOGITS, OTHER_LOGITS = normal(2, 3, 5), normal(2, 3, 5)
HIDDEN, OTHER_HIDDEN = normal(2, 3, 4), normal(2, 3, 4)
WEIGHT, OTHER_WEIGHT, BIAS = normal(5, 4), normal(5, 4), normal(5)
TOKENS = token_statistics(LOGITS, OTHER_LOGITS, LABELS, backend="reference")
OPTIONS = {"softcap": (3.0, None), "scale": (0.5, 1.0), "temperature": 0.7}


def scalar(statistics) -> torch.Tensor:
    """Curved in all statistics."""
    return sum((i + 1) * value.square().sum() for i, value in enumerate(statistics) if value.is_floating_point())


# Each with the tensor that is differentiated.
OPERATORS = {
    "token, policy": (lambda x, b: token_statistics(x, OTHER_LOGITS, LABELS, backend=b), LOGITS),
    "token, reference": (lambda x, b: token_statistics(LOGITS, x, LABELS, temperature=2, backend=b), OTHER_LOGITS),
    "sequence": (lambda x, b: sequence_statistics(x, OTHER_LOGITS, LABELS, backend=b), LOGITS),
    "packed": (
        lambda x, b: sequence_statistics(
            x[0], OTHER_LOGITS[0], LABELS[0], cu_seqlens=torch.tensor([0, 2, 3]), backend=b
        ),
        LOGITS,
    ),
    "reduction": (lambda x, b: sequence_reduction(TOKENS._replace(kl=x), LABELS, backend=b), normal(2, 3)),
    "linear, hidden": (
        lambda x, b: linear_token_statistics(x, WEIGHT, OTHER_HIDDEN, OTHER_WEIGHT, LABELS, backend=b, **OPTIONS),
        HIDDEN,
    ),
    "linear, weight": (
        lambda x, b: linear_token_statistics(
            HIDDEN, x, OTHER_HIDDEN, OTHER_WEIGHT, LABELS, policy_bias=BIAS, backend=b, **OPTIONS
        ),
        WEIGHT,
    ),
    "linear, reference": (
        lambda x, b: linear_sequence_statistics(HIDDEN, WEIGHT, x, OTHER_WEIGHT, LABELS, backend=b),
        OTHER_HIDDEN,
    ),
}


def dual(f, x, direction):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent
        return torch.zeros(()) if tangent is None else tangent


FIRST = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "dual numbers": dual,
    "jacfwd": lambda f, x, t: (jacfwd(f)(x) * t).sum(),
    "jacrev": lambda f, x, t: (jacrev(f)(x) * t).sum(),
    "vmap": lambda f, x, t: (vmap(f)(torch.stack([x + 1e-5 * t, x - 1e-5 * t])).diff().neg() / 2e-5)[0],
    "vmap of grad": lambda f, x, t: (vmap(grad(f))(torch.stack([x, x])) * t).sum() / 2,
}
SECOND = {
    "hessian": lambda f, x, t: (hessian(f)(x).reshape(x.numel(), -1) @ t.flatten()) @ t.flatten(),
    "reverse over forward": lambda f, x, t: (grad(lambda x: jvp(f, (x,), (t,))[1])(x) * t).sum(),
}


@pytest.mark.parametrize("transform", [*FIRST, *SECOND])
@pytest.mark.parametrize("operator", OPERATORS)
def test_derivatives_are_right_or_refused(operator, transform):
    call, x = OPERATORS[operator]
    direction = normal(*x.shape)

    def along(step):
        return float(scalar(call(x + step * direction, "reference")))

    if transform in FIRST:
        expected, derivative = (along(1e-5) - along(-1e-5)) / 2e-5, FIRST[transform]
    else:
        expected, derivative = (along(1e-3) - 2 * along(0) + along(-1e-3)) / 1e-6, SECOND[transform]
    for backend in ("auto", "reference"):
        got = derivative(lambda x, b=backend: scalar(call(x, b)), x, direction)
        assert float(got) == pytest.approx(expected, rel=1e-4, abs=1e-5), backend
    with pytest.raises(RuntimeError, match=r"Expected `backend` to be 'auto' or 'reference' under torch\.func"):
        derivative(lambda x: scalar(call(x, "fused")), x, direction)


def test_vmap_over_labels_too():
    rows = vmap(token_statistics)(LOGITS, OTHER_LOGITS, LABELS)
    torch.testing.assert_close(rows, TOKENS)
    hidden = vmap(lambda h, y: linear_token_statistics(h, WEIGHT, h, OTHER_WEIGHT, y))(HIDDEN, LABELS)
    torch.testing.assert_close(hidden, linear_token_statistics(HIDDEN, WEIGHT, HIDDEN, OTHER_WEIGHT, LABELS))
    with pytest.raises(ValueError, match=r"Expected `labels` to be in \[0, 5\) .* but got 5"):
        vmap(token_statistics)(LOGITS, OTHER_LOGITS, LABELS.where(LABELS != 4, 5))


def test_transformed_linear_statistics_do_not_read_ignored_rows():
    hidden = HIDDEN.clone()
    hidden[LABELS == -100] = torch.nan
    gradient = grad(lambda w: linear_token_statistics(hidden, w, hidden, WEIGHT, LABELS).kl.sum())(OTHER_WEIGHT)
    expected = grad(lambda w: linear_token_statistics(HIDDEN, w, HIDDEN, WEIGHT, LABELS).kl.sum())(OTHER_WEIGHT)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "reduction"])
def test_gradients_of_gradients_along_a_direction_are_refused(operator):
    call, x = OPERATORS[operator]
    x = x.clone().requires_grad_()
    output = scalar(call(x, "fused"))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Expected `backend='reference'` where gradients"):
        torch.autograd.grad(output, x, forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output)))
    output = scalar(call(x, "fused"))
    with pytest.raises(RuntimeError, match="Expected `backend='reference'` where gradients"):
        vmap(lambda u: torch.autograd.grad(output, x, u, retain_graph=True)[0])(torch.ones(2, dtype=torch.float64))


def test_compiled_forward_mode_is_right_or_refused():
    def derivative(x, direction, backend):
        return jvp(lambda x: token_statistics(x, OTHER_LOGITS, LABELS, backend=backend).kl, (x,), (direction,))[1]

    direction = normal(*LOGITS.shape)
    compiled = torch.compile(derivative, backend="eager")
    torch.testing.assert_close(compiled(LOGITS, direction, "auto"), derivative(LOGITS, direction, "reference"))
    with pytest.raises(Exception, match="forward-mode differentiation"):
        compiled(LOGITS, direction, "fused")
