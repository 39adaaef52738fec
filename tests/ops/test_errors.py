"""Bad arguments: the documented exception, naming the argument, what was expected and what came, on every backend."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from lit_did.ops.checks import MAX_LEADING_DIMENSIONS, check_leading_dimensions

BACKENDS = ("fused", "reference", "auto")
LOGITS = torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3, dtype=torch.long)

# What is changed in a good call, the exception, its message.
BAD = {
    "policy not a tensor": (
        {"policy_logits": [[0.0]]},
        TypeError,
        r"Expected `policy_logits` to be a tensor, but got list",
    ),
    "reference not a tensor": (
        {"reference_logits": None},
        TypeError,
        r"Expected `reference_logits` to be a tensor, but got NoneType",
    ),
    "labels not a tensor": ({"labels": 3}, TypeError, r"Expected `labels` to be a tensor, but got int"),
    "integer policy": (
        {"policy_logits": LOGITS.long()},
        TypeError,
        r"Expected `policy_logits` to be float32, bfloat16, float16 or float64, but got torch.int64",
    ),
    "complex reference": (
        {"reference_logits": LOGITS.to(torch.complex64)},
        TypeError,
        r"Expected `reference_logits` to be float32, .*, but got torch.complex64",
    ),
    "float8 policy": (
        {"policy_logits": LOGITS.to(torch.float8_e4m3fn)},
        TypeError,
        r"`policy_logits` .* but got torch.float8_e4m3fn",
    ),
    "float labels": ({"labels": LABELS.float()}, TypeError, r"Expected `labels` to be integers, but got torch.float32"),
    "bool labels": ({"labels": LABELS.bool()}, TypeError, r"Expected `labels` to be integers, but got torch.bool"),
    "scalar policy": (
        {"policy_logits": torch.tensor(1.0)},
        ValueError,
        r"Expected `policy_logits` to have shape \[\.\.\., V\] with V >= 1, but got \(\)",
    ),
    "empty vocabulary": (
        {"policy_logits": LOGITS[..., :0], "reference_logits": LOGITS[..., :0]},
        ValueError,
        r"Expected `policy_logits` to have shape \[\.\.\., V\] with V >= 1, but got \(2, 3, 0\)",
    ),
    "another vocabulary": (
        {"reference_logits": torch.zeros(2, 3, 6)},
        ValueError,
        r"Expected `reference_logits` to have the vocabulary of `policy_logits`, 5 entries, but got \(2, 3, 6\)",
    ),
    "scalar reference": (
        {"reference_logits": torch.tensor(1.0)},
        ValueError,
        r"`reference_logits` .* 5 entries, but got \(\)",
    ),
    "other reference rows": (
        {"reference_logits": torch.zeros(1, 3, 5)},
        ValueError,
        r"Expected `reference_logits` to have the shape of `policy_logits`, \(2, 3, 5\), but got \(1, 3, 5\)",
    ),
    "flat labels": (
        {"labels": LABELS.flatten()},
        ValueError,
        r"Expected `labels` to have shape \(2, 3\), but got \(6,\)",
    ),
    "labels with a vocabulary": (
        {"labels": torch.zeros(2, 3, 5, dtype=torch.long)},
        ValueError,
        r"Expected `labels` to have shape \(2, 3\), but got \(2, 3, 5\)",
    ),
    "reference elsewhere": (
        {"reference_logits": LOGITS.to("meta")},
        ValueError,
        r"Expected `reference_logits` on the device of `policy_logits`, cpu, but got meta",
    ),
    "labels elsewhere": (
        {"labels": LABELS.to("meta")},
        ValueError,
        r"Expected `labels` on the device of `policy_logits`, cpu, but got meta",
    ),
    "label V": (
        {"labels": LABELS.index_fill(1, torch.tensor(2), 5)},
        ValueError,
        r"Expected `labels` to be in \[0, 5\) or `ignore_index` \(-100\), but got 5 at row 2",
    ),
    "label -1": ({"labels": LABELS - 1}, ValueError, r"Expected `labels` to be in \[0, 5\) .*, but got -1 at row 0"),
    "label huge": (
        {"labels": LABELS + 2**62},
        ValueError,
        r"Expected `labels` to be in .* but got 4611686018427387904",
    ),
    "label of another ignore_index": (
        {"labels": LABELS - 100, "ignore_index": -1},
        ValueError,
        r"or `ignore_index` \(-1\), but got -100 at row 0",
    ),
    "temperature 0": (
        {"temperature": 0.0},
        ValueError,
        r"Expected `temperature` to be in \[1e-30, 1e30\], but got 0.0",
    ),
    "temperature -1": (
        {"temperature": -1},
        ValueError,
        r"Expected `temperature` to be in \[1e-30, 1e30\], but got -1",
    ),
    "temperature nan": ({"temperature": math.nan}, ValueError, r"`temperature` to be in .* but got nan"),
    "temperature inf": ({"temperature": math.inf}, ValueError, r"`temperature` to be in .* but got inf"),
    "temperature 1e31": ({"temperature": 1e31}, ValueError, r"`temperature` to be in .* but got 1e\+31"),
    "temperature '1'": ({"temperature": "1"}, TypeError, r"Expected `temperature` to be a number, but got '1'"),
    "temperature True": ({"temperature": True}, TypeError, r"Expected `temperature` to be a number, but got True"),
    "ignore_index 1.5": ({"ignore_index": 1.5}, TypeError, r"Expected `ignore_index` to be an integer, but got 1.5"),
    "ignore_index None": ({"ignore_index": None}, TypeError, r"Expected `ignore_index` to be an integer, but got None"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [token_statistics, sequence_statistics])
@pytest.mark.parametrize("bad", BAD)
def test_bad_argument(bad, function, backend):
    changed, error, message = BAD[bad]
    good = {"policy_logits": LOGITS, "reference_logits": LOGITS, "labels": LABELS, "backend": backend}
    function(**good)
    with pytest.raises(error, match=message):
        function(**good | changed)


@pytest.mark.parametrize("function", [token_statistics, sequence_statistics])
def test_unknown_backend(function):
    with pytest.raises(
        ValueError, match="Expected `backend` to be one of 'auto', 'fused', 'reference', but got 'cuda'"
    ):
        function(LOGITS, LOGITS, LABELS, backend="cuda")


def test_device_without_kernels():
    """An explicit choice never falls back; "auto" does, and says so once."""
    meta = (LOGITS.to("meta"), LOGITS.to("meta"), LABELS.to("meta"))
    with pytest.raises(RuntimeError, match=r"for `backend='fused'` on meta, but this install has: reference, fused"):
        token_statistics(*meta, backend="fused")


# ----------------------------------------------------------------------------------------------------------
# Calls through torch.ops, past the Python checks: they raise too, and never read out of bounds
# ----------------------------------------------------------------------------------------------------------


def raw(policy=LOGITS, reference=LOGITS, labels=LABELS, ignore_index=-100, temperature=1.0):
    return torch.ops.lit_did.token_statistics(policy, reference, labels, ignore_index, temperature)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"policy": torch.tensor(0.0)}, RuntimeError, "`policy_logits` of shape"),
        ({"policy": LOGITS[..., :0], "reference": LOGITS[..., :0]}, RuntimeError, "`policy_logits` of shape"),
        ({"reference": LOGITS[..., :4]}, RuntimeError, "`reference_logits` of the shape of `policy_logits`"),
        ({"labels": LABELS[:1]}, RuntimeError, "`labels` of shape"),
        ({"labels": LABELS.int()}, RuntimeError, "`labels` of int64"),
        ({"labels": LABELS + 5}, RuntimeError, r"`labels` in \[0, V\) or equal to `ignore_index`"),
        ({"labels": LABELS - 1}, RuntimeError, r"`labels` in \[0, V\)"),
        ({"policy": LOGITS.double()}, RuntimeError, "both logits or neither of float64"),
        ({"policy": LOGITS.long(), "reference": LOGITS.long()}, RuntimeError, "logits of float32"),
        ({"policy": LOGITS.repeat(1, 1, 2)[..., ::2]}, RuntimeError, "contiguous in the vocabulary"),
        ({"temperature": 0.0}, RuntimeError, "`temperature`"),
        ({"temperature": math.nan}, RuntimeError, "`temperature`"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_operator_call(changed, error, message):
    raw()
    with pytest.raises(error, match=message):
        raw(**changed)


def raw_backward(changed):
    *statistics, normalizers = raw()
    arguments = {
        "grads": [torch.ones(2, 3)] * 9,
        "policy_logits": LOGITS,
        "reference_logits": LOGITS,
        "labels": LABELS,
        "statistics": statistics,
        "normalizers": normalizers,
        "ignore_index": -100,
        "temperature": 1.0,
        "policy_needs_grad": True,
        "reference_needs_grad": True,
    }
    return torch.ops.lit_did.token_statistics_backward(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"grads": [torch.ones(2, 3)] * 8}, RuntimeError, "nine `grads` and `statistics`"),
        ({"grads": [torch.ones(2)] * 9}, RuntimeError, "`grads` of the shape"),
        ({"grads": [torch.ones(2, 3).double()] * 9}, RuntimeError, "Float"),
        ({"statistics": [torch.ones(2, 3)] * 10}, RuntimeError, "nine `grads` and `statistics`"),
        ({"statistics": [torch.ones(0)] * 9}, RuntimeError, "`statistics` of the shape"),
        ({"normalizers": torch.ones(2, 3, 3).double()}, RuntimeError, "`normalizers` of shape"),
        ({"normalizers": torch.ones(2, 3, 5)}, RuntimeError, "Double"),
        ({"labels": LABELS[:, :2]}, RuntimeError, "`labels` of shape"),
        ({"reference_logits": LOGITS[..., 1:]}, RuntimeError, "`reference_logits` of the shape"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_backward_call(changed, error, message):
    raw_backward({})
    with pytest.raises(error, match=message):
        raw_backward(changed)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_backward_without_a_side(needs):
    """A side that needs no gradient gets an empty tensor, both included."""
    grads = raw_backward({"policy_needs_grad": needs[0], "reference_needs_grad": needs[1]})
    assert [grad.numel() for grad in grads] == [LOGITS.numel() * needed for needed in needs]


@pytest.mark.parametrize("label", [-7, 5, 2**62])
def test_backward_with_a_label_out_of_range(label):
    """The forward refuses such labels; the backward, which trusts it, at least writes nowhere else."""
    for grad in raw_backward({"labels": LABELS + label}):
        assert grad.isfinite().all()


def test_leading_dimensions_on_cuda():
    """Dimensions that lie in memory like one count once, and those of size 1 not at all."""
    logits = torch.zeros(*[2] * 9, 4)
    backwards = logits.permute(*reversed(range(9)), 9)
    check_leading_dimensions(policy_logits=logits, reference_logits=backwards[0][None])
    with pytest.raises(
        ValueError,
        match=r"`reference_logits` to have at most 8 leading dimensions apart in memory, but got sizes \[2, 2, .* and "
        r"strides \[4, 8, .*\]. Pass `reference_logits.contiguous\(\)`.",
    ):
        check_leading_dimensions(policy_logits=logits, reference_logits=backwards)
    header = Path(__file__).parents[2] / "csrc/cuda/kernels.h"
    if header.is_file():
        assert f"kMaxLeadingDims = {MAX_LEADING_DIMENSIONS};" in header.read_text()


# ----------------------------------------------------------------------------------------------------------
# What fails inside an operator is explained in the words of the one who knows
# ----------------------------------------------------------------------------------------------------------

SHORT_OF_MEMORY = """
import resource, torch, lit_did
logits = torch.zeros(16, 2**20, requires_grad=True)
value = lit_did.token_statistics(logits, logits.detach()[:1].expand(16, -1), torch.zeros(16).long(), backend="fused")
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, -1))  # the gradient takes 2**26 bytes
value.log_ratio.sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_memory_for_a_gradient():
    result = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError")
    assert "can't allocate memory: you tried to allocate 67108864 bytes" in last_line
