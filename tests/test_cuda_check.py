"""`make cuda-check` on toy kernels: each fault is refused with its reason, a sound kernel passes with its figures."""

from __future__ import annotations

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
    #pragma unroll
    for (int k = 0; k < 4; ++k) {{
      if (z[k] > limit) {{ limit = z[k]; sum *= fast_exp2(sqrtf(limit) / sum) + fast_exp2(sinf(limit)); }}
      sum += fast_exp2(z[k]) + fast_exp2(r[k]) * fast_exp2(z[k] - r[k]);
    }}
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
    heading, row = figures.read_text().splitlines()
    assert heading.split(",")[-1] == "exp2"
    assert row.split(",")[-1] == "3.0"
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


def program(text):
    """Instructions from lines such as `@P0 BRA 3`; a branch's target is the line's number."""
    code = []
    for line in text.split("\n"):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        operands = ",".join(f"{int(part) * 16:#x}" if part.isdigit() else part for part in operands.split(","))
        code.append(machine_code.Instruction(opcode, operands, predicate))
    return code


def test_loops():
    """A loop within a loop; code behind the last branch is in neither, nor is the jump to itself at the end."""
    blocks = machine_code.basic_blocks(
        program("MOV\nLDG.E.128\nMUFU.EX2\n@P0 BRA 2\nSTG.E\n@P1 BRA 1\nLDG.E\nEXIT\nBRA 8")
    )
    found = {loop.header: loop for loop in machine_code.loops(blocks)}
    assert set(found) == {1, 2}
    assert found[1].blocks == {1, 2, 4}
    assert found[1].own == {1, 4}
    outer, inner = (machine_code.one_turn(blocks, found[header]) for header in (1, 2))
    assert (outer.wide_bytes, outer.narrow_bytes, outer.narrow_stores, outer.exp2) == (16, 0, 1, 0)
    assert (inner.wide_bytes, inner.exp2) == (0, 1)


def test_reconvergence():
    """BSYNC goes on where its BSSY says, here past a rare branch that lies behind the loop."""
    blocks = machine_code.basic_blocks(
        program("MOV\nBSSY B0,5\n@P0 BRA 8\nMUFU.EX2\nBSYNC B0\nLDG.E.128\n@P1 BRA 1\nEXIT\nLDG.E\nBSYNC B0")
    )
    (loop,) = machine_code.loops(blocks)
    assert loop.blocks == {1, 3, 5, 8}
    turn = machine_code.one_turn(blocks, loop)
    assert (turn.wide_bytes, turn.narrow_bytes, turn.exp2) == (16, 0, 1)


def test_names():
    name = (
        "void lit_did::cuda::(anonymous namespace)::kernel<lit_did::BFloat16, float, (int)2, true>(Some<int>, float*)"
    )
    assert cuda_check.short_name(name) == "kernel<bf16, f32, (int)2, true>"
    assert cuda_check.short_name("lit_did::cuda::finish_kernel(float*)") == "finish_kernel"
