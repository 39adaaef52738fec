"""`make cuda-build`, the last step: what was installed is a CUDA build whose operators all have CUDA implementations.

Run from outside a clone, by the interpreter that lit-did was installed for. Needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import lit_did
from lit_did import doctor
from lit_did.ops.extension import EXTENSION, fused_devices


def problems() -> list[str]:
    """One line for everything that is wrong."""
    if not Path(lit_did.__file__).is_relative_to(sys.prefix):
        return [f"this is not the installed lit_did but {lit_did.__file__}"]
    if EXTENSION.module is None:
        return [str(EXTENSION.problem)]
    found = []
    if EXTENSION.cuda is None:
        found.append(str(EXTENSION.cuda_problem))
    elif len(EXTENSION.cuda.split()) < 2:
        found.append(f"the CUDA library names no CUDA version or no architectures: {EXTENSION.cuda!r}")
    if fused_devices() != ("cpu", "cuda"):
        found.append(f"the fused operators serve {fused_devices()}")
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lit_did::"))
    if not names:
        found.append("no operators are registered")
    for name in names:
        kernels = {key: torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA")}
        print(f"{name:40} {', '.join(key for key, has in kernels.items() if has)}")
        found += [f"{name} has no implementation for {key}" for key, has in kernels.items() if not has]
    return found


if __name__ == "__main__":
    wrong = problems()
    print(doctor.report())
    for problem in wrong:
        print(f"FAILED {problem}")
    sys.exit(bool(wrong))
