"""label_model against numerical derivatives, brute force, and fits without the pairs of each prompt."""

import numpy as np
import pytest
from scipy import optimize
from scipy.sparse import csr_array

from lit_did.audit import label_model
from lit_did.audit.label_model import held_out, laplace, likelihood, log_evidence, mode, without_own
from lit_did.audit.label_noise import fit_label_noise
from lit_did.audit.statistics import area_under_curve


def kinds(seed, count, *sizes):
    """Features whose first number speaks for the label."""
    generator = np.random.default_rng(seed)
    found = [generator.normal(size=(count, size)) for size in sizes]
    found[0][:, 0] += 0.7
    return found


def grams(matrices):
    found = np.stack([matrix @ matrix.T for matrix in matrices])
    return found / (np.einsum("mii->m", found) / len(found[0]))[:, None, None]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_the_derivatives_of_the_likelihood(share):
    f, step = np.linspace(-4, 4, 9), 1e-5
    _, first, second, third = likelihood(f, share)
    values = [np.array([likelihood(at, share)[0] for at in (f + sign * step)[:, None]]) for sign in (-1, 1)]
    low, high = likelihood(f - step, share), likelihood(f + step, share)
    assert np.allclose(first, (values[1] - values[0]) / (2 * step), atol=1e-8)
    assert np.allclose(second, -(high[1] - low[1]) / (2 * step), atol=1e-8)
    assert np.allclose(third, (high[2] - low[2]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_the_mode_is_the_highest_point_of_the_posterior(share):
    """In the weights of features, of which f is a linear function."""
    features = kinds(0, 60, 4)[0]

    def loss(weights):
        return weights @ weights / 2 - likelihood(features @ weights, share)[0]

    found = optimize.minimize(loss, np.zeros(4), tol=1e-10)
    f, dual = mode(features @ features.T, share)
    assert np.allclose(f, features @ found.x, atol=1e-2)
    assert np.allclose(features @ features.T @ dual, f)


def swapped_kinds(seed, count, *sizes):
    """Features whose first number speaks for all labels but a few, which have negative curvature at the mode."""
    found = kinds(seed, count, *sizes)
    found[0][:, 0] = np.abs(found[0][:, 0]) + 0.5
    for features in found:
        features[::16] *= -1
    return found


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_the_gradient_of_the_evidence(share, monkeypatch):
    monkeypatch.setattr(label_model, "SHARE", share)
    of_kinds, logs = grams(swapped_kinds(0, 80, 3, 100, 1)), np.array([1.5, -1.0, 0.0])
    value, gradient, _ = log_evidence(of_kinds, logs)
    assert value == pytest.approx(laplace(np.tensordot(np.exp(logs), of_kinds, 1), share).evidence)
    for number, step in enumerate(1e-3 * np.eye(3)):
        difference = log_evidence(of_kinds, logs + step)[0] - log_evidence(of_kinds, logs - step)[0]
        assert gradient[number] == pytest.approx(difference / 2e-3, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_the_evidence_is_that_of_brute_force(share):
    """In the weights of features: the posterior's height at its mode, less half of the log-determinant there."""
    features = swapped_kinds(0, 80, 4)[0]

    def loss(weights):
        return weights @ weights / 2 - likelihood(features @ weights, share)[0]

    mode_of_weights = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    steps = 1e-3 * np.eye(4)
    hessian = [
        [
            sum(a * b * loss(mode_of_weights + a * one + b * other) for a in (-1, 1) for b in (-1, 1)) / 4e-6
            for other in steps
        ]
        for one in steps
    ]
    expected = -loss(mode_of_weights) - np.linalg.slogdet(hessian)[1] / 2
    fit = laplace(features @ features.T, share)
    assert (fit.second < -0.01).any() == (share > 0)
    assert fit.evidence == pytest.approx(expected, abs=1e-4)


def test_one_of_several_modes_is_found_from_every_start():
    """200 pairs speak for a weight and one against it. That one may be swapped, or right by a weight of its own."""
    features = np.array([[3.0, 0.0]] * 200 + [[-4.0, 4.0]])

    def weights_from(start, share):
        return optimize.minimize(lambda w: w @ w / 2 - likelihood(features @ w, share)[0], start, tol=1e-10).x

    from_share_0 = weights_from(weights_from([0.0, 0.0], 0.0), label_model.SHARE)
    swapped = weights_from([2.0, 0.0], label_model.SHARE)
    assert features[-1] @ swapped < -7
    assert features[-1] @ from_share_0 > 0
    for start in (swapped, from_share_0, 0 * swapped):
        dual = np.linalg.lstsq(features.T, start, rcond=None)[0]
        f = mode(features @ features.T, label_model.SHARE, dual)[0]
        assert f == pytest.approx(features @ from_share_0, abs=1e-3)


def test_the_evidence_is_the_chance_of_the_labels():
    """Of one pair: E[sigmoid(f)] is 1/2, and that of two equal pairs lies between 1/4 and 1/2."""
    assert laplace(np.full((1, 1), 0.1), 0.0).evidence == pytest.approx(np.log(0.5), abs=1e-3)
    draws = np.random.default_rng(0).normal(size=10**6) * np.sqrt(0.5)
    exact = np.log(np.mean(1 / (1 + np.exp(-draws)) ** 2))
    assert laplace(np.full((2, 2), 0.5), 0.0).evidence == pytest.approx(exact, abs=5e-3)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_scores_are_those_of_fits_without_the_prompt(share):
    kernel, groups = grams(kinds(1, 80, 5, 60)).sum(0), np.arange(80) // 2
    fit = laplace(kernel, share)
    scores = np.einsum("ij,ji->i", kernel, without_own(fit, groups))
    expected = np.empty(80)
    for prompt in range(40):
        kept = groups != prompt
        rest = kernel[np.ix_(kept, kept)]
        dual = mode(rest, share)[1]
        expected[~kept] = kernel[np.ix_(~kept, kept)] @ dual
    assert np.abs(scores - expected).max() < 0.05 * np.std(expected)
    assert np.std(fit.f - expected) > 0.1 * np.std(expected)  # the fit to all pairs is not held out


def test_contributions_sum_to_scores_and_go_to_what_predicts():
    matrices = [*kinds(2, 200, 3, 50), np.random.default_rng(9).normal(size=(200, 1))]
    found = held_out(matrices, np.arange(200), 0)
    assert np.allclose(found.contributions.sum(axis=1), found.scores)
    sizes = np.abs(found.contributions).mean(axis=0)
    assert sizes[0] > 5 * sizes[1:].max()
    assert np.mean(found.scores > 0) > 0.7


def test_copies_of_random_labels_are_not_remembered():
    """Each pair twice, with labels by chance: a fit that sees one copy would know the other."""
    features = np.repeat(np.random.default_rng(1).normal(size=(60, 200)), 2, axis=0)
    assert np.mean(held_out([features], np.arange(120) // 2, 0).scores > 0) < 0.65
    assert np.mean(held_out([features], np.arange(120), 0).scores > 0) > 0.9


@pytest.mark.long
def test_tests_of_halves_are_exact():
    """With labels by chance, fits that have seen some of the labels make p values too small."""
    halves, scores = [], []
    for seed in range(80):
        matrices = [np.random.default_rng((seed, size)).normal(size=(100, size)) for size in (1, 2, 3, 5, 40)]
        found = held_out(matrices, np.arange(100), 0)
        halves += [fit_label_noise(of, places).p_unrelated for places, of in found.halves]
        scores.append(fit_label_noise(found.scores, np.arange(100)).p_unrelated)
    assert np.mean(np.array(halves) < 0.1) <= 0.13
    assert np.mean(np.array(scores) < 0.1) > 0.2


def test_halves_have_whole_prompts_and_all_of_them():
    found = held_out(kinds(6, 60, 3), np.arange(60) // 2, 0)
    places = [half for half, _ in found.halves]
    assert sorted(np.concatenate(places).tolist()) == list(range(60))
    assert not set(places[0] // 2) & set(places[1] // 2)


def test_sparse_and_dense_features_score_alike():
    dense = np.round(kinds(3, 80, 4, 6)[0])
    one, other = (held_out([matrix], np.arange(80), 0).scores for matrix in (dense, csr_array(dense)))
    assert np.allclose(one, other)


def test_swapped_labels_bend_the_scores_less():
    """Without the assumption that labels may be swapped, swapped labels are ranked worse."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 10))
    features *= np.sign(features @ generator.normal(size=10))[:, None]
    swapped = generator.random(400) < 0.08
    features[swapped] *= -1
    areas = []
    for share in (0.0, label_model.SHARE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(label_model, "SHARE", share)
            areas.append(area_under_curve(-held_out([features], np.arange(400), 0).scores, swapped))
    assert areas[1] > areas[0] + 0.01
    assert areas[1] > 0.99


def test_large_data_is_fitted_to_whole_prompts_and_scored_in_full(monkeypatch):
    monkeypatch.setattr(label_model, "LARGEST_FIT", 150)
    monkeypatch.setattr(label_model, "LARGEST_TUNE", 90)
    matrices, groups = kinds(5, 400, 3, 20), np.random.default_rng(0).permutation(np.arange(400) // 2)
    fitted = label_model._draw_prompts(groups, 150, 0)
    assert len(fitted) == 150
    assert not set(groups[fitted]) & set(np.delete(groups, fitted))
    found = held_out([matrices[0], csr_array(matrices[1])], groups, 0)
    turned = np.ones(400)
    outside = np.setdiff1d(np.arange(400), fitted)[:50]
    turned[outside] = -1
    again = held_out([matrix * turned[:, None] for matrix in matrices], groups, 0)
    assert np.allclose(again.scores, found.scores * turned)
    assert sorted(np.concatenate([places for places, _ in found.halves])) == fitted.tolist()
    assert np.allclose(found.contributions.sum(axis=1), found.scores)
    assert np.mean(found.scores > 0) > 0.7


def test_a_prompt_of_very_many_pairs_does_not_take_the_place_of_others(monkeypatch):
    groups = np.concatenate([np.zeros(1000, int), np.arange(1, 301)])
    drawn = label_model._draw_prompts(groups, 200, 0)
    assert len(drawn) == 200
    assert (groups[drawn] > 0).all()


def test_pairs_outside_the_fit_have_the_score_of_equal_ones_in_it(monkeypatch):
    values = np.random.default_rng(0).normal(0.5, 1, (40, 6))
    twice, groups, fits = np.concatenate([values, values]), np.arange(80), []
    fitted_by = label_model.laplace
    monkeypatch.setattr(label_model, "LARGEST_FIT", 40)
    monkeypatch.setattr(label_model, "laplace", lambda *given: fits.append(fitted_by(*given)) or fits[-1])
    scores = held_out([twice, twice[:, :2]], groups, 0).scores
    fitted = label_model._draw_prompts(groups, 40, 0)
    outside = [place for place in groups if place not in fitted and (place + 40) % 80 in fitted]
    expected = fits[-1].f[np.searchsorted(fitted, (np.array(outside) + 40) % 80)]
    assert len(outside) > 10
    assert np.abs(expected).max() > 0.1
    assert scores[outside] == pytest.approx(expected, rel=1e-6)
