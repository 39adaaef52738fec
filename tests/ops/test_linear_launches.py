"""linear_token_statistics as on CUDA, imitated on the CPU: what it launches for a tile, and that it never waits.

What the imitation changes: tiles have CUDA's sizes, the host does not read labels, and products of half
precision return float32 through `out_dtype`, which the CPU does not have and `Recorded` computes for it.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_did.ops import agreement, linear, tiles
from tests.helpers import FIELDS
from tests.ops.linear_cases import Case, assert_as_good_as_logits, gradients, make_case
from tests.ops.linear_cases import linear as of_case

aten, lit_did = torch.ops.aten, torch.ops.lit_did
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_}
# Views, and memory that the caching allocator gives without a kernel.
NO_LAUNCH = {aten.empty, aten.empty_like, aten.new_empty, aten.detach, aten.empty_strided}
# The host waits for what the device has computed: values, or sizes that depend on them.
WAITS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.unique_dim),
    *(aten._unique2, aten.repeat_interleave, aten.bincount),
}
BLOCKS, CHUNKS = 4, 3  # of 4 tokens each
VOCABULARY, TOKENS = BLOCKS * 4096 - 1000, CHUNKS * 4


class Recorded(TorchDispatchMode):
    """Counts what would be launched on CUDA, and raises where the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function.overloadpacket
        assert packet not in WAITS, f"{function} waits for the device"
        devices = {kwargs.get("device"), *(a for a in args if isinstance(a, torch.device))}
        assert packet is not aten._to_copy or not devices - {None}, f"{function} copies to the host"
        if function == aten.addmm.dtype_out:
            self.launches["products"] += 1
            return self._wide_product(*args, **kwargs)
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if packet in PRODUCTS:
            self.launches["products"] += 1
            # cuBLASLt adds a bias. With another factor than 1, torch first copies it into every row of the product.
            self.launches["bias"] += args[0].dim() == 1 and kwargs.get("beta", 1) != 1
        elif packet is lit_did.token_statistics_backward_:
            # Each side has a kernel of its own where only log-probabilities have a gradient.
            grads, writes = args[0], args[8:10]
            self.launches["backward"] += 1 if any(grad is not None for grad in grads[2:]) else sum(writes)
        elif packet not in NO_LAUNCH and not aliases:
            self.launches[packet.__name__] += 1
        return function(*args, **kwargs)

    @staticmethod
    def _wide_product(*args, beta=1, alpha=1, out=None):
        added, a, b, dtype = args
        product = alpha * (a.to(dtype) @ b.to(dtype))
        assert out is added  # in place
        return out.copy_(product if beta == 0 else product + beta * out)


@pytest.fixture(autouse=True)
def _imitate_cuda(monkeypatch):
    tiling = tiles.TILING["cuda"]._replace(tile=4 * 4096)
    monkeypatch.setitem(tiles.TILING, "cpu", tiling)
    for module in (linear, agreement):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)


def case_of(dtype, vocabulary=VOCABULARY, **options) -> Case:
    made = make_case(dtype, **options)
    generator = torch.Generator().manual_seed(0)
    for name, value in made.tensors.items():
        if value is not None:
            shape = (TOKENS if name.endswith("hidden") else vocabulary, *value.shape[1:])
            made.tensors[name] = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    made.labels = torch.randint(vocabulary, (TOKENS,), generator=generator)
    made.upstream = {name: torch.randn(TOKENS, generator=generator) for name in FIELDS}
    return made


def recorded(case: Case, **options) -> tuple[Counter[str], Counter[str]]:
    """What the forward and the backward launch."""
    inputs = case.inputs()
    with Recorded() as forward:
        statistics = of_case(case, inputs, **options)
    with Recorded() as backward:
        gradients(case, statistics, inputs)
    return forward.launches, backward.launches


LOGPROBS = FIELDS[:2]
TWO, EQUAL, ONE = {"softcap": (5.0, 3.0)}, {"softcap": (3.0, 3.0)}, {"softcap": (None, 3.0)}
OUTER = {"bias": True, "scale": (0.5, 2.0)}
# What else than products is launched for a tile, with the statistics that the loss uses: in the forward, in the
# backward of a tile that was kept, and in that of one that is computed again. docs/kernels.md has this as a table.
LAUNCHES = {
    "all": ({}, FIELDS, 1, 1, 1),
    "log-probabilities": ({}, LOGPROBS, 1, 2, 2),
    "one side's": ({}, FIELDS[:1], 1, 1, 1),
    "one softcap": (ONE, FIELDS, 3, 1, 3),
    "one softcap, log-probabilities": (ONE, LOGPROBS, 3, 2, 4),
    "equal softcaps": (EQUAL, FIELDS, 3, 1, 3),
    "equal softcaps, log-probabilities": (EQUAL, LOGPROBS, 3, 2, 4),
    "two softcaps": (TWO, FIELDS, 4, 1, 4),
    "two softcaps, log-probabilities": (TWO, LOGPROBS, 4, 2, 5),
    "two softcaps, bias and scale": (TWO | OUTER, LOGPROBS, 4, 2, 5),
    "one softcap, bias and scale": (ONE | OUTER, LOGPROBS, 4, 2, 5),
    "bias and scale": (OUTER, LOGPROBS, 3, 2, 4),
    "bias": ({"bias": True}, FIELDS, 1, 1, 1),
}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_a_tile(dtype, name, again):
    """At most 5, from the difference that more blocks of the vocabulary make; and nothing waits."""
    options, used, of_forward, *of_backward = LAUNCHES[name]
    more_blocks = 6
    memory = {"max_extra_bytes": 2 * 4 * 4096 * dtype.itemsize} if again else {}  # a tile of each model
    counts = []
    for vocabulary in (VOCABULARY, VOCABULARY + more_blocks * 4096):
        case = case_of(dtype, vocabulary, **options)
        case.upstream = {field: case.upstream[field] for field in used}
        counts.append(recorded(case, **memory))
    forward, backward = (more - fewer for fewer, more in zip(*counts, strict=True))
    more_tiles, sides = more_blocks * CHUNKS, 1 if name == "one side's" else 2
    assert forward.pop("products") == 2 * more_tiles
    assert forward.pop("merge_token_partials_") == 1  # for every 8 blocks, one
    assert sum(forward.values()) == of_forward * more_tiles, forward
    gradients_of_side = 3 if "bias" in options else 2
    assert backward.pop("products") == (gradients_of_side + again) * sides * more_tiles
    if dtype == torch.bfloat16:  # a block's weight gradient is summed over the chunks in float32, and cast once
        assert backward.pop("copy_") == more_blocks * sides
    assert sum(backward.values()) == of_backward[again] * more_tiles, backward
    assert max(of_forward, *of_backward) <= 5


def test_launches_of_a_call():
    """A few besides those of its tiles."""
    forward, backward = recorded(case_of(torch.float32), ignore_index=None)
    tiles_of_call = BLOCKS * CHUNKS
    assert forward["token_partials_"] == backward["backward"] == tiles_of_call
    assert sum(forward.values()) - forward["products"] - tiles_of_call <= 2
    assert forward["finish_token_partials"] == 1
    assert sum(backward.values()) - backward["products"] - tiles_of_call <= 4


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": (None, 3.0), "scale": (0.5, 2.0)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_gradients(dtype, options):
    with WideProducts():
        assert_as_good_as_logits(case_of(dtype, **options))


class WideProducts(Recorded):
    """The products alone, in tests that look at values themselves."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == aten.addmm.dtype_out:
            return self._wide_product(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_tokens(dtype):
    """0, and a gradient of 0, without that the host knows how many there are. NaN in them reaches nothing."""
    case = case_of(dtype, bias=True)
    ignored, kept = [0, 4, 5, 11], [1, 2, 3, 6, 7, 8, 9, 10]
    alone = Case(case.tensors, case.labels[kept], upstream={name: u[kept] for name, u in case.upstream.items()})
    case.labels[ignored] = -100
    inputs, fewer = case.inputs(), alone.inputs()
    for side in ("policy", "reference"):
        fewer[f"{side}_hidden"] = fewer[f"{side}_hidden"][kept]
        inputs[f"{side}_hidden"].data[ignored] = torch.nan
    with Recorded():
        ours = of_case(case, inputs)
        grads = gradients(case, ours, inputs)
    with WideProducts():
        expected = of_case(alone, fewer)
        of_fewer = gradients(alone, expected, fewer)
    for value, right in zip(ours, expected, strict=True):
        assert (value[ignored] == 0).all()
        torch.testing.assert_close(value[kept], right)
    for name, grad in grads.items():
        if name.endswith("hidden"):
            assert (grad[ignored] == 0).all()
            grad = grad[kept]
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # bfloat16: other sums, rounded once
        torch.testing.assert_close(grad, of_fewer[name], rtol=tolerance, atol=tolerance * grad.abs().max().item())


def test_all_ignored():
    case = case_of(torch.float32)
    case.labels[:] = -100
    inputs = case.inputs()
    with Recorded():
        statistics = of_case(case, inputs)
        grads = gradients(case, statistics, inputs)
    assert all((value == 0).all() for value in (*statistics, *grads.values()))


def test_what_waits_is_seen():
    labels = torch.tensor([1, -100])
    for waits in (lambda: (labels == 1).nonzero(), lambda: labels[0].item(), lambda: bool(labels.any())):
        with Recorded(), pytest.raises(AssertionError, match="waits for the device"):
            waits()
    with Recorded(), pytest.raises(AssertionError, match="copies to the host"):
        labels.to("cpu", copy=True)
