"""The 95% intervals of validation metrics: against textbook formulas and a bootstrap, and their values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lit_did.modules.objective import Objective
from lit_did.modules.pairs import PairMetrics, PairStatistics
from lit_did.ops import SequenceStatistics


def random_pairs(count: int, seed: int = 0) -> PairStatistics:
    """Pairs whose statistics vary with the number of tokens, as those of models do."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> SequenceStatistics:
        num_tokens = torch.randint(1, 30, (count,), generator=generator)
        values = {name: torch.randn(count, generator=generator) + 2 for name in SequenceStatistics._fields}
        for name in ("policy_logprob", "log_ratio", "token_did_log_partition"):
            values[name] = values[name] * num_tokens
        return SequenceStatistics(**values | {"num_tokens": num_tokens})

    chosen, rejected = side(), side()
    objective = Objective(beta=0.3, loss="sigmoid")
    return objective.pairs(chosen, rejected, None, 1.0)


def computed(pairs: PairStatistics, **options) -> tuple[dict, dict]:
    """Values and intervals."""
    metrics = PairMetrics(Objective(beta=0.3, **{"loss": "sigmoid", **options}), intervals=True)
    metrics.update(pairs)
    values = {name: value.tolist() for name, value in metrics.compute().items()}
    ends = {name.removeprefix("interval/"): v for name, v in values.items() if name.startswith("interval/")}
    return values, ends


def test_means_over_pairs_have_students_interval():
    pairs = random_pairs(20)
    values, intervals = computed(pairs)
    margins = 0.3 * (pairs.chosen.log_ratio.double() - pairs.rejected.log_ratio.double())
    for name, of_pairs in {
        "loss": pairs.loss,
        "reward_margin": margins,
        "chosen_log_ratio": pairs.chosen.log_ratio,
        "rejected_log_ratio": pairs.rejected.log_ratio,
        "reward": 0.3 * (pairs.chosen.log_ratio.double() + pairs.rejected.log_ratio.double()) / 2,
    }.items():
        numbers = of_pairs.double().numpy()
        expected = stats.t.interval(0.95, len(numbers) - 1, numbers.mean(), stats.sem(numbers))
        assert intervals[name] == pytest.approx(expected, rel=1e-6), name
        assert values[name] == pytest.approx(numbers.mean(), rel=1e-6)
    assert values["num_pairs"] == 20


def test_shares_of_pairs_have_wilsons_interval():
    pairs = random_pairs(31)
    _, intervals = computed(pairs)
    for name, right in {
        "reward_accuracy": pairs.chosen.log_ratio > pairs.rejected.log_ratio,
        "chosen_fell": pairs.chosen.log_ratio < 0,
    }.items():
        expected = stats.binomtest(int(right.sum()), 31).proportion_ci(0.95, "wilson")
        assert intervals[name] == pytest.approx((expected.low, expected.high), rel=1e-9)


TOKENS = ("token_did_entropy", "token_did_concentration", "token_did_log_partition", "policy_entropy", "kl")


@pytest.mark.parametrize("options", [{}, {"loss": {"sigmoid": 0.8, "sft": 0.2}}], ids=["sigmoid", "sft"])
def test_means_over_tokens_have_the_bootstraps_interval(options):
    count, draws = 400, 1000
    pairs = random_pairs(count)
    _, intervals = computed(pairs, **options)
    rng = np.random.default_rng(0)
    n = [side.num_tokens.double().numpy() for side in (pairs.chosen, pairs.rejected)]
    drawn = rng.integers(count, size=(draws, count))
    samples = {}
    for name in (*TOKENS, "reverse_kl"):
        values = [getattr(side, name).double().numpy() for side in (pairs.chosen, pairs.rejected)]
        sums = sum(v if "log_partition" in name else v * m for v, m in zip(values, n, strict=True))
        samples[name] = sums[drawn].sum(1) / sum(n)[drawn].sum(1)
    if options:
        nll = -pairs.chosen.policy_logprob.double().numpy()
        preference = pairs.preference_loss.double().numpy()
        samples["loss"] = preference[drawn].mean(1) + 0.2 * nll[drawn].sum(1) / n[0][drawn].sum(1)
    for name, values in samples.items():
        low, high = np.quantile(values, (0.025, 0.975))
        assert intervals[name] == pytest.approx((low, high), abs=0.12 * (high - low)), name


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_every_interval_holds_its_metric(loss):
    pairs = random_pairs(9)
    if loss == "simpo":  # has no reference
        nothing = torch.full((9,), torch.nan)
        fields = dict.fromkeys(SequenceStatistics._fields, nothing)
        kept = ("policy_logprob", "policy_entropy", "num_tokens")
        pairs = pairs._replace(
            **{
                name: SequenceStatistics(**fields | {k: getattr(getattr(pairs, name), k) for k in kept})
                for name in ("chosen", "rejected")
            }
        )
    values, intervals = computed(pairs, loss=loss)
    names = {name for name in values if not name.startswith("interval/")}
    assert names - intervals.keys() == {"num_pairs", "bad_steps"} | ({"calibration_error"} & names)
    assert all(low < values[name] < high for name, (low, high) in intervals.items())


def test_pairs_that_several_processes_measure_count_once():
    pairs = random_pairs(9)
    metrics = PairMetrics(Objective(beta=0.3, loss="sigmoid"), intervals=True, copies=2)
    for _ in range(2):  # the processes' sums are added up
        metrics.update(pairs)
    _, expected = computed(pairs)
    values = metrics.compute()
    assert values["num_pairs"] == 9
    assert {n.removeprefix("interval/"): v.tolist() for n, v in values.items() if "/" in n} == {
        name: pytest.approx(interval, rel=1e-9) for name, interval in expected.items()
    }


def test_pairs_of_weight_0_do_not_count_and_one_pair_has_no_interval():
    pairs = random_pairs(5)
    metrics = PairMetrics(Objective(beta=0.3, loss="sigmoid"), intervals=True)
    spoilt = pairs.chosen._replace(kl=torch.tensor([1.0, 1, 1, 1, torch.nan]))
    metrics.update(pairs._replace(chosen=spoilt), torch.tensor([1.0, 1, 1, 1, 0]))
    values = metrics.compute()
    assert values["num_pairs"] == 4
    assert all(value.isfinite().all() for value in values.values())
    metrics.reset()
    metrics.update(pairs, torch.tensor([1.0, 0, 0, 0, 0]))
    values = metrics.compute()
    assert values["interval/loss"].isnan().all()
    assert values["loss"].isfinite()
