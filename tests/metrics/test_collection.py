"""DIDMetrics: all metrics, one pass over the logits an update, one exchange between processes."""

from __future__ import annotations

import pickle

import lightning
import pytest
from torch import nn
from torch.utils.data import DataLoader

from lit_did import DIDMetrics, sequence_statistics, token_statistics
from lit_did.functional import inputs
from lit_did.metrics import PreferenceLoss
from tests.metrics.oracle import expected, make_batches
from tests.modules.tiny import trainer


def assert_close(values: dict, truth: dict[str, float]) -> None:
    assert values.keys() == truth.keys()
    for name, value in truth.items():
        # float32 log-probabilities of some 5 tokens, each good to 1e-6
        assert float(values[name]) == pytest.approx(value, rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("options", [{}, {"unit": "bits", "beta": 0.7, "num_bins": 4, "temperature": 2.0}])
def test_all_metrics(options):
    metrics = DIDMetrics(**options)
    for batch in make_batches():
        metrics.update(*batch)
    assert_close(metrics.compute(), expected(make_batches(), **options))


def test_the_operator_is_called_once_an_update(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return sequence_statistics(*args, **kwargs)

    monkeypatch.setattr(inputs, "sequence_statistics", counted)
    metrics = DIDMetrics()
    batches = make_batches()
    metrics.update(*batches[0])
    metrics(*batches[1])
    assert len(calls) == 2
    assert len(metrics) == 14


def test_statistics_at_hand():
    truth = expected(make_batches())
    by_sequence, by_token = DIDMetrics(), DIDMetrics()
    for policy, reference, labels in make_batches():
        by_sequence.update(sequence_statistics(policy, reference, labels))
        by_token.update(token_statistics(policy, reference, labels), labels=labels)
    assert_close(by_sequence.compute(), truth)
    assert_close(by_token.compute(), truth)


def test_sequences_that_are_no_pairs():
    policy, reference, labels = make_batches()[0]
    metrics = DIDMetrics(pairs=False)
    metrics.update(policy[:3], reference[:3], labels[:3])  # an odd number
    values = metrics.compute()
    assert set(values) == {
        "token_did_entropy", "token_did_concentration", "token_did_log_partition", "policy_entropy", "kl", "reverse_kl",
        "reward", "reward_per_token",
    }  # fmt: skip
    assert values["kl"] > 0


def test_forward_reset_prefix_clone_pickle():
    batches = make_batches()
    metrics = DIDMetrics(prefix="val/", postfix="/x")
    for batch in batches:
        of_batch = metrics(*batch)
        assert_close(of_batch, {f"val/{name}/x": value for name, value in expected([batch]).items()})
    truth = {f"val/{name}/x": value for name, value in expected(batches).items()}
    assert_close(metrics.compute(), truth)
    assert_close(pickle.loads(pickle.dumps(metrics)).compute(), truth)
    other = metrics.clone(prefix="test/")
    other.reset()
    other.update(*batches[0])
    assert_close(other.compute(), {f"test/{name}/x": value for name, value in expected(batches[:1]).items()})
    assert_close(metrics.compute(), truth)
    assert metrics.state_dict() == {}


def test_forward_is_differentiable():
    policy, reference, labels = make_batches()[0]
    policy.requires_grad_()
    metrics = DIDMetrics()
    values = metrics(policy, reference, labels)
    (values["reward_margin"] + values["token_did_entropy"]).backward()
    assert policy.grad.abs().sum() > 0
    metrics.update(policy, reference, labels)
    assert not any(state.requires_grad for m in metrics.values() for state in m.metric_state.values())


def test_unequal_metrics_that_start_equal():
    """At pi = rho the KLs are 0 and the DID's entropy is its log-partition: they must not be taken for the same."""
    metrics = DIDMetrics()
    policy, _, labels = make_batches()[0]
    batches = [[policy, policy.clone(), labels], *make_batches(seed=3)]
    for batch in batches:
        metrics.update(*batch)
    assert_close(metrics.compute(), expected(batches))


def test_a_metric_added():
    metrics = DIDMetrics(beta=0.7)
    metrics.add_metrics({"loss": PreferenceLoss(beta=0.7)})
    for batch in make_batches():
        metrics.update(*batch)
    values = metrics.compute()
    assert 0 < values.pop("loss") < 2
    assert_close(values, expected(make_batches(), beta=0.7))


class Logs(lightning.LightningModule):
    """Somebody's own module: two lines make it log the DID."""

    def __init__(self, of_collection: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.did = DIDMetrics(prefix="val/")
        self.of_collection = of_collection

    def validation_step(self, batch, batch_idx):
        self.did.update(*batch)
        if self.of_collection:
            self.log_dict(self.did)

    def on_validation_epoch_end(self):
        if not self.of_collection:
            self.log_dict(self.did.compute())
            self.did.reset()


@pytest.mark.parametrize("of_collection", [True, False])
def test_logged_by_lightning(of_collection):
    run = trainer()
    module = Logs(of_collection)
    truth = {f"val/{name}": value for name, value in expected(make_batches()).items()}
    for _ in range(2):  # Lightning resets what it logs
        run.validate(module, DataLoader(make_batches(), batch_size=None), verbose=False)
        assert_close({n: v for n, v in run.callback_metrics.items() if n.startswith("val/")}, truth)
