"""No training step makes the host wait for the device, except to log: counted on a device that is only imitated."""

from __future__ import annotations

import json
import sys

import pytest
from torch.utils import backend_registration

from lit_did.models import varlen
from tests.processes import run_program

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="This PyTorch cannot imitate a device.",
)


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(run_program(sys.executable, "-m", "tests.modules.host_waits").splitlines()[-1])


CASES = ["full", "lora", "other terms", "projected", "cached", "checkpointed", "elementwise recomputed"]


@pytest.mark.parametrize("case", [*CASES, "flex attention", "one segment at a time"])
def test_the_host_waits_only_to_log(results, case):
    of_batches, (loss, expected) = results[case]["waits"], results[case]["loss"]
    assert loss == pytest.approx(expected, rel=1e-4)  # the premise: it trains as on a CPU
    assert len(of_batches) == 8
    assert results[case]["fused_steps"] == 4 * (1 if case == "lora" else 2)  # a step for matrices and one for vectors
    for batch, waits in enumerate(of_batches):  # two are a step; the third step and the last one are logged
        assert waits == ["_to_copy.default in lit_did/modules/pairs.py:on_host"] * (batch in (5, 7)), batch


@pytest.mark.skipif(varlen._of_torch() is None, reason="This torch has no varlen_attn with windows.")
def test_attention_is_one_call_a_layer(results):
    """Of every micro-batch and model, and once more of the policy where its layers run again."""
    calls = {case: results[case]["calls"] for case in results}
    layers, models = 2, 2
    micro_batches, rest = divmod(calls["full"], layers * models)
    assert (micro_batches >= 8, rest) == (True, 0)
    for case in ("lora", "other terms", "elementwise recomputed", "flex attention"):
        assert calls[case] == layers * models * micro_batches
    assert calls["checkpointed"] == layers * (models + 1) * micro_batches
    assert calls["one segment at a time"] == 0


def test_what_waits_is_found(results):
    for waits in results["reads"]["waits"]:
        assert any(wait.startswith("_local_scalar_dense.default") for wait in waits)
