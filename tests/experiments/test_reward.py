"""The experiment `reward`: how preferences leave the power law, what tuning chooses, and what the experiment finds."""

from __future__ import annotations

import csv

import pytest
import torch

from lit_did.experiments import __main__ as command
from lit_did.experiments.energy_models import gaussian, jensen_shannon, population_loss, random_power_law
from lit_did.experiments.reward import BETA, CONTESTANTS, closed_form, off_the_law, tune


def test_off_the_law():
    lawful = random_power_law(500, range(2), BETA)
    noise = gaussian(3, 500, range(2))[2]

    def log_ratio(preferences):
        value = preferences.reference - preferences.rejected
        return value - value.mean(-1, keepdim=True)

    truth = log_ratio(lawful)
    for kind, size in (("exponent", 1.0), ("noise", 0.0), ("curvature", 0.0)):
        unchanged = off_the_law(lawful, kind, size, noise)
        assert torch.allclose(unchanged.rejected, lawful.rejected, atol=1e-12, rtol=0)  # rounding
    assert torch.allclose(log_ratio(off_the_law(lawful, "exponent", 2.0, noise)), 2 * truth, atol=1e-12, rtol=0)
    for kind in ("noise", "curvature"):
        broken = off_the_law(lawful, kind, 0.5, noise)
        assert torch.equal(broken.target, lawful.target)
        assert torch.equal(broken.reference, lawful.reference)
        difference = log_ratio(broken) - truth
        # of half the law's spread; 500 numbers know their standard deviation to a few percent
        assert (difference.std(-1) / truth.std(-1)).tolist() == pytest.approx([0.5, 0.5], rel=0.25)
    standard = truth / truth.std(-1, keepdim=True)
    difference = log_ratio(off_the_law(lawful, "curvature", 0.5, noise)) - truth
    for seed in range(2):
        assert float(torch.corrcoef(torch.stack([difference[seed], standard[seed] ** 2]))[0, 1]) > 1 - 1e-12


@pytest.mark.parametrize("kind", ["exponent", "noise", "curvature"])
def test_closed_form_is_where_dpos_gradient_vanishes(kind):
    preferences = off_the_law(random_power_law(20, range(2), BETA), kind, 1.5, gaussian(3, 20, range(2))[2])
    logits = closed_form(preferences, beta=0.3).requires_grad_()
    population_loss(logits.log_softmax(-1), preferences, loss="sigmoid", beta=0.3).sum().backward()
    assert logits.grad.abs().max() < 1e-15  # rounding; 1e-2 at the reference
    assert jensen_shannon(logits.detach(), preferences.target).min() > 1e-3


def test_tuning_takes_the_least_mean_divergence():
    rows, tuned = tune(random_power_law(8, range(2), BETA), range(2), steps=30)
    assert len(rows) == 2 * sum(len(contestant.grid) for contestant in CONTESTANTS)
    assert tuned["DPO"] == {"loss": "sigmoid", "beta": BETA}
    for contestant in CONTESTANTS:
        sums = {}
        for row in rows:
            if row["loss"] == contestant.title:
                sums[row["hyperparameters"]] = sums.get(row["hyperparameters"], 0) + row["divergence"]
        best = min(sums, key=sums.get)
        assert all(f"{value:g}" in best for name, value in tuned[contestant.title].items() if name != "loss")


def test_quick_run_and_what_it_finds(tmp_path, capsys):
    assert command.main(["reward", "--quick", "--seeds", "2", "--output", str(tmp_path / "out")]) == 0
    names = {"reward.csv", "reward_off_law.csv", "reward_training.csv", "reward_grid.csv", "reward.png", "reward.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out" / "reward.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "reward.txt").read_text()
    printed = capsys.readouterr()
    assert text.strip() in printed.out
    assert "parts: 100%" in printed.err
    assert text.startswith("lit-did experiment reward --quick --seeds 2 --seed 0\nlit-did ")

    def read(name):
        return list(csv.DictReader((tmp_path / "out" / name).open()))

    divergence = {}
    for row in read("reward.csv"):
        divergence.setdefault((row["loss"], row["setting"]), []).append(float(row["divergence"]))
    assert all(len(values) == 2 * 2 for values in divergence.values())  # sizes, seeds
    # The law holds: DPO with its exponent learns the target, and no other loss does, tuned as it may be.
    assert max(divergence["DPO", "tuned"]) < 1e-12
    others = [contestant.title for contestant in CONTESTANTS[1:]]
    assert len(others) == 6
    assert min(min(divergence[title, "tuned"]) for title in others) > 1e-5
    # With another exponent it is worse than not training, and worse than IPO.
    assert sum(divergence["DPO", "usual"]) > sum(divergence["none", ""]) > sum(divergence["IPO", "usual"])

    off_law = {}
    for row in read("reward_off_law.csv"):
        off_law.setdefault((row["kind"], row["size"], row["loss"]), []).append(float(row["divergence"]))
    # Off the law DPO is not the best: a finding, not a wish.
    for kind in ("exponent", "noise", "curvature"):
        sizes = {size for some, size, _ in off_law if some == kind}
        largest = max(sizes, key=float)
        assert sum(off_law[kind, largest, "IPO"]) < sum(off_law[kind, largest, "DPO"])

    training = {
        (row["loss"], row["step"], row["seed"]): float(row["divergence"]) for row in read("reward_training.csv")
    }
    for seed in "01":
        assert training["DPO", "100", seed] < 0.02 * training["DPO", "0", seed]
