"""A kernel's machine code as nvdisasm prints it: its loops, and what one turn of a loop loads, stores and computes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

INSTRUCTION_BYTES = 16  # since Volta
# What they may cost and still be part of the fast path; about twice what the kernels' main loops take.
INSTRUCTIONS_FOR_AN_EXP2, INSTRUCTIONS_FOR_A_LOAD = 16, 64
LEAVES = ("EXIT", "RET", "KILL")
BRANCHES = ("BRA", "BRX", "JMP", "JMX")


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str
    predicate: str  # "" where it always runs


class Turn(NamedTuple):
    """What one turn of a loop does; bytes of a thread."""

    wide_bytes: int  # global loads of 128 bits or more
    narrow_bytes: int  # global loads of less
    wide_stores: int
    narrow_stores: int
    exp2: int  # MUFU.EX2 instructions
    loading_blocks: int  # basic blocks that hold wide loads
    instructions: int

    @property
    def loads(self) -> bool:
        return self.wide_bytes + self.narrow_bytes > 0

    def __add__(self, other: Turn) -> Turn:
        return Turn(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]  # with those of the loops inside
    own: frozenset[int]  # without


def functions(listing: str) -> dict[str, list[Instruction]]:
    """{mangled name: instructions} of `nvdisasm --emit-json`."""
    _, listed = json.loads(listing)
    return {
        function["function-name"]: [
            Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""))
            for i in function["sass-instructions"]
        ]
        for function in listed
    }


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where control may go after each instruction. Calls (slow paths of division and the like) count as straight on."""
    found: list[list[int]] = []
    reconvergence: dict[str, int] = {}  # BSSY B0, target ... BSYNC B0 goes on at the target
    for index, (opcode, operands, predicate) in enumerate(code):
        name = opcode.split(".")[0]
        parts = [part.strip() for part in operands.split(",")]
        target = int(parts[-1], 16) // INSTRUCTION_BYTES if re.fullmatch(r"0x[0-9a-f]+", parts[-1]) else None
        conditional = bool(predicate) or len(parts) > 1
        if name == "BSSY" and target is not None:
            reconvergence[parts[0]] = target
        if name == "BSYNC":
            targets = [reconvergence.get(parts[-1], index + 1)]
        elif name in LEAVES:
            targets = []
        elif name in BRANCHES:
            targets = [] if target is None else [target]
        else:
            targets, conditional = [], True
        found.append([t for t in {*targets, *([index + 1] if conditional else [])} if t < len(code)])
    return found


def basic_blocks(code: list[Instruction]) -> dict[int, tuple[list[Instruction], list[int]]]:
    """{first instruction: (instructions, the blocks that may follow)}."""
    after = successors(code)
    starts = {0} | {t for i, targets in enumerate(after) for t in targets if targets != [i + 1]}
    starts |= {i + 1 for i, targets in enumerate(after) if targets != [i + 1]}
    edges = [*sorted(s for s in starts if s < len(code)), len(code)]
    return {a: (code[a:b], after[b - 1]) for a, b in pairwise(edges)}


def loops(blocks: dict[int, tuple[list[Instruction], list[int]]]) -> Iterator[Loop]:
    """All loops, inner ones too: the blocks that reach one another, then the same without the loop's entry."""

    def reached(start: int, inside: frozenset[int]) -> set[int]:
        seen: set[int] = set()
        ahead = [b for b in blocks[start][1] if b in inside]
        while ahead:
            block = ahead.pop()
            if block not in seen:
                seen.add(block)
                ahead += [b for b in blocks[block][1] if b in inside]
        return seen

    def search(inside: frozenset[int]) -> Iterator[Loop]:
        reach = {block: reached(block, inside) for block in inside}
        left = set(inside)
        while left:
            block = min(left)
            together = frozenset(b for b in reach[block] if block in reach[b])
            left -= together | {block}
            if not together or _only_jumps_to_itself(together):
                continue
            entered = {t for b in blocks if b not in together for t in blocks[b][1] if t in together} or {block}
            inner = list(search(together - entered))
            within = frozenset().union(*(loop.blocks for loop in inner))
            yield Loop(min(entered), together, together - within)
            yield from inner

    def _only_jumps_to_itself(together: frozenset[int]) -> bool:  # what ends every function
        return len(together) == 1 and len(blocks[min(together)][0]) == 1

    yield from search(frozenset(blocks))


def one_turn(blocks: dict[int, tuple[list[Instruction], list[int]]], loop: Loop) -> Turn:
    """The turn that does most for its length: see `worth`."""
    open_blocks: set[int] = set()
    nothing = count([])

    @cache
    def best_from(block: int) -> Turn | None:
        """The best way from the block back to the loop's header; None where there is none."""
        open_blocks.add(block)
        inside = [b for b in blocks[block][1] if b in loop.blocks]
        ways = [nothing if b == loop.header else best_from(b) for b in inside if b not in open_blocks - {loop.header}]
        open_blocks.discard(block)
        best = max((way for way in ways if way is not None), key=worth, default=None)
        return best and best + (count(blocks[block][0]) if block in loop.own else nothing)

    return best_from(loop.header) or nothing


def worth(turn: Turn) -> tuple[int, int]:
    """By which the main one among turns is told, the fast path over whole vectors: it has the greatest.

    A turn that ends early stores, loads or computes less. One through a rare branch (another maximum, infinities, rows
    off a 16-byte boundary, entry by entry) spends more instructions on as much; that it may load more words, to shift
    them together, counts nothing.
    """
    useful = INSTRUCTIONS_FOR_AN_EXP2 * turn.exp2 + INSTRUCTIONS_FOR_A_LOAD * turn.loading_blocks
    return (turn.wide_stores, useful - turn.instructions)


def count(code: list[Instruction]) -> Turn:
    wide_bytes = narrow_bytes = wide_stores = narrow_stores = exp2 = 0
    for opcode, _, _ in code:
        name, *modifiers = opcode.split(".")
        bits = next((int(m) for m in modifiers if m in ("64", "128", "256")), 32)
        bits = 8 if {"U8", "S8"} & set(modifiers) else 16 if {"U16", "S16"} & set(modifiers) else bits
        if name in ("LDG", "LDGSTS"):
            wide_bytes += bits // 8 * (bits >= 128)
            narrow_bytes += bits // 8 * (bits < 128)
        elif name == "STG":
            wide_stores += bits >= 128
            narrow_stores += bits < 128
        elif name == "MUFU":
            exp2 += "EX2" in modifiers
    return Turn(wide_bytes, narrow_bytes, wide_stores, narrow_stores, exp2, int(wide_bytes > 0), len(code))
