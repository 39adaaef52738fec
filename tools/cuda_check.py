"""`make cuda-check`: compiles the CUDA kernels for every architecture, without torch and without a GPU, and reads the
machine code: no warning, no spill, no stack frame, 128-bit loads in the loops that read logits, and no more
instructions in those loops than KERNELS allows.

Needs nvcc (12.8 or later for all architectures) and, from PyPI, nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tools import machine_code
from tools.machine_code import Anatomy, Count, Detour
from tools.occupancy import MULTIPROCESSORS, occupancy

ROOT = Path(__file__).parents[1]
FLAGS = (ROOT / "csrc/cuda/nvcc_flags.txt").read_text().split()  # setup.py reads the same
STRICT = ["--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v,--warn-on-spills"]
LINES = ["-lineinfo"]  # changes no instruction
COMPILERS_AT_A_TIME = 2


class Work(NamedTuple):
    """What a kernel's main loop does on the common path (tools/machine_code.py)."""

    sides: int  # of logits that it reads: 0, 1, or policy and reference
    writes: bool  # gradients
    exp2: int = 0  # instructions an entry, float64 aside: a path that leaves work out shows here
    most: Mapping[str, int] = {}
    """Most instructions for UNIT entries of each side, by dtype, or by dtype and architecture. If the sides differ in
    dtype, their mean. Some percent above what nvcc 13.0 makes of them."""


UNIT = 32

# An unknown kernel is refused. sm_75 has no instruction that rounds to bfloat16.
OF_THE_FORWARD = {"bf16": 680, "f16": 680, "f32": 680, "f64": 4800, "f64 sm_120": 13400}
OF_THE_FORWARD |= {"bf16 sm_100": 630, "f16 sm_100": 630}
OF_THE_BACKWARD = {"bf16": 960, "bf16 sm_75": 1440, "f16": 1060, "f32": 1190, "f64": 5700, "f64 sm_120": 14000}
OF_LOGPROBS = {"bf16": 290, "bf16 sm_75": 540, "f16": 325, "f32": 395, "f64": 1980, "f64 sm_120": 4220}
KERNELS = {
    "forward_kernel": Work(2, False, 3, OF_THE_FORWARD),
    "finish_kernel": Work(0, False),
    "backward_kernel": Work(2, True, 3, OF_THE_BACKWARD),
    "logprob_backward_kernel": Work(1, True, 1, OF_LOGPROBS),
    "partials_kernel": Work(2, False, 3, OF_THE_FORWARD),  # the same loop as the forward's
    "merge_slices_kernel": Work(0, False),
    "finish_slices_kernel": Work(0, False),
    "sequence_kernel": Work(0, False),
}
# Kernels that add half precision in pairs: five of eight third exponentials are polynomials (csrc/cuda/pairs.cuh).
ON_PAIRS = {(name, "sm_100") for name in ("forward_kernel", "partials_kernel")}
EXP2_ON_PAIRS = 3 - 5 / 8
ENTRY_BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}
SHORT_NAMES = {"lit_did::BFloat16": "bf16", "lit_did::Float16": "f16", "float": "f32", "double": "f64"}


# What docs/kernels.md has of them, with this release of nvcc.
DOCS, DOCS_NVCC = ROOT / "docs/kernels.md", "release 13.0"
IN_DOCS = {
    "forward, bfloat16": "forward_kernel<bf16, bf16>",
    "forward, float32": "forward_kernel<f32, f32>",
    "backward, bfloat16": "backward_kernel<bf16, bf16>",
    "backward, float32": "backward_kernel<f32, f32>",
    "log-probabilities' backward, bfloat16": "logprob_backward_kernel<bf16, true>",
    "log-probabilities' backward, float32": "logprob_backward_kernel<f32, true>",
}


class Kernel(NamedTuple):
    """One instantiation for one architecture; the fields that are printed."""

    kernel: str
    architecture: str
    threads: int  # a block
    registers: int
    stack: int
    spills: int
    shared: int
    occupancy: float
    entries: int | None  # of each side, that a thread reads in one turn of its main loop
    exp2: float | None  # exp2 instructions an entry in the main loop
    instructions: int  # of a turn of the main loop
    prologue: int  # instructions before the main loop
    around: int  # from the main loop back to it, where a loop is around it (in the forward, for each part of a row)
    epilogue: int  # after it
    behind_loads: int  # instructions of a turn behind its last global load
    rare: str  # what a turn takes besides where it leaves the common path
    rare_around: str  # and the way around


NO_LOOP = Anatomy([], [], [], [], [], [], 0, 0)


class Refused(Exception):
    """What is wrong with a kernel or a source, in one line."""


# ----------------------------------------------------------------------------------------------------------
# Tools
# ----------------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home]
    return next((nvcc for nvcc in [*beside[:-1], shutil.which("nvcc"), beside[-1]] if nvcc), None)


def find_tool(name: str) -> str:
    """nvdisasm or cuobjdump: of the PyPI package, else of the toolkit."""
    try:
        for file in metadata.files(f"nvidia-cuda-{name}") or ():
            if file.name == name:
                return str(file.locate())
    except metadata.PackageNotFoundError:
        pass
    beside = Path(find_nvcc() or name).parent / name
    found = shutil.which(name) or (str(beside) if beside.exists() else None)
    if found is None:
        raise Refused(f"{name} is missing: pip install nvidia-cuda-{name}")
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ----------------------------------------------------------------------------------------------------------
# One source for one architecture
# ----------------------------------------------------------------------------------------------------------


def check_source(source: Path, architecture: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of `source`, and a line for everything that is wrong."""
    where = f"sm_{architecture} {source.name}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / f"{source.stem}.cubin")
        command = [find_nvcc(), "-cubin", f"-arch=sm_{architecture}", *FLAGS, *STRICT, *LINES, str(source), "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True)
        messages = result.stdout + result.stderr
        if result.returncode != 0:
            return [], [f"{where}: {reason}" for reason in compiler_reasons(messages)]
        resources = resource_usage(messages)
        if not resources:
            return [], []
        nvdisasm = find_tool("nvdisasm")
        lines = output_of(nvdisasm, "--print-code", "--print-line-info-inline", cubin)
        code = machine_code.functions(output_of(nvdisasm, "--emit-json", cubin), lines)
        threads = block_threads(output_of(find_tool("cuobjdump"), "--dump-elf", cubin))
    kernels, failures = [], []
    for mangled, used in resources.items():
        name = short_name(demangled(mangled))
        try:
            base = re.split(r"[<(]", name)[0]
            if base not in KERNELS:
                raise Refused(f"unknown: name it in KERNELS of {Path(__file__).name}")
            if mangled not in threads:
                raise Refused("no __launch_bounds__, so that its registers have no limit")
            work = KERNELS[base]
            anatomy = machine_code.anatomy(code[mangled]) or NO_LOOP
            turn = machine_code.count(anatomy.turn)
            entries = entries_of(name, turn, work.sides)
            kernel = Kernel(
                name,
                f"sm_{architecture}",
                threads[mangled],
                **used,
                occupancy=occupancy(architecture, threads[mangled], used["registers"], used["shared"]),
                entries=entries,
                exp2=turn.exp2 / entries if entries and turn.exp2 else None,
                instructions=turn.instructions,
                prologue=len(anatomy.prologue),
                around=len(anatomy.around),
                epilogue=len(anatomy.epilogue),
                behind_loads=machine_code.behind_loads(anatomy.turn),
                rare=rare_paths(anatomy.detours),
                rare_around=rare_paths(anatomy.detours_around),
            )
            kernels.append(kernel)
            failures += [f"{where} {name}: {reason}" for reason in wrongs(kernel, work, turn)]
        except (Refused, machine_code.MarkError) as reason:
            failures.append(f"{where} {name}: {reason}")
    return kernels, failures


def wrongs(kernel: Kernel, work: Work, turn: Count) -> list[str]:
    """Everything that a kernel must not be."""
    found = []
    if kernel.stack:
        found.append(f"a stack frame of {kernel.stack} bytes")
    if kernel.spills:
        found.append(f"{kernel.spills} bytes of spilled registers")
    if not kernel.occupancy:
        found.append("not one block fits on a multiprocessor")
    if work.sides and not turn.wide_bytes:
        found.append("no 128-bit global loads in the main loop")
    elif work.sides and turn.narrow_bytes:
        found.append(f"{turn.narrow_bytes} bytes of narrow loads beside 128-bit loads in the main loop")
    if work.writes and (turn.narrow_stores or not turn.wide_stores):
        found.append("no 128-bit global stores in the main loop, or narrow ones too")
    base, types = re.split(r"[<(]", kernel.kernel)[0], types_of(kernel.kernel)
    pairs = (base, kernel.architecture) in ON_PAIRS and set(types) <= {"bf16", "f16"}
    exp2 = EXP2_ON_PAIRS if pairs else work.exp2
    if kernel.entries and "f64" not in types and turn.exp2 != exp2 * kernel.entries:
        found.append(f"{turn.exp2} exp2 instructions for {kernel.entries} entries, {exp2:g} each expected")
    if pairs and not turn.packed:
        found.append("no arithmetic on pairs in the main loop")
    if work.sides:
        most = most_instructions(kernel, work)
        if (for_a_unit := instructions_for_a_unit(kernel)) > most:
            of = f"for {UNIT} entries in the main loop, above the bound of {most:.0f}"
            found.append(f"{for_a_unit:.0f} instructions {of}")
    return found


def most_instructions(kernel: Kernel, work: Work) -> float:
    """The bound of `work` for the kernel's dtypes and architecture."""
    types = types_of(kernel.kernel)[: work.sides]
    bounds = [work.most.get(f"{word} {kernel.architecture}", work.most.get(word)) for word in types]
    if not bounds or None in bounds:
        raise Refused(f"no bound on its instructions: add one to KERNELS of {Path(__file__).name}")
    return statistics.mean(bounds)


def instructions_for_a_unit(kernel: Kernel) -> float:
    return kernel.instructions * UNIT / kernel.entries if kernel.entries else math.inf


def rare_paths(detours: list[Detour]) -> str:
    """`forward.cuh:63 +105 x2`: behind the mark on that line are 105 instructions more, at two places of the path. A
    loop there counts as one turn of it."""
    paths = [detour for detour in detours if detour.more.instructions > 0]
    return ", ".join(f"{detour.mark} +{detour.more.instructions} x{detour.places}" for detour in paths)


def types_of(name: str) -> list[str]:
    return [word for word in re.findall(r"\w+", name) if word in ENTRY_BYTES]


def entries_of(name: str, turn: Count, sides: int) -> int | None:
    """Entries of each side that a turn reads: its bytes over those of an entry of every side."""
    if not sides or not turn.wide_bytes:
        return None
    sizes = [ENTRY_BYTES[word] for word in types_of(name)][:sides]
    if len(sizes) < sides:
        raise Refused(f"its first template arguments are not {sides} of {', '.join(SHORT_NAMES)}")
    entries, rest = divmod(turn.wide_bytes, sum(sizes))
    if rest:
        raise Refused(
            f"{turn.wide_bytes} bytes in a turn are not whole entries of {' and '.join(map(str, sizes))} bytes"
        )
    return entries


def compiler_reasons(messages: str) -> list[str]:
    lines = [line.strip() for line in messages.splitlines()]
    found = [line for line in lines if re.search(r"\b(error|warning|fatal)\b", line, re.IGNORECASE)] or lines[-1:]
    return list(dict.fromkeys(line.removeprefix(f"{ROOT}/") for line in found))


def resource_usage(messages: str) -> dict[str, dict[str, int]]:
    """{mangled name: registers, stack, spills and shared bytes} of `ptxas -v`."""
    found: dict[str, dict[str, int]] = {}
    for entry in re.split(r"(?=Compiling entry function)", messages)[1:]:
        (name,) = re.findall(r"Compiling entry function '(\w+)'", entry)
        numbers = {
            "stack": r"(\d+) bytes stack frame",
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
        }
        numbers = {key: sum(map(int, re.findall(pattern, entry)[:1])) for key, pattern in numbers.items()}
        found[name] = {
            "registers": numbers["registers"],
            "stack": numbers["stack"],
            "spills": numbers["stores"] + numbers["loads"],
            "shared": numbers["shared"],
        }
    return found


def block_threads(elf: str) -> dict[str, int]:
    """{mangled name: threads of __launch_bounds__} of `cuobjdump --dump-elf`."""
    found = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", section)
        if bounds:
            x, y, z = (int(number, 16) for number in bounds.groups())
            found[section.split()[0]] = x * y * z
    return found


def demangled(name: str) -> str:
    return output_of("c++filt", name).strip()


def short_name(signature: str) -> str:
    """`void lit_did::cuda::(anonymous namespace)::kernel<float, 2>(float*)` is kernel<f32, 2>."""
    signature = signature.replace("(anonymous namespace)::", "")
    depth, end = 0, len(signature)
    for i, character in enumerate(signature):  # the parameters open the first bracket outside <>
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            end = i
            break
    name = signature[:end].removeprefix("void ")
    head, angle, arguments = name.partition("<")
    arguments = re.sub(r"[\w:]+", lambda word: SHORT_NAMES.get(word.group(), word.group()), arguments)
    return head.rsplit("::", 1)[-1] + angle + arguments


# ----------------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------------


def check(sources: list[Path], architectures: list[str]) -> tuple[list[Kernel], list[str]]:
    """Every source for every architecture; kernels in a fixed order, and the failures."""
    pairs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(COMPILERS_AT_A_TIME) as pool:
        results = list(pool.map(lambda pair: check_source(*pair), pairs))
    kernels = [kernel for found, _ in results for kernel in found]
    failures = [failure for _, found in results for failure in found]
    for source in sources:
        if not any(found for (s, _), (found, wrong) in zip(pairs, results, strict=True) if s == source or wrong):
            failures.append(f"{source.name}: holds no kernel")
    return sorted(kernels, key=lambda k: (k.kernel, int(k.architecture[3:]))), failures


def show(kernels: list[Kernel]) -> None:
    """A row a kernel and a column an architecture; what is the same for all of them stands in front."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    architectures = sorted({k.architecture for k in kernels}, key=lambda name: int(name[3:]))
    table = Table(title=f"Registers a thread, occupancy, instructions for {UNIT} entries", pad_edge=False)
    table.add_column("kernel", overflow="fold")
    for heading in ("threads", *architectures):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(k.kernel for k in kernels):
        of_name = {k.architecture: k for k in kernels if k.kernel == name}
        cells = [_cell(of_name[a]) if a in of_name else "" for a in architectures]
        table.add_row(name, str(next(iter(of_name.values())).threads), *cells)
    console.print(table)


def _cell(kernel: Kernel) -> str:
    instructions = f"{instructions_for_a_unit(kernel):4.0f}" if kernel.entries else "   -"
    return f"{kernel.registers:3} {kernel.occupancy:4.0%} {instructions}"


def show_paths(kernels: list[Kernel]) -> None:
    for k in kernels:
        around = f"{k.around} around it (rare: {k.rare_around or 'none'}), " if k.around else ""
        print(
            f"{k.kernel} {k.architecture}: {k.prologue} instructions, {k.instructions} a turn of the main loop "
            f"({k.behind_loads} behind its last load; rare: {k.rare or 'none'}), {around}{k.epilogue} behind it"
        )


def docs_table(kernels: list[Kernel]) -> list[str]:
    """The rows of the table in docs/kernels.md, in Markdown."""
    found = []
    for label, name in IN_DOCS.items():
        row = sorted((k for k in kernels if k.kernel == name), key=lambda k: int(k.architecture[3:]))
        cells = [f"{k.registers}, {k.occupancy:.0%}, {instructions_for_a_unit(k):.0f}" for k in row]
        found.append(f"| {label} | {' | '.join(cells)} |")
    return found


def stale_rows(kernels: list[Kernel], docs: str) -> list[str]:
    """The rows of `docs_table` that the page lacks."""
    return [row for row in docs_table(kernels) if row not in docs.splitlines()]


def write_csv(kernels: list[Kernel], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Kernel._fields)
        writer.writerows(kernels)


def main() -> int:
    """Parses the command line and checks; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, default=sorted((ROOT / "csrc/cuda").glob("*.cu")))
    parser.add_argument("--arch", nargs="+", default=list(MULTIPROCESSORS), choices=list(MULTIPROCESSORS))
    parser.add_argument("--paths", action="store_true", help="prints the common path of every kernel, and what is rare")
    parser.add_argument("--table", action="store_true", help="prints the rows of docs/kernels.md's table in Markdown")
    parser.add_argument("--csv", type=Path, help="where the table goes too")
    options = parser.parse_args()
    if find_nvcc() is None:
        print("cuda-check: nvcc is missing; install the CUDA toolkit, or set CUDA_HOME to it.", file=sys.stderr)
        return 2
    try:
        find_tool("nvdisasm"), find_tool("cuobjdump")
    except Refused as reason:
        print(f"cuda-check: {reason}", file=sys.stderr)
        return 2
    if not options.sources:
        print("cuda-check: csrc/cuda holds no .cu file.", file=sys.stderr)
        return 2
    kernels, failures = check(options.sources, options.arch)
    if kernels:
        show(kernels)
        if options.paths:
            show_paths(kernels)
    if options.table:
        print("\n".join(docs_table(kernels)))
    if options.csv:
        write_csv(kernels, options.csv)
    complete = {k.architecture for k in kernels} == {f"sm_{a}" for a in MULTIPROCESSORS}
    if complete and set(IN_DOCS.values()) <= {k.kernel for k in kernels} and DOCS_NVCC in output_of(find_nvcc(), "-V"):
        failures += [
            f"{DOCS.name} lacks this row of its table (--table): {r}" for r in stale_rows(kernels, DOCS.read_text())
        ]
    for failure in failures:
        print(f"FAILED {failure}")
    architectures = ", ".join(f"sm_{a}" for a in options.arch)
    print(f"cuda-check: {len(kernels)} kernels for {architectures}; {len(failures)} failures.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
