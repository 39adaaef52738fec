"""Racing in turns, measured memory, and the read limit."""

import mmap
import time

import pytest
import torch

from benchmarks import memory, read_limit
from benchmarks.harness import MEBIBYTE, Runner, Size, in_own_process, race

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not memory.MEASURED_ON_CPU, reason="memory is measured on Linux")


def runner(name: str, step, **options) -> Runner:
    size = Size(1, 1, torch.float32, CPU)
    return Runner(name, size, lambda: (), (step,), {"forward": (slice(0, 1), 4)}, warmup=1, **options)


def test_contestants_take_turns_and_slow_ones_fewer():
    calls = []

    def slow(state):
        calls.append("slow")
        time.sleep(0.05)

    quick, slow = (runner("quick", lambda state: calls.append("quick")), runner("slow", slow))
    results = race("table", [quick, slow], repeats=8, seconds=0.2)
    assert calls[:2] == ["quick", "slow"]  # the warm-up
    timed = "".join(name[0] for name in calls[2:])
    assert timed.count("q") == 8
    assert 1 <= timed.count("s") <= 4
    assert "ss" not in timed
    assert {r.contestant: r.repeats for r in results} == {"quick": 8, "slow": timed.count("s")}


def test_every_runner_has_its_number_of_threads_and_torch_its_own_after():
    before, seen = torch.get_num_threads(), []
    race("threads", [runner("one", lambda state: seen.append(torch.get_num_threads()), threads=1)], repeats=1)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@on_linux
def test_memory_sees_what_a_call_took_and_gave_back():
    for _ in range(4):  # the C library keeps what was freed: the later calls must see it still
        at_peak, _ = memory.peak(lambda: torch.ones(8 * MEBIBYTE // 4).sum(), CPU)
        assert 7.5 * MEBIBYTE < at_peak < 9.5 * MEBIBYTE
    assert memory.peak(lambda: None, CPU)[0] < MEBIBYTE / 2


@on_linux
def test_extra_memory_is_beyond_what_is_returned():
    def mapped(mebibytes):
        """Memory straight from the system: what malloc gives back at once depends on all that went before."""
        return torch.frombuffer(mmap.mmap(-1, mebibytes * MEBIBYTE), dtype=torch.uint8).fill_(1)

    def step(state):
        mapped(8)
        return [mapped(4)]

    (result,) = race("table", [runner("greedy", step)], repeats=1)
    assert 7.5 < result.peak_mib < 9.5
    assert 3.5 < result.extra_mib < 5.5


def test_memory_held_counts_every_piece_once_and_inputs_not():
    tensor, given = torch.zeros(256), torch.zeros(8)
    assert memory.held([tensor, tensor[2:], given.view(2, 4)], apart_from=[given]) == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_read_limit_reads_every_word(dtype, threads):
    tensor = torch.randn(37, 1012).to(dtype)
    assert read_limit.load()(tensor, threads) == tensor.view(torch.int64).sum().item() % 2**64


@pytest.mark.parametrize(
    ("compiler", "words"), [(None, "install g"), ("/no/such/compiler", "does not start"), ("false", "does not compile")]
)
def test_the_read_limit_says_what_is_wrong_with_the_compiler(compiler, words, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=words):
        read_limit.load.__wrapped__()


def test_a_process_of_its_own_has_its_own_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert in_own_process(3, torch.get_num_threads) == 3  # more than it would take of itself, here
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
