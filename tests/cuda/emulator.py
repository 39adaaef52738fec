"""csrc/cuda on the host: builds it with g++ and emulation.h, gives it cases and reads back what its kernels wrote.

A case's buffers hold NaN wherever the kernels have no business: between rows, in rows that are ignored, in outputs not
yet written. `run` asserts that what they should not write is as it was; AddressSanitizer sees what they must not read.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parent / "emulation"
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # ScalarKind

# As device compilers do: 16-byte words may stand for entries, and multiplications and additions are fused, which g++
# does among its expensive optimisations. The kernels' arithmetic relies on that.
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-march=native", "-fno-strict-aliasing", "-fdata-sections"),
    *("-ffp-contract=fast", "-fexpensive-optimizations"),
    *("-Wall", "-Wno-unknown-pragmas", "-pthread", "-DLIT_DID_CUDA_EMULATION", f"-I{EMULATION}"),
]
BUILDS = {
    "plain": [],
    "pairs": ["-DLIT_DID_CUDA_PAIRS"],  # the forward as on sm_100, in csrc/cuda/pairs.cuh
    "thread": ["-fsanitize=thread"],
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=lit_did_shared"),
    ],
}


class EmulationError(Exception):
    """The driver did not finish; with what it said last."""


TIMEOUT = 600  # seconds a run of the driver: a hanging kernel is a failure, not a wait


# ----------------------------------------------------------------------------------------------------------
# Cases and results
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where rows of [..., V] lie in memory."""

    misalignment: int = 0
    """entries from a 64-byte boundary to the first row"""
    gap: int = 0
    """entries between one row and the next, which nobody may touch"""
    reversed_dims: bool = False
    """the outermost dimension is the closest in memory"""
    one: bool = False
    """all rows lie in one place"""


@dataclass
class TokenCase:
    policy: Tensor
    reference: Tensor
    labels: Tensor
    ignore_index: int = -100
    temperature: float = 1.0
    layouts: tuple[Layout, Layout] = (Layout(), Layout())
    upstream: list[Tensor | None] | None = None
    """gradients of the nine statistics, shaped like labels; None: no backward"""
    grads: tuple[str, str] = ("apart", "apart")
    """each side's gradient: "apart", "in place" of its logits, or "none" """
    grad_layouts: tuple[Layout, Layout] = (Layout(), Layout())
    softcaps: tuple[float | None, float | None] = (None, None)
    """of softcapped logits: the gradients are those in what was capped"""
    slices: list[int] = field(default_factory=list)
    """where slices of the vocabulary begin, each with calls of its own; none: one call for the whole"""
    seed: int = 1


class TokenResult(NamedTuple):
    statistics: Tensor
    """[9, ...]"""
    policy_grad: Tensor | None
    reference_grad: Tensor | None


@dataclass
class SequenceCase:
    statistics: Tensor
    """[9, tokens]"""
    labels: Tensor
    cu_seqlens: Tensor | None = None
    length: int = 0
    ignore_index: int = -100
    seed: int = 1


class SequenceResult(NamedTuple):
    statistics: Tensor
    """[10, sequences]"""
    num_tokens: Tensor


class _Rows:
    """Logits laid out in memory of their own."""

    def __init__(self, logits: Tensor, layout: Layout, allowed: Tensor):
        self.dtype, self.layout = logits.dtype, layout
        self.sizes, self.vocabulary = logits.shape[:-1], logits.shape[-1]
        step = self.vocabulary + layout.gap
        self.strides = [0] * len(self.sizes)
        dims = range(len(self.sizes))
        for i in dims if layout.reversed_dims else reversed(dims):
            self.strides[i] = 0 if layout.one else step
            step *= max(self.sizes[i], 1)
        rows = 1 if layout.one else math.prod(self.sizes)
        self.entries = (rows - 1) * (self.vocabulary + layout.gap) + self.vocabulary if rows else 0
        self.memory = torch.full((self.entries * logits.element_size(),), 0xFF, dtype=torch.uint8)
        starts = torch.arange(max(self.entries, 1)).as_strided(self.sizes, self.strides).flatten()
        self.starts = starts[allowed.flatten()].sort().values
        if layout.one:
            self.memory.view(self.dtype)[:] = logits[allowed][0]
        else:
            self.of(self.memory)[allowed] = logits[allowed]

    def of(self, memory: Tensor) -> Tensor:
        """[..., V] view of the rows in a copy of the memory."""
        return memory.view(self.dtype).as_strided((*self.sizes, self.vocabulary), (*self.strides, 1))

    def write(self, out: _Writer) -> None:
        size = self.dtype.itemsize
        out.integers(KINDS[self.dtype])
        ranges = [(start * size, (start + self.vocabulary) * size) for start in self.starts.tolist()]
        out.buffer(self.memory, self.layout.misalignment * size, ranges)
        out.integers(len(self.sizes), *self.sizes, *self.strides)

    def outside(self, memory: Tensor) -> Tensor:
        """The bytes that belong to no row."""
        touched = torch.zeros(self.entries, dtype=torch.bool)
        if self.entries:
            touched.as_strided((*self.sizes, self.vocabulary), (*self.strides, 1)).fill_(True)
        return memory.view(-1, self.dtype.itemsize)[~touched]


class _Writer:
    def __init__(self):
        self.parts: list[bytes] = []
        self.memories: list[Tensor] = []  # of the case under way, in the order in which they come back

    def integers(self, *values: int) -> None:
        self.parts.append(struct.pack(f"<{len(values)}q", *values))

    def real(self, value: float) -> None:
        self.parts.append(struct.pack("<d", value))

    def buffer(self, memory: Tensor, misalignment: int = 0, ranges: list[tuple[int, int]] | None = None) -> None:
        memory = memory.reshape(-1).contiguous().view(torch.uint8)
        self.memories.append(memory)
        self.integers(memory.numel(), misalignment)
        self.parts.append(memory.numpy().tobytes())
        ranges = [(0, memory.numel())] if ranges is None else ranges
        self.integers(len(ranges), *(bound for both in ranges for bound in both))

    def expect(self, elements: int, dtype: torch.dtype) -> None:
        """An output that the driver itself makes."""
        self.memories.append(torch.full((elements * dtype.itemsize,), 0xFF, dtype=torch.uint8))


class _Reader:
    def __init__(self, content: bytes):
        self.content, self.at = content, 0

    def integer(self) -> int:
        (value,) = struct.unpack_from("<q", self.content, self.at)
        self.at += 8
        return value

    def memory(self, size: int) -> Tensor:
        part = bytearray(self.content[self.at : self.at + size])
        assert len(part) == size
        self.at += size
        return torch.frombuffer(part, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


class _Tokens:
    """One TokenCase on its way to the driver and back."""

    def __init__(self, case: TokenCase, out: _Writer):
        self.case = case
        labels = case.labels
        self.real = torch.float64 if case.policy.dtype == torch.float64 else torch.float32
        out.memories = []
        out.integers(case.seed, 0, labels.numel(), case.policy.shape[-1], case.ignore_index)
        out.real(case.temperature)
        kept = labels != case.ignore_index
        everything = torch.ones_like(kept)
        self.sides = []
        for logits, layout, grad in zip((case.policy, case.reference), case.layouts, case.grads, strict=True):
            if grad == "in place":  # an ignored row is not read, but its gradient is written
                logits = logits.masked_fill(~kept[..., None], torch.nan)
            self.sides.append(_Rows(logits, layout, everything if grad == "in place" else kept))
            self.sides[-1].write(out)
        out.buffer(labels)
        for _ in range(9):
            out.expect(labels.numel(), self.real)
        out.expect(5 * labels.numel(), torch.float64)
        out.integers(len(case.slices), *case.slices)
        out.integers(int(case.upstream is not None))
        self.grads = [None, None]
        if case.upstream is not None:
            for upstream in case.upstream:
                out.integers(int(upstream is not None))
                if upstream is not None:
                    out.buffer(upstream.to(self.real))
            for i, logits in enumerate((case.policy, case.reference)):
                out.integers(("none", "in place", "apart").index(case.grads[i]))
                if case.grads[i] == "apart":
                    self.grads[i] = _Rows(torch.full_like(logits, torch.nan), case.grad_layouts[i], everything)
                    self.grads[i].write(out)
            for softcap in case.softcaps:
                out.real(0.0 if softcap is None else 1 / softcap)
        self.memories = out.memories

    def read(self, results: _Reader) -> TokenResult:
        self.exchanges = results.integer()
        errors = [results.integer() for _ in range(1 if self.case.upstream is None else 2)]
        assert not any(errors), f"cudaError_t {errors}"
        after = [results.memory(memory.numel()) for memory in self.memories]
        shape = self.case.labels.shape
        statistics = torch.stack([memory.view(self.real).view(shape) for memory in after[3:12]])
        outputs = {*range(3, 13)}
        grads = [None, None]
        apart = len(after) - sum(rows is not None for rows in self.grads)
        for i, rows in enumerate(self.grads):
            where = i if self.case.grads[i] == "in place" else apart
            if self.case.upstream is None or self.case.grads[i] == "none":
                continue
            rows = rows or self.sides[i]
            grads[i] = rows.of(after[where]).clone()
            assert (rows.outside(after[where]) == 0xFF).all(), "written between the rows of a gradient"
            outputs.add(where)
            apart += where == apart
        for i, (memory, before) in enumerate(zip(after, self.memories, strict=True)):
            assert i in outputs or torch.equal(memory, before), f"input {i} was written to"
        return TokenResult(statistics, *grads)


class _Sequences:
    def __init__(self, case: SequenceCase, out: _Writer):
        self.dtype = case.statistics.dtype
        out.memories = []
        self.sequences = len(case.cu_seqlens) - 1 if case.cu_seqlens is not None else len(case.labels) // case.length
        out.integers(case.seed, 1, KINDS[self.dtype], self.sequences, case.length, len(case.labels), case.ignore_index)
        for statistic in case.statistics:
            out.buffer(statistic)
        out.buffer(case.labels)
        out.integers(int(case.cu_seqlens is not None))
        if case.cu_seqlens is not None:
            out.buffer(case.cu_seqlens)
        self.inputs = len(out.memories)
        for _ in range(10):
            out.expect(self.sequences, self.dtype)
        out.expect(self.sequences, torch.int64)
        self.memories = out.memories

    def read(self, results: _Reader) -> SequenceResult:
        error = results.integer()
        assert error == 0, f"cudaError_t {error}"
        after = [results.memory(memory.numel()) for memory in self.memories]
        for memory, before in zip(after[: self.inputs], self.memories, strict=False):
            assert torch.equal(memory, before), "an input was written to"
        *statistics, num_tokens = after[self.inputs :]
        return SequenceResult(torch.stack([m.view(self.dtype) for m in statistics]), num_tokens.view(torch.int64))


# ----------------------------------------------------------------------------------------------------------
# The driver
# ----------------------------------------------------------------------------------------------------------


class Emulator:
    """A driver built from `csrc` as `BUILDS` says. `cache` keeps objects by their source."""

    exchanges: list[int]
    """of each `TokenCase` of the last run: how often a lane gave the others of its warp a value in the forward"""

    def __init__(self, variant: str, cache: Path, csrc: Path = CSRC):
        self.flags = [*FLAGS, f"-I{csrc / 'cuda'}", *BUILDS[variant]]
        self.cache = cache
        # Shadow memory wants its place in the address space.
        self.prefix = ["setarch", "-R"] if variant == "thread" and shutil.which("setarch") else []
        sources = [*sorted((csrc / "cuda").glob("*.cu")), EMULATION / "driver.cpp"]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(self._object, sources))
        script = EMULATION / "shared_memory.ld"
        self.driver = self._made(
            "driver",
            script.read_text() + "".join(path.name for path in objects),
            [*map(str, objects), f"-Wl,-T,{script}"],
        )

    def _object(self, source: Path) -> Path:
        language = ["-x", "c++", str(source)]
        text = subprocess.run(
            ["g++", *self.flags, "-E", "-P", *language], check=True, capture_output=True, text=True
        ).stdout
        return self._made(source.stem, text, ["-c", *language])

    def _made(self, name: str, content: str, arguments: list[str]) -> Path:
        flags = [flag for flag in self.flags if not flag.startswith("-I")]
        key = hashlib.sha256("\0".join([_compiler(), *flags, content]).encode()).hexdigest()[:20]
        path = self.cache / f"{name}-{key}"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            result = subprocess.run(
                ["g++", *self.flags, *arguments, "-o", str(partial)], capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            partial.replace(path)
        return path

    def run(self, cases: list[TokenCase | SequenceCase]) -> list:
        """The cases' results, TokenResult or SequenceResult. Raises EmulationError with what stopped the driver."""
        out = _Writer()
        out.integers(len(cases))
        pending = [(_Tokens if isinstance(case, TokenCase) else _Sequences)(case, out) for case in cases]
        options = {
            "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
            "ASAN_OPTIONS": "detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "cases"), Path(folder, "results")
            given.write_bytes(b"".join(out.parts))
            result = subprocess.run(
                [*self.prefix, str(self.driver), str(given), str(made)],
                capture_output=True,
                text=True,
                errors="replace",
                env=os.environ | options,
                timeout=TIMEOUT,
            )
            if result.returncode != 0:
                said = result.stderr
                raise EmulationError(f"exit status {result.returncode}\n{said[:2000]}\n...\n{said[-6000:]}")
            results = _Reader(made.read_bytes())
        found = [case.read(results) for case in pending]
        self.exchanges = [case.exchanges for case in pending if isinstance(case, _Tokens)]
        return found


def why_not(variant: str) -> str | None:
    """What is missing for an Emulator here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        built = subprocess.run(
            ["g++", *FLAGS, *BUILDS[variant], "-x", "c++", "-", "-o", str(program)],
            input="#include <ucontext.h>\n#include <source_location>\nint main() { return 0; }",
            capture_output=True,
            text=True,
        )
        if built.returncode != 0 or subprocess.run([str(program)], capture_output=True).returncode != 0:
            return f"g++ cannot build and run programs for the emulation ({variant})"
    return None


def _compiler() -> str:
    global _version
    if _version is None:
        # What -march=native means is part of it: the cache may be moved to another machine.
        command = ["g++", "-march=native", "-Q", "--help=target", "--version"]
        _version = subprocess.run(command, capture_output=True, text=True).stdout
    return _version


_version: str | None = None
