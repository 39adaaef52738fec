"""PowerLawExponent is `fit_power_law` of all samples, however they come, and a torchmetrics metric."""

from __future__ import annotations

import copy
import pickle

import lightning
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lit_did.functional import PowerLawFit, fit_power_law
from lit_did.metrics import PowerLawExponent
from tests.metrics.samples import log_ratios
from tests.modules.tiny import trainer


def whole(batches: list[tuple], **options) -> dict[str, float]:
    u, v, *prompt = (torch.cat(side) for side in zip(*batches, strict=True))
    return fit_power_law(u, v, group=prompt[0] if prompt else None, **options)._asdict()


def close(values: dict[str, float]):
    # Two clusters 200 spreads apart leave little of a quadratic term: 5e-8 of its p-value was rounding, all else less.
    return pytest.approx(values, rel=1e-6, nan_ok=True)


def floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())
    return {name: value.item() for name, value in values.items()}


each = pytest.mark.parametrize("with_prompts", [False, True])


@each
def test_batches_are_one(with_prompts):
    batches = log_ratios(with_prompts)
    for order in (batches, batches[::-1]):
        metric = PowerLawExponent(confidence=0.8)
        for batch in order:
            metric.update(*batch)
        values = floats(metric.compute())
        assert values == close(whole(batches, confidence=0.8))
        assert list(values) == list(PowerLawFit._fields)
    assert metric.power_law_sums.shape == (276,)


@each
def test_forward_reset_pickle_and_clone(with_prompts):
    first, _, third, last = batches = log_ratios(with_prompts)
    metric = PowerLawExponent()
    assert floats(metric(*first)) == close(whole([first]))
    assert floats(metric(*third)) == close(whole([third]))
    assert floats(metric.compute()) == close(whole([first, third]))
    assert metric.state_dict() == {}
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
        other.update(*batches[1])
        other.update(*last)
        assert floats(other.compute()) == close(whole(batches))
    assert floats(metric.compute()) == close(whole([first, third]))  # the original is untouched
    metric.reset()
    metric.update(*third)
    assert floats(metric.compute()) == close(whole([third]))


def test_no_data_yet_and_a_policy_that_is_its_reference():
    metric = PowerLawExponent()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        values = floats(metric.compute())
    assert values.pop("num_samples") == values.pop("num_prompts") == 0
    assert all(value != value for value in values.values())
    for prompt in (None, torch.tensor([0, 0, 1, 1])):
        metric = PowerLawExponent(only="exponent")
        for _ in range(2):
            metric.update(torch.arange(4.0), torch.zeros(4), prompt)
            assert metric.compute().isnan()
        metric.update(torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 2, 0, 2]), prompt)
        assert metric.compute().isfinite()
    constant = PowerLawExponent(only="exponent")
    for _ in range(2):  # 3 times 0.1 over 3 is not 0.1, but what does not vary has no variance
        constant.update(torch.arange(3.0), torch.full((3,), 0.1, dtype=torch.float64))
        assert constant.compute().isnan()
    few = PowerLawExponent(only="exponent")
    few.update(torch.zeros(0), torch.zeros(0))
    few.update(torch.arange(2.0), torch.arange(2.0))
    assert few.compute().isnan()
    few.update(torch.tensor([5.0]), torch.tensor([5.0]))
    assert few.compute() == pytest.approx(1)


def test_the_state_keeps_its_dtype():
    batches = log_ratios(True)
    metric = PowerLawExponent()
    for changed in (metric, metric.half(), torch.nn.ModuleList([metric]).to(torch.bfloat16)[0]):
        assert changed.power_law_sums.dtype == torch.float64
    for u, v, prompt in batches:
        metric(u.requires_grad_(), v, prompt)  # which torchmetrics runs with gradients
    assert not metric.power_law_sums.requires_grad
    assert floats(metric.half().compute()) == close(whole(log_ratios(True)))


def test_prompts_in_some_updates_only():
    metric = PowerLawExponent()
    u, v, prompt = log_ratios(True)[2]
    metric.update(u, v, prompt)
    with pytest.raises(ValueError, match="`group` in all updates or in none, but got both"):
        metric.update(u, v)
    assert floats(metric.compute()) == close(whole([(u, v, prompt)]))  # the wrong one left nothing


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PowerLawExponent(only="beta"), ValueError, "`only` to be None or one of 'exponent', .* got 'beta'"),
        (lambda: PowerLawExponent(confidence=0), ValueError, r"`confidence` to be in \(0, 1\), but got 0"),
        (lambda: PowerLawExponent().update(torch.zeros(2), torch.zeros(3)), ValueError, "`policy_log_ratio`"),
        (lambda: PowerLawExponent().update(torch.zeros(2), torch.zeros(2).log()), ValueError, "finite, but got -inf"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_plot():
    metric = PowerLawExponent(only="exponent")
    values = [metric(*batch) for batch in log_ratios(False)[::2]]
    figure, axes = plt.subplots(1, 2)
    metric.plot(values, ax=axes[0])
    assert axes[0].lines[0].get_ydata().tolist() == [value.item() for value in values]
    PowerLawExponent().plot(PowerLawExponent()(*log_ratios(False)[0]), ax=axes[1])
    assert len(axes[1].lines) == len(PowerLawFit._fields)
    plt.close(figure)


class Logs(lightning.LightningModule):
    """Somebody's own module: one scalar through the metric, and all in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.exponent, self.fit = PowerLawExponent(only="exponent"), PowerLawExponent()

    def validation_step(self, batch, batch_idx):
        self.exponent.update(*batch)
        self.fit.update(*batch)
        self.log("val/beta", self.exponent)

    def on_validation_epoch_end(self):
        self.log_dict(self.fit.compute())
        self.fit.reset()


def test_logged_by_lightning_and_in_a_collection():
    batches = log_ratios(True)
    run = trainer()
    module = Logs()
    for _ in range(2):  # Lightning resets what it logs
        run.validate(module, DataLoader(batches, batch_size=None), verbose=False)
        seen = {name: value.item() for name, value in run.callback_metrics.items()}
        # the loader keeps float64, Lightning logs float32
        assert seen.pop("val/beta") == pytest.approx(whole(batches)["exponent"], rel=1e-6)
        assert seen == pytest.approx(whole(batches), rel=1e-5, nan_ok=True)
    collection = MetricCollection(
        {name: PowerLawExponent(only="upper", confidence=level) for name, level in (("wide", 0.99), ("narrow", 0.9))}
    )
    for batch in batches:
        collection.update(*batch)
    values = collection.compute()
    assert values["wide"] == pytest.approx(whole(batches, confidence=0.99)["upper"], rel=1e-6)
    assert values["narrow"] == pytest.approx(whole(batches, confidence=0.9)["upper"], rel=1e-6)


def test_names_of_its_own():
    metric = PowerLawExponent(prefix="law/")
    metric.update(torch.tensor([1.0, 0.5, 2.0, -1.0]), torch.tensor([2.0, 1.0, 4.0, -2.0]))
    values = metric.compute()
    assert set(values) == {f"law/{name}" for name in PowerLawFit._fields}
    assert values["law/exponent"].item() == pytest.approx(0.5)
