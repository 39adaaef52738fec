"""A kernel's machine code as nvdisasm prints it: what one turn of its main loop costs on the common path, what comes
before, around and after the loop, and what the rare branches cost besides.

Machine code does not say which way of a branch is rare. The sources do, by `[[unlikely]] {`: what stands in those
braces is rare, with everything that is inlined there. With -lineinfo, which changes no instruction, an instruction
carries its source line and the lines of the calls that it was inlined at. A block is rare if most of its instructions
come from rare lines. The common path is the longest one without rare blocks. So a rare branch that is not marked makes
a count too large, never too small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

INSTRUCTION_BYTES = 16  # since Volta
LEAVES = ("EXIT", "RET", "KILL")
BRANCHES = ("BRA", "BRX", "JMP", "JMX")
MARK = "[[unlikely]]"
# Compilers share these between paths, or write them without a line: they say nothing about the block in which they are.
WITHOUT_EVIDENCE = re.compile(
    r"U?MOV|IMAD\.U?MOV|C?S2U?R|U?LDC|[A-Z]SETP|UISETP|U?PLOP3|HFMA2\S*|BRA|BSSY|BSYNC|WARPSYNC|NOP"
)


class Line(NamedTuple):
    file: str
    number: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}"


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str
    predicate: str  # "" where it always runs
    lines: tuple[Line, ...] = ()  # its own, and those of the calls that it was inlined at


class Block(NamedTuple):
    """A basic block."""

    code: list[Instruction]
    after: list[int]  # the blocks that may follow
    marks: frozenset[Line]  # lines of `[[unlikely]]` that make it rare; none on the common path

    @property
    def leaves(self) -> bool:
        return not self.after and self.code[-1].opcode == "EXIT"


Blocks = Mapping[int, Block]  # by a block's first instruction


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]  # with those of the loops inside
    own: frozenset[int]  # without


class Count(NamedTuple):
    """What instructions do; bytes of a thread. One whose predicate is false counts, too: it is issued all the same."""

    instructions: int = 0
    wide_bytes: int = 0  # global loads of 128 bits or more
    narrow_bytes: int = 0  # global loads of less
    wide_stores: int = 0
    narrow_stores: int = 0
    exp2: int = 0  # MUFU.EX2 instructions
    mufu: int = 0  # MUFU instructions of any kind
    double: int = 0  # float64 arithmetic
    packed: int = 0  # float32 arithmetic on pairs

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(self, other, strict=True)))


class Detour(NamedTuple):
    """Leaving the common path of a turn for what one mark makes rare, and coming back."""

    mark: Line
    more: Count  # than the common path costs, at the place where that is most
    places: int  # where the path may be left for it


@dataclass(frozen=True)
class Anatomy:
    """A kernel from its entry to its exit on the common path. Loops other than the main one are left out."""

    prologue: list[Instruction]
    turn: list[Instruction]  # of the main loop
    around: list[Instruction]  # from the main loop back to it, through the outermost loop around it
    epilogue: list[Instruction]
    detours: list[Detour]  # from the turn; the longest first
    detours_around: list[Detour]  # from `around`
    rare_blocks: int  # of the main loop
    rare_instructions: int


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def functions(listing: str, lines: str = "") -> dict[str, list[Instruction]]:
    """{mangled name: instructions} of `nvdisasm --emit-json`, with source lines of `nvdisasm --print-code
    --print-line-info-inline`."""
    _, listed = json.loads(listing)
    lines_of = source_lines(lines)
    found = {}
    for function in listed:
        name = function["function-name"]
        at = lines_of.get(name, {})
        found[name] = [
            Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""), at.get(index, ()))
            for index, i in enumerate(function["sass-instructions"])
        ]
    return found


def source_lines(text: str) -> dict[str, dict[int, tuple[Line, ...]]]:
    """{mangled name: {instruction: its lines}}. A comment with lines holds until the next one, or a label to which
    other code may jump; only BSYNC leads to the label behind it."""
    found: dict[str, dict[int, tuple[Line, ...]]] = {}
    lines: tuple[Line, ...] = ()
    collecting = behind_bsync = False
    of_function: dict[int, tuple[Line, ...]] = {}
    for row in text.splitlines():
        if row.startswith(".text."):
            of_function = found.setdefault(row.removeprefix(".text.").removesuffix(":"), {})
            lines, collecting = (), False
        elif row.startswith(".L"):
            lines = lines if behind_bsync else ()
            collecting = False
        elif row.lstrip().startswith("//## File"):
            here = tuple(Line(file, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', row))
            lines = tuple(dict.fromkeys(lines + here)) if collecting else here
            collecting = True
        elif offset := re.match(r"\s*/\*([0-9a-f]{4,})\*/", row):
            of_function[int(offset.group(1), 16) // INSTRUCTION_BYTES] = lines
            collecting, behind_bsync = False, " BSYNC" in row
    return found


class MarkError(ValueError):
    """A mark that line numbers cannot follow."""


@cache
def rare_lines(source: str) -> dict[int, frozenset[Line]]:
    """{line: the marks in whose braces it stands} of a source."""
    path = Path(source)
    text = path.read_text() if path.is_file() else ""
    found: dict[int, frozenset[Line]] = {}
    opened: list[Line | None] = []  # a bracket's mark
    for number, row in enumerate(text.splitlines(), 1):
        code = row.split("//")[0].rstrip()
        mark = Line(source, number) if MARK in code else None
        if mark and not code.endswith(MARK + " {"):
            raise MarkError(f"{mark}: Expected `{MARK} {{` at the end of the line, but got {code.strip()!r}.")
        inside = frozenset(mark for mark in opened if mark)
        if inside and not code.lstrip().startswith("}"):
            found[number] = inside
        for at, bracket in enumerate(code):
            if bracket == "{":
                opened.append(mark if at == len(code) - 1 else None)
            elif bracket == "}" and opened:
                opened.pop()
    return found


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where control may go after each instruction.

    Calls (slow paths of division and the like) count as straight on, and so does BRA.DIV, which branches where the
    lanes of a warp have come apart before a shuffle or a vote. A call under a predicate is a way out of a loop.
    """
    found: list[list[int]] = []
    reconvergence: dict[str, int] = {}  # BSSY B0, target ... BSYNC B0 goes on at the target
    for index, (opcode, operands, predicate, _) in enumerate(code):
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
        elif (name in BRANCHES and ".DIV" not in opcode) or (name == "CALL" and predicate):
            targets = [] if target is None else [target]
        else:
            targets, conditional = [], True
        found.append([t for t in {*targets, *([index + 1] if conditional else [])} if t < len(code)])
    return found


def basic_blocks(code: list[Instruction]) -> dict[int, Block]:
    """Those that can be reached."""
    after = successors(code)
    starts = {0} | {t for i, targets in enumerate(after) for t in targets if targets != [i + 1]}
    starts |= {i + 1 for i, targets in enumerate(after) if targets != [i + 1]}
    edges = [*sorted(s for s in starts if s < len(code)), len(code)]
    blocks = {a: Block(code[a:b], after[b - 1], marks_of(code[a:b])) for a, b in pairwise(edges)}
    return part_of(blocks, sorted(reachable(blocks, 0) | {0}))


def marks_of(code: list[Instruction]) -> frozenset[Line]:
    """The marks under which most of the instructions stand."""
    working = [instruction for instruction in code if not WITHOUT_EVIDENCE.match(instruction.opcode)]
    under = [frozenset().union(*(rare_lines(line.file).get(line.number, ()) for line in i.lines)) for i in working]
    return frozenset(mark for mark in frozenset().union(*under) if 2 * sum(mark in of for of in under) > len(working))


# ----------------------------------------------------------------------------------------------------------
# Loops and paths
# ----------------------------------------------------------------------------------------------------------


def reachable(blocks: Blocks, start: int) -> set[int]:
    """The blocks that may follow `start`; with itself only where a way leads back."""
    seen: set[int] = set()
    ahead = [start]
    while ahead:
        for block in blocks[ahead.pop()].after:
            if block in blocks and block not in seen:
                seen.add(block)
                ahead.append(block)
    return seen


def leading_to(blocks: Blocks, end: int) -> set[int]:
    before: dict[int, list[int]] = {block: [] for block in blocks}
    for block in blocks:
        for following in blocks[block].after:
            if following in blocks:
                before[following].append(block)
    return reachable({block: Block([], before[block], frozenset()) for block in blocks}, end)


def part_of(blocks: Blocks, inside: Iterable[int]) -> dict[int, Block]:
    return {block: blocks[block] for block in inside}


def loops(blocks: Blocks) -> Iterator[Loop]:
    """All loops, inner ones too: the blocks that reach one another, then the same without the loop's header."""

    def search(inside: dict[int, Block]) -> Iterator[Loop]:
        reach = {block: reachable(inside, block) for block in inside}
        left = set(inside)
        while left:
            block = min(left)
            together = frozenset(b for b in reach[block] if block in reach[b])
            left -= together | {block}
            if not together or _only_jumps_to_itself(together):
                continue
            entered = {t for b in blocks if b not in together for t in blocks[b].after if t in together} or {block}
            header = min(entered)
            inner = list(search(part_of(blocks, together - {header})))
            within = frozenset().union(*(loop.blocks for loop in inner))
            yield Loop(header, together, together - within)
            yield from inner

    def _only_jumps_to_itself(together: frozenset[int]) -> bool:  # what ends every function
        return len(together) == 1 and len(blocks[min(together)].code) == 1

    yield from search(dict(blocks))


def always_passed(blocks: Blocks, end: int | None) -> dict[int, set[int]]:
    """{block: the blocks on every way from it to `end`, or to an exit}; without those that do not get there."""
    ends = {block for block in blocks if blocks[block].leaves} if end is None else {end}
    arriving = sorted(ends.union(*(leading_to(blocks, block) for block in ends)), reverse=True)
    bit = {block: 1 << i for i, block in enumerate(arriving)}
    everything = (1 << len(arriving)) - 1
    found = dict.fromkeys(arriving, everything)
    changed = True
    while changed:
        changed = False
        for block in arriving:
            passed = everything
            for following in blocks[block].after:
                passed &= 0 if following == end else found.get(following, everything)
            if block in ends and end is None:
                passed = 0
            passed |= bit[block]
            changed |= passed != found[block]
            found[block] = passed
    return {block: {b for b in arriving if bit[b] & found[block]} for block in arriving}


def common_blocks(blocks: Blocks, start: int, end: int | None) -> dict[int, Block]:
    """Those on the ways from `start` to `end`, or to an exit, that are not rare.

    What every way to the end passes is common, too. There the marks mislead: compilers move instructions, out of loops
    above all.
    """
    passed = always_passed(blocks, end)
    found: set[int] = set()
    forced = set() if end is None else {end}
    ahead = {start}
    while ahead:
        found |= ahead
        forced.update(*(passed[block] for block in ahead if block in passed))
        after = {b for block in found for b in blocks[block].after if b in passed}
        ahead = {b for b in after - found if b in forced or not blocks[b].marks}
    return part_of(blocks, found)


def longest(blocks: Blocks, start: int, end: int | None, counted: Container[int]) -> list[int] | None:
    """The path with most instructions in `counted` blocks from `start` to `end`, or to an exit; without `end` itself.

    It takes no way back to where a loop begins, but for `end`.
    """
    inside: dict[int, frozenset[int]] = {}

    def onward(block: int) -> list[int]:
        return [t for t in blocks[block].after if t in blocks and t != end and block not in inside.get(t, ())]

    try:
        order = list(TopologicalSorter({block: onward(block) for block in blocks}).static_order())
    except CycleError:
        inner = part_of(blocks, [block for block in blocks if block != end])
        inside = {loop.header: loop.blocks for loop in loops(inner)}
        order = list(TopologicalSorter({block: onward(block) for block in blocks}).static_order())
    best: dict[int, tuple[int, int]] = {}
    for block in order:
        ways = [(best[t][0], t) for t in onward(block) if t in best]
        if end in blocks[block].after if end is not None else blocks[block].leaves:
            ways.append((0, -1))
        if ways:
            length, following = max(ways)
            best[block] = (length + len(blocks[block].code) * (block in counted), following)
    if start not in best:
        return None
    path, block = [], start
    while block != -1:
        path.append(block)
        block = best[block][1]
    return path


def common_path(blocks: Blocks, start: int, end: int | None) -> list[int] | None:
    """The longest path without rare blocks. Loops on the way are none of it, but for one that closes at `end`."""
    common = common_blocks(blocks, start, end)
    outside = part_of(common, [block for block in common if block != end or start != end])
    inner = frozenset().union(*(loop.blocks for loop in loops(outside)))
    path = longest(common, start, end, frozenset(common) - inner)
    return path and [block for block in path if block not in inner]


def code_of(blocks: Blocks, path: Iterable[int]) -> list[Instruction]:
    return [instruction for block in path for instruction in blocks[block].code]


def main_loop(blocks: Blocks) -> tuple[Loop, list[int]] | None:
    """The loop that loads most on its common path, of equals the longer one; and that path."""
    turns: dict[Loop, list[int]] = {}
    for loop in loops(blocks):  # outer ones before those inside
        turn = common_path(part_of(blocks, loop.blocks), loop.header, loop.header)
        if turn and not marks_of(code_of(blocks, turn)):
            turns[loop] = turn

    def loads(loop: Loop) -> tuple[int, int]:
        does = count(code_of(blocks, turns[loop]))
        return does.wide_bytes, does.narrow_bytes

    # A way back inside a loop, to do the work again, is no loop of its own.
    left = [loop for loop in turns if not any(o.blocks > loop.blocks and loads(o) >= loads(loop) for o in turns)]
    if not left:
        return None
    main = max(left, key=lambda loop: (*loads(loop), len(code_of(blocks, turns[loop]))))
    return main, turns[main]


def anatomy(code: list[Instruction]) -> Anatomy | None:
    """None where no loop is on the common path."""
    blocks = basic_blocks(code)
    found = main_loop(blocks)
    if found is None:
        return None
    loop, turn = found
    before = common_path(blocks, 0, loop.header) or []
    behind = common_path(blocks, loop.header, None) or []
    common = common_blocks(part_of(blocks, loop.blocks), loop.header, loop.header)
    rare = loop.blocks - set(common)
    outer = [o for o in loops(blocks) if o.blocks > loop.blocks]  # the outermost first
    around = path_around(blocks, loop, turn, outer[0].blocks) if outer else []
    rare_around = outer[0].blocks - loop.blocks - set(around) if outer else frozenset()
    detours = [*detours_from(blocks, turn, rare), *detours_out(blocks, loop, turn, outer[::-1])]
    return Anatomy(
        code_of(blocks, before),
        code_of(blocks, turn),
        code_of(blocks, around),
        code_of(blocks, [block for block in behind if block not in loop.blocks]),
        sorted(detours, key=lambda detour: -detour.more.instructions),
        sorted(detours_from(blocks, around, rare_around), key=lambda detour: -detour.more.instructions),
        len(rare),
        len(code_of(blocks, rare)),
    )


def detours_from(blocks: Blocks, turn: list[int], rare: frozenset[int]) -> Iterator[Detour]:
    """For every mark the longest way from a block of the turn through its `rare` blocks to another block of the turn.

    What it leaves out of the turn is subtracted. What comes again, where it goes back, is added.
    """
    counts = [count(blocks[block].code) for block in turn]
    places_in_turn = {block: place for place, block in enumerate(turn)}
    for mark in sorted(frozenset().union(*(blocks[block].marks for block in rare))):
        # The mark may stand inside others: where it does least.
        allowed = min(
            (blocks[b].marks for b in rare if mark in blocks[b].marks), key=lambda marks: (len(marks), sorted(marks))
        )
        around = [block for block in rare if blocks[block].marks <= allowed]
        found: dict[int, Count] = {}
        for leaving, block in enumerate(turn):
            region = {b: blocks[b] for b in around} | {block: Block([], blocks[block].after, frozenset())}
            back = {t for b in around for t in blocks[b].after if t in places_in_turn}
            for end in back:
                inside = region | {end: Block([], blocks[end].after if end == block else [], frozenset())}
                path = longest(inside, block, end, frozenset(around))
                if path is None or not any(mark in blocks[b].marks for b in path[1:]):
                    continue
                returning = places_in_turn[end] or len(turn)
                again = counts[returning : leaving + 1] if returning <= leaving else []
                left_out = counts[leaving + 1 : returning]
                more = count(code_of(blocks, path[1:])) + sum(again, Count()) - sum(left_out, Count())
                found[leaving] = max(found.get(leaving, more), more)
        if found:
            yield Detour(mark, max(found.values()), len(found))


def path_around(blocks: Blocks, loop: Loop, exits: Iterable[int], within: frozenset[int]) -> list[int]:
    """The common path from `exits`, which are blocks or lead to blocks outside `loop`, back to its header."""
    after = [t for block in exits for t in blocks[block].after if t in within - loop.blocks]
    outside = part_of(blocks, within - loop.blocks) | {loop.header: Block([], after, frozenset())}
    return (common_path(outside, loop.header, loop.header) or [loop.header])[1:]


def detours_out(blocks: Blocks, loop: Loop, turn: list[int], outer: list[Loop]) -> Iterator[Detour]:
    """Ways out of the loop that are rare and lead back to its header, through the innermost loop around it that has
    such a way. What they leave out of the turn is subtracted."""
    found: dict[Line, dict[int, Count]] = {}
    for leaving, block in enumerate(turn):
        left_out = sum((count(blocks[b].code) for b in turn[leaving + 1 :]), Count())
        for first in set(blocks[block].after) - loop.blocks:
            for around in outer:
                outside = part_of(blocks, around.blocks - loop.blocks) | {loop.header: Block([], [first], frozenset())}
                if not blocks[first].marks or first not in leading_to(outside, loop.header):
                    continue
                # The way's first block is common here: it is the only one.
                outside[first] = blocks[first]._replace(marks=frozenset())
                path = common_path(outside, loop.header, loop.header)
                if path:
                    more = count(code_of(blocks, path[1:])) - left_out
                    for mark in blocks[first].marks:
                        found.setdefault(mark, {})[leaving] = more
                    break
    for mark in sorted(found):
        yield Detour(mark, max(found[mark].values()), len(found[mark]))


def behind_loads(code: list[Instruction]) -> int:
    """Instructions behind the last global load; all where there is none."""
    return next((i for i, instruction in enumerate(reversed(code)) if instruction.opcode.startswith("LDG")), len(code))


def count(code: list[Instruction]) -> Count:
    wide_bytes = narrow_bytes = wide_stores = narrow_stores = exp2 = mufu = double = packed = 0
    for opcode, *_ in code:
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
            mufu += 1
            exp2 += "EX2" in modifiers
        elif name in ("DADD", "DMUL", "DFMA", "DSETP"):
            double += 1
        elif name in ("FADD2", "FMUL2", "FFMA2"):
            packed += 1
    return Count(len(code), wide_bytes, narrow_bytes, wide_stores, narrow_stores, exp2, mufu, double, packed)
