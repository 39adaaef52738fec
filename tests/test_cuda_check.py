"""`make cuda-check` on toy kernels: each fault is refused with its reason, a sound kernel passes with its figures."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import pytest

cuda_check = pytest.importorskip("tools.cuda_check", reason="the tools that read machine code are for clones")

from tools import machine_code  # noqa: E402
from tools.occupancy import occupancy  # noqa: E402


def missing_tools() -> str | None:
    """Why the checker cannot run here."""
    if cuda_check.find_nvcc() is None:
        return "nvcc is missing"
    try:
        cuda_check.find_tool("nvdisasm"), cuda_check.find_tool("cuobjdump")
    except cuda_check.Refused as reason:
        return str(reason)
    return None


needs_nvcc = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

WORK = """
    #pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (z[k] > limit) MARK {
        RARE
      }
      sum += fast_exp2(z[k]) + fast_exp2(r[k]) * fast_exp2(z[k] - r[k]);
    }"""
# Checked afterwards, and rarely done again: once, or until it fits.
ADD = """
      float added = 0;
      for (int k = 0; k < 4; ++k) added += fast_exp2(z[k] - limit) + fast_exp2(r[k]) * fast_exp2(z[k] - r[k]);"""
ADDED_AGAIN = {
    "once": ADD
    + """
      if (!__all_sync(0xffffffffu, added < 256.f)) [[unlikely]] {
        limit += __shfl_xor_sync(0xffffffffu, z[0], 1) + 8;
        added = 0;
        for (int k = 0; k < 4; ++k) added += fast_exp2(z[k] - limit) + fast_exp2(r[k] - limit);
      }
      sum += added;""",
    "until it fits": f"""
    for (;;) {{
      {ADD}
      if (!__all_sync(0xffffffffu, added < 256.f)) [[unlikely]] {{
        limit += __shfl_xor_sync(0xffffffffu, z[0], 1) + 8;
        continue;
      }}
      sum += added;
      break;
    }}""",
}


def work(rare="limit = z[k]; sum *= fast_exp2(sqrtf(limit) / sum) + fast_exp2(sinf(limit));", mark="[[unlikely]]"):
    return WORK.replace("MARK", mark).replace("RARE", rare)


# A forward as it should be: two rows in 16-byte loads, three exp2 an entry, and a branch that is seldom taken.
KERNEL = """
#include <cuda_runtime.h>
{helpers}
__device__ __forceinline__ float fast_exp2(float x) {{
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}}
template <typename P, typename R>
__global__ void {bounds} {name}(const P* policy, const R* reference, float* out, int size) {{
  float sum = 0, limit = 0;
  {before}
  #pragma unroll 1
  for (int i = threadIdx.x; i < size; i += blockDim.x) {{
    {load}
    {work}
  }}
  out[threadIdx.x] = sum;
  {after}
}}
template __global__ void {name}<float, float>(const float*, const float*, float*, int);
"""
SOUND = {
    "name": "forward_kernel",
    "bounds": "__launch_bounds__(256)",
    "helpers": "",
    "before": "",
    "load": """const float4 zs = reinterpret_cast<const float4*>(policy)[i];
    const float4 rs = reinterpret_cast<const float4*>(reference)[i];
    const float z[4] = {zs.x, zs.y, zs.z, zs.w}, r[4] = {rs.x, rs.y, rs.z, rs.w};""",
    "after": "",
    "work": work(),
}
ENTRY_BY_ENTRY = """float z[4], r[4];
    for (int k = 0; k < 4; ++k) { z[k] = policy[4 * i + k]; r[k] = reference[4 * i + k]; }"""
ONE_SIDE_ENTRY_BY_ENTRY = """const float4 zs = reinterpret_cast<const float4*>(policy)[i];
    const float z[4] = {zs.x, zs.y, zs.z, zs.w};
    float r[4];
    for (int k = 0; k < 4; ++k) r[k] = reference[4 * i + k];"""
INDEXED = "float stack[64]; for (int k = 0; k < 64; ++k) stack[(k * size) & 63] = policy[k];"


def check(tmp_path, architecture="80", **parts):
    source = tmp_path / "toy.cu"
    source.write_text(KERNEL.format(**{**SOUND, **parts}))
    return cuda_check.check([source], [architecture])


@needs_nvcc
@pytest.mark.parametrize("architecture", ["75", "80", "120"])
def test_sound(tmp_path, architecture):
    (kernel,), failures = check(tmp_path, architecture)
    assert failures == []
    assert kernel.kernel == "forward_kernel<f32, f32>"
    assert kernel.architecture == f"sm_{architecture}"
    assert kernel.threads == 256
    assert 10 < kernel.registers < 100
    assert kernel.occupancy == occupancy(architecture, 256, kernel.registers, kernel.shared) > 0
    assert kernel.entries == 4
    assert kernel.exp2 == 3, "the branch that is seldom taken was counted"
    assert re.match(r"toy.cu:\d+ \+\d+ x4", kernel.rare)
    assert 40 < kernel.instructions < 100
    assert kernel.prologue > 5
    assert kernel.epilogue > 2


@needs_nvcc
@pytest.mark.parametrize("architecture", ["75", "90"])
def test_a_rare_branch_that_costs_less(tmp_path, architecture):
    """It leaves out what the common path does: the common path counts all the same."""
    (kernel,), failures = check(tmp_path, architecture, work=work("sum = z[k]; limit += r[k]; continue;"))
    assert failures == []
    assert kernel.exp2 == 3


@needs_nvcc
@pytest.mark.parametrize("times", ADDED_AGAIN)
def test_work_that_is_rarely_done_again(tmp_path, times):
    (kernel,), failures = check(tmp_path, "90", work=ADDED_AGAIN[times])
    assert failures == []
    assert kernel.exp2 == 3
    if times == "once":
        (more,) = (int(number) for number in re.findall(r"\+(\d+)", kernel.rare))
        assert 15 < more < kernel.instructions


FAULTS = {
    "warning": ({"before": "int unused;"}, r"was declared but never referenced"),
    "error": ({"before": "nothing();"}, r'identifier "nothing" is undefined'),
    "stack frame": ({"before": INDEXED, "after": "out[0] = stack[size];"}, r"a stack frame of \d+ bytes"),
    "spill": (
        {
            "bounds": "__launch_bounds__(1024, 2)",
            "before": "float kept[64]; for (int k = 0; k < 64; ++k) kept[k] = policy[k];",
            "after": "for (int k = 0; k < 64; ++k) out[k] = kept[k];",
        },
        r"[Ss]pill",
    ),
    "narrow loads": ({"load": ENTRY_BY_ENTRY}, r"no 128-bit global loads in the main loop"),
    "one side narrow": ({"load": ONE_SIDE_ENTRY_BY_ENTRY}, r"16 bytes of narrow loads beside 128-bit loads"),
    "no stores": ({"name": "backward_kernel"}, r"no 128-bit global stores in the main loop"),
    "unknown": ({"name": "another_kernel"}, r"unknown: name it in KERNELS"),
    "a rare branch without a mark": ({"work": work(mark="")}, r"\d+ exp2 instructions for 4 entries, 3 each expected"),
    "a mark on one line": (
        {"before": "if (size < 0) [[unlikely]] return;"},
        r"toy.cu:\d+: Expected `\[\[unlikely\]\] \{` at the end of the line",
    ),
    "no bounds": ({"bounds": ""}, r"no __launch_bounds__"),
}


@needs_nvcc
@pytest.mark.parametrize("fault", FAULTS)
def test_refused(tmp_path, fault):
    parts, reason = FAULTS[fault]
    _, failures = check(tmp_path, **parts)
    assert len(failures) >= 1
    assert all(failure.startswith("sm_80 toy.cu") or "holds no kernel" in failure for failure in failures)
    assert re.search(reason, failures[0]), failures


@needs_nvcc
def test_bounds(tmp_path, monkeypatch):
    """Instructions for 32 entries: of the dtype, or of the dtype on one architecture."""

    def failures(most):
        monkeypatch.setitem(cuda_check.KERNELS, "forward_kernel", cuda_check.Work(2, False, 3, most))
        return check(tmp_path)[1]

    (kernel,), _ = check(tmp_path)
    needed = kernel.instructions * 32 // 4
    assert failures({"f32": needed, "f32 sm_90": 1, "bf16": 1}) == []
    (failure,) = failures({"f32": needed - 1})
    assert failure.endswith(f"{needed} instructions for 32 entries in the main loop, above the bound of {needed - 1}")
    assert len(failures({"f32": needed, "f32 sm_80": needed - 1})) == 1


def measured(name, architecture="sm_90", instructions=100):
    figures = dict.fromkeys(cuda_check.Kernel._fields, 0)
    figures |= {"kernel": name, "architecture": architecture, "instructions": instructions, "entries": 16}
    return cuda_check.Kernel(**figures | {"registers": 80, "occupancy": 0.375})


def test_bounds_of_two_dtypes():
    work = cuda_check.Work(2, False, 3, {"bf16": 100, "bf16 sm_75": 200, "f32": 300})
    assert cuda_check.most_instructions(measured("kernel<bf16, bf16, f64>"), work) == 100
    assert cuda_check.most_instructions(measured("kernel<bf16, f32>"), work) == 200
    assert cuda_check.most_instructions(measured("kernel<bf16, f32>", "sm_75"), work) == 250
    with pytest.raises(cuda_check.Refused, match="no bound on its instructions"):
        cuda_check.most_instructions(measured("kernel<bf16, f16>"), work)


@pytest.mark.parametrize("name", [name for name, work in cuda_check.KERNELS.items() if work.sides])
def test_every_dtype_has_a_bound(name):
    types = ("bf16", "f16", "f32", "f64")
    for pair in ((policy, reference) for policy in types for reference in types):
        kernel = measured(f"{name}<{', '.join(pair[: cuda_check.KERNELS[name].sides])}>")
        assert cuda_check.most_instructions(kernel, cuda_check.KERNELS[name]) > 200


def test_pairs():
    """Two half-precision sides are added in pairs on sm_100, and need fewer exponentials there."""
    work = cuda_check.KERNELS["forward_kernel"]
    in_pairs = machine_code.Count(wide_bytes=64, exp2=38, packed=100)
    one_by_one = machine_code.Count(wide_bytes=64, exp2=48)
    kernel = measured("forward_kernel<bf16, f16>", "sm_100")
    assert cuda_check.wrongs(kernel, work, in_pairs) == []
    assert cuda_check.wrongs(kernel, work, in_pairs._replace(packed=0)) == ["no arithmetic on pairs in the main loop"]
    assert cuda_check.wrongs(kernel, work, one_by_one)[0].endswith("for 16 entries, 2.375 each expected")
    for other in (measured("forward_kernel<bf16, bf16>"), measured("forward_kernel<bf16, f32>", "sm_100")):
        assert cuda_check.wrongs(other, work, one_by_one) == []
        assert len(cuda_check.wrongs(other, work, in_pairs)) == 1


def test_table_of_docs():
    """The page has a cell for every architecture. A row that differs from what is counted is stale."""
    architectures = [f"sm_{a}" for a in cuda_check.MULTIPROCESSORS]
    kernels = [measured(name, a, 332) for name in cuda_check.IN_DOCS.values() for a in architectures]
    rows = cuda_check.docs_table(kernels)
    assert rows[0] == "| forward, bfloat16 |" + " 80, 38%, 664 |" * len(architectures)
    docs = "\n".join(rows)
    assert cuda_check.stale_rows(kernels, docs) == []
    assert cuda_check.stale_rows(kernels, docs.replace("664", "670", 1)) == rows[:1]
    page = cuda_check.DOCS.read_text()
    assert "| kernel | " + " | ".join(architectures) + " |" in page
    cell = r" \d+, \d+%, \d+ \|"
    for label in cuda_check.IN_DOCS:
        assert re.search(rf"^\| {label} \|({cell}){{{len(architectures)}}}$", page, re.MULTILINE), label


@needs_nvcc
def test_command_line(tmp_path):
    """Exit codes, the table, and the figures as CSV."""
    source, figures = tmp_path / "toy.cu", tmp_path / "figures.csv"

    def run(**parts):
        source.write_text(KERNEL.format(**{**SOUND, **parts}))
        command = [sys.executable, "-m", "tools.cuda_check", source, "--arch", "90", "--csv", figures]
        return subprocess.run(command, capture_output=True, text=True, cwd=cuda_check.ROOT)

    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "forward_kernel<f32, f32>" in result.stdout
    assert result.stdout.splitlines()[-1] == "cuda-check: 1 kernels for sm_90; 0 failures."
    heading, row = csv.reader(figures.read_text().splitlines())
    of = dict(zip(heading, row, strict=True))
    assert of["exp2"] == "3.0"
    assert int(of["prologue"]) > 0
    result = run(load=ENTRY_BY_ENTRY)
    assert result.returncode == 1
    assert "FAILED sm_90 toy.cu forward_kernel<f32, f32>: no 128-bit global loads" in result.stdout


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cuda_check"])
    assert cuda_check.main() == 2
    assert capsys.readouterr().err == "cuda-check: nvcc is missing; install the CUDA toolkit, or set CUDA_HOME to it.\n"


# ----------------------------------------------------------------------------------------------------------
# The parts that need no compiler
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        ("80", 256, 32, 0, 1.0),
        ("80", 256, 33, 0, 48 / 64),  # 40 registers: 6 blocks of 8 warps
        ("80", 256, 80, 0, 24 / 64),  # 3 blocks
        ("75", 256, 80, 0, 24 / 32),
        ("86", 256, 64, 0, 32 / 48),
        ("90", 256, 64, 100 * 1024, 16 / 64),  # 2 blocks by shared memory
        ("80", 32, 16, 0, 32 / 64),  # 32 blocks at most
        ("86", 32, 16, 0, 16 / 48),
        ("80", 1024, 128, 0, 0.0),  # 4 warps a partition, 8 needed
    ],
)
def test_occupancy(architecture, threads, registers, shared, expected):
    assert occupancy(architecture, threads, registers, shared) == expected


SOURCE = """
void common() {
  if (rare) [[unlikely]] {
    one;
    if (rarer) [[unlikely]] {
      two;
    }
    three;  // not [[unlikely]]
  } else [[unlikely]] {
    four;
  }
  five;
}
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.cuh"
    path.write_text(SOURCE)
    return str(path)


def program(text, source=""):
    """Instructions from lines such as `@P0 BRA 3 | 12`; a branch's target is the line's number, 12 the source's."""
    code = []
    for row in text.split("\n"):
        row, _, at = row.partition(" | ")
        predicate, _, rest = row.partition(" ") if row.startswith("@") else ("", "", row)
        opcode, _, operands = rest.partition(" ")
        operands = ",".join(f"{int(part) * 16:#x}" if part.isdigit() else part for part in operands.split(","))
        lines = (machine_code.Line(source, int(at)),) if at else ()
        code.append(machine_code.Instruction(opcode, operands, predicate, lines))
    return code


def opcodes(code):
    return " ".join(instruction.opcode for instruction in code)


def test_marks(source):
    found = machine_code.rare_lines(source)
    numbers = {line: sorted(mark.number for mark in marks) for line, marks in found.items()}
    assert numbers == {4: [3], 5: [3], 6: [3, 5], 8: [3], 10: [9]}


def test_lines():
    """A comment's lines hold until the next one or a label; an inlined instruction has all of its call's."""
    found = machine_code.source_lines(
        """.text.kernel:
\t//## File "a.cuh", line 7 inlined at "b.cu", line 9
\t//## File "b.cu", line 9
        /*0000*/                   LDG.E R1, R2 ;
        /*0010*/                   FADD R1, R1, R1 ;
\t//## File "b.cu", line 10
        /*0020*/                   BRA `(.L_x_0) ;
.L_x_0:
        /*0030*/                   NOP ;
\t//## File "b.cu", line 11
        /*0040*/                   BSYNC B0 ;
.L_x_1:
        /*0050*/                   EXIT ;
"""
    )
    inlined = (("a.cuh", 7), ("b.cu", 9))
    assert found == {
        "kernel": {0: inlined, 1: inlined, 2: (("b.cu", 10),), 3: (), 4: (("b.cu", 11),), 5: (("b.cu", 11),)}
    }


def test_loops():
    """A loop within a loop; code behind the last branch is in neither, nor is the jump to itself at the end."""
    code = program("MOV\nLDG.E.128\nMUFU.EX2\n@P0 BRA 2\nSTG.E\n@P1 BRA 1\nLDG.E\nEXIT\nBRA 8")
    blocks = machine_code.basic_blocks(code)
    found = {loop.header: loop for loop in machine_code.loops(blocks)}
    assert set(found) == {1, 2}
    assert found[1].blocks == {1, 2, 4}
    assert found[1].own == {1, 4}
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.prologue) == "MOV"
    assert opcodes(anatomy.turn) == "LDG.E.128 STG.E BRA"
    assert opcodes(anatomy.epilogue) == "LDG.E EXIT"
    assert machine_code.count(anatomy.turn)[:5] == (3, 16, 0, 0, 1)


def test_reconvergence(source):
    """BSYNC goes on where its BSSY says, here past a rare branch that lies behind the loop."""
    code = program(
        "MOV\nBSSY B0,5\n@P0 BRA 8\nMUFU.EX2\nBSYNC B0\nLDG.E.128\n@P1 BRA 1\nEXIT\nLDG.E | 4\nFADD | 4\nBSYNC B0",
        source,
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.turn) == "BSSY BRA MUFU.EX2 BSYNC LDG.E.128 BRA"
    (detour,) = anatomy.detours
    assert (detour.mark.number, detour.places) == (3, 1)
    # Three instructions in place of two.
    assert detour.more.instructions == 1
    assert detour.more.exp2 == -1


def test_a_loop_behind_a_rare_branch_does_not_count(source):
    """It loads more than the common one, and comes first."""
    code = program(
        "@P0 BRA 5\nLDG.E.128 | 4\nLDG.E.128 | 4\n@P1 BRA 1\nEXIT\nLDG.E.128 | 12\n@P1 BRA 5\nSTG.E | 12\nEXIT", source
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.prologue) == "BRA"
    assert opcodes(anatomy.turn) == "LDG.E.128 BRA"
    assert opcodes(anatomy.epilogue) == "STG.E EXIT"


def test_rare_instructions_on_every_way(source):
    """Moved out of the rare branch to where every way passes, they are common: before the loop and inside."""
    code = program(
        """MOV
@P0 BRA 9
FADD | 4
LDG.E.128 | 12
@P0 BRA 6
FMUL | 4
FADD | 6
@P1 BRA 3
BRA 9
EXIT""",
        source,
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.prologue) == "MOV BRA FADD"
    assert opcodes(anatomy.turn) == "LDG.E.128 BRA FADD BRA"
    assert [(d.mark.number, d.more.instructions) for d in anatomy.detours] == [(3, 1)]


def test_shared_instructions_say_nothing(source):
    """A comparison of the rare branch's in a common block that other ways avoid."""
    code = program(
        "LDG.E.128 | 12\n@P0 BRA 5\nISETP | 4\nMOV | 4\nFADD | 12\n@P1 BRA 0\nEXIT",
        source,
    )
    assert opcodes(machine_code.anatomy(code).turn) == "LDG.E.128 BRA ISETP MOV FADD BRA"


def test_work_done_again(source):
    """The way back is no loop, not even with the next turn's loads on it; it costs itself and what it repeats."""
    code = program(
        """MOV
MUFU.EX2 | 12
LDG.E.128 | 12
VOTE.ALL | 12
@P0 BRA 8
FADD | 4
FMUL | 4
BRA 1
@P1 BRA 0
EXIT""",
        source,
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.turn) == "MOV MUFU.EX2 LDG.E.128 VOTE.ALL BRA BRA"
    (detour,) = anatomy.detours
    assert (detour.more.instructions, detour.more.exp2) == (7, 1)
    assert (anatomy.rare_blocks, anatomy.rare_instructions) == (1, 3)


def test_a_rare_way_around(source):
    """It leaves the main loop and comes back through the loop around it, as the common way around does."""
    code = program(
        """MOV
FADD | 12
LDG.E.128 | 12
@P0 BRA 6
@P1 BRA 2
BRA 8
FMUL | 4
BRA 8
@P2 BRA 1
EXIT""",
        source,
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.prologue) == "MOV"
    assert opcodes(anatomy.turn) == "LDG.E.128 BRA BRA"
    assert opcodes(anatomy.around) == "BRA BRA FADD"
    (detour,) = anatomy.detours
    assert (detour.mark.number, detour.places) == (3, 1)
    # FMUL BRA BRA FADD in place of the turn's last branch.
    assert detour.more.instructions == 3
    assert machine_code.behind_loads(anatomy.turn) == 2


def test_rare_instructions_around(source):
    code = program(
        "MOV\nFADD | 12\n@P0 BRA 5\nFMUL | 4\nFMUL | 4\nFADD | 12\nLDG.E.128 | 12\n@P1 BRA 6\n@P2 BRA 1\nEXIT", source
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.around) == "BRA FADD BRA FADD"
    assert [(d.mark.number, d.more.instructions) for d in anatomy.detours_around] == [(3, 2)]


def test_lanes_apart():
    """BRA.DIV brings lanes together before a vote, out of line; a call under a predicate ends a loop."""
    code = program(
        """LDG.E.128
BRA.DIV UR4,5
VOTE.ALL
@P0 CALL.REL.NOINC 8
BRA 0
WARPSYNC.COLLECTIVE
VOTE.ALL
BRA 3
EXIT"""
    )
    anatomy = machine_code.anatomy(code)
    assert opcodes(anatomy.turn) == "LDG.E.128 BRA.DIV VOTE.ALL CALL.REL.NOINC BRA"
    assert opcodes(anatomy.epilogue) == "EXIT"


def test_widths():
    count = machine_code.count(
        program(
            "LDG.E.ENL2.256\nLDG.E.128.CONSTANT\nLDG.E.64\nLDG.E.U16\nLDG.E\nSTG.E.ENL2.256\nSTG.E.64\nMUFU.RCP\nDFMA\n"
            "FFMA2.RN\nFADD2\nFADD"
        )
    )
    assert (count.wide_bytes, count.narrow_bytes) == (48, 14)
    assert (count.wide_stores, count.narrow_stores) == (1, 1)
    assert (count.exp2, count.mufu, count.double, count.packed) == (0, 1, 1, 2)


def test_names():
    name = (
        "void lit_did::cuda::(anonymous namespace)::kernel<lit_did::BFloat16, float, (int)2, true>(Some<int>, float*)"
    )
    assert cuda_check.short_name(name) == "kernel<bf16, f32, (int)2, true>"
    assert cuda_check.short_name("lit_did::cuda::finish_kernel(float*)") == "finish_kernel"
