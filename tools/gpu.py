"""`make gpu`: everything that needs a GPU, one step after another; says at the end which failed.

Runs in the folder that `make cuda-build` prepares, with the lit_did that is installed there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys

import torch

PYTEST = (sys.executable, "-m", "pytest", "-q", "tests/ops/test_cuda.py")
# Small cases of every kernel: the sanitizer runs kernels a hundred times slower.
SANITIZED = "test_layouts_of or test_two_dtypes_of or test_backward_in_place or test_packed_of"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def steps(quick: bool) -> dict[str, tuple[str, ...]]:
    """{what: command}."""
    found: dict[str, tuple[str, ...]] = {
        "build": (sys.executable, "tools/cuda_build_check.py"),
        "tests": (*PYTEST, "-m", "not slow" if quick else "slow or not slow"),
    }
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer is not found: its checks are left out.")
    elif not quick:
        for tool in SANITIZERS:
            found[tool] = (sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-k", SANITIZED)
    found["benchmarks"] = (sys.executable, "-m", "benchmarks", "--device", "cuda")
    return found


def main() -> int:
    """Runs all steps, whatever the earlier ones said; 0 where none failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without slow tests and compute-sanitizer")
    parser.add_argument("--only", nargs="+", help="some of: build, tests, benchmarks, " + ", ".join(SANITIZERS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} finds no CUDA device.")
        return 1
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    failed = []
    for what, command in steps(options.quick).items():
        if options.only and what not in options.only:
            continue
        print(f"\n--- {what}: {shlex.join(command)}", flush=True)
        # Without torch's cache every tensor is an allocation of its own, whose end the sanitizer sees.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what in SANITIZERS else {}
        if subprocess.run(command, env={**os.environ, **uncached}).returncode != 0:
            failed.append(what)
    print("\nAll passed." if not failed else f"\nFAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
