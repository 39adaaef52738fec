"""Every metric against NumPy, in every form of input, and the contract of a torchmetrics metric."""

from __future__ import annotations

import copy
import functools
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryCalibrationError

from lit_did import functional as F
from lit_did import metrics as M
from lit_did import sequence_statistics, token_statistics
from lit_did.functional.inputs import as_pairs
from lit_did.functional.preference import check_preference_loss
from lit_did.functional.rewards import DISPLACEMENTS
from lit_did.ops import SequenceStatistics
from tests.metrics.oracle import expected, make_batches

BETA = {"beta": 0.7}


def mean_loss(*arguments, beta: float, **options) -> torch.Tensor:
    pairs = as_pairs(F.as_sequences(*arguments, **options))
    return F.preference_loss(pairs.chosen_log_ratio, pairs.rejected_log_ratio, beta=beta)[pairs.counts].mean()


# name in the oracle: (class, its arguments, functional twin, its arguments)
CASES = {
    "token_did_entropy": (M.TokenDIDEntropy, {}, F.token_did_entropy, {}),
    "token_did_concentration": (M.TokenDIDConcentration, {}, F.token_did_concentration, {}),
    "token_did_log_partition": (M.TokenDIDLogPartition, {}, F.token_did_log_partition, {}),
    "policy_entropy": (M.PolicyEntropy, {}, F.policy_entropy, {}),
    "kl": (M.PolicyKL, {}, F.policy_kl, {}),
    "reverse_kl": (M.PolicyKL, {"reverse": True}, F.policy_kl, {"reverse": True}),
    "reward": (M.LogRatioReward, BETA, F.log_ratio_reward, BETA),
    "reward_per_token": (
        M.LogRatioReward, {**BETA, "per_token": True}, F.log_ratio_reward, {**BETA, "per_token": True},
    ),
    "reward_margin": (M.RewardMargin, BETA, F.reward_margin, BETA),
    "reward_accuracy": (M.RewardAccuracy, {}, F.reward_accuracy, {}),
    "calibration_error": (M.RewardCalibration, {**BETA, "num_bins": 4}, F.reward_calibration, {**BETA, "num_bins": 4}),
    "loss": (M.PreferenceLoss, BETA, mean_loss, BETA),
    **{
        name: (
            M.LikelihoodDisplacement,
            {"only": name},
            lambda *a, name=name, **k: F.likelihood_displacement(*a, **k)[name],
            {},
        )
        for name in DISPLACEMENTS
    },
}  # fmt: skip
ORACLE = functools.partial(expected, beta=0.7, num_bins=4, loss=True)
each = pytest.mark.parametrize("name", CASES)
INFORMATION = (
    "token_did_entropy",
    "token_did_concentration",
    "token_did_log_partition",
    "policy_entropy",
    "kl",
    "reverse_kl",
)


def make(name: str, **options):
    cls, arguments, _, _ = CASES[name]
    return cls(**arguments, **options)


def value_of(metric, batches) -> float:
    for batch in batches:
        metric.update(*batch)
    value = metric.compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    return value.item()


def close(value: float):
    # float32 log-probabilities of some 5 tokens, each good to 1e-6
    return pytest.approx(value, rel=1e-5, abs=2e-6)


@each
def test_uneven_batches_with_a_tie_and_an_empty_completion(name):
    batches = make_batches()
    truth = ORACLE(batches)
    assert value_of(make(name), batches) == close(truth[name])
    if name not in ("reward_accuracy", "chosen_fell"):  # the premise: a mean of the batches' means is another
        means = [ORACLE([batch])[name] for batch in batches]
        assert sum(means) / len(means) != pytest.approx(truth[name], rel=1e-4)


@each
@pytest.mark.parametrize("form", ["tokens", "sequences", "packed", "packed tokens"])
def test_statistics_at_hand_and_packed_logits(name, form):
    metric = make(name)
    for policy, reference, labels in make_batches():
        rows, length = labels.shape
        offsets = torch.arange(0, rows * length + 1, length)
        packed = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        if form == "tokens":
            metric.update(token_statistics(policy, reference, labels), labels=labels)
        elif form == "sequences":
            metric.update(sequence_statistics(policy, reference, labels))
        elif form == "packed":
            metric.update(*packed, cu_seqlens=offsets)
        else:
            metric.update(token_statistics(*packed), labels=packed[2], cu_seqlens=offsets)
    assert metric.compute().item() == close(ORACLE(make_batches())[name])


@each
@pytest.mark.parametrize("ignore_index", [-1, 3])
def test_other_ignore_index(name, ignore_index):
    batches = make_batches(ignore_index=ignore_index)
    value = value_of(make(name, ignore_index=ignore_index), batches)
    assert value == close(ORACLE(batches, ignore_index=ignore_index)[name])
    at_hand = make(name, ignore_index=ignore_index)
    for policy, reference, labels in batches:
        at_hand.update(token_statistics(policy, reference, labels, ignore_index=ignore_index), labels=labels)
    assert at_hand.compute().item() == close(value)


@each
def test_temperature(name):
    batches = make_batches()
    truth = ORACLE(batches, temperature=0.5)
    assert value_of(make(name, temperature=0.5), batches) == close(truth[name])


@each
def test_extra_padding_changes_nothing(name):
    batches = make_batches()
    padded = []
    for policy, reference, labels in batches:
        junk = torch.full((labels.shape[0], 3, policy.shape[-1]), torch.nan)  # not even read
        ignored = torch.full((labels.shape[0], 3), -100)
        padded.append([torch.cat([junk, policy, junk], 1), torch.cat([junk, reference, junk], 1)])
        padded[-1].append(torch.cat([ignored, labels, ignored], 1))
    assert value_of(make(name), padded) == pytest.approx(value_of(make(name), batches), rel=1e-9, abs=1e-12)


@each
def test_one_batch_or_many_micro_batches(name):
    """What gradient accumulation does: the same pairs, in other portions."""
    policy, reference, labels = make_batches(sizes=(6,))[0]
    pairs = [[side[[i, i + 6]] for side in (policy, reference, labels)] for i in range(6)]
    whole = value_of(make(name), [[policy, reference, labels]])
    assert value_of(make(name), pairs) == pytest.approx(whole, rel=1e-12, abs=1e-15)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name, dtype):
    """Against the truth of the rounded logits: rounding them is the caller's choice, adding in low precision is not."""
    batches = make_batches(dtype=dtype)
    assert value_of(make(name), batches) == close(ORACLE(batches)[name])


@each
def test_functional_twin(name):
    _, _, twin, arguments = CASES[name]
    for batch in make_batches():
        value = twin(*batch, **arguments)
        assert value.dtype == torch.float64
        assert value.item() == close(ORACLE([batch])[name])
    policy, reference, labels = make_batches()[0]
    statistics = token_statistics(policy, reference, labels)
    assert twin(statistics, labels=labels, **arguments).item() == close(ORACLE([[policy, reference, labels]])[name])


@each
def test_forward_returns_the_batch_and_adds_it(name):
    batches = make_batches()
    metric = make(name)
    for batch in batches:
        assert metric(*batch).item() == close(ORACLE([batch])[name])
    assert metric.compute().item() == pytest.approx(value_of(make(name), batches), rel=1e-12)


@each
def test_reset_and_no_data_yet(name):
    metric = make(name)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    value_of(metric, make_batches(seed=1))
    metric.reset()
    assert value_of(metric, make_batches()) == close(ORACLE(make_batches())[name])
    nothing = make(name)
    policy, reference, labels = make_batches()[0]
    nothing.update(policy, reference, torch.full_like(labels, -100))
    assert nothing.compute().isnan()


@each
def test_pickle_clone_and_state_dict(name):
    first, *rest = make_batches()
    metric = make(name)
    metric.update(*first)
    assert metric.state_dict() == {}  # nothing of it in a model's checkpoint
    saved = make(name)
    saved.persistent(True)
    metric.persistent(True)
    saved.load_state_dict(metric.state_dict())
    saved._update_count = 1  # torchmetrics keeps no count of updates in a state_dict
    truth = close(ORACLE([first, *rest])[name])
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric), saved):
        assert other.compute() == metric.compute()
        assert value_of(other, rest) == truth
    assert metric.compute().item() == close(ORACLE([first])[name])  # the original is untouched
    assert hash(metric) != hash(make(name))


@each
def test_sums_keep_their_dtypes_and_sizes(name):
    metric = make(name)
    sizes = [state.shape for state in metric.metric_state.values()]
    assert [state.dtype for state in metric.metric_state.values()] == [torch.float64, torch.int64]
    value_of(metric, make_batches())
    for changed in (metric, metric.to(torch.bfloat16), torch.nn.ModuleList([metric]).half()[0], metric.float()):
        assert [state.dtype for state in changed.metric_state.values()] == [torch.float64, torch.int64]
        assert [state.shape for state in changed.metric_state.values()] == sizes
    assert value_of(metric, []) == close(ORACLE(make_batches())[name])


def of_sequences(num_tokens: list[int], **fields) -> SequenceStatistics:
    zeros = torch.zeros(len(num_tokens))
    values = dict.fromkeys(SequenceStatistics._fields, zeros) | {k: torch.tensor(v) for k, v in fields.items()}
    return SequenceStatistics(**values | {"num_tokens": torch.tensor(num_tokens)})


@pytest.mark.parametrize("name", [*INFORMATION, "reward_per_token"])
def test_a_billion_tokens_do_not_saturate(name):
    field = {"reward_per_token": "log_ratio"}.get(name, name)
    is_sum = field in ("log_ratio", "token_did_log_partition")
    metric = make(name)
    metric.update(of_sequences([10**9, 10**9], **{field: [1e9, 1e9] if is_sum else [1.0, 1.0]}))
    for _ in range(1000):
        metric.update(of_sequences([1, 1], **{field: [3.0, 5.0]}))
    tokens = 2 * 10**9 + 2000
    scale = 0.7 if name == "reward_per_token" else 1
    # float32 would lose every one of the small updates: 4e-6 of the value
    assert metric.compute().item() == pytest.approx(scale * (2e9 + 8000) / tokens, rel=1e-12)
    counts = metric.metric_state[metric._counts]
    assert counts.flatten()[-1].item() == tokens


@pytest.mark.parametrize("name", ["reward_margin", "reward_accuracy", "chosen_log_ratio", "reward"])
def test_pairs_beyond_float32(name):
    metric = make(name)
    metric.update(of_sequences([1, 1], log_ratio=[1.0, 0.0]))
    setattr(metric, metric._counts, metric.metric_state[metric._counts] + 2**24)
    for _ in range(3):
        metric.update(of_sequences([1, 1], log_ratio=[1.0, 0.0]))
    per_update = 2 if name == "reward" else 1
    assert metric.metric_state[metric._counts].flatten()[0].item() == 2**24 + 4 * per_update


@each
def test_sequences_without_tokens_do_not_count_even_as_nan(name):
    policy, reference, labels = make_batches(sizes=(4,))[0]
    statistics = sequence_statistics(policy, reference, labels)
    spoiled = SequenceStatistics(*(value.clone() for value in statistics))
    for field, value in spoiled._asdict().items():
        value[2] = 0 if field == "num_tokens" else torch.nan
    labels = labels.clone()
    labels[2] = -100
    metric = make(name)
    metric.update(spoiled)
    assert metric.compute().item() == close(ORACLE([[policy, reference, labels]])[name])


@each
def test_nan_is_not_hidden(name):
    policy, reference, labels = make_batches(sizes=(2,))[0]
    policy[0, 0, 0] = torch.nan
    metric = make(name)
    metric.update(policy, reference, labels)
    if name == "rejected_log_ratio":
        assert metric.compute().isfinite()  # it is a chosen completion that is NaN
    else:
        assert metric.compute().isnan()


@pytest.mark.parametrize("name", [name for name, (cls, *_) in CASES.items() if cls.is_differentiable])
def test_is_differentiable_is_true(name):
    _, _, twin, arguments = CASES[name]
    policy, reference, labels = (side[:4] for side in make_batches(sizes=(2,), vocabulary=4)[0])
    policy, reference = policy.double().requires_grad_(), reference.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, r: twin(p, r, labels, **arguments), (policy, reference))
    metric = make(name)
    value = metric(policy, reference, labels)
    (gradient,) = torch.autograd.grad(value, policy)
    assert gradient.abs().sum() > 0
    metric.update(policy, reference, labels)
    assert not any(state.requires_grad for state in metric.metric_state.values())  # no graph is kept


@pytest.mark.parametrize("name", INFORMATION)
def test_bits(name):
    batches = make_batches()
    assert value_of(make(name, unit="bits"), batches) == close(ORACLE(batches, unit="bits")[name])
    twin, arguments = CASES[name][2:]
    assert twin(*batches[0], unit="bits", **arguments).item() == close(ORACLE(batches[:1], unit="bits")[name])


def test_displacement_as_a_dict():
    metric = M.LikelihoodDisplacement()
    for batch in make_batches():
        metric.update(*batch)
    truth = ORACLE(make_batches())
    assert {name: value.item() for name, value in metric.compute().items()} == {
        name: close(truth[name]) for name in DISPLACEMENTS
    }


def test_calibration_is_torchmetrics_own_of_both_orders():
    policy, reference, labels = make_batches(sizes=(200,))[0]
    statistics = sequence_statistics(policy, reference, labels)
    chosen, rejected = statistics.log_ratio.double().chunk(2)
    keep = (statistics.num_tokens > 0).view(2, -1).all(0) & (chosen != rejected)
    p = torch.sigmoid(0.3 * (chosen - rejected))[keep]
    theirs = BinaryCalibrationError(n_bins=20, norm="l1")
    value = theirs(torch.cat([p, 1 - p]), torch.cat([torch.ones(len(p)), torch.zeros(len(p))]).int())
    ours = F.reward_calibration(
        SequenceStatistics(*(field[keep.repeat(2)] for field in statistics)), beta=0.3, num_bins=10
    )
    assert ours.item() == pytest.approx(value.item(), abs=1e-6)
    assert ours > 0.02  # the premise


def test_calibration_of_a_calibrated_and_of_an_overconfident_reward():
    margins = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    # Each margin stands for as many pairs as its probability says: |margin| right with sigmoid(|margin|).
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(len(margins), generator=generator, dtype=torch.float64) < torch.sigmoid(margins.abs())
    sign = torch.where(right, 1, -1)
    log_ratio = torch.cat([margins.abs() * sign, torch.zeros_like(margins)])
    statistics = of_sequences([1] * len(log_ratio))._replace(log_ratio=log_ratio)
    # 1e5 pairs in 10 bins: a standard deviation of at most 0.5 / sqrt(1e4) a bin
    assert F.reward_calibration(statistics, beta=1.0) < 0.01
    assert F.reward_calibration(statistics, beta=3.0) > 0.05


@pytest.mark.parametrize("first", ["equal", "different"])
def test_a_collection_of_the_users_own_never_mixes_states_up(first):
    """torchmetrics shares states that look alike after the first update: at pi = rho unlike metrics do."""
    metrics = {name: make(name) for name in CASES}
    metrics["kl_hot"] = make("kl", temperature=2.0)
    metrics["calibrated_otherwise"] = M.RewardCalibration(beta=0.1, num_bins=4)
    metrics |= {f"loss_{loss}": M.PreferenceLoss(loss=loss, beta=0.5) for loss in ("sigmoid", "hinge", "ipo")}
    collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()})
    start = make_batches(seed=5)[1]
    if first == "equal":
        start[1] = start[0].clone()
    batches = [start, *make_batches()]
    for batch in batches:
        collection.update(*batch)
    values = collection.compute()
    for name, metric in metrics.items():
        assert values[name].item() == value_of(metric, batches), name


PREFERENCE_LOSSES = [
    {},
    {"label_smoothing": 0.2},
    {"loss": "robust", "label_smoothing": 0.2},
    *({"loss": loss} for loss in F.LOSSES if loss not in ("sigmoid", "robust")),
    {"loss": "simpo", "gamma": 1.0, "nll_weight": 0.5},
    {"nll_weight": 0.3},
    {"loss": {"hinge": 0.5, "ipo": 0.1, "sft": 0.2}},
    {"loss": {"cpo": 0.5, "slic": 0.1}},
]


@pytest.mark.parametrize("options", PREFERENCE_LOSSES, ids=lambda options: "_".join(map(str, options.values())))
def test_every_preference_loss(options):
    batches = make_batches()
    terms = check_preference_loss(
        **{"beta": 0.7, "loss": "sigmoid", "label_smoothing": 0, "gamma": None, "nll_weight": None, **options}
    )
    free, losses, nll, chosen_tokens = terms.reference_free, [], 0.0, 0
    for policy, reference, labels in batches:
        counts = labels != -100
        log_pi, log_rho = (
            torch.where(counts, side.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0], 0)
            for side in (policy, reference)
        )
        compared = (log_pi if free else log_pi - log_rho).sum(-1)
        tokens = counts.sum(-1)
        for i in range(len(tokens) // 2):
            j = i + len(tokens) // 2
            if tokens[i] and tokens[j]:
                lengths = {"chosen_num_tokens": tokens[i], "rejected_num_tokens": tokens[j]}
                chosen = log_pi[i].sum()
                losses.append(
                    F.preference_loss(compared[i], compared[j], beta=0.7, chosen_logprob=chosen, **options, **lengths)
                    + terms.sft * chosen / tokens[i]  # without its SFT term
                )
                nll, chosen_tokens = nll - chosen, chosen_tokens + tokens[i]
    expected = close((torch.stack(losses).mean() + terms.sft * nll / chosen_tokens).item())
    metric = M.PreferenceLoss(beta=0.7, **options)
    assert value_of(metric, batches) == expected
    if free:  # nothing is read that a policy alone has not
        unread = set(SequenceStatistics._fields) - {"policy_logprob", "num_tokens"}
        for batch in batches:
            statistics = sequence_statistics(*batch)
            nan = torch.full_like(statistics.policy_logprob, torch.nan)
            metric.update(statistics._replace(**dict.fromkeys(unread, nan)))
        assert metric.compute().item() == expected


@pytest.mark.parametrize("loss", F.LOSSES)
def test_gradients_of_every_preference_loss_pass_by_pairs_that_do_not_count(loss):
    """The last pair's rejected completion is empty: it has no length to divide by."""
    policy, reference, labels = make_batches(sizes=(3,))[0]
    policy.requires_grad_()
    (gradient,) = torch.autograd.grad(M.PreferenceLoss(loss=loss)(policy, reference, labels), policy)
    assert gradient.isfinite().all()
    assert (gradient[[2, 5]] == 0).all()
    read = [1] if loss == "sft" else [1, 4]
    assert (gradient[read] != 0).any(-1).any(-1).all()


@each
def test_plot(name, tmp_path):
    metric = make(name)
    values = [metric(*batch) for batch in make_batches()]
    figure, axes = plt.subplots(1, 2)
    metric.plot(ax=axes[0])
    metric.plot(values, ax=axes[1])
    assert len(axes[0].lines) >= 1
    assert axes[1].lines[0].get_ydata().tolist() == [value.item() for value in values]
    figure.savefig(tmp_path / "plot.png")
    plt.close(figure)


@pytest.mark.parametrize("name", CASES)
def test_flags(name):
    metric = make(name)
    assert metric.full_state_update is False
    assert isinstance(metric.is_differentiable, bool)
    assert metric.higher_is_better == {
        "reward_margin": True, "reward_accuracy": True, "calibration_error": False, "loss": False,
    }.get(name)  # fmt: skip


STATISTICS = of_sequences([1, 1])
LOGITS = torch.zeros(2, 1, 3)
LABELS = torch.zeros(2, 1, dtype=torch.long)
TOKENS = token_statistics(LOGITS, LOGITS, LABELS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS,), ValueError, "`reference_logits` with logits, but got None"),
        ((LOGITS, LOGITS), ValueError, "`labels` with logits, but got None"),
        ((STATISTICS, LOGITS), ValueError, "`reference_logits` to be None with SequenceStatistics, but got Tensor"),
        ((STATISTICS, None, LABELS), ValueError, "`labels` to be None with SequenceStatistics"),
        ((TOKENS,), ValueError, "`labels` with TokenStatistics"),
        ((TOKENS, LOGITS, LABELS), ValueError, "`reference_logits` to be None with TokenStatistics"),
        ((TOKENS, None, LABELS[:1]), ValueError, r"`policy_logprob` to have the shape of `labels`, \(1, 1\)"),
        ((TOKENS, None, LABELS.float()), TypeError, "`labels` to be integers, but got torch.float32"),
        (([1.0],), TypeError, "to be a tensor, TokenStatistics or SequenceStatistics, but got list"),
        ((STATISTICS._replace(kl=torch.zeros(3)),), ValueError, r"`kl` to have the shape of `num_tokens`, \(2,\)"),
        ((of_sequences([1, 1, 1]),), ValueError, "an even number of sequences, the chosen .* but got 3"),
        ((LOGITS, LOGITS, LABELS + 3), ValueError, r"`labels` to be in \[0, 3\)"),
    ],
)
def test_wrong_input_is_refused(arguments, error, message):
    metric = M.RewardMargin()
    with pytest.raises(error, match=message):
        metric.update(*arguments)
    assert all((state == 0).all() for state in metric.metric_state.values())


@pytest.mark.parametrize(
    ("make_wrong", "error", "message"),
    [
        (lambda: M.TokenDIDEntropy(unit="bit"), ValueError, "`unit` to be one of 'nats', 'bits', but got 'bit'"),
        (lambda: M.RewardMargin(beta="0.1"), TypeError, "`beta` to be an int or a float, but got '0.1'"),
        (lambda: M.RewardMargin(beta=0), ValueError, "`beta` to be above 0, but got 0"),
        (lambda: M.RewardCalibration(num_bins=0), ValueError, "`num_bins` to be an integer of at least 1, but got 0"),
        (lambda: M.LikelihoodDisplacement(only="chosen"), ValueError, "`only` to be one of 'chosen_log_ratio'"),
        (lambda: M.PolicyKL(temperature=0), ValueError, "`temperature` to be in"),
        (lambda: M.PolicyKL(ignore_index=1.5), TypeError, "`ignore_index` to be an integer, but got 1.5"),
        (lambda: M.PolicyKL(backend="cuda"), ValueError, "`backend` to be one of"),
        (lambda: M.PolicyKL(betta=1), ValueError, "Unexpected keyword arguments: `betta`"),
        (lambda: M.PreferenceLoss(loss="dpo"), ValueError, "`loss` to be one of"),
        (lambda: F.policy_kl(STATISTICS, unit="bit"), ValueError, "`unit`"),
    ],
)
def test_wrong_arguments_are_refused(make_wrong, error, message):
    with pytest.raises(error, match=message):
        make_wrong()
