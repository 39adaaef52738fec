"""DIDEntropy is `estimate_did_entropy` of every prompt, however its samples come, and a torchmetrics metric."""

from __future__ import annotations

import copy
import math
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_did.functional import DIDEntropyEstimate, estimate_did_entropy
from lit_did.metrics import DIDEntropy
from tests.metrics.samples import COUNTS, batches_of, completions


def estimates_of(samples: dict[str, Tensor], **options) -> dict[int, DIDEntropyEstimate | None]:
    """One prompt after the other, token ids compared as they are."""
    estimates: dict[int, DIDEntropyEstimate | None] = dict.fromkeys(COUNTS)
    for prompt in (7, -3, 2**40):
        mine = samples["group"] == prompt
        given = {name: value[mine] for name, value in samples.items() if name != "group"}
        estimates[prompt] = estimate_did_entropy(**given, **options)
    return estimates


def make(**options) -> DIDEntropy:
    return DIDEntropy(max_new_tokens=6, vocab_size=100, **options)


def updated(metric: DIDEntropy, batches: list[dict[str, Tensor]]) -> DIDEntropy:
    for batch in batches:
        metric.update(**batch)
    return metric


def close(estimate: DIDEntropyEstimate | None):
    # the same samples in another order
    return None if estimate is None else pytest.approx(estimate[:-1], rel=1e-9)


def assert_estimates(metric: DIDEntropy, expected: dict[int, DIDEntropyEstimate | None]) -> None:
    seen = metric.estimates()
    assert seen.keys() == expected.keys()
    for prompt, estimate in seen.items():
        assert (estimate and estimate[:-1]) == close(expected[prompt]), prompt
        assert estimate is None or estimate.reason == expected[prompt].reason


def test_every_prompt_has_its_estimate():
    samples = completions()
    expected = estimates_of(samples)
    assert [estimate and estimate.reliable for estimate in expected.values()] == [True, False, False, None, None]
    assert expected[7].num_distinct < 60  # the premise: some completions come twice
    for batches in ([samples], batches_of(samples)):
        assert_estimates(updated(make(), batches), expected)
        assert_estimates(updated(make(confidence=0.8), batches), estimates_of(samples, confidence=0.8))


def test_values():
    # Without the prompt of two samples, whose interval is infinite.
    samples = {name: value[completions()["group"] != 2**40] for name, value in completions().items()}
    every = estimates_of(completions(), confidence=0.8)
    one, other = every[7], every[-3]
    values = {name: value.item() for name, value in updated(make(confidence=0.8), [samples]).compute().items()}
    # Welch's t interval of a mean of two.
    variances = [one.standard_error**2 / 4, other.standard_error**2 / 4]
    spread = sum(v**2 / (e.effective_sample_size - 1) for v, e in zip(variances, (one, other), strict=True))
    margin = stats.t.ppf(0.9, sum(variances) ** 2 / spread) * math.sqrt(sum(variances))
    entropy = (one.entropy + other.entropy) / 2
    assert values == pytest.approx(
        {
            "entropy": entropy,
            "lower": entropy - margin,
            "upper": entropy + margin,
            "entropy_per_token": entropy / 6,
            "concentration": 6 * math.log(100) - entropy,
            "log_partition": (one.log_partition + other.log_partition) / 2,
            "effective_sample_size": (one.effective_sample_size + other.effective_sample_size) / 2,
            "reliable": 1 / 4,  # the prompts without an estimate count
            "num_prompts": 4,
        },
        rel=1e-9,
    )
    plain = DIDEntropy()(**samples)
    assert values.keys() - plain.keys() == {"entropy_per_token", "concentration"}
    assert DIDEntropy(max_new_tokens=3)(**samples).keys() - plain.keys() == {"entropy_per_token"}


def test_one_prompt_has_its_own_interval():
    samples = {name: value[completions()["group"] == 7] for name, value in completions().items()}
    expected = estimates_of(completions())[7]
    values = updated(make(), [samples]).compute()
    assert [values[name].item() for name in ("entropy", "lower", "upper", "log_partition")] == pytest.approx(
        [expected.entropy, expected.lower, expected.upper, expected.log_partition], rel=1e-9
    )


def test_an_infinite_interval_makes_the_means_infinite():
    values = updated(make(), [completions()]).compute()
    assert estimates_of(completions())[2**40].upper == math.inf  # the premise
    assert (values["lower"], values["upper"]) == (-math.inf, math.inf)
    assert values["entropy"].isfinite()


def test_certain_estimates_have_an_interval_of_no_width():
    logprob, ids = torch.full((6,), -2.0), torch.arange(6)
    metric = DIDEntropy()
    metric.update(logprob, logprob, logprob, ids % 2, ids)
    assert metric.estimates()[0].standard_error == 0  # the premise: no rounding
    values = metric.compute()
    assert values["lower"] == values["entropy"] == values["upper"]


@pytest.mark.parametrize("kind", ["ids", "log-probabilities"])
def test_other_ways_to_tell_completions_apart(kind):
    samples = completions()
    if kind == "ids":
        samples["sequences"] = torch.unique(samples["sequences"], dim=0, return_inverse=True)[1]
        expected = estimates_of(samples)
        batches = batches_of(samples)
    else:
        del samples["sequences"]
        same = (torch.arange(106) % 2 == 0) & (samples["group"] != 5)
        for name in ("policy_logprob", "reference_logprob", "proposal_logprob"):
            samples[name][same] = -2.0
        signed = same.nonzero()[:20, 0]
        samples["reference_logprob"][signed] = torch.tensor([0.0, -0.0]).double().repeat(10)
        expected = estimates_of(samples)
        assert expected[7].num_distinct < 45  # the premise
        batches = [{name: value[part] for name, value in samples.items()} for part in (slice(0, 50), slice(50, None))]
    assert_estimates(updated(make(), batches), expected)


def test_padding_that_is_a_token():
    """Only at the end is it padding; inside a completion it is a token like others."""
    logprob, prompt = torch.full((2,), -1.0), torch.zeros(2, dtype=torch.long)
    for padding, narrow, wide, num_distinct in (
        (0, [[5, 0, 6], [5, 6, 0]], [[5, 0, 6, 0], [5, 6, 0, 0]], 2),
        (-1, [[5, 0], [5, 0]], [[5, 0, 0], [5, 0, -1]], 2),
        (0, [[5, 0], [5, 0]], [[5, 0, 0], [5, 0, 0]], 1),
    ):
        metric = DIDEntropy(padding=padding)
        for sequences in (narrow, wide):
            metric.update(logprob, logprob, logprob, prompt, torch.tensor(sequences))
        assert metric.estimates()[0].num_distinct == num_distinct


def test_forward_reset_pickle_and_clone():
    samples = completions()
    first, *rest = batches_of(samples, (50, 30, 26))
    metric = make()
    of_batch = metric(**rest[1])
    assert of_batch["entropy"] == make()(**rest[1])["entropy"]
    metric.reset()
    of_batch = metric(**first)
    assert of_batch["num_prompts"] == metric.compute()["num_prompts"] == len(first["group"].unique())
    assert metric.state_dict() == {}
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
        for batch in rest:
            other(**batch)
        assert_estimates(other, estimates_of(samples))
        assert other.compute()["num_prompts"] == 5
    assert len(metric.metric_state[metric._groups]) == 1  # the original is untouched


def test_no_data_yet():
    nothing = {name: value[:0] for name, value in completions().items()}
    empty = make()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        unused = empty.compute()
    for values in (unused, updated(make(), [nothing]).compute()):
        assert values["num_prompts"] == 0
        assert all(value.isnan() for name, value in values.items() if name != "num_prompts")
    assert empty.estimates() == {}
    one = {name: value[:1] for name, value in completions().items()}
    values = updated(make(), [one]).compute()
    assert values["entropy"].isnan()
    assert (values["reliable"], values["num_prompts"]) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_the_states_dtypes(dtype):
    samples = {name: v.to(dtype) if name.endswith("logprob") else v for name, v in completions().items()}
    samples["policy_logprob"].requires_grad_()
    first, *rest = batches_of(samples)
    metric = make()
    metric(**first)  # which torchmetrics runs with gradients
    metric = updated(torch.nn.ModuleList([metric]).half()[0], rest).to(torch.bfloat16)
    for state, kind in (
        (metric._logprobs, torch.float64),
        (metric._groups, torch.int64),
        (metric._sequences, torch.int64),
    ):
        assert {part.dtype for part in metric.metric_state[state]} == {kind}
        assert not any(part.requires_grad for part in metric.metric_state[state])
    assert_estimates(metric, estimates_of(samples))


def test_plot():
    figure, axes = plt.subplots()
    values = make()(**completions())
    DIDEntropy().plot(values, ax=axes)
    assert len(axes.lines) == len(values)
    plt.close(figure)


def changed(**change):
    return lambda: DIDEntropy().update(**{**completions(), **change})


@pytest.mark.parametrize(
    ("make_wrong", "error", "words"),
    [
        (lambda: DIDEntropy(confidence=1), ValueError, r"`confidence` to be in \(0, 1\), but got 1"),
        (
            lambda: DIDEntropy(max_new_tokens=0),
            ValueError,
            "`max_new_tokens` to be an integer of at least 1, but got 0",
        ),
        (lambda: DIDEntropy(max_new_tokens=3, vocab_size=2.5), TypeError, "`vocab_size` to be an integer .* got 2.5"),
        (lambda: DIDEntropy(vocab_size=7), ValueError, "`max_new_tokens` with `vocab_size`, but got None"),
        (lambda: DIDEntropy(padding=None), TypeError, "`padding` to be an integer, but got None"),
        (changed(policy_logprob=[1.0]), TypeError, "`policy_logprob` to be a tensor of floats, but got list"),
        (changed(policy_logprob=torch.zeros(3, 2)), ValueError, "`reference_logprob` to have the shape"),
        (changed(proposal_logprob=torch.full((106,), -torch.inf)), ValueError, "`proposal_logprob` to be finite"),
        (changed(group=torch.zeros(106)), TypeError, "`group` to be a tensor of integers, but got torch.float32"),
        (changed(group=torch.zeros(3).long()), ValueError, r"`group` to have shape \(106,\), but got \(3,\)"),
        (changed(sequences=torch.zeros(106)), TypeError, "`sequences` to be a tensor of integers"),
        (changed(sequences=torch.zeros(3).long()), ValueError, "`sequences` to have shape"),
    ],
)
def test_errors(make_wrong, error, words):
    with pytest.raises(error, match=words):
        make_wrong()


def test_one_value_or_names_of_its_own():
    samples = [torch.full((30,), -5.0)] * 3 + [torch.zeros(30).long(), torch.arange(30)]
    whole, one, named = DIDEntropy(), DIDEntropy(only="entropy"), DIDEntropy(prefix="did/")
    for metric in (whole, one, named):
        metric.update(*samples)
    values = whole.compute()
    assert one.compute() == values["entropy"]
    assert named.compute() == {f"did/{name}": value for name, value in values.items()}
    with pytest.raises(ValueError, match=r"`only` to be None or one of 'entropy', .* but got 'concentration'"):
        DIDEntropy(only="concentration")  # without a vocabulary
    assert DIDEntropy(only="concentration", max_new_tokens=2, vocab_size=3).compute().isnan()
