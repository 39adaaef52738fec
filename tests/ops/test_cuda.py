"""The operators on CUDA tensors: the CPU tests' own cases moved to a GPU, and what only a GPU has.

`make gpu` runs these. Without a CUDA device, or in a build without CUDA, all are skipped.
"""

from __future__ import annotations

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from lit_did.ops.extension import fused_devices
from tests import helpers
from tests.helpers import DTYPES, random_logits
from tests.ops import test_compile as compiling
from tests.ops import test_determinism as determinism
from tests.ops import test_large as large
from tests.ops import test_sequence_reduction as reductions
from tests.ops import test_sequence_statistics as sequences
from tests.ops import test_support as support
from tests.ops import test_token_statistics as tokens
from tests.ops.linear_cases import assert_as_good_as_logits, gradients, linear, make_case

DEVICE = "cuda"
if not torch.cuda.is_available() or DEVICE not in fused_devices():
    pytest.skip("needs a CUDA device and a build with CUDA", allow_module_level=True)
SPLIT = 32768  # entries that one block of the forward or the backward takes

# ----------------------------------------------------------------------------------------------------------
# The CPU tests' cases: values, gradients, layouts, support rules, equal bits, sequences
# ----------------------------------------------------------------------------------------------------------

MODULES = (tokens, support, determinism, sequences, reductions)
MOVED = ("token_statistics", "sequence_statistics", "fused_reduction")  # what those tests call
NOT_HERE = {
    "test_threads",
    # Checked on the CPU only: a GPU would have to be waited for.
    "test_bad_offsets",
    "test_bad_operator_call",
    "test_bad_offsets_in_a_compiled_function",
    # They say themselves where their tensors are.
    "test_other_bad_layouts",
    "test_opcheck",
    "test_new_numbers_of_sequences_do_not_recompile",
    # On CUDA where a token stands decides too: padding on the left changes the order of a sum. See below.
    "test_layouts_have_the_same_bits",
}
for module in MODULES:
    for name, test in list(vars(module).items()):
        if name.startswith("test_") and name not in NOT_HERE:
            globals()[f"{name}_of_{module.__name__.rsplit('test_')[-1]}"] = test


class Moved(torch.autograd.Function):
    """The same tensor on the device, with its strides and its place in its memory, and so its alignment."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.set_materialize_grads(False)
        bytes_of_all = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
        there = bytes_of_all.to(DEVICE, copy=True).untyped_storage()
        layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(there, *layout)

    @staticmethod
    def backward(ctx, grad):
        return None if grad is None else grad.cpu()


def moved(argument):
    """Tensors, alone or several, to the device; whatever else as it is."""
    if isinstance(argument, (list, tuple)):
        return [moved(element) for element in argument]
    return Moved.apply(argument) if torch.is_tensor(argument) else argument


def on_device(operator):
    """`operator` for tensors on the CPU, computed on the device; gradients find their way back."""

    def call(*arguments, **options):
        result = operator(*moved(arguments), **{name: moved(option) for name, option in options.items()})
        assert result[0].device.type == DEVICE
        return result._make(value.cpu() for value in result)

    return call


@pytest.fixture(autouse=True)
def _move_the_cpu_tests(monkeypatch, request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "reference":
        pytest.skip("plain torch, on any device")
    for module in MODULES:
        for name in MOVED:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, on_device(getattr(module, name)))
    monkeypatch.setattr(helpers, "UNITS", helpers.CUDA_UNITS)


# ----------------------------------------------------------------------------------------------------------
# What only a GPU has
# ----------------------------------------------------------------------------------------------------------


def batch_on_device(rows=6, vocabulary=1030, dtype="f32", seed=0, device=None):
    return tuple(x.to(device or DEVICE) for x in random_logits(rows, vocabulary, DTYPES[dtype], DTYPES[dtype], seed))


def bits(policy, reference, labels, **options):
    """The statistics [9, rows] and both gradients. Gradients for all statistics, or the two log-probabilities'."""
    inputs = (policy.detach().requires_grad_(), reference.detach().requires_grad_())
    statistics = token_statistics(*inputs, labels, backend="fused", **options)
    return torch.stack(statistics).detach(), *torch.autograd.grad([s.sum() for s in statistics], inputs)


def assert_same(ours, expected):
    for i, (value, of_expected) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(value, of_expected), ("statistics", "policy's gradient", "reference's gradient")[i]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 530, 2 * SPLIT + 21])
def test_few_rows_or_many(vocabulary, dtype):
    """A row alone, as one of a few, and as one of more than the device works on at a time."""
    many = 16 * torch.cuda.get_device_properties(0).multi_processor_count + 3
    batch = batch_on_device(40, vocabulary, dtype)
    repeated = tuple(x.repeat(-(-many // 40), *[1] * (x.dim() - 1))[:many] for x in batch)
    values, *grads = bits(*repeated)
    assert_same((values[:, :40], *(grad[:40] for grad in grads)), bits(*batch))
    assert_same((values[:, -1:], *(grad[-1:] for grad in grads)), bits(*(x[-1:].clone() for x in repeated)))


@pytest.mark.parametrize("options", [{}, {"max_extra_bytes": 60_000}, {"chunk_tokens": 4}], ids=str)
@pytest.mark.parametrize("used", [slice(None), slice(2)], ids=["all", "log-probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_statistics(dtype, used, options):
    """Labels that lie in another block of the vocabulary than the one whose gradient is computed."""
    case = make_case(DTYPES[dtype], bias=True, softcap=(None, 5.0))
    case.tensors = {name: value.detach().to(DEVICE).requires_grad_() for name, value in case.tensors.items()}
    case.labels = case.labels.to(DEVICE)
    case.upstream = dict(list(case.upstream.items())[used])
    assert_as_good_as_logits(case, **options)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"max_extra_bytes": 60_000}], ids=str)
def test_linear_statistics_do_not_wait_for_the_device(options, dtype):
    """Neither forward nor backward; ignored tokens return 0 and get a gradient of 0, though they hold NaN."""
    case = make_case(DTYPES[dtype], bias=True, softcap=(None, 5.0))
    case.tensors = {name: value.detach().to(DEVICE).requires_grad_() for name, value in case.tensors.items()}
    case.labels = case.labels.to(DEVICE)
    case.labels[[0, 4]] = -100
    case.upstream = {name: value.to(DEVICE) for name, value in case.upstream.items()}
    inputs = case.inputs()
    for side in ("policy", "reference"):
        inputs[f"{side}_hidden"].data[[0, 4]] = torch.nan
    linear(case, inputs, **options)  # what initialises itself may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = linear(case, inputs, **options)
        grads = gradients(case, statistics, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((value[[0, 4]] == 0).all() and value.isfinite().all() for value in statistics)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all((grads[f"{side}_hidden"][[0, 4]] == 0).all() for side in ("policy", "reference"))


@pytest.mark.parametrize("vocabulary", [530, 2 * SPLIT + 21])
def test_every_run_gives_the_same_bits(vocabulary):
    batch = batch_on_device(64, vocabulary, "bf16")
    expected = bits(*batch)
    for _ in range(20):
        assert_same(bits(*batch), expected)


@pytest.mark.parametrize("rows", [2, 300])
def test_stream_of_the_caller(rows):
    """The logits arrive on that stream after the host has launched all: on another one, zeros would be read."""
    batch = batch_on_device(rows, SPLIT + 30)
    expected = bits(*batch)
    late = tuple(torch.zeros_like(x) for x in batch)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for to, of in zip(late, batch, strict=True):
            to.copy_(of)
        ours = bits(*late)
        assert not stream.query(), "the operators waited for the device, or the premise fails: nothing was late"
    stream.synchronize()
    assert_same(ours, expected)


def sequence_bits(policy, reference, labels, **options):
    inputs = (policy.detach().requires_grad_(), reference.detach().requires_grad_())
    statistics = sequence_statistics(*inputs, labels, backend="fused", **options)
    return *(s.detach() for s in statistics), *torch.autograd.grad([s.sum() for s in statistics[:-1]], inputs)


@pytest.mark.parametrize("what", ["tokens", "packed", "padded"])
@pytest.mark.parametrize("rows", [4, 1200])
def test_cuda_graph(rows, what):
    """Forward and backward are captured, and a replay on other logits gives what a call gives."""
    cu_seqlens = torch.tensor([0, 1, 1, rows], device=DEVICE)

    def run(policy, reference, labels):
        if what == "tokens":
            return bits(policy, reference, labels)
        if what == "packed":
            return sequence_bits(policy, reference, labels, cu_seqlens=cu_seqlens)
        return sequence_bits(*(x.unflatten(0, (-1, 2)) for x in (policy, reference, labels)))

    batch = batch_on_device(rows, SPLIT + 30, "bf16")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*batch)  # what initialises itself must not do so under capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*batch)
    for seed in (1, 2):
        other = batch_on_device(rows, SPLIT + 30, "bf16", seed)
        for to, of in zip(batch, other, strict=True):
            to.copy_(of)
        graph.replay()
        for ours, expected in zip(captured, run(*other), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_place(dtype, shift):
    """The same bits, in the logits' own memory, and nothing of the logits' size besides. `shift`: entries."""
    rows, vocabulary = 40, SPLIT + 30
    policy, reference, labels = batch_on_device(rows, vocabulary, dtype)
    labels[7] = -100
    _, *expected = bits(policy, reference, labels)

    def given_up(logits, by):
        memory = torch.full((rows, vocabulary + 8), torch.nan, dtype=logits.dtype, device=DEVICE)
        memory[:, by : by + vocabulary] = logits
        return memory.requires_grad_() * 1  # a leaf could not be given up

    for side in range(2):
        whole = given_up((policy, reference)[side], shift[side])
        mine = whole[:, shift[side] : shift[side] + vocabulary]
        other = (reference, policy)[side]
        pair = (mine, other) if side == 0 else (other, mine)
        statistics = token_statistics(*pair, labels, backend="fused", inplace_backward=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (grad,) = torch.autograd.grad([s.sum() for s in statistics], mine)
        assert torch.equal(grad, expected[side])
        assert grad.data_ptr() == mine.data_ptr()
        assert torch.cuda.max_memory_allocated() - before < grad.nbytes / 2
        outside = torch.ones(vocabulary + 8, dtype=torch.bool, device=DEVICE)
        outside[shift[side] : shift[side] + vocabulary] = False
        assert whole.detach()[:, outside].isnan().all(), "written outside the row"


@pytest.mark.parametrize("dtype", ["bf16", "f64"])
def test_sequences_in_any_layout(dtype):
    """A sequence packed, padded on the right or alone: the same bits."""
    policy, reference, labels = batch_on_device(700, 40, dtype)
    labels[::3] = -100
    offsets = torch.tensor([0, 300, 301, 700], device=DEVICE)
    packed = sequence_statistics(policy, reference, labels, cu_seqlens=offsets)
    for i, (a, b) in enumerate([(0, 300), (300, 301), (301, 700)]):
        alone = [x[a:b] for x in (policy, reference, labels)]
        padding = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, 99), value=-100) for x in alone]
        for layout in (alone, padding):
            for ours, expected in zip(sequence_statistics(*layout), packed, strict=True):
                assert torch.equal(ours, expected[i])


def test_label_out_of_range():
    """Not raised, because the host would have to wait: the log-probabilities are NaN, all else is as it was."""
    policy, reference, labels = batch_on_device()
    expected = token_statistics(policy, reference, labels, backend="fused")
    labels[2], labels[4] = 1030, -5
    ours = token_statistics(policy, reference, labels, backend="fused")
    wrong = torch.tensor([2, 4], device=DEVICE)
    for i, (value, before) in enumerate(zip(ours, expected, strict=True)):
        if i < 2:
            assert value[wrong].isnan().all()
            value, before = value.clone(), before.clone()
            value[wrong] = before[wrong] = 0
        assert torch.equal(value, before)


def test_two_devices_in_one_call():
    policy, reference, labels = batch_on_device()
    with pytest.raises(ValueError, match=r"device"):
        token_statistics(policy, reference.cpu(), labels)
    with pytest.raises(ValueError, match=r"device"):
        token_statistics(policy, reference, labels.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    expected = bits(*batch_on_device(device="cuda:0"))
    ours = bits(*batch_on_device(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in ours)
    assert_same([value.to("cuda:0") for value in ours], expected)


@pytest.mark.parametrize("sample", list(compiling.sample_inputs()), ids=lambda s: f"{tuple(s[0].shape)}-{s[0].dtype}")
def test_opcheck(sample):
    sample = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in sample]
    torch.library.opcheck(torch.ops.lit_did.token_statistics.default, tuple(sample), test_utils=compiling.OPCHECKS)


@pytest.mark.parametrize("loss", [compiling.token_loss, compiling.padded_loss])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, loss):
    torch.compiler.reset()
    batch = batch_on_device(8, 530, "bf16")
    batch[2][3] = -100
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    expected = compiling.value_and_grads(loss, *batch)
    for ours, of_eager in zip(compiling.value_and_grads(compiled, *batch), expected, strict=True):
        torch.testing.assert_close(ours, of_eager)


@pytest.mark.slow
@pytest.mark.parametrize("case", [large.test_offsets_beyond_31_bits, large.test_a_long_stride])
def test_more_than_31_bits(case):
    with torch.device(DEVICE):
        case()
