"""The experiment `dynamics`: gradients against autograd, changes against closed forms, and what it finds."""

from __future__ import annotations

import csv
import math
from itertools import pairwise

import pytest
import torch

from lit_did.experiments import __main__ as command
from lit_did.experiments import tempered
from lit_did.experiments.dynamics import (
    BETA,
    CONCENTRATIONS,
    ascend,
    at_equal_margin,
    changes,
    did_of,
    dpo_gradients,
    make_cases,
    project,
)
from lit_did.experiments.energy_models import entropy, gaussian, kl, population_loss, power_law, random_power_law


def between(num_completions: int, seeds: range):
    """Chosen completions neither from rho nor rejected ones from it."""
    return power_law(*random_power_law(num_completions, seeds, BETA)[::3], BETA, chosen_share=0.5)


def test_gradients_are_autograds():
    preferences = between(9, range(2))
    logits = gaussian(3, 9, range(2))[2].requires_grad_()
    policy = logits.log_softmax(-1)
    pairs = (preferences.chosen[:, :, None] + preferences.rejected[:, None, :]).exp()
    reward = BETA * (policy - preferences.reference)
    weight = BETA * pairs * torch.sigmoid(-(reward[:, :, None] - reward[:, None, :])).detach()
    expected = (
        torch.autograd.grad((weight * policy[:, :, None]).sum(), logits, retain_graph=True)[0],
        torch.autograd.grad((weight * policy[:, None, :]).sum(), logits, retain_graph=True)[0],
    )
    found = dpo_gradients(policy.detach(), preferences, BETA)
    for ours, autograds in zip(found, expected, strict=True):
        assert torch.allclose(ours, autograds, atol=1e-15, rtol=0)
    loss = population_loss(policy, preferences, loss="sigmoid", beta=BETA).sum()
    assert torch.allclose(found[0] - found[1], -torch.autograd.grad(loss, logits)[0], atol=1e-15, rtol=0)


def test_projection():
    chosen, rejected = torch.randn(2, 50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = project(chosen, rejected)
    product = (chosen * rejected).sum(-1)
    assert 0 < (product > 0).sum() < 50  # both cases occur
    apart = product <= 0
    assert torch.equal(direction[apart], (chosen - rejected)[apart])
    # where they agree, what is left of the rejected gradient is at right angles to the chosen one
    left = (chosen - direction)[~apart]
    assert torch.allclose((left * chosen[~apart]).sum(-1), torch.zeros(()).double(), atol=1e-14)
    assert torch.allclose(((left - rejected[~apart]).abs().sum(-1) > 0).double(), torch.ones(()).double())
    assert torch.equal(project(torch.zeros(3), torch.ones(3)), -torch.ones(3))  # no chosen gradient: no division by 0


def test_changes_at_the_target_have_closed_forms():
    preferences = random_power_law(30, range(3), BETA)
    found = changes(preferences.target, preferences)
    reference, _, rejected, target = preferences
    jeffreys = kl(reference, rejected) + kl(rejected, reference)
    assert torch.allclose(found["chosen_change"], -kl(reference, target), atol=1e-14, rtol=0)
    # on the power law the margin is Jeffreys' divergence of chosen and rejected over beta
    assert torch.allclose(found["chosen_change"] - found["rejected_change"], jeffreys / BETA, atol=1e-13, rtol=0)
    did = target.exp() / reference.exp()
    did = did / did.sum(-1, keepdim=True)
    assert torch.allclose(found["did_entropy"], -(did * did.log()).sum(-1), atol=1e-13, rtol=0)
    halfway = between(30, range(3))
    expected = (halfway.chosen.exp() * (target - reference)).sum(-1)  # the mean log-ratio of chosen completions
    assert torch.allclose(changes(target, halfway)["chosen_change"], expected, atol=1e-13, rtol=0)
    before = changes(reference, preferences)
    assert torch.allclose(before["did_entropy"], torch.tensor(math.log(30)).double())
    for name in ("chosen_change", "rejected_change", "entropy_change"):
        assert torch.equal(before[name], torch.zeros(3).double())


def test_targets_have_the_did_entropy_asked_for():
    direction = gaussian(1, 50, range(3))[0]
    for concentration in CONCENTRATIONS:
        did = did_of(direction, concentration)
        assert (math.log(50) - entropy(did)).tolist() == pytest.approx([concentration] * 3, abs=1e-12)
        assert torch.equal(did.argmax(-1), direction.argmax(-1))
    cases = make_cases(50, range(3))
    assert len({tuple(case.about.values()) for case in cases}) == len(cases) == 16
    for case in cases:
        moved = entropy(case.preferences.target) - entropy(case.preferences.reference)
        if case.about["target"] == "along":  # a sharper rho, whatever the DID's entropy
            assert (moved < 0).all()
        if case.about["did"] in ("rho^-0.5", "log N - 0.1") and case.about["target"] == "against":
            assert (moved > 0).all()


def test_descent_goes_down():
    preferences = between(12, range(2))
    size = 1 / (BETA**2 * (preferences.chosen.exp() + preferences.rejected.exp()).amax(-1, keepdim=True))
    policy, losses = preferences.reference, []
    for _ in range(30):
        losses.append(population_loss(policy, preferences, loss="sigmoid", beta=BETA))
        chosen, rejected = dpo_gradients(policy, preferences, BETA)
        policy = (policy + size * (chosen - rejected)).log_softmax(-1)
    assert all((after < before).all() for before, after in pairwise(losses))
    path = ascend(preferences, projected=False, steps=30)
    assert [min(path), max(path)] == [0, 30]
    by_hand = changes(policy, preferences)
    assert all(torch.equal(path[30][name], by_hand[name]) for name in by_hand)
    projected = ascend(preferences, projected=True, steps=30)
    assert (projected[30]["chosen_change"] > path[30]["chosen_change"]).all()
    assert (projected[30]["rejected_change"] < 0).all()


def test_dpo_pg_stays_at_the_reference_where_chosen_completions_come_from_it():
    """What it learns there is its steps' overshooting: proportional to their size. Elsewhere it learns anyway."""

    def margin(preferences, scale: float) -> torch.Tensor:
        after = ascend(preferences, projected=True, steps=400, scale=scale)[400]
        return after["chosen_change"] - after["rejected_change"]

    from_reference = random_power_law(12, range(3), BETA)
    # 0.1 but for terms of second order in the step
    assert (margin(from_reference, 0.1) / margin(from_reference, 1.0)).tolist() == pytest.approx([0.1] * 3, abs=0.05)
    elsewhere = between(12, range(3))
    assert (margin(elsewhere, 0.1) / margin(elsewhere, 1.0)).min() > 0.4


def test_comparison_at_equal_margin_interpolates():
    """DPO's path with margin t, DID entropy 5 - t^2; DPO-PG ends at margin 1.5 with DID entropy 2."""

    def after(margin: float, did_entropy: float) -> dict[str, torch.Tensor]:
        values = {"chosen_change": -margin, "rejected_change": -2 * margin, "entropy_change": 3 * margin}
        return {name: torch.tensor([value]) for name, value in {**values, "did_entropy": did_entropy}.items()}

    dpo = {step: after(float(step), 5.0 - step**2) for step in range(4)}
    found = at_equal_margin(dpo, {0: after(0.0, 5.0), 9: after(1.5, 2.0)})
    assert found["margin"].tolist() == [1.5]
    assert found["dpo_margin"].tolist() == [3.0]
    assert found["did_entropy_difference"].tolist() == [2.0 - (4.0 + 1.0) / 2]  # between steps 1 and 2
    assert found["entropy_change_difference"].tolist() == [0.0]


def test_quick_run_and_what_it_finds(tmp_path, monkeypatch):
    # The language model has tests of its own.
    row = {"target": "t", "of": "o"} | dict.fromkeys(tempered.CHANGES, 0.0)
    monkeypatch.setattr(tempered, "rows", lambda options: [row | {"seed": seed} for seed in options.all_seeds()])
    assert command.main(["dynamics", "--quick", "--seeds", "3", "--output", str(tmp_path)]) == 0
    tables = {f"dynamics{name}.csv" for name in ("", "_projected", "_training", "_language_model")}
    assert {path.name for path in tmp_path.iterdir()} == tables | {"dynamics.png", "dynamics.txt"}
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "dynamics.csv").open()))
    assert len(rows) == 16 * 3

    def column(name: str, **where: str) -> list[float]:
        return [float(row[name]) for row in rows if all(row[key] == value for key, value in where.items())]

    assert max(column("highest_chosen_change")) < 0  # the chosen log-likelihood falls, from the first step
    # Training ends where the theory says.
    error = [abs(float(row["trained_chosen_change"]) - float(row["chosen_change"])) for row in rows]
    assert sorted(error)[len(error) // 2] < 1e-3

    def entropy_change(target: str, did: str) -> float:
        return sum(column("entropy_change", target=target, did=did)) / 6

    # Of equal strength, the reinforcing target concentrates and the exploring one spreads ...
    assert entropy_change("along", "rho^+0.5") < -0.1 < 0.1 < entropy_change("against", "rho^-0.5")
    # ... but of equal DID entropy too: where q lies decides the sign, not its entropy.
    for concentration in CONCENTRATIONS:
        did = f"log N - {concentration:g}"
        assert entropy_change("along", did) < -0.1 < 0.1 < entropy_change("against", did)
    # Along rho a lower DID entropy concentrates more, against it it does not.
    assert entropy_change("along", "log N - 0.5") < entropy_change("along", "log N - 0.1") - 0.05
    assert entropy_change("against", "log N - 0.5") > entropy_change("against", "log N - 0.1")

    compared = list(csv.DictReader((tmp_path / "dynamics_projected.csv").open()))
    assert len(compared) == 2 * 6 * 3
    for reference in ("normal", "heavy-tailed"):
        for target in ("along", "against", "independent"):
            here = {"chosen_from": "between", "reference": reference, "target": target}
            rows = [row for row in compared if here.items() <= row.items()]
            assert len(rows) == 3
            # DPO-PG's DID has the lower entropy at equal margin.
            assert sum(float(row["did_entropy_difference"]) for row in rows) < 0
