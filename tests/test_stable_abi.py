"""The compiled libraries need nothing of torch but its stable ABI, and compute the same bits under another torch.

The second is skipped unless the environment variable LIT_DID_OTHER_PYTHON names a Python that has another torch, of
2.11 or newer. It needs nothing else of that Python.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lit_did
from lit_did.ops.extension import EXTENSION

LIBRARIES = Path(lit_did.__file__).parent / "lib"
OTHER_PYTHON = os.environ.get("LIT_DID_OTHER_PYTHON")

pytestmark = pytest.mark.skipif(EXTENSION.module is None, reason="the extension is not built")


def undefined(library):
    """The symbols that a library expects elsewhere: those of C and C++ libraries, which have versions, and others."""
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", str(library)], text=True)
    found = [line.split() for line in listed.splitlines()]
    names = [name for kind, name in found if kind == "U"]  # the compiler's own are weak
    return [name for name in names if "@" in name], [name for name in names if "@" not in name]


def stable_symbols():
    """The symbols that the headers of torch's stable ABI declare."""
    headers = Path(torch.__file__).parent / "include/torch/csrc"
    texts = [(headers / name).read_text() for name in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")]
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", "".join(texts)))
    return declared | {f"aoti_torch_dtype_{name}" for name in re.findall(r"\w+", "".join(texts))}  # of a macro


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs `nm` on Linux")
@pytest.mark.parametrize("library", sorted(LIBRARIES.glob("*.so")), ids=lambda path: path.name)
def test_symbols_of_torch(library):
    """They are declared in the headers of the stable ABI. None belongs to C++ of torch (at::, c10::, torch::)."""
    of_c, of_torch = undefined(library)
    assert set(of_torch) - stable_symbols() == set()
    assert not [name for name in of_c if re.search(r"2at|3c10|5torch", name)]
    assert {"aoti_torch_get_sizes", "torch_library_impl"} <= set(of_torch)  # the search finds something
    assert not [name for name in of_c if name.startswith(("GOMP_", "omp_", "__kmpc_"))]  # torch starts the threads


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs `nm` on Linux")
def test_the_module_needs_no_torch():
    of_c, of_others = undefined(EXTENSION.module.__file__)
    assert not [name for name in of_others if not name.startswith(("Py", "_Py"))]
    assert not [name for name in of_c if "torch" in name]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs `nm` on Linux")
@pytest.mark.parametrize("library", [*LIBRARIES.glob("*.so"), EXTENSION.module and EXTENSION.module.__file__])
def test_what_is_exported(library):
    """Nothing of a C++ runtime that is linked in. Other libraries would use an exported `operator new` too."""
    listed = subprocess.check_output(["nm", "-D", "--defined-only", str(library)], text=True)
    names = [line.split()[-1] for line in listed.splitlines()]
    assert set(names) <= {"lit_did_cuda_build", "PyInit__C"}


# Prints torch's version and a digest of every result: statistics, both backwards and sums, of logits that every torch
# makes alike. The large case has gradients of 32 MiB, whose memory the library maps itself.
DIGESTS = """
import ctypes, hashlib, json, sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.lit_did

def digest(tensors):
    kept = [tensor.contiguous() for tensor in tensors]
    data = b"".join(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) for tensor in kept)
    return hashlib.sha256(data).hexdigest()

def logits(rows, vocabulary, factor, dtype):
    entries = torch.arange(rows * vocabulary, dtype=torch.int64)
    return ((entries * factor % 1009 - 500).double() / 64).to(dtype).view(rows, vocabulary)

found = {}
cases = [(7, 1030, "float32", "float32"), (7, 40000, "bfloat16", "float16"), (5, 530, "float64", "float64"),
         (128, 65536, "float32", "float32")]
for rows, vocabulary, *dtypes in cases:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        policy, reference = (logits(rows, vocabulary, f, getattr(torch, d)) for f, d in zip((7919, 6007), dtypes))
        policy[1, 3] = float("-inf")
        labels = torch.arange(rows) * 31 % vocabulary
        labels[2] = -100
        *statistics, normalizers = ops.token_statistics(policy, reference, labels, -100, 0.9)
        grads = [None if i == 5 else (statistic * 0 + i + 1).nan_to_num(1) for i, statistic in enumerate(statistics)]
        arguments = (grads, policy, reference, labels, statistics, normalizers, -100, 0.9, True, True)
        gradients = ops.token_statistics_backward(*arguments)
        sums = ops.sequence_reduction(statistics, labels, torch.tensor([0, 2, 2, rows]), -100)
        ops.token_statistics_backward_(*arguments)
        results = {"forward": [*statistics, normalizers], "backward": gradients, "sums": sums}
        name = f"{rows} x {vocabulary} {dtypes}, {threads} threads: "
        found |= {name + part: digest(tensors) for part, tensors in results.items()}
        found[name + "in place"] = digest([policy, reference]) == digest(gradients)
try:
    ops.token_statistics(policy, reference, labels + 65536, -100, 0.9)
except RuntimeError as error:  # torch raises it, with any C++ library that ours was built with
    found["refused"] = str(error).splitlines()[0]
print(json.dumps([torch.__version__, found]))
"""


def digests(python):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-W", "ignore", "-c", DIGESTS, str(LIBRARIES / "lit_did_cpu.so")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(OTHER_PYTHON is None, reason="LIT_DID_OTHER_PYTHON names no Python with another torch")
def test_another_torch():
    this_torch, expected = digests(sys.executable)
    other_torch, found = digests(OTHER_PYTHON)
    assert other_torch != this_torch == torch.__version__
    assert found == expected
    assert found["refused"].startswith("torch.ops.lit_did needs `labels` in [0, V)")
    assert all(same for name, same in found.items() if name.endswith("in place"))
    assert len(set(map(str, found.values()))) == 3 * 4 + 2, "every case has results of its own, with any threads"
