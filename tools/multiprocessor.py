"""A model of one multiprocessor that runs the forward kernel: which share of a copy's bandwidth the kernel reaches.

    python -m tools.multiprocessor

Nothing here is measured. Warps issue instructions, wait for memory and meet at the end of their block. A scheduler
issues one instruction per clock and shares its slots among the warps that compute. Memory serves requests in order, at
the multiprocessor's share of the bandwidth, and answers after a latency. The kernels' counts come from their machine
code, the GPUs' peaks and clocks from their makers. A copy's bandwidth and latencies are what others measured. The
other constants are assumptions.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

SCHEDULERS = 4
EXP2_CLOCKS = 8  # of a scheduler's special function unit, for one instruction of a warp: 4 lanes a clock
ISSUED = 0.93  # of the slots, at most: the rest goes to dependences and bank conflicts
PIPE = 0.97  # of a pipe's clocks, at most
DRAM = 0.93  # of the peak bandwidth, at most
SPREAD = 0.1  # of the latency, up or down
BLOCK_START, LAST_STORE = 200, 900  # clocks
BETWEEN_TURNS = 25  # instructions before a load that does not go out ahead


@dataclass(frozen=True)
class GPU:
    name: str
    architecture: str
    peak: float  # GB/s
    copy: float  # GB/s, what a device copy reaches
    multiprocessors: int
    clock: float  # GHz
    latency: float  # ns
    float32_lanes: int = 128  # of a multiprocessor


GPUS = (
    GPU("H100", "sm_90", 3350, 3000, 132, 1.755, 600),
    GPU("H200", "sm_90", 4800, 4300, 132, 1.9, 600),
    GPU("A100", "sm_80", 2039, 1780, 108, 1.41, 550, float32_lanes=64),
    GPU("B200", "sm_100", 8000, 7200, 148, 1.9, 750),
)


@dataclass(frozen=True)
class Kernel:
    """What a block does. Instructions are those that each of its warps issues."""

    blocks: int  # on a multiprocessor at a time
    warps: int  # of a block
    turns: int  # of a warp in a block
    load: int  # bytes of a turn
    exp2: int  # instructions of a turn
    float32: int  # instructions of a turn; one on a pair counts twice, because it keeps the lanes busy for two clocks
    turn: int  # instructions of a turn, the loads and all else included
    alone: int  # clocks of a turn in a warp that shares its scheduler with none
    prologue: int  # instructions before the first load
    part: int  # at the start and end of a part
    part_turns: int  # turns of a part
    move: int  # where the origins move again
    moves: float  # how often they do, for each turn but a part's first
    end: int  # after a warp's last part
    finish: int  # of the last warp of a block
    ahead: float  # the share of a turn's instructions that follow the last of the next turn's loads


# ----------------------------------------------------------------------------------------------------------
# The kernels, for 16 bfloat16 entries of each side in a turn of a lane, and V = 131,072
# ----------------------------------------------------------------------------------------------------------

_BEFORE = {"blocks": 3, "warps": 8, "turns": 8, "load": 2048, "exp2": 48, "float32": 210, "alone": 720}
_BEFORE |= {"part_turns": 8, "moves": 0.08, "end": 200, "finish": 200, "ahead": 0}
# Commit 04839a9. Half of a turn is a chunk, and one chunk in 25 moves the origins.
BEFORE = {
    "sm_80": Kernel(turn=429, prologue=110, part=105, move=105, **_BEFORE),
    "sm_90": Kernel(turn=428, prologue=122, part=105, move=105, **_BEFORE),
    "sm_100": Kernel(turn=401, prologue=114, part=101, move=101, **_BEFORE),
}
_NOW = {"blocks": 24, "warps": 1, "turns": 32, "load": 2048, "exp2": 48, "float32": 215, "alone": 620}
_NOW |= {"part_turns": 8, "moves": 0.005, "end": 0, "finish": 0}
_NOW_IN_PAIRS = _NOW | {"exp2": 38, "float32": 303}
# Of forward_kernel<bf16, bf16>, as `python -m tools.cuda_check csrc/cuda/forward.cu --arch 80 90 100 --paths` prints
# it. `part` is what comes around the main loop. `ahead` is the share of a turn behind its last load. A move is the
# rare branch of a turn, and the turn that is thrown away.
NOW = {
    "sm_80": Kernel(turn=332, prologue=138, part=347, move=239 + 332, ahead=58 / 332, **_NOW),
    "sm_90": Kernel(turn=332, prologue=156, part=351, move=246 + 332, ahead=47 / 332, **_NOW),
    "sm_100": Kernel(turn=293, prologue=153, part=308, move=197 + 293, ahead=70 / 293, **_NOW_IN_PAIRS),
}


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------

Step = tuple[str, float]  # what a warp does next: ("issue", instructions) or ("wait", until a clock)


class Multiprocessor:
    """Runs blocks of a kernel until `blocks` have ended."""

    def __init__(self, kernel: Kernel, gpu: GPU):
        self.kernel, self.gpu = kernel, gpu
        self.latency = gpu.latency * gpu.clock
        self.bandwidth = gpu.peak * DRAM / gpu.multiprocessors / gpu.clock  # bytes per clock
        # The pipe that a turn keeps busy the longest decides how many instructions a scheduler issues.
        pipe = max(EXP2_CLOCKS * kernel.exp2, kernel.float32 * 128 / gpu.float32_lanes)
        self.issued = min(ISSUED, PIPE * kernel.turn / pipe)
        self.issued_alone = kernel.turn / kernel.alone
        self.chance = random.Random(1)
        self.now = self.memory_free = self.read = 0.0
        self.ended = self.order = 0
        self.waiting: list[tuple[float, int, int, Iterator[Step]]] = []  # until when, order, scheduler, warp
        self.computing: list[list[tuple[float, Iterator[Step]]]] = [[] for _ in range(SCHEDULERS)]
        for number in range(kernel.blocks):
            self.begin_block(number, 300.0 * number)

    def begin_block(self, number: int, start: float) -> None:
        ending = iter(range(self.kernel.warps - 1, -1, -1))  # how many warps are left after one that ends
        for i in range(self.kernel.warps):
            self.resume((number + i) % SCHEDULERS, self.warp(number, start, ending))

    def load(self) -> float:
        """When a turn's bytes are there that are asked for now."""
        self.read += self.kernel.load
        self.memory_free = max(self.memory_free, self.now) + self.kernel.load / self.bandwidth
        return self.memory_free + self.latency * self.chance.uniform(1 - SPREAD, 1 + SPREAD)

    def warp(self, number: int, start: float, ending: Iterator[int]) -> Iterator[Step]:
        k = self.kernel
        yield "wait", start + self.latency  # for the row's label
        yield "issue", k.prologue
        ready = self.load()
        for turn in range(k.turns):
            yield "wait", ready
            if turn % k.part_turns == 0:
                yield "issue", k.part
            elif self.chance.random() < k.moves:
                yield "issue", k.move
            yield "issue", k.turn * (1 - k.ahead)
            last = turn + 1 == k.turns
            if k.ahead and not last:
                ready = self.load()
            yield "issue", k.turn * k.ahead
            if not k.ahead and not last:
                yield "issue", BETWEEN_TURNS
                ready = self.load()
        yield "issue", k.end
        if next(ending) == 0:
            yield "issue", k.finish
            yield "wait", self.now + LAST_STORE
            self.ended += 1
            self.begin_block(number, self.now + BLOCK_START)

    def resume(self, scheduler: int, warp: Iterator[Step]) -> None:
        for what, amount in warp:
            if what == "issue" and amount > 0:
                self.computing[scheduler].append((amount, warp))
                return
            if what == "wait" and amount > self.now:
                self.order += 1
                heapq.heappush(self.waiting, (amount, self.order, scheduler, warp))
                return

    def advance(self) -> None:
        """To the next warp that has issued its instructions or waited long enough."""
        speeds = [min(self.issued / max(len(warps), 1), self.issued_alone) for warps in self.computing]
        steps = [left / speed for warps, speed in zip(self.computing, speeds, strict=True) for left, _ in warps]
        step = min([*steps, *(until - self.now for until, *_ in self.waiting[:1])])
        self.now += step
        for scheduler, (warps, speed) in enumerate(zip(self.computing, speeds, strict=True)):
            left = [(amount - step * speed, warp) for amount, warp in warps]
            self.computing[scheduler] = [(amount, warp) for amount, warp in left if amount > 1e-6]
            for amount, warp in left:
                if amount <= 1e-6:
                    self.resume(scheduler, warp)
        while self.waiting and self.waiting[0][0] <= self.now:
            _, _, scheduler, warp = heapq.heappop(self.waiting)
            self.resume(scheduler, warp)


def bytes_per_clock(kernel: Kernel, gpu: GPU, warps: int = 400) -> float:
    """What one multiprocessor reads while that many warps end, after a quarter as many to warm up."""
    model = Multiprocessor(kernel, gpu)
    marks = []
    for ended in (warps // 4, warps + warps // 4):
        while model.ended * kernel.warps < ended:
            model.advance()
        marks.append((model.read, model.now))
    (read, begin), (all_read, end) = marks
    return (all_read - read) / (end - begin)


def share_of_copy(kernel: Kernel, gpu: GPU) -> float:
    return bytes_per_clock(kernel, gpu) * gpu.multiprocessors * gpu.clock / gpu.copy


def rows() -> list[tuple[str, ...]]:
    """Each GPU's name, and the shares of both kernels."""
    return [
        (gpu.name, *(f"{share_of_copy(kernels[gpu.architecture], gpu):.0%}" for kernels in (BEFORE, NOW)))
        for gpu in GPUS
    ]


def main() -> None:
    table = Table(title="The bfloat16 forward: calculated share of a copy's bandwidth")
    for heading in ("GPU", "before", "now"):
        table.add_column(heading)
    for row in rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
