"""Results print in a line, without thousands of numbers."""

from __future__ import annotations

import pytest
import torch

from lit_did import sequence_statistics, token_statistics
from lit_did.functional import enumerate_did, estimate_did_entropy, fit_power_law
from lit_did.modules.pairs import PairStatistics


def _results():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 40, 50, 11), torch.randint(0, 11, (40, 50))
    statistics = sequence_statistics(*logits, labels)
    samples = -torch.rand(3, 2000) - 1
    numbers = torch.arange(40)
    pairs = PairStatistics(numbers, statistics, statistics, statistics.kl, statistics.log_ratio, statistics.kl)
    yield "TokenStatistics", token_statistics(*logits, labels), "kl=float32[40, 50] "
    yield "SequenceStatistics", statistics, "num_tokens=int64[40] 50 to 50"
    yield "PairStatistics", pairs, "index=int64[40] 0 to 39, chosen=SequenceStatistics(11 fields)"
    yield "DIDEntropyEstimate", estimate_did_entropy(*samples), "num_distinct="
    yield "PowerLawFit", fit_power_law(samples[0], samples[1]), "num_samples=2000"

    def uniform(prefixes):
        return torch.zeros(len(prefixes), 4)

    exact = enumerate_did(uniform, uniform, max_new_tokens=3, eos_token_id=0)
    yield "EnumeratedDID", exact, "log_partition=float64[] "


@pytest.mark.parametrize("number", range(6))
def test_a_result_prints_in_a_line(number):
    name, result, part = list(_results())[number]
    text = repr(result)
    assert text.startswith(f"{name}(")
    assert part in text
    assert all(f"{field}=" in text for field in result._fields)
    assert "\n" not in text
    assert len(text) < 700


def test_tensors_without_numbers_print_their_shape():
    from torch.func import vmap

    results = []

    def keep(logits):
        results.append(repr(token_statistics(logits, logits, torch.zeros((), dtype=torch.int64), backend="reference")))
        return logits

    vmap(keep)(torch.randn(3, 4))
    assert "kl=float32[]" in results[0]
    meta = sequence_statistics(*torch.randn(2, 2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    assert "kl=float32[2]," in repr(type(meta)(*(value.to("meta") for value in meta)))
