"""linear_token_statistics: the memory that it takes, and the matrix products that it does and does not do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_did import linear_token_statistics
from lit_did.ops.tiles import TILING, make_plan

TOKENS, VOCABULARY, SIZE = 96, 8192, 4
LOGITS = TOKENS * VOCABULARY * 4  # bytes of one side in float32
BLOCK = TOKENS * 512 * 4
PARTIALS = TOKENS * (8 * 16 + 14) * 8  # what slices say, and statistics and normalizers

PRODUCT_NAMES = ("aten::addmm", "aten::addmm_", "aten::mm")


class Products(TorchDispatchMode):
    """Counts the matrix products by the sizes that they multiply: "logits", "hidden", "weight"."""

    def __init__(self):
        super().__init__()
        self.counts = {"logits": 0, "hidden": 0, "weight": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.mm):
            b = args[-1]
            inner, outer = b.shape
            kind = "logits" if inner == SIZE else "weight" if inner <= TOKENS else "hidden"
            assert kind == "logits" or outer == SIZE
            self.counts[kind] += 1
        return function(*args, **(kwargs or {}))


def layers(dtype=torch.float32, frozen=()):
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, SIZE), (VOCABULARY, SIZE)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes * 2]
    return [value.requires_grad_(i not in frozen) for i, value in enumerate(tensors)]


LABELS = torch.arange(TOKENS) * 85
LOSSES = {"log-ratios": lambda s: s.log_ratio.sigmoid().sum(), "all": lambda s: sum(value.sum() for value in s)}
BLOCKS = VOCABULARY // 512

# The bound in blocks of one side, and which products follow with a policy that is trained.
PRODUCTS = {
    # The policy's logits all stay: log-ratios compute nothing again. The last of the reference's is still there.
    "policy-kept": (BLOCKS + 1, "log-ratios", (), {"logits": 2 * BLOCKS, "hidden": BLOCKS, "weight": BLOCKS}),
    "reference-again": (BLOCKS + 1, "all", (), {"logits": 3 * BLOCKS - 1, "hidden": BLOCKS, "weight": BLOCKS}),
    # A block of either side, the policy's in five of sixteen besides.
    "some-kept": (7, "log-ratios", (), {"logits": 3 * BLOCKS - 6, "hidden": BLOCKS, "weight": BLOCKS}),
    "none-kept": (2, "log-ratios", (), {"logits": 3 * BLOCKS - 1, "hidden": BLOCKS, "weight": BLOCKS}),
    "frozen-weight": (BLOCKS + 1, "log-ratios", (1,), {"logits": 2 * BLOCKS, "hidden": BLOCKS, "weight": 0}),
    "frozen-hidden": (BLOCKS + 1, "log-ratios", (0,), {"logits": 2 * BLOCKS, "hidden": 0, "weight": BLOCKS}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, monkeypatch):
    blocks, loss, frozen, expected = PRODUCTS[name]
    monkeypatch.setitem(TILING, "cpu", TILING["cpu"]._replace(tile=TOKENS * 512))
    tensors = layers(frozen=(2, 3, *frozen))
    with Products() as products:
        statistics = linear_token_statistics(*tensors, LABELS, max_extra_bytes=blocks * BLOCK)
        LOSSES[loss](statistics).backward()
    assert products.counts == expected


def test_as_much_of_a_trained_reference_is_kept_as_fits(monkeypatch):
    monkeypatch.setitem(TILING, "cpu", TILING["cpu"]._replace(tile=TOKENS * 512))
    with Products() as products:
        LOSSES["all"](linear_token_statistics(*layers(), LABELS, max_extra_bytes=(BLOCKS + 8) * BLOCK)).backward()
    assert products.counts == {"logits": 3 * BLOCKS - 8, "hidden": 2 * BLOCKS, "weight": 2 * BLOCKS}


@pytest.mark.parametrize(("change", "logits"), [({}, 1), ({"scale": (1.0, 2.0)}, 2), ({"softcap": (None, 3.0)}, 2)])
def test_a_policy_beside_itself(change, logits):
    hidden, weight = layers()[:2]
    with Products() as products:
        statistics = linear_token_statistics(hidden, weight, hidden.detach(), weight.detach(), LABELS, **change)
        statistics.policy_logprob.sum().backward()
    assert products.counts == {"logits": logits, "hidden": 1, "weight": 1}
    if not change:
        apart = linear_token_statistics(hidden, weight, hidden.clone(), weight.clone(), LABELS)
        assert all(map(torch.equal, statistics, apart))


def test_nothing_is_computed_again_where_all_fits():
    tensors = layers()
    with Products() as products:
        LOSSES["all"](linear_token_statistics(*tensors, LABELS)).backward()
    assert products.counts == {"logits": 2, "hidden": 2, "weight": 2}


def test_no_product_for_a_side_that_the_loss_does_not_use():
    tensors = layers()
    with Products() as products:
        grads = torch.autograd.grad(linear_token_statistics(*tensors, LABELS).policy_logprob.sum(), tensors)
    assert products.counts == {"logits": 2, "hidden": 1, "weight": 1}
    assert all((grad == 0).all() for grad in grads[2:])
    assert all((grad != 0).any() for grad in grads[:2])


def peak_bytes(run) -> int:
    """The most that is allocated at a time beyond what was before."""
    return max(itertools.accumulate(allocations(run)))


def allocations(run) -> list[int]:
    """Bytes, negative where memory was freed; of a matrix product what is left of it.

    On some processors (with AMX) the library takes scratch memory for a product's time, some thousand rows' worth.
    """
    with profile(profile_memory=True) as profiler:
        run()
    found: list[int] = []
    product_ends = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() in PRODUCT_NAMES:
            product_ends = event.end_ns()
            found.append(0)
        elif event.name() == "[memory]" and event.start_ns() < product_ends:
            found[-1] += event.nbytes()
        elif event.name() == "[memory]":
            found.append(event.nbytes())
    return found


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_tokens", ["auto", 40])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("blocks", [3, 5, 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds(dtype, blocks, loss, chunk_tokens, softcap):
    bound = blocks * BLOCK
    tensors = layers(dtype)
    # The arguments' gradients, those in float32 that they are summed up in, and what is a few numbers a token.
    others = 4 * sum(value.nbytes for value in tensors) + PARTIALS

    def run():
        statistics = linear_token_statistics(
            *tensors, LABELS, chunk_tokens=chunk_tokens, max_extra_bytes=bound, softcap=softcap
        )
        LOSSES[loss](statistics).backward()

    run()  # once for what torch allocates at first
    for value in tensors:
        value.grad = None
    peak = peak_bytes(run)
    assert peak <= bound + others
    if blocks == 50 and dtype == torch.float32:  # the measure sees the tiles: both sides' logits fit
        assert peak >= 2 * LOGITS


@pytest.mark.parametrize("trained", ["policy", "both", "none", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [12, 16])
def test_the_bound_is_filled(dtype, blocks, trained, monkeypatch):
    """As on CUDA: by one tile of each side, or, where a backward will come, by smaller ones that are kept for it."""
    tiling = TILING["cuda"]._replace(narrowest=1024, slice_entries=1024, tile=TOKENS * 1024)
    monkeypatch.setitem(TILING, "cpu", tiling)
    tensors = layers(dtype, frozen={"policy": (2, 3), "none": range(4)}.get(trained, ()))
    bound = blocks * TOKENS * 512 * dtype.itemsize
    with torch.set_grad_enabled(trained != "no_grad"):
        peak = peak_bytes(lambda: linear_token_statistics(*tensors, LABELS, max_extra_bytes=bound))
    assert 0.8 * bound + PARTIALS <= peak <= bound + PARTIALS


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    """One tile a side, though there is memory for all."""
    monkeypatch.setitem(TILING, "cpu", TILING["cpu"]._replace(tile=TOKENS * 512, single_tile=TOKENS * 512))
    tensors = layers()
    frozen = [value.detach() for value in tensors]
    with torch.no_grad():
        for given in (tensors, frozen):
            assert peak_bytes(lambda given=given: linear_token_statistics(*given, LABELS)) < 2 * BLOCK + PARTIALS
    assert peak_bytes(lambda: linear_token_statistics(*frozen, LABELS)) < 2 * BLOCK + PARTIALS
    assert peak_bytes(lambda: linear_token_statistics(*tensors, LABELS)) > 2 * LOGITS


def test_tiles_are_let_go_after_the_backward():
    """Though the statistics, and with them the graph, live on."""
    tensors = layers()
    alive = []

    def run():
        alive.append(linear_token_statistics(*tensors, LABELS))
        LOSSES["all"](alive[0]).backward()

    assert sum(allocations(run)) < sum(value.nbytes for value in tensors) + LOGITS / 10
    assert alive[0].kl.grad_fn is not None


@pytest.mark.parametrize("options", [{"max_extra_bytes": LOGITS}, {"chunk_tokens": 3}], ids=str)
def test_the_reference_is_bounded_too(options):
    """Three tokens at a time, by either."""
    tensors = layers()

    def run():
        LOSSES["all"](linear_token_statistics(*tensors, LABELS, backend="reference", **options)).backward()

    run()
    assert peak_bytes(run) < LOGITS + 8 * sum(value.nbytes for value in tensors)


POLICY, BOTH, NONE = (True, False), (True, True), (False, False)  # which model is trained


def plan(tokens, vocabulary, *, itemsize=4, chunk_tokens="auto", max_extra_bytes=2**28, trained=POLICY, device="cpu"):
    itemsizes = itemsize, itemsize
    return make_plan(tokens, vocabulary, itemsizes, chunk_tokens, max_extra_bytes, trained, TILING[device])


@pytest.mark.parametrize("vocabulary", [1, 7, 511, 512, 513, 1030, 49_152, 50_257, 262_144])
@pytest.mark.parametrize("tokens", [1, 7, 816, 70_000])
@pytest.mark.parametrize("device", TILING)
def test_plans(device, tokens, vocabulary):
    """Tiles cover everything once, in the bound, in blocks that are not narrow."""
    for itemsize, chunk_tokens, trained in ((4, "auto", BOTH), (4, "auto", NONE), (2, 7, POLICY), (8, 1000, NONE)):
        entry = 2 * itemsize
        for bound in (min(512, vocabulary) * entry, 5_000_000, 2**28):
            made = plan(
                tokens,
                vocabulary,
                itemsize=itemsize,
                chunk_tokens=chunk_tokens,
                max_extra_bytes=bound,
                trained=trained,
                device=device,
            )
            assert 1 <= made.rows <= (tokens if chunk_tokens == "auto" else min(tokens, chunk_tokens))
            assert min(256, vocabulary) <= made.columns <= vocabulary  # blocks of 512, evened out
            assert made.columns % 64 == 0 or made.columns == vocabulary
            if device == "cuda" and bound >= 4096 * entry:  # tokens are cut first
                assert made.columns % 4096 == 0 or made.columns == vocabulary
                assert made.columns <= 32_768 or made.rows == tokens
            tile = made.rows * made.columns * itemsize
            assert (made.policy_slots + made.reference_slots) * tile <= bound
            if -(-tokens // made.rows) * -(-vocabulary // made.columns) < 5000:  # there are plans of millions
                tiles = made.tiles(tokens, vocabulary)
                assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles) == tokens * vocabulary
                assert len(set(map(str, tiles))) == len(tiles) >= max(made.policy_slots, made.reference_slots)
                assert (tiles[-1][0].stop, tiles[-1][1].stop) == (tokens, vocabulary)


def test_the_default_keeps_the_policy():
    """816 tokens of 49,152 entries in 256 MiB: all of the policy's logits, one tile of the frozen reference's."""
    made = plan(816, 49_152)
    assert made.rows == 816
    assert made.policy_slots == len(made.tiles(816, 49_152)) == 5
    assert made.reference_slots == 1
    assert plan(816, 49_152, trained=BOTH) == made._replace(reference_slots=3)
    half = plan(816, 49_152, itemsize=2)
    assert half.policy_slots == half.reference_slots == len(half.tiles(816, 49_152))
    assert plan(816, 49_152, trained=NONE)[2:] == (1, 1)


def test_tiles_on_cuda():
    """A tile of 2^25 entries, and more of the policy's kept where 1 GiB has room for them."""
    made = plan(8192, 128_256, itemsize=2, max_extra_bytes=TILING["cuda"].extra_bytes, device="cuda")
    assert made == (8192, 4096, 15, 1)
    assert (made.policy_slots + made.reference_slots) * made.rows * made.columns * 2 == 2**30
    assert len(made.tiles(8192, 128_256)) == 32
    assert plan(816, 128_256, itemsize=2, max_extra_bytes=2**30, device="cuda") == (816, 32_768, 4, 4)
    assert plan(8192, 128_256, itemsize=2, max_extra_bytes=2**30, trained=NONE, device="cuda") == (8192, 32_768, 1, 1)


@pytest.mark.parametrize("trained", [POLICY, BOTH, NONE], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocabulary", [128_256, 262_144])
@pytest.mark.parametrize("tokens", [4096, 6000, 8192, 70_000])
def test_the_default_is_filled_on_cuda(tokens, vocabulary, itemsize, trained):
    """Except that blocks are even: a single tile may take less, if it takes as many."""
    bound = TILING["cuda"].extra_bytes
    made = plan(tokens, vocabulary, itemsize=itemsize, max_extra_bytes=bound, trained=trained, device="cuda")
    filled = made.rows * made.columns * itemsize * (made.policy_slots + made.reference_slots)
    fewer_blocks = max(1, -(-vocabulary // made.columns) - 1)
    wider = -(-vocabulary // fewer_blocks // 4096) * 4096
    assert filled <= bound
    assert filled >= 0.8 * bound or (trained == NONE and made.rows * wider * 2 * itemsize > bound)
    assert made.columns >= 4096


def test_the_default_of_the_device(monkeypatch):
    """None takes what `TILING` says."""
    assert (TILING["cpu"].extra_bytes, TILING["cuda"].extra_bytes) == (2**28, 2**30)
    monkeypatch.setitem(TILING, "cpu", TILING["cpu"]._replace(extra_bytes=2 * BLOCK))
    with torch.no_grad(), Products() as products:
        linear_token_statistics(*layers(), LABELS)
    assert products.counts["logits"] == 2 * BLOCKS
