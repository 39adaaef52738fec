"""linear_token_statistics and linear_sequence_statistics against the logits form and float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

from lit_did import linear_sequence_statistics, linear_token_statistics, sequence_statistics, token_statistics
from tests.helpers import DTYPES, FIELDS
from tests.ops.linear_cases import (
    INPUTS,
    TOKENS,
    VOCABULARY,
    Case,
    assert_as_good_as_logits,
    gradients,
    in_float64,
    linear,
    logits_form,
    make_case,
)

# Tiles: one; several blocks that are kept, or computed again; some tokens at a time.
CUTS = {
    "whole": {},
    "blocks": {"max_extra_bytes": 200_000},
    "recomputed": {"max_extra_bytes": 100_000},
    "one-token": {"chunk_tokens": 1},
    "seven-tokens": {"chunk_tokens": 7, "max_extra_bytes": 60_000},
    "reference": {"chunk_tokens": 7, "backend": "reference"},
}
with_cuts = pytest.mark.parametrize("cuts", CUTS)
with_backends = pytest.mark.parametrize("backend", ["fused", "reference"])
PAIRS = [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("f64", "f64"), ("bf16", "f32")]


@with_cuts
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_dtypes(pair, cuts):
    assert_as_good_as_logits(make_case(*(DTYPES[name] for name in pair)), **CUTS[cuts])


@with_cuts
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"softcap": (5.0, 3.0)},
        {"softcap": (None, 3.0), "scale": (0.25, 2.0), "bias": True},
        {"scale": (0.5, 0.5), "temperature": 1.7},
        {"softcap": (4.0, None), "scale": (1.5, 1.0), "temperature": 0.6, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_options(dtype, options, cuts):
    assert_as_good_as_logits(make_case(DTYPES[dtype], **options), **CUTS[cuts])


@with_cuts
@pytest.mark.parametrize("statistic", FIELDS)
def test_gradient_of_one_statistic(statistic, cuts):
    case = make_case(bias=True, softcap=(None, 5.0))
    case.upstream = {statistic: case.upstream[statistic]}
    assert_as_good_as_logits(case, **CUTS[cuts])


@with_cuts
@pytest.mark.parametrize("frozen", [INPUTS[3:], INPUTS[:3], INPUTS[1:2] + INPUTS[4:5], INPUTS[:1], INPUTS[1:]], ids=str)
def test_frozen(frozen, cuts):
    case = make_case(bias=True)
    for name in frozen:
        case.tensors[name].requires_grad_(False)
    assert_as_good_as_logits(case, **CUTS[cuts])


def test_one_number_for_both():
    case = make_case(softcap=(3.0, 3.0), scale=(0.5, 0.5))
    inputs = [value for value in case.inputs().values() if value is not None]
    ours = linear_token_statistics(*inputs, case.labels, softcap=3.0, scale=0.5)
    for value, expected in zip(ours, linear(case, case.inputs()), strict=True):
        assert torch.equal(value, expected)


@with_backends
def test_both_float64_where_one_is(backend):
    case = make_case(torch.float32, torch.float64)
    inputs, exact = case.inputs(), case.inputs(torch.float64)
    ours, truth = linear(case, inputs, backend=backend), in_float64(case, exact)
    for value, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for name, grad in gradients(case, ours, inputs).items():
        torch.testing.assert_close(grad, gradients(case, truth, exact, retain_graph=True)[name].to(grad.dtype))


@with_backends
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_autocast(dtype, backend):
    """Logits of autocast's dtype, whatever the parameters', but not for float64; gradients of the parameters' dtype."""
    case = make_case(DTYPES[dtype], bias=True)
    inputs, cast = case.inputs(), case.inputs(torch.float64 if dtype == "f64" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear(case, inputs, backend=backend)
        ours_grads = gradients(case, ours, inputs)
    expected = linear(case, cast, backend=backend)
    for value, right in zip(ours, expected, strict=True):
        assert torch.equal(value, right)
    for name, grad in gradients(case, expected, cast).items():
        assert ours_grads[name].dtype == case.tensors[name].dtype
        assert torch.equal(ours_grads[name], grad.to(ours_grads[name].dtype))


@pytest.mark.parametrize("cuts", [name for name in CUTS if name != "reference"])
def test_backward_within_autocast(cuts):
    """What the forward outside it computed in float32, the backward does too; torch's own would not."""
    case = make_case()
    inputs, others = case.inputs(), case.inputs()
    statistics, expected = linear(case, inputs, **CUTS[cuts]), linear(case, others, **CUTS[cuts])
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(case, statistics, inputs)
    for name, grad in gradients(case, expected, others).items():
        assert torch.equal(grads[name], grad)


@with_cuts
def test_tied_weights(cuts):
    """One weight for both models and the hidden states too: its gradient is the sum over all its uses."""
    weight = make_case(torch.float64).tensors["policy_weight"].detach().requires_grad_()
    hidden, labels = weight[:TOKENS] * 0.5, torch.arange(TOKENS) * 7
    upstream = [make_case().upstream[name] for name in FIELDS]

    def grad(statistics):
        return torch.autograd.grad(list(statistics), weight, upstream, retain_graph=True)[0]

    ours = linear_token_statistics(hidden, weight, 2 * hidden, weight, labels, **CUTS[cuts])
    expected = token_statistics(hidden @ weight.T, 2 * hidden @ weight.T, labels)
    torch.testing.assert_close(grad(ours), grad(expected), rtol=1e-10, atol=1e-10)


def test_not_contiguous():
    """Hidden states of every other position, weights of which every other row and column counts."""
    case = make_case(torch.float64)
    inputs, spaced = case.inputs(), case.inputs()
    for name in ("policy_hidden", "policy_weight", "reference_weight"):
        wide = spaced[name].detach().repeat_interleave(2, 0).repeat_interleave(2, 1).requires_grad_()
        spaced[name] = wide[::2, ::2]
    expected, ours = linear(case, inputs), linear(case, spaced)
    for value, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)
    ours_grads = gradients(case, ours, spaced)
    for name, grad in gradients(case, expected, inputs).items():
        torch.testing.assert_close(ours_grads[name], grad, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------
# Tokens that do not count, and numbers that are not finite
# ----------------------------------------------------------------------------------------------------------


@with_cuts
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_tokens(ignore_index, cuts):
    """They return 0 and get no gradient, and NaN in them reaches nothing; shapes are the labels'."""
    case = make_case(bias=True)
    ignored = torch.tensor([0, 4, 5, 10])
    kept = torch.tensor([i for i in range(TOKENS) if i not in ignored])
    case.labels.clamp_(min=1)[ignored] = ignore_index
    alone = Case(case.tensors, case.labels[kept], upstream={name: u[kept] for name, u in case.upstream.items()})
    inputs, fewer = case.inputs(), alone.inputs()
    for side in ("policy", "reference"):
        fewer[f"{side}_hidden"] = fewer[f"{side}_hidden"][kept]
        inputs[f"{side}_hidden"].data[ignored] = torch.nan
    shaped = inputs | {name: inputs[name].view(1, TOKENS, -1) for name in ("policy_hidden", "reference_hidden")}
    case.labels = case.labels.view(1, TOKENS)
    case.upstream = {name: u.view(1, TOKENS) for name, u in case.upstream.items()}
    ours = linear(case, shaped, ignore_index=ignore_index, **CUTS[cuts])
    expected = linear(alone, fewer, **CUTS[cuts])
    assert {value.shape for value in ours} == {(1, TOKENS)}
    for value, right in zip(ours, expected, strict=True):
        assert (value[0, ignored] == 0).all()
        torch.testing.assert_close(value[0, kept], right)
    of_fewer = gradients(alone, expected, fewer)
    for name, grad in gradients(case, ours, inputs).items():
        if name.endswith("hidden"):
            assert (grad[ignored] == 0).all()
            grad = grad[kept]
        torch.testing.assert_close(grad, of_fewer[name])


@with_backends
def test_every_label_counts_without_an_ignore_index(backend):
    case = make_case(torch.float64)
    inputs = case.inputs()
    ours = linear(case, inputs, ignore_index=None, backend=backend)
    for value, right in zip(ours, linear(case, inputs, backend=backend), strict=True):
        assert torch.equal(value, right)
    case.labels[2] = -100
    with pytest.raises(ValueError, match="but got -100 at row 2"):
        linear(case, inputs, ignore_index=None, backend=backend)


@with_backends
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3,), (2, 3)], ids=str)
def test_no_token(shape, backend):
    """All ignored, or none there: zeros, and gradients that are zeros too."""
    labels = torch.full(shape, -100)
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    statistics = linear_token_statistics(hidden, weight, hidden, weight, labels, backend=backend)
    for value in statistics:
        assert value.shape == shape
        assert (value == 0).all()
    grads = torch.autograd.grad(sum(value.sum() for value in statistics), (hidden, weight))
    assert all((grad == 0).all() for grad in grads)
    sum(value.sum() for value in linear_token_statistics(hidden, weight, hidden, weight, labels)).backward()


def test_a_single_token():
    """Labels without a dimension."""
    case = make_case()
    one = {name: value[3] if name.endswith("hidden") else value for name, value in case.inputs().items()}
    case.labels = case.labels[3]
    ours, expected = linear(case, one), logits_form(case, one)
    for value, right in zip(ours, expected, strict=True):
        assert value.shape == ()
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)


@with_cuts
@pytest.mark.parametrize("padded", [slice(1490, None), slice(600, None), slice(0, 600)], ids=str)
def test_padded_vocabulary(padded, cuts):
    """A bias of -inf on both sides takes entries out, whole blocks too; their weights get no gradient."""
    case = make_case(torch.float64, bias=True)
    case.labels = torch.full((TOKENS,), 599 if padded.start else 601)
    for side in ("policy", "reference"):
        case.tensors[f"{side}_bias"].data[padded] = -torch.inf
    inputs, others = case.inputs(), case.inputs()
    ours, expected = linear(case, inputs, **CUTS[cuts]), logits_form(case, others)
    for value, right in zip(ours, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-11)
    of_logits = gradients(case, expected, others)
    for name, grad in gradients(case, ours, inputs).items():
        torch.testing.assert_close(grad, of_logits[name], rtol=1e-10, atol=1e-10)
        assert name.endswith("hidden") or (grad[padded] == 0).all()


@with_cuts
def test_nan_stays_in_its_token(cuts):
    case = make_case()
    broken = case.inputs()
    broken["policy_hidden"].data[2, 1], broken["reference_hidden"].data[7, 0] = torch.nan, torch.inf
    inputs = case.inputs()
    ours, expected = linear(case, broken, **CUTS[cuts]), linear(case, inputs, **CUTS[cuts])
    wrong = torch.zeros(TOKENS, dtype=torch.bool)
    wrong[[2, 7]] = True
    for value, right in zip(ours, expected, strict=True):
        assert torch.equal(value.isnan(), wrong)
        torch.testing.assert_close(value[~wrong], right[~wrong])
    of_finite = gradients(case, expected, inputs)
    for name, grad in gradients(case, ours, broken).items():
        if name.endswith("hidden"):
            assert torch.equal(grad.isnan().any(-1), wrong)
            torch.testing.assert_close(grad[~wrong], of_finite[name][~wrong])


# ----------------------------------------------------------------------------------------------------------
# Sequences, and the ways that gradients are asked for
# ----------------------------------------------------------------------------------------------------------


@with_backends
@pytest.mark.parametrize("packed", [True, False])
def test_sequences(packed, backend):
    case = make_case(torch.float64)
    case.labels[[1, 8]] = -100
    tensors = case.inputs()
    options = {"temperature": 1.3, "backend": backend}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 4, 4, TOKENS])
    hidden, weight = (tensors[f"{side}_hidden"] for side in ("policy", "reference")), tensors["policy_weight"]
    policy, reference = (value if packed else value.view(1, TOKENS, -1) for value in hidden)
    labels = case.labels if packed else case.labels.view(1, TOKENS)
    ours = linear_sequence_statistics(
        policy, weight, reference, tensors["reference_weight"], labels, softcap=(4.0, None), scale=(2.0, 1.0), **options
    )
    logits = 4 * torch.tanh(2 * policy @ weight.T / 4), reference @ tensors["reference_weight"].T
    expected = sequence_statistics(*logits, labels, **options)
    for value, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-11)

    def loss(statistics):
        return statistics.log_ratio.sigmoid().sum() + statistics.kl.sum()

    grads, of_logits = (torch.autograd.grad(loss(s), (weight, policy), retain_graph=True) for s in (ours, expected))
    for grad, right in zip(grads, of_logits, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-10)


@with_cuts
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_backward_twice(softcap, cuts):
    """With retain_graph: the first overwrote the logits, the second computes them again."""
    case = make_case(softcap=(softcap, softcap))
    inputs = case.inputs()
    statistics = linear(case, inputs, **CUTS[cuts])
    logprobs = Case(case.tensors, case.labels, upstream={"policy_logprob": case.upstream["policy_logprob"]})
    first = gradients(case, statistics, inputs, retain_graph=True)
    of_logprobs = gradients(logprobs, statistics, inputs, retain_graph=True)
    again = gradients(case, statistics, inputs)
    assert all(torch.equal(again[name], grad) for name, grad in first.items())
    others = case.inputs()
    expected = gradients(logprobs, linear(case, others), others)
    for name, grad in of_logprobs.items():  # sums of 1500 terms, in an order that may change with where memory lies
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=3e-6 * expected[name].abs().max().item())
    if cuts != "reference":
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            gradients(case, statistics, inputs)


def test_second_derivative():
    case = make_case(torch.float64)
    inputs = case.inputs()
    first = gradients(case, linear(case, inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use `backend='reference'`"):
        torch.autograd.grad(first["policy_hidden"].square().sum(), inputs["policy_hidden"])
    of_specification = []
    for statistics in (linear(case, inputs, backend="reference", chunk_tokens=4), in_float64(case, inputs)):
        first = gradients(case, statistics, inputs, create_graph=True)
        of_specification += torch.autograd.grad(first["policy_hidden"].square().sum(), inputs["policy_weight"])
    torch.testing.assert_close(*of_specification, rtol=1e-9, atol=1e-9)


@with_cuts
def test_within_checkpointing(cuts):
    """What the backward finds in the tiles is what the forward that ran again left there."""
    case = make_case()
    inputs, others = case.inputs(), case.inputs()

    def run(*tensors):
        return tuple(linear(case, dict(zip(INPUTS, tensors, strict=True)), **CUTS[cuts]))

    ours = torch.utils.checkpoint.checkpoint(run, *inputs.values(), use_reentrant=False)
    grads = gradients(case, type(linear(case, inputs))(*ours), inputs)
    for name, grad in gradients(case, linear(case, others, **CUTS[cuts]), others).items():
        assert torch.equal(grads[name], grad)


def test_compiled():
    """Runs as it is between two graphs."""
    case = make_case()
    inputs = case.inputs()

    def run(policy_hidden):
        doubled = inputs | {"policy_hidden": policy_hidden * 2}
        return linear(case, doubled).log_ratio.sigmoid() * 3

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, backend=backend)
    values, grads = [], []
    for function in (run, compiled):
        values.append(function(inputs["policy_hidden"]))
        grads.append(torch.autograd.grad(values[-1].sum(), (inputs["policy_hidden"], inputs["policy_weight"])))
    assert torch.equal(*values)
    assert all(map(torch.equal, *grads))
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_tiles_are_float32(dtype):
    """Over 24 blocks and 64 chunks: no further from the truth than with one tile. Sums in `dtype` are several times."""
    generator = torch.Generator().manual_seed(0)
    shapes = (64, 4), (24 * 512, 4), (24 * 512,)
    exact = [torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes]
    labels = torch.randint(24 * 512, (64,), generator=generator)

    def grads(tensors, **options):
        hidden, weight, bias = tensors
        s = linear_token_statistics(hidden, weight, -hidden.detach(), weight, labels, policy_bias=bias, **options)
        return torch.autograd.grad(100 * (s.policy_logprob.sum() + s.kl.sum()), tensors)

    truth = grads(exact)
    errors = []
    for options in ({}, {"max_extra_bytes": 512 * 4}):
        tensors = [value.detach().to(dtype).requires_grad_() for value in exact]
        errors.append([(a.double() - b).norm() for a, b in zip(grads(tensors, **options), truth, strict=True)])
    for one_tile, many in zip(*errors, strict=True):
        assert many <= 1.2 * one_tile


def test_labels_in_every_block():
    """Every label of the vocabulary finds its logit, in whatever block it lies."""
    weight = torch.randn(VOCABULARY, 4, dtype=torch.float64)
    hidden, labels = torch.randn(VOCABULARY, 4, dtype=torch.float64), torch.arange(VOCABULARY)
    ours = linear_token_statistics(hidden, weight, -hidden, weight, labels, max_extra_bytes=2**24)
    expected = (hidden @ weight.T).log_softmax(-1).diagonal()
    torch.testing.assert_close(ours.policy_logprob, expected, rtol=1e-12, atol=1e-12)
