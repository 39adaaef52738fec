"""Rewards and preference losses against their formulas in plain Python; tests/integrations holds them to TRL's code."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from lit_did.functional import LOSSES, REFERENCE_FREE_LOSSES, pair_accuracy, pair_margin, preference_loss

CHOSEN = [0.0, 3.0, -2.0, 40.0, -300.0]
REJECTED = [0.0, 1.0, 2.5, -60.0, 900.0]
# log-probabilities, as losses without a reference take them
CHOSEN_LOGPROB = [-3.0, -0.25, -40.0, -500.0, -2.0]
REJECTED_LOGPROB = [-3.0, -7.0, -12.5, -60.0, -900.0]
CHOSEN_TOKENS = [3, 1, 17, 40, 2]
MEAN = sum(CHOSEN_TOKENS) / 5
REJECTED_TOKENS = [3, 4, 5, 300, 9]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_odds(mean_logprob: float) -> float:
    """By the definition, in 60 digits."""
    with localcontext(prec=60):
        p = Decimal(mean_logprob).exp()
        return float((p / (1 - p)).ln())


def is_free(loss) -> bool:
    return any(name in REFERENCE_FREE_LOSSES for name in ([loss] if isinstance(loss, str) else loss))


def arguments(loss: str = "sigmoid", **tensor) -> tuple[list[torch.Tensor], dict]:
    """The two log-ratios, or log-probabilities, and the numbers of tokens."""
    values = (CHOSEN_LOGPROB, REJECTED_LOGPROB) if is_free(loss) else (CHOSEN, REJECTED)
    tokens = {"chosen_num_tokens": torch.tensor(CHOSEN_TOKENS), "rejected_num_tokens": torch.tensor(REJECTED_TOKENS)}
    if not is_free(loss):
        tokens["chosen_logprob"] = torch.tensor(CHOSEN_LOGPROB, dtype=torch.float64)
    return [torch.tensor(side, **{"dtype": torch.float64, **tensor}) for side in values], tokens


# of the chosen and the rejected log-ratio, their tokens, beta and the chosen log-probability
FORMULAS = [
    ({}, lambda c, r, n, m, b, p: softplus(-b * (c - r))),
    ({"label_smoothing": 0.2}, lambda c, r, n, m, b, p: 0.8 * softplus(-b * (c - r)) + 0.2 * softplus(b * (c - r))),
    (
        {"loss": "robust", "label_smoothing": 0.2},
        lambda c, r, n, m, b, p: (0.8 * softplus(-b * (c - r)) - 0.2 * softplus(b * (c - r))) / 0.6,
    ),
    ({"loss": "robust"}, lambda c, r, n, m, b, p: softplus(-b * (c - r))),
    ({"loss": "hinge"}, lambda c, r, n, m, b, p: max(0.0, 1 - b * (c - r))),
    ({"loss": "ipo"}, lambda c, r, n, m, b, p: (c / n - r / m - 1 / (2 * b)) ** 2),
    ({"loss": "slic"}, lambda c, r, n, m, b, p: max(0.0, 1 - b * (c - r)) - c / MEAN),
    ({"loss": "slic", "nll_weight": 0.3}, lambda c, r, n, m, b, p: max(0.0, 1 - b * (c - r)) - 0.3 * c / MEAN),
    ({"loss": "cpo"}, lambda c, r, n, m, b, p: softplus(-b * (c - r)) - c / MEAN),
    (
        {"loss": "cpo", "label_smoothing": 0.1, "nll_weight": 0},
        lambda c, r, n, m, b, p: 0.9 * softplus(-b * (c - r)) + 0.1 * softplus(b * (c - r)),
    ),
    ({"loss": "simpo"}, lambda c, r, n, m, b, p: softplus(0.5 - b * (c / n - r / m))),
    (
        {"loss": "simpo", "gamma": 1.3, "nll_weight": 0.5, "label_smoothing": 0.1},
        lambda c, r, n, m, b, p: (
            0.9 * softplus(1.3 - b * (c / n - r / m)) + 0.1 * softplus(b * (c / n - r / m) - 1.3) - 0.5 * c / MEAN
        ),
    ),
    ({"loss": "orpo"}, lambda c, r, n, m, b, p: b * softplus(log_odds(r / m) - log_odds(c / n)) - c / MEAN),
    ({"loss": "orpo", "nll_weight": 0.0}, lambda c, r, n, m, b, p: b * softplus(log_odds(r / m) - log_odds(c / n))),
    ({"loss": "sigmoid_norm"}, lambda c, r, n, m, b, p: softplus(-b * (c / n - r / m))),
    (
        {"loss": "sigmoid_norm", "label_smoothing": 0.2},
        lambda c, r, n, m, b, p: 0.8 * softplus(-b * (c / n - r / m)) + 0.2 * softplus(b * (c / n - r / m)),
    ),
    ({"loss": "sft"}, lambda c, r, n, m, b, p: -p / MEAN),
    ({"nll_weight": 0.3}, lambda c, r, n, m, b, p: softplus(-b * (c - r)) - 0.3 * p / MEAN),
    ({"loss": {"sigmoid": 0.8, "sft": 0.2}}, lambda c, r, n, m, b, p: 0.8 * softplus(-b * (c - r)) - 0.2 * p / MEAN),
    (
        {"loss": {"hinge": 0.5, "ipo": 2, "robust": 0.0}, "nll_weight": 0.3},
        lambda c, r, n, m, b, p: (
            0.5 * max(0.0, 1 - b * (c - r)) + 2 * (c / n - r / m - 1 / (2 * b)) ** 2 - 0.3 * p / MEAN
        ),
    ),
    (  # the default SFT term is the loss's own, and has its weight
        {"loss": {"cpo": 0.5, "slic": 0.1}, "label_smoothing": 0.1},
        lambda c, r, n, m, b, p: (
            0.5 * (0.9 * softplus(-b * (c - r)) + 0.1 * softplus(b * (c - r)) - c / MEAN)
            + 0.1 * (max(0.0, 1 - b * (c - r)) - c / MEAN)
        ),
    ),
    (  # which "sft" replaces
        {"loss": {"cpo": 0.5, "sft": 0.2}},
        lambda c, r, n, m, b, p: 0.5 * softplus(-b * (c - r)) - 0.2 * c / MEAN,
    ),
    (
        {"loss": {"simpo": 2, "orpo": 0.1}, "gamma": 0.2, "nll_weight": 0},
        lambda c, r, n, m, b, p: (
            2 * softplus(0.2 - b * (c / n - r / m)) + 0.1 * b * softplus(log_odds(r / m) - log_odds(c / n))
        ),
    ),
]  # fmt: skip
NAMES = ["_".join(map(str, options.values())) or "sigmoid" for options, _ in FORMULAS]


def test_every_loss_has_a_formula_here():
    named = [options.get("loss", "sigmoid") for options, _ in FORMULAS]
    assert {loss for loss in named if isinstance(loss, str)} == set(LOSSES)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=NAMES)
def test_losses(beta, options, formula):
    sides, tokens = arguments(**{k: v for k, v in options.items() if k == "loss"})
    expected = [
        formula(*numbers, beta, p)
        for *numbers, p in zip(
            *(side.tolist() for side in sides), CHOSEN_TOKENS, REJECTED_TOKENS, CHOSEN_LOGPROB, strict=True
        )
    ]
    loss = preference_loss(*sides, beta=beta, **options, **tokens)
    assert loss.dtype == torch.float64
    # a hundred roundings at most, and where a loss is a small difference of large terms (hinge, robust), theirs
    assert loss.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-11)


def test_the_default_beta_is_the_common_one():
    sides, _ = arguments()
    assert torch.equal(preference_loss(*sides), preference_loss(*sides, beta=0.1))


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=NAMES)
def test_gradients(options, formula):
    (chosen, rejected), tokens = arguments(**{k: v for k, v in options.items() if k == "loss"}, requires_grad=True)
    # without the pairs so far out that finite differences of 1e-6 drown in the loss's own rounding
    near = [side[:3] for side in (chosen, rejected)]
    tokens = {name: value[:3] for name, value in tokens.items()}
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, beta=0.7, **options, **tokens), near)


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=NAMES)
def test_finite_in_float32_however_far_apart(options, formula):
    far = [-1e4, -1.0, -1e-8, 0.0, 1e4]
    chosen, rejected = (side.flatten().requires_grad_() for side in torch.cartesian_prod(*[torch.tensor(far)] * 2).T)
    for tokens in (1, 500):
        loss = preference_loss(
            chosen, rejected, beta=0.1, chosen_num_tokens=tokens, rejected_num_tokens=tokens, chosen_logprob=chosen,
            **options,
        )  # fmt: skip
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss.sum(), (chosen, rejected), materialize_grads=True)
        assert all(torch.isfinite(value).all() for value in (loss, *gradients))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sft"])
def test_gradients_push_apart(loss):
    (chosen, rejected), tokens = arguments(loss, dtype=torch.float32, requires_grad=True)
    preference_loss(chosen, rejected, beta=0.1, loss=loss, **tokens).sum().backward()
    assert chosen.grad[0] < 0  # at a tie every loss raises the chosen completion and lowers the rejected one
    assert rejected.grad[0] > 0
    if loss not in (
        *REFERENCE_FREE_LOSSES,
        "ipo",
        "sigmoid_norm",
    ):  # no term of one side, no length: only the difference counts
        assert torch.equal(chosen.grad, -rejected.grad)


@pytest.mark.parametrize("logprob", [-1e-30, -1e-12, -3e-8, -1e-4, -0.5, -math.log(2), -2.0, -16.0, -90.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_near_certain_and_of_near_impossible_completions(logprob, dtype):
    chosen = torch.tensor(logprob, dtype=dtype, requires_grad=True)
    rejected = torch.tensor(-0.7, dtype=dtype)
    options = {"loss": "orpo", "beta": 1.0, "nll_weight": 0.0, "chosen_num_tokens": 1, "rejected_num_tokens": 1}
    loss = preference_loss(rejected, chosen, **options)  # as the rejected one: its loss grows with its odds
    expected = log_odds(chosen.item()) - log_odds(rejected.item())
    eps = torch.finfo(dtype).eps
    # softplus(expected); one rounding each of the two log-odds, their difference and its softplus
    assert loss.item() == pytest.approx(softplus(expected), rel=8 * eps, abs=8 * eps)
    (gradient,) = torch.autograd.grad(loss, chosen)
    # d log-odds / d log p = 1 / (1 - p)
    slope = (1 / (1 + math.exp(-expected))) / -math.expm1(chosen.item())
    assert gradient.item() == pytest.approx(slope, rel=1e3 * eps, abs=8 * eps)


def test_robust_loss_is_on_average_that_of_the_right_labels():
    sides, _ = arguments()
    for share in (0.1, 0.3):
        options = {"loss": "robust", "label_smoothing": share, "beta": 0.7}
        mean = (1 - share) * preference_loss(*sides, **options) + share * preference_loss(*sides[::-1], **options)
        torch.testing.assert_close(mean, preference_loss(*sides, beta=0.7), rtol=1e-12, atol=1e-12)


def test_ipo_of_one_token_is_the_papers():
    sides, _ = arguments()
    loss = preference_loss(*sides, beta=0.3, loss="ipo", chosen_num_tokens=1, rejected_num_tokens=1)
    torch.testing.assert_close(loss, (sides[0] - sides[1] - 1 / 0.6) ** 2)


def test_label_smoothing_is_least_where_the_policy_is_as_sure_as_the_labels():
    h = torch.linspace(-10, 40, 5001, dtype=torch.float64)
    loss = preference_loss(h, torch.zeros_like(h), beta=0.1, label_smoothing=0.2)
    assert float(torch.sigmoid(0.1 * h[loss.argmin()])) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_pairs_of_two_sets_by_broadcasting(loss):
    (chosen, rejected), tokens = arguments(loss)
    columns = {name: value if name == "rejected_num_tokens" else value[:, None] for name, value in tokens.items()}
    grid = preference_loss(chosen[:, None], rejected, loss=loss, **columns)
    assert grid.shape == (5, 5)
    torch.testing.assert_close(grid.diagonal(), preference_loss(chosen, rejected, loss=loss, **tokens))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_completion_is_no_nan(loss):
    zero = torch.zeros(1, requires_grad=True)
    tokens = {"chosen_num_tokens": 0, "rejected_num_tokens": 4, "chosen_logprob": zero}
    value = preference_loss(zero, torch.tensor([-2.0]), loss=loss, **tokens)
    (gradient,) = torch.autograd.grad(value, zero)
    assert value.isfinite()
    assert gradient.isfinite()


@pytest.mark.parametrize(
    ("loss", "given", "missing"),
    [
        ("ipo", ("rejected",), "chosen"),
        ("ipo", ("chosen",), "rejected"),
        ("simpo", ("chosen",), "rejected"),
        ("orpo", ("rejected",), "chosen"),
        ("sigmoid_norm", ("chosen",), "rejected"),
        ("sft", ("rejected",), "chosen"),
        ("slic", ("rejected",), "chosen"),
        ("cpo", ("rejected",), "chosen"),
    ],
)
def test_a_missing_length_is_refused(loss, given, missing):
    sides, tokens = arguments(loss)
    tokens = {
        name: value for name, value in tokens.items() if name.removesuffix("_num_tokens") in (*given, "chosen_logprob")
    }
    with pytest.raises(ValueError, match=rf"Expected `{missing}_num_tokens` with `loss='{loss}'`.*but got None"):
        preference_loss(*sides, loss=loss, **tokens)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "dpo"}, ValueError, "`loss` to be one of 'sigmoid', .* 'sft', or weights of them, but got 'dpo'"),
        ({"beta": 0.0}, ValueError, "`beta` to be above 0, but got 0.0"),
        ({"beta": True}, TypeError, "`beta` to be an int or a float, but got True"),
        ({"label_smoothing": 0.5}, ValueError, r"`label_smoothing` to be in \[0, 0.5\), but got 0.5"),
        *(
            ({"loss": loss, "label_smoothing": 0.1}, ValueError, f"`label_smoothing` to be 0 with `loss='{loss}'`")
            for loss in ("hinge", "ipo", "slic", "orpo")
        ),
        *(
            ({"loss": loss, "gamma": 0.5}, ValueError, f"`gamma` to be None with `loss='{loss}'`, but got 0.5")
            for loss in LOSSES
            if loss != "simpo"
        ),
        ({"loss": "sft", "nll_weight": 1.0}, ValueError, "`nll_weight` to be None with `loss='sft'`, which holds the"),
        ({"loss": {"ipo": 1, "sft": 0}, "nll_weight": 1}, ValueError, "`nll_weight` to be None with `loss={'ipo': 1"),
        ({"nll_weight": -0.1}, ValueError, "`nll_weight` to be finite and at least 0, but got -0.1"),
        ({"loss": {}}, ValueError, "`loss` to hold at least one of 'sigmoid', .* but got {}"),
        ({"loss": {"dpo": 1}}, ValueError, "`loss` to be one of 'sigmoid', .*, or weights of them, but got 'dpo'"),
        ({"loss": {"ipo": -1}}, ValueError, "`loss` to hold finite weights of at least 0, but got -1 for 'ipo'"),
        ({"loss": {"ipo": math.inf}}, ValueError, "`loss` to hold finite weights of at least 0, but got inf for 'ipo'"),
        ({"loss": {"ipo": math.nan}}, ValueError, "`loss` to hold finite weights of at least 0, but got nan for 'ipo'"),
        ({"loss": {"ipo": "1"}}, TypeError, "`loss` to be a dict of names and weights, .*, for 'ipo', but got '1'"),
        ({"loss": {"ipo": True}}, TypeError, "`loss` to be a dict of names and weights, .*, for 'ipo', but got True"),
        ({"loss": {"ipo": 0, "sft": 0}}, ValueError, "`loss` to hold a weight above 0, but got {'ipo': 0, 'sft': 0}"),
        ({"loss": ["ipo", "sft"]}, TypeError, r"`loss` to be a name or a dict of names and weights, but got \['ipo'"),
        ({"loss": {"sigmoid": 1, "cpo": 1}}, ValueError, "same implicit reward .*, but got 'sigmoid' and 'cpo'"),
        ({"loss": {"slic": 1, "orpo": 1}}, ValueError, "same implicit reward .*, but got 'slic' and 'orpo'"),
        (
            {"loss": {"sigmoid": 1, "robust": 1}, "label_smoothing": 0.1},
            ValueError,
            "`label_smoothing` to be 0 with `loss=.*`, where 'sigmoid' and 'robust' have it, but got 0.1",
        ),
        ({"loss": {"ipo": 1, "hinge": 1}, "label_smoothing": 0.1}, ValueError, "`label_smoothing` to be 0 with `loss="),
        ({"loss": {"cpo": 1, "slic": 1}, "gamma": 0.1}, ValueError, "`gamma` to be None with `loss={'cpo': 1"),
        ({"loss": "simpo", "gamma": -1}, ValueError, "`gamma` to be finite and at least 0, but got -1"),
        ({"loss": "simpo", "gamma": "1"}, TypeError, "`gamma` to be an int, a float or None, but got '1'"),
        ({"loss": "cpo", "nll_weight": math.nan}, ValueError, "`nll_weight` to be finite and at least 0, but got nan"),
        ({"loss": "orpo", "nll_weight": math.inf}, ValueError, "`nll_weight` to be finite and at least 0, but got inf"),
    ],
)
def test_options_out_of_range_or_of_another_loss_are_refused(options, error, message):
    sides, tokens = arguments()
    with pytest.raises(error, match=message):
        preference_loss(*sides, **options, **tokens)


def test_the_sft_term_wants_the_log_probability():
    sides, tokens = arguments()
    del tokens["chosen_logprob"]
    with pytest.raises(ValueError, match="Expected `chosen_logprob` with `loss='sigmoid'`, whose SFT term needs it"):
        preference_loss(*sides, nll_weight=0.1, **tokens)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "cpo", "simpo"])
def test_a_policy_that_excludes_the_rejected_completion_loses_nothing(loss):
    options = {"nll_weight": 0.0} if loss in REFERENCE_FREE_LOSSES else {}
    sides = (torch.tensor([-1.0]), torch.tensor([-torch.inf]))
    losses = preference_loss(*sides, loss=loss, chosen_num_tokens=1, rejected_num_tokens=1, **options)
    assert losses.tolist() == [0]


def test_margin_and_accuracy():
    chosen, rejected = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, -2.0, 3.0])
    assert pair_margin(chosen, rejected, 0.5).tolist() == [0.0, 2.0, -2.0]
    assert pair_accuracy(chosen, rejected).tolist() == [0.5, 1.0, 0.0]
    assert pair_accuracy(torch.tensor([torch.nan]), torch.zeros(1)).isnan()  # no tie
