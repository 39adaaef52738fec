"""No training step makes the host wait for the device, except to log: counted on a device that is only imitated."""

from __future__ import annotations

import json
import sys

import pytest
from torch.utils import backend_registration

from tests.processes import run_program

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="This PyTorch cannot imitate a device.",
)


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(run_program(sys.executable, "-m", "tests.modules.host_waits").splitlines()[-1])


@pytest.mark.parametrize("case", ["full", "lora", "other terms", "projected", "cached"])
def test_the_host_waits_only_to_log(results, case):
    of_batches, (loss, expected) = results[case]["waits"], results[case]["loss"]
    assert loss == pytest.approx(expected, rel=1e-4)  # the premise: it trains as on a CPU
    assert len(of_batches) == 8
    for batch, waits in enumerate(of_batches):  # two are a step; the third step and the last one are logged
        assert waits == ["_to_copy.default in lit_did/modules/pairs.py:on_host"] * (batch in (5, 7)), batch


def test_what_waits_is_found(results):
    for waits in results["reads"]["waits"]:
        assert any(wait.startswith("_local_scalar_dense.default") for wait in waits)
