"""The backward that writes gradients over the logits: the ordinary one's bits, and an error where values are lost."""

from __future__ import annotations

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from lit_did.ops import extension
from tests.helpers import DTYPES, random_logits

ROWS, VOCABULARY = 6, 530  # vectors, a block and a tail
USED = {"logprobs": (0, 1), "entropy": (2,), "all": range(9)}


def batch(policy_dtype="f32", reference_dtype="f32"):
    """Logits with an ignored row, one that holds NaN, and one with holes."""
    policy, reference, labels = random_logits(ROWS, VOCABULARY, DTYPES[policy_dtype], DTYPES[reference_dtype])
    labels[1] = -100
    policy[2, 5] = torch.nan
    policy[3, 7::9], reference[3, 7::9] = -torch.inf, -torch.inf
    labels[3] = 0
    return policy, reference, labels


def operator_arguments(policy, reference, labels, used=range(9)):
    *statistics, normalizers = torch.ops.lit_did.token_statistics(policy, reference, labels, -100, 0.9)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(labels.shape, generator=generator, dtype=statistics[0].dtype) if i in used else None
        for i in range(9)
    ]
    return grads, policy, reference, labels, statistics, normalizers, -100, 0.9


def loss(statistics):
    return statistics.log_ratio.sigmoid().sum() + statistics.token_did_entropy.sum() - 0.1 * statistics.kl.sum()


def token_loss(*inputs, **options):
    return loss(token_statistics(*inputs, **options))


def packed_loss(*inputs, **options):
    return loss(sequence_statistics(*inputs, cu_seqlens=torch.tensor([0, 2, 2, ROWS]), **options))


def grads_through(layer, function=token_loss, **options):
    """The gradients of `function` behind `layer`, with respect to its inputs; the logits in between."""
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    inputs = (policy.requires_grad_(), reference.requires_grad_())
    logits = [layer(x) for x in inputs]
    return torch.autograd.grad(function(*logits, labels, **options), inputs), logits


def scaled(x):
    return 1.5 * x


def assert_same(ours, expected):
    for grad, of_expected in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, of_expected, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------
# The operator
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"), ("f16", "bf16"), ("f64", "f64")])
def test_same_bits(dtypes, used, needs):
    logits = batch(*dtypes)
    arguments = operator_arguments(*logits, USED[used])
    before = [x.clone() for x in logits[:2]]
    expected = torch.ops.lit_did.token_statistics_backward(*arguments, *needs)
    torch.ops.lit_did.token_statistics_backward_(*arguments, *needs)
    for ours, grad, original, needed in zip(logits[:2], expected, before, needs, strict=True):
        assert_same([ours], [grad if needed else original])
        if needed:
            assert (ours[1] == 0).all()
            assert ours[2].isnan().all()


@pytest.mark.parametrize("softcaps", [(3.0, 2.0), (3.0, None), (None, 2.0), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("bf16", "bf16"), ("f16", "bf16"), ("f64", "f64")], ids="-".join)
def test_softcaps(dtypes, used, softcaps):
    """The gradient in x where the logits are softcap * tanh(x / softcap): that in the logits by the softcap's slope."""
    policy, reference, labels = random_logits(ROWS, VOCABULARY, *(DTYPES[name] for name in dtypes))
    labels[:3] = torch.tensor([0, -100, VOCABULARY - 1])  # the last entry: in what vectors leave over
    logits = policy, reference
    for side, softcap in zip(logits, softcaps, strict=True):
        if softcap is not None:
            side.copy_(softcap * torch.tanh(side.double() / softcap))
        else:
            side[3, 7::9] = -torch.inf
    labels[3] = 0
    arguments = operator_arguments(*logits, labels, USED[used])
    before = [side.to(torch.float64, copy=True) for side in logits]
    # The same in a wider dtype, so that the product with the slope is rounded once.
    wide = operator_arguments(*(side.float() if side.itemsize == 2 else side for side in logits), labels, USED[used])
    expected = torch.ops.lit_did.token_statistics_backward(*wide, True, True)
    torch.ops.lit_did.token_statistics_backward_(*arguments, True, True, 0, *softcaps)
    for ours, grad, side, softcap in zip(logits, expected, before, softcaps, strict=True):
        slope = 1 if softcap is None else 1 - (side / softcap) ** 2
        eps = torch.finfo(ours.dtype).eps
        floor = 2**-24 if ours.dtype == torch.float16 else 16 * torch.finfo(grad.dtype).eps * grad.abs().max().item()
        torch.testing.assert_close(ours.double(), grad.double() * slope, rtol=2 * eps, atol=floor)


@pytest.mark.parametrize("softcap", [0.0, -3.0, torch.inf, torch.nan])
def test_refused_softcaps(softcap):
    arguments = operator_arguments(*batch())
    with pytest.raises(RuntimeError, match="softcaps that are positive and finite"):
        torch.ops.lit_did.token_statistics_backward_(*arguments, True, True, 0, softcap, None)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "apart"])
def test_strides(layout):
    """The gradient has the logits' strides; entries of the same memory that are not the logits' stay."""
    policy, reference, labels = batch()
    expected = torch.ops.lit_did.token_statistics_backward(*operator_arguments(policy, reference, labels), True, True)
    memory = torch.full((2, ROWS + 2, VOCABULARY + 3), 7.0)
    if layout == "transposed":
        views = [torch.empty(3, 2, VOCABULARY).transpose(0, 1) for _ in range(2)]
        labels = labels.view(2, 3)
    elif layout == "sliced":
        views = [half[1:-1, 2:-1] for half in memory]
    else:  # both sides' rows by turns in one memory
        views = list(memory.view(ROWS + 2, 2, -1)[1:-1, :, 2:-1].unbind(1))
    for view, logits in zip(views, (policy, reference), strict=True):
        view.copy_(logits.view(view.shape))
    torch.ops.lit_did.token_statistics_backward_(*operator_arguments(*views, labels), True, True)
    assert_same([view.reshape(ROWS, -1) for view in views], expected)
    if layout != "transposed":
        assert (memory == 7).sum() == memory.numel() - 2 * ROWS * VOCABULARY


class Given(torch.autograd.Function):
    """A layer that returns the given logits as they lie in memory."""

    @staticmethod
    def forward(ctx, parameter, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def overlapping_logits():
    logits = torch.randn(ROWS, VOCABULARY)
    other = torch.randn(ROWS, VOCABULARY)
    moved = torch.randn(ROWS + 1, VOCABULARY)
    return {
        "expanded policy": (logits[:1].expand(ROWS, -1), other, (True, False), "`policy_logits` .* every row"),
        "expanded reference": (other, logits[:1].expand(ROWS, -1), (False, True), "`reference_logits` .* every row"),
        "windows": (torch.randn(600).unfold(0, VOCABULARY, 9)[:ROWS], other, (True, True), "`policy_logits` .* every"),
        "the same": (logits, logits, (True, False), "`policy_logits` .* memory with `reference_logits`"),
        "a row further": (moved[1:], moved[:-1], (False, True), "`reference_logits` .* memory with `policy_logits`"),
        "another dtype": (
            logits,
            logits.view(torch.bfloat16)[:, :VOCABULARY],
            (True, False),
            "`policy_logits` .* memory with",
        ),
    }


@pytest.mark.parametrize("case", overlapping_logits())
def test_overlapping_logits_are_refused(case):
    """Before anything is written. The same logits are accepted where they are only read."""
    policy, reference, needs, message = overlapping_logits()[case]
    labels = torch.zeros(ROWS, dtype=torch.long)
    before = policy.clone(), reference.clone()

    def backward(*needs):
        parameter = torch.zeros((), requires_grad=True)
        sides = [
            Given.apply(parameter, x) if needed else x for x, needed in zip((policy, reference), needs, strict=True)
        ]
        token_loss(*sides, labels, inplace_backward=True).backward()

    with pytest.raises(ValueError, match=f"Expected {message}"):
        backward(*needs)
    assert_same([policy, reference], before)
    if "expanded" in case:
        backward(*(not needed for needed in needs))


def test_neighbours_in_memory():
    """One side ends where the other begins."""
    policy, reference, labels = batch("f32", "bf16")
    expected = torch.ops.lit_did.token_statistics_backward(*operator_arguments(policy, reference, labels), True, True)
    memory = torch.empty(6 * policy.numel(), dtype=torch.uint8)
    split = 4 * policy.numel()
    views = (memory[:split].view(torch.float32).view_as(policy), memory[split:].view(torch.bfloat16).view_as(policy))
    for view, logits in zip(views, (policy, reference), strict=True):
        view.copy_(logits)
    torch.ops.lit_did.token_statistics_backward_(*operator_arguments(*views, labels), True, True)
    assert_same(views, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (1, 1)])
def test_nothing_to_write(shape):
    logits, labels = torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long)
    torch.ops.lit_did.token_statistics_backward_(*operator_arguments(logits, logits.clone(), labels), True, True)
    assert (logits == 0).all()


# ----------------------------------------------------------------------------------------------------------
# The public functions
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [token_loss, packed_loss])
def test_gradient_takes_the_memory(function):
    expected, _ = grads_through(scaled, function)
    ours, _ = grads_through(scaled, function, inplace_backward=True)
    assert_same(ours, expected)

    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    logits = policy.requires_grad_().clone()
    value = function(logits, reference, labels, inplace_backward=True)
    assert torch.equal(logits, policy)
    before = reference.clone()
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert logits._version == 1
    assert_same([logits], torch.autograd.grad(function(policy, reference, labels), policy))
    assert torch.equal(reference, before)
    assert reference._version == before._version


def test_shifted_logits_of_a_model():
    """The usual way to logits: an output layer, and its last position cut off."""
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer, hidden = torch.nn.Linear(16, VOCABULARY), torch.randn(2, 5, 16)
        statistics = sequence_statistics(
            layer(hidden)[:, :-1], torch.randn(2, 4, VOCABULARY), torch.zeros(2, 4).long(), inplace_backward=inplace
        )
        loss(statistics).backward()
        grads.append([layer.weight.grad, layer.bias.grad])
    assert_same(*grads)


@pytest.mark.parametrize("layer", [torch.tanh, torch.exp, lambda x: x.softmax(-1)], ids=["tanh", "exp", "softmax"])
def test_values_that_another_backward_needs(layer):
    """These layers' backwards read their output."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads_through(layer, inplace_backward=True)


def test_softcapping_by_a_product():
    """30 * tanh(x / 30) keeps tanh's output, not the product: the logits are free."""

    def softcapped(x):
        return 30 * torch.tanh(x / 30)

    assert_same(grads_through(softcapped, inplace_backward=True)[0], grads_through(softcapped)[0])


def test_second_backward():
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    value = token_loss(policy.requires_grad_() * 1, reference, labels, inplace_backward=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_another_loss_of_the_same_logits():
    """Whichever runs second finds the logits overwritten; within one backward that is the loss built first."""

    def both(policy, reference, labels, **options):
        return policy.square().sum() + token_loss(policy, reference, labels, **options)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads_through(scaled, both, inplace_backward=True)

    def linear(policy, reference, labels, **options):  # a sum keeps nothing
        return policy.sum() + token_loss(policy, reference, labels, **options)

    assert_same(grads_through(scaled, linear, inplace_backward=True)[0], grads_through(scaled, linear)[0])


def test_shared_logits_are_refused():
    policy, _, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    logits = policy.requires_grad_() * 1
    value = token_loss(logits, logits, labels, inplace_backward=True)
    with pytest.raises(ValueError, match=r"`policy_logits` .* shares memory with `reference_logits`"):
        value.backward()
    assert torch.equal(logits, policy)


@pytest.mark.parametrize("side", ["policy_logits", "reference_logits"])
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.view(2, 3, -1), lambda x: x[None]], ids=["leaf", "view", "new"]
)
def test_leaves_are_refused(view, side):
    """An optimizer would step from a parameter's gradient as if it were its value."""
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    named = {"policy_logits": policy, "reference_logits": reference}
    named[side].requires_grad_()
    arguments = {name: view(x) for name, x in named.items()}
    labels = labels.view(arguments[side].shape[:-1])
    with pytest.raises(ValueError, match=f"Expected `{side}` not to be a leaf that requires a gradient"):
        token_statistics(**arguments, labels=labels, inplace_backward=True)
    with torch.no_grad():
        expected = token_statistics(**arguments, labels=labels)
        assert_same(token_statistics(**arguments, labels=labels, inplace_backward=True), expected)
    cloned = arguments | {side: arguments[side].clone()}
    loss(token_statistics(**cloned, labels=labels, inplace_backward=True)).backward()
    assert named[side].grad.isfinite().all()


def test_view_that_became_a_leaf():
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="`policy_logits` not to be a leaf"):
        token_statistics(policy[1:].requires_grad_(), reference[1:], labels[1:], inplace_backward=True)


@pytest.mark.parametrize("case", ["float64", "strided vocabulary"])
def test_copies_are_what_is_written(case):
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    if case == "float64":
        reference = reference.double()
    else:
        policy = policy.t().contiguous().t()
    logits = policy.requires_grad_() * 1
    before = logits.clone()
    (ours,) = torch.autograd.grad(token_loss(logits, reference, labels, inplace_backward=True), policy)
    assert torch.equal(logits, before)
    assert_same([ours], torch.autograd.grad(token_loss(policy, reference, labels), policy))


@pytest.mark.parametrize("function", [token_statistics, sequence_statistics])
def test_bad_switch(function):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match="Expected `inplace_backward` to be a bool, but got 1"):
        function(logits, logits, labels, inplace_backward=1)
    with pytest.raises(ValueError, match="Expected `inplace_backward` to be False with `backend='reference'`"):
        function(logits, logits, labels, inplace_backward=True, backend="reference")


@pytest.mark.filterwarnings("ignore:.*plain PyTorch implementation")
def test_without_effect_where_auto_is_the_reference(monkeypatch):
    monkeypatch.setattr(extension, "fused_devices", lambda: ())
    expected, _ = grads_through(torch.tanh)
    ours, logits = grads_through(torch.tanh, inplace_backward=True)
    assert_same(ours, expected)
    assert all(x._version == 0 for x in logits)


# ----------------------------------------------------------------------------------------------------------
# Where autograd does not compare versions, the ordinary backward runs
# ----------------------------------------------------------------------------------------------------------


def checkpointed(use_reentrant):
    def function(policy, reference, labels, **options):
        def region(policy, reference):
            return token_loss(torch.tanh(policy), torch.tanh(reference), labels, **options)

        return torch.utils.checkpoint.checkpoint(region, policy, reference, use_reentrant=use_reentrant)

    return function


def test_checkpointing():
    """Recomputed logits are shared with tanh's backward, which would not notice."""
    ours, _ = grads_through(scaled, checkpointed(False), inplace_backward=True)
    assert_same(ours, grads_through(scaled, checkpointed(False))[0])


def test_hooks_on_saved_tensors():
    def function(policy, *inputs, **options):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return token_loss(torch.tanh(policy), *inputs, **options)

    assert_same(grads_through(scaled, function, inplace_backward=True)[0], grads_through(scaled, function)[0])


def test_reentrant_checkpointing():
    """Its inner graph has version counters: an error."""
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    value = checkpointed(True)(policy.requires_grad_(), reference.requires_grad_(), labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_create_graph():
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    logits = torch.tanh(policy.requires_grad_())
    value = token_loss(logits, reference, labels, inplace_backward=True)
    (ours,) = torch.autograd.grad(value, policy, create_graph=True)
    assert logits._version == 0
    assert_same([ours], torch.autograd.grad(token_loss(torch.tanh(policy), reference, labels), policy))


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layer", [scaled, torch.tanh], ids=["scaled", "tanh"])
@pytest.mark.parametrize("function", [token_loss, packed_loss])
def test_compiled(function, layer):
    def behind_layer(policy, reference, labels, **options):
        return function(layer(policy), layer(reference), labels, **options)

    compiled = torch.compile(behind_layer, fullgraph=True, backend="aot_eager")
    ours, logits = grads_through(scaled, compiled, inplace_backward=True)
    for grad, expected in zip(ours, grads_through(scaled, behind_layer)[0], strict=True):
        torch.testing.assert_close(grad, expected)
    assert all(x._version == 0 for x in logits)


@pytest.mark.usefixtures("compiler")
def test_compiled_with_logits_as_inputs():
    """The compiled graph does not write over what its caller passed."""
    compiled = torch.compile(token_loss, fullgraph=True, backend="aot_eager")
    ours, logits = grads_through(torch.tanh, compiled, inplace_backward=True)
    for grad, expected in zip(ours, grads_through(torch.tanh)[0], strict=True):
        torch.testing.assert_close(grad, expected)
    assert all(x._version == 0 for x in logits)


@pytest.mark.usefixtures("compiler")
def test_compiled_with_leaves():
    """Nothing is overwritten, so leaves are accepted."""
    compiled = torch.compile(token_loss, fullgraph=True, backend="aot_eager")
    policy, reference, labels = random_logits(ROWS, VOCABULARY, torch.float32, torch.float32)
    policy.requires_grad_()
    value = compiled(policy, reference, labels, inplace_backward=True)
    (ours,) = torch.autograd.grad(value, policy)
    torch.testing.assert_close(ours, *torch.autograd.grad(token_loss(policy, reference, labels), policy))
    assert policy._version == 0


@pytest.mark.usefixtures("compiler")
def test_compiled_model_before_it():
    """Logits out of a compiled graph, the rest eager: overwritten, or refused where that graph kept them."""
    compiled = torch.compile(scaled, backend="aot_eager")
    assert_same(grads_through(compiled, inplace_backward=True)[0], grads_through(scaled)[0])
    compiled = torch.compile(torch.tanh, backend="aot_eager")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads_through(compiled, inplace_backward=True)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layer", [scaled, torch.tanh], ids=["scaled", "tanh"])
def test_compiled_autograd(layer):
    expected, _ = grads_through(layer)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        ours, _ = grads_through(layer, inplace_backward=True)
    for grad, of_eager in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, of_eager)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needs):
    arguments = operator_arguments(*random_logits(ROWS, 20, torch.float32, torch.bfloat16))
    torch.library.opcheck(
        torch.ops.lit_did.token_statistics_backward_.default, (*arguments, *needs), test_utils=OPCHECKS
    )


def test_opcheck_forward():
    policy, reference, labels = random_logits(ROWS, 20, torch.float32, torch.float32)
    arguments = (policy.requires_grad_(), reference.requires_grad_(), labels, -100, 0.9, True)
    torch.library.opcheck(torch.ops.lit_did.token_statistics.default, arguments, test_utils=OPCHECKS)


def test_lazy_clones_are_copied_first():
    """The gradient goes over the clone's own memory, not over the memory that it still shares."""
    leaf = torch.randn(3, 7, requires_grad=True)
    base = leaf.clone()
    kept = base.detach().clone()
    token_statistics(
        torch._lazy_clone(base), torch.randn(3, 7), torch.tensor([0, 1, 2]), inplace_backward=True
    ).log_ratio.sum().backward()
    assert torch.equal(base, kept)
