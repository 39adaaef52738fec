"""How many threads of a kernel fit on a multiprocessor, by the rules of the CUDA toolkit's cuda_occupancy.h."""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
REGISTERS = 65536  # of a multiprocessor, in four partitions; given to warps in units of 256
PARTITIONS = 4
REGISTER_UNIT = 256


class Multiprocessor(NamedTuple):
    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # that the system takes of every block's shared memory
    shared_unit: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; blocks and units: cuda_occupancy.h.
MULTIPROCESSORS = {
    "75": Multiprocessor(1024, 16, 64 * 1024, 0, 256),
    "80": Multiprocessor(2048, 32, 164 * 1024, 1024, 128),
    "86": Multiprocessor(1536, 16, 100 * 1024, 1024, 128),
    "89": Multiprocessor(1536, 24, 100 * 1024, 1024, 128),
    "90": Multiprocessor(2048, 32, 228 * 1024, 1024, 128),
    "100": Multiprocessor(2048, 32, 228 * 1024, 1024, 128),
    "120": Multiprocessor(1536, 24, 100 * 1024, 1024, 128),
}


def occupancy(architecture: str, block_threads: int, registers: int, shared_bytes: int) -> float:
    """Resident threads over the most that the multiprocessor holds; 0 where not even one block fits."""
    limits = MULTIPROCESSORS[architecture]
    warps = _round_up(block_threads, WARP) // WARP
    of_a_warp = _round_up(registers * WARP, REGISTER_UNIT)
    by_registers = PARTITIONS * (REGISTERS // PARTITIONS // of_a_warp) // warps
    by_threads = limits.threads // WARP // warps
    shared = _round_up(shared_bytes + limits.reserved_bytes, limits.shared_unit)
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return min(by_registers, by_threads, by_shared, limits.blocks) * warps * WARP / limits.threads


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
