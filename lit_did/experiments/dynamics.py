"""What DPO does to likelihoods and to the policy's entropy, on exact models, against the theory, and DPO-PG beside it.

Claims: with chosen completions from rho, the chosen log-likelihood falls by KL(rho, pi*); a low-entropy DID
concentrates the policy, a high-entropy DID spreads it (arXiv 2505.23761); DPO-PG learns a lower-entropy DID than DPO.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_did.experiments.energy_models import Preferences, entropy, gaussian, kl, one_thread, power_law, train
from lit_did.experiments.reporting import (
    Options,
    Report,
    Table,
    criterion,
    describe,
    draw_band,
    draw_cross,
    legend_below,
    points,
    sign,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA = 0.5
COMPLETIONS = 64
QUICK_COMPLETIONS = 32
CONCENTRATIONS = (0.1, 0.5)
"""log N - H(q) of the DIDs: how far they are from knowing nothing, in nats"""
TEMPER = 0.5
"""targets of equal strength: rho^(1 + TEMPER) and rho^(1 - TEMPER)"""
REFERENCES = ("normal", "heavy-tailed")
STEPS = 300
"""of Adam"""
GRADIENT_STEPS = 2000
QUICK_GRADIENT_STEPS = 400
"""of plain gradient descent, as DPO-PG needs it"""
CHOSEN_FROM = {"rho": 0.0, "between": 0.5}
"""the share of the law that chosen completions carry: the paper's setting, and halfway to rejected ones from rho"""
PROJECTED = f"log N - {CONCENTRATIONS[1]:g}"
"""the DIDs that DPO-PG is tried on"""
CHANGES = ("chosen_change", "rejected_change", "entropy_change", "did_entropy")
SHOWN = ("margin", "dpo_margin", "chosen_change_difference", "entropy_change_difference", "did_entropy_difference")


class Case(NamedTuple):
    """Models and preferences of one kind."""

    about: dict[str, str]
    preferences: Preferences
    """[seeds, N]"""


def run(options: Options) -> Report:
    """Trains policies towards targets whose DIDs have a given entropy, and compares what changes with the theory."""
    from lit_did.experiments import tempered  # lightning and transformers take seconds to load

    seeds = options.all_seeds()
    size = QUICK_COMPLETIONS if options.quick else COMPLETIONS
    steps = QUICK_GRADIENT_STEPS if options.quick else GRADIENT_STEPS
    by = ("reference", "target", "did")
    rows = _against_theory(make_cases(size, seeds), seeds)
    errors = [max(abs(row[f"trained_{name}"] - row[name]) for name in CHANGES) for row in rows]
    highest = max(row["highest_chosen_change"] for row in rows)
    compared, path_rows, slower = _against_projected(size, seeds, steps)
    title = f"DPO-PG, {steps} steps of gradient descent, minus DPO where its margin is the same, in nats"
    tables = [
        Table("dynamics", "Changes from rho to pi*, in nats", rows, by, CHANGES),
        Table("dynamics_projected", title, compared, ("chosen_from", "reference", "target"), SHOWN),
        Table("dynamics_training", "", path_rows),
        tempered.table(options),
    ]
    notes = [
        f"{size} completions; preferences on the power law, exponent {BETA}. Target: pi* proportional to rho q, with q "
        "a power of rho (along), of 1 / rho (against), or unrelated to rho. DID: q's entropy, or what q is. Chosen and "
        "rejected change: the means of log pi - log rho over these completions. Entropy change: of the policy's "
        f"entropy. DID entropy: at most log N = {math.log(size):.3f}. Margin: chosen change less rejected change, here "
        "at the end of each method. Chosen from: rho, or between rho and pi*, so that chosen and rejected completions "
        "carry half the law each.",
        f"DPO, {STEPS} steps of Adam: {sum(error < 0.01 for error in errors)} of {len(errors)} runs end within 0.01 "
        f"nats of these changes, the farthest within {max(errors):.2g} (where pi* needs completions that rho "
        f"almost never draws). The highest chosen change of any run at any step was {highest:.2g}.",
        f"DPO-PG here takes a projection of our own (`lit-did docs losses`), on DIDs with entropy log N - "
        f"{CONCENTRATIONS[1]:g}. With a tenth of the step size its margin is {slower['rho']:.2f} times as large where "
        "chosen completions come from rho: a tenth would mean that it learns only by overshooting. Where chosen "
        f"completions carry half the law it is {slower['between']:.2f} times as large.",
        tempered.note(options),
    ]
    found = f"{_found(tables, highest)} {tempered.found(tables[-1], options)}"
    return Report(tables, lambda figure: _draw(figure, tables), (13, 10), notes, found)


@one_thread()
def _against_theory(cases: list[Case], seeds: range) -> list[dict[str, Any]]:
    every = _together(cases)
    trained = [changes(policy, every) for policy in train(every, steps=STEPS, step_size=0.1, loss="sigmoid", beta=BETA)]
    theory, rows = changes(every.target, every), []
    for i, row in enumerate(_labels(cases, seeds)):
        rows.append(row | _row(theory, i))
        rows[-1] |= {f"trained_{name}": value for name, value in _row(trained[-1], i).items()}
        rows[-1]["highest_chosen_change"] = max(float(after["chosen_change"][i]) for after in trained[1:])
    return rows


@one_thread()
def _against_projected(
    size: int, seeds: range, steps: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """Comparisons, paths, and the share of DPO-PG's margin that is left at a tenth of the step size (the median)."""
    compared, path_rows, slower = [], [], {}
    for name, share in CHOSEN_FROM.items():
        cases = [case for case in make_cases(size, seeds, share) if case.about["did"] == PROJECTED]
        every = _together(cases)
        labels = [{"chosen_from": name, **row} for row in _labels(cases, seeds)]
        paths = {method: ascend(every, projected=method == "DPO-PG", steps=steps) for method in ("DPO", "DPO-PG")}
        differences = at_equal_margin(paths["DPO"], paths["DPO-PG"])
        compared += [row | _row(differences, i) for i, row in enumerate(labels)]
        path_rows += [
            {"method": method, **row, "step": step, **_row(after, i)}
            for method, path in paths.items()
            for step, after in path.items()
            for i, row in enumerate(labels)
        ]
        tenth = ascend(every, projected=True, steps=steps, scale=0.1)[steps]
        ratio = (tenth["chosen_change"] - tenth["rejected_change"]) / differences["margin"]
        slower[name] = float(ratio.median())
    return compared, path_rows, slower


def make_cases(num_completions: int, seeds: range, chosen_share: float = 0.0) -> list[Case]:
    """Targets along rho, against it and independent of it, whose DIDs have the same entropies; and tempered ones.

    pi* is proportional to rho q. Along rho, q is a power of rho, so that pi* is a sharper rho: it reinforces. Against
    it, q is a power of 1 / rho: pi* is flatter, and explores.
    """
    noise, other = gaussian(2, num_completions, seeds)
    heavy = -torch.special.log_ndtr(noise)  # exponential with mean 1: a Pareto law of rho, a few likely completions
    cases = []
    for name, logits in zip(REFERENCES, (noise, heavy), strict=True):
        reference = logits.log_softmax(-1)
        for target, direction in (("along", logits), ("against", -logits), ("independent", other)):
            for concentration in CONCENTRATIONS:
                about = {"reference": name, "target": target, "did": f"log N - {concentration:g}"}
                cases.append(Case(about, _preferences(reference, did_of(direction, concentration), chosen_share)))
        for target, temper in (("along", TEMPER), ("against", -TEMPER)):
            about = {"reference": name, "target": target, "did": f"rho^{temper:+g}"}
            cases.append(Case(about, _preferences(reference, (temper * logits).log_softmax(-1), chosen_share)))
    return cases


def did_of(direction: Tensor, concentration: float) -> Tensor:
    """[..., N] log q, q proportional to exp(s direction), with s > 0 such that log N - H(q) is `concentration`.

    Example:
        >>> did = did_of(torch.tensor([0.0, 1.0, 5.0]), concentration=0.5)
        >>> round(math.log(3) - float(entropy(did)), 6)
        0.5
    """
    low, high = torch.zeros_like(direction[..., :1]), torch.full_like(direction[..., :1], 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        did = (middle * direction).log_softmax(-1)
        too_sharp = math.log(direction.shape[-1]) - entropy(did)[..., None] > concentration
        low, high = torch.where(too_sharp, low, middle), torch.where(too_sharp, middle, high)
    return (low * direction).log_softmax(-1)


def _preferences(reference: Tensor, did: Tensor, chosen_share: float) -> Preferences:
    return power_law(reference, (reference + did).log_softmax(-1), BETA, chosen_share)


def _together(cases: list[Case]) -> Preferences:
    return Preferences(*map(torch.cat, zip(*(case.preferences for case in cases), strict=True)))


def changes(policy: Tensor, preferences: Preferences) -> dict[str, Tensor]:
    """What training did, each [...]: `CHANGES`. With chosen completions from rho, -KL(rho, pi) is the chosen change."""
    reference, chosen, rejected, _ = preferences
    return {
        "chosen_change": kl(chosen, reference) - kl(chosen, policy),
        "rejected_change": kl(rejected, reference) - kl(rejected, policy),
        "entropy_change": entropy(policy) - entropy(reference),
        "did_entropy": entropy((policy - reference).log_softmax(-1)),
    }


def dpo_gradients(policy: Tensor, preferences: Preferences, beta: float) -> tuple[Tensor, Tensor]:
    """[..., N] twice: the gradients in the logits of mean(beta s log pi(y_w)) and of mean(beta s log pi(y_l)).

    With m the margin, s = sigmoid(-m) is held constant. Their difference is minus the gradient of DPO's population
    loss. The mean over pairs is exact: with c(y) = sum over y_l of p(y, y_l) beta s, the first is c - sum(c) pi.
    """
    reward = beta * (policy - preferences.reference)
    pairs = (preferences.chosen[..., :, None] + preferences.rejected[..., None, :]).exp()
    weight = beta * pairs * torch.sigmoid(reward[..., None, :] - reward[..., :, None])
    probability, total = policy.exp(), weight.sum((-1, -2))[..., None]
    return weight.sum(-1) - total * probability, weight.sum(-2) - total * probability


def project(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[..., N] DPO-PG's direction, g_w - [g_l - max(0, <g_l, g_w>) / |g_w|^2 g_w]: along g_w it never goes down.

    Example:
        >>> project(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))  # DPO's own would be (-2, -1)
        tensor([ 1., -1.])
    """
    product, square = ((chosen * other).sum(-1, keepdim=True) for other in (rejected, chosen))
    share = torch.where(square > 0, product.clamp(min=0) / square, 0)
    return chosen - rejected + share * chosen


def ascend(
    preferences: Preferences, *, projected: bool, steps: int, scale: float = 1.0
) -> dict[int, dict[str, Tensor]]:
    """Gradient descent on DPO's loss from the reference, or DPO-PG: {step: `changes`}, at some 100 steps.

    Plain steps: with Adam the projection would not hold. A step is scale / (beta^2 max(p_w + p_l)), p the
    probabilities of chosen and rejected: well below where DPO would overshoot, because its loss's curvature is at most
    a quarter of beta^2 (p_w + p_l) in every logit's direction.
    """
    size = scale / (BETA**2 * (preferences.chosen.exp() + preferences.rejected.exp()).amax(-1, keepdim=True))
    recorded = {round(steps ** (i / 150)) for i in range(151)} | {0}
    policy, path = preferences.reference, {}
    for step in range(steps + 1):
        if step in recorded:
            path[step] = changes(policy, preferences)
        chosen, rejected = dpo_gradients(policy, preferences, BETA)
        direction = project(chosen, rejected) if projected else chosen - rejected
        policy = (policy + size * direction).log_softmax(-1)
    return path


def at_equal_margin(dpo: dict[int, dict[str, Tensor]], projected: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Both last margins, and DPO-PG's last `CHANGES` minus DPO's at the same margin, interpolated along its path.

    The margin is the chosen change minus the rejected one: how much has been learned. DPO-PG's is the slower to grow.
    """
    margin = torch.stack([after["chosen_change"] - after["rejected_change"] for after in dpo.values()], -1)  # [.., P]
    last = list(projected.values())[-1]
    wanted = (last["chosen_change"] - last["rejected_change"])[..., None]
    above = torch.searchsorted(margin, wanted).clamp(1, margin.shape[-1] - 1)
    low, high = margin.gather(-1, above - 1), margin.gather(-1, above)
    share = ((wanted - low) / (high - low)).clamp(0, 1)
    differences = {"margin": wanted.squeeze(-1), "dpo_margin": margin[..., -1]}
    for name in CHANGES:
        path = torch.stack([after[name] for after in dpo.values()], -1)
        ours = torch.lerp(path.gather(-1, above - 1), path.gather(-1, above), share).squeeze(-1)
        differences[f"{name}_difference"] = last[name] - ours
    return differences


def _row(values: dict[str, Tensor], index: int) -> dict[str, float]:
    return {name: float(value[index]) for name, value in values.items()}


def _labels(cases: list[Case], seeds: range) -> list[dict[str, Any]]:
    return [{**case.about, "seed": seed} for case in cases for seed in seeds]


def _found(tables: list[Table], highest: float) -> str:
    changed, compared, *_ = tables

    def count(table: Table, value: str, wanted: int, **where: str) -> str:
        """In how many cases of a table the mean over seeds has a sign that its interval confirms."""
        rows = [row for row in table.rows if all(row[name] == name_wanted for name, name_wanted in where.items())]
        cases: dict[tuple, list[float]] = {}
        for row in rows:
            cases.setdefault(tuple(row[name] for name in table.by), []).append(row[value])
        return f"{sum(sign(values) == wanted for values in cases.values())} of {len(cases)}"

    seeds = len({row["seed"] for row in changed.rows})
    moved = "stayed below" if highest < 0 else "did not stay below"
    return (
        f"the chosen log-likelihood {moved} its start at every step of all {len(changed.rows)} runs of DPO. From rho "
        f"to pi* the policy's entropy falls in {count(changed, 'entropy_change', -1, target='along')} cases along rho "
        f"and rises in {count(changed, 'entropy_change', 1, target='against')} against it. At equal margins DPO-PG has "
        "the lower DID entropy in "
        f"{count(compared, 'did_entropy_difference', -1, chosen_from='between')} cases where chosen completions carry "
        f"half the law and in {count(compared, 'did_entropy_difference', -1, chosen_from='rho')} where they come from "
        f"rho. (A case counts if {criterion(seeds)}.)"
    )


def _draw(figure: Figure, tables: list[Table]) -> None:
    changed, _, training, _ = tables
    (entropies, information), (chosen, rejected) = figure.subplots(2, 2)
    targets = list(dict.fromkeys(row["target"] for row in changed.rows))
    for case in dict.fromkeys(tuple(row[name] for name in changed.by) for row in changed.rows):
        rows = [row for row in changed.rows if tuple(row[name] for name in changed.by) == case]
        reference, target, _ = case
        draw_cross(
            entropies,
            [row["did_entropy"] for row in rows],
            [row["entropy_change"] for row in rows],
            color=f"C{targets.index(target)}",
            marker="ox"[REFERENCES.index(reference)],
        )
    entropies.axhline(0, color="grey", linewidth=0.8)
    y = "change of the policy's entropy (nats)"
    describe(entropies, "From rho to pi*: o normal rho, x heavy-tailed rho", "DID entropy (nats)", y)
    for target, (style, method) in product(("along", "against"), (("-", "DPO"), ("--", "DPO-PG"))):
        where = {"method": method, "reference": REFERENCES[0], "target": target, "chosen_from": "between"}
        color = f"C{targets.index(target)}"
        for axes, name in ((chosen, "chosen_change"), (rejected, "rejected_change")):
            draw_band(axes, points(training, name, "step", **where), style, color=color)
        path = {name: points(training, name, "step", **where).mean for name in CHANGES}
        margin = [a - b for a, b in zip(path["chosen_change"], path["rejected_change"], strict=True)]
        information.plot(margin, path["did_entropy"], style, color=color)
    for i, target in enumerate(targets):
        chosen.plot([], [], "-", color=f"C{i}", label=f"{target} rho" if target != "independent" else target)
    chosen.plot([], [], "-", color="grey", label="DPO")
    chosen.plot([], [], "--", color="grey", label="DPO-PG")
    setting = f"{REFERENCES[0]} rho, chosen between rho and pi*"
    for axes, side in ((chosen, "chosen"), (rejected, "rejected")):
        axes.set_xscale("symlog", linthresh=1)
        x = "step of gradient descent"
        describe(axes, f"Training: {side} completions ({setting})", x, f"{side}: mean of log pi - log rho (nats)")
    describe(information, f"Training: information learned ({setting})", "margin (nats)", "DID entropy (nats)")
    legend_below(figure, chosen, 5, len({row["seed"] for row in changed.rows}))
