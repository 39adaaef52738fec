"""What DPO does to likelihoods and to the policy's entropy, on exact models, against the theory; and DPO-PG beside it.

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
from lit_did.experiments.reporting import Options, Report, Table, curve, describe, means

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
        "rejected: the means of log pi - log rho over them. Entropy: of the policy. DID entropy: at most log N = "
        f"{math.log(size):.3f}. Margin: chosen less rejected, here the last one of each method. Chosen from: rho, or "
        "between rho and pi*, so that chosen and rejected completions carry half the law each.",
        f"DPO, {STEPS} steps of Adam: {sum(error < 0.01 for error in errors)} of {len(errors)} runs end within 0.01 "
        f"nats of these changes, the furthest within {max(errors):.2g} (where pi* needs completions that rho "
        f"almost never draws). The highest chosen change of any run at any step was {highest:.2g}.",
        f"DPO-PG on DIDs with entropy log N - {CONCENTRATIONS[1]:g}. With a tenth of the step size it ends at "
        f"{slower['rho']:.2f} of the margin where chosen completions come from rho: there it learns only by "
        f"overshooting. Where they carry half the law, {slower['between']:.2f}.",
        tempered.note(options),
    ]
    return Report(tables, lambda figure: _draw(figure, tables), (15, 5), notes)


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
    """Comparisons, paths, and what a tenth of the step size leaves of DPO-PG's margin (the median)."""
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


def _draw(figure: Figure, tables: list[Table]) -> None:
    changed, _, training, _ = tables
    entropies, likelihoods, information = figure.subplots(1, 3)
    for i, target in enumerate(dict.fromkeys(row["target"] for row in changed.rows)):
        for marker, reference in zip("ox", REFERENCES, strict=True):
            rows = [row for row in changed.rows if (row["target"], row["reference"]) == (target, reference)]
            entropies.scatter(
                [row["did_entropy"] for row in rows],
                [row["entropy_change"] for row in rows],
                color=f"C{i}",
                marker=marker,
                label=f"{target}, {reference} rho",
            )
    entropies.axhline(0, color="grey", linewidth=0.8)
    describe(entropies, "Policy's entropy: change from rho to pi*", "DID entropy (nats)", "nats")
    for (i, target), (style, method) in product(enumerate(("along", "against")), (("-", "DPO"), ("--", "DPO-PG"))):
        where = {"method": method, "reference": REFERENCES[0], "target": target, "chosen_from": "between"}
        path = {name: means(training, name, "step", **where) for name in CHANGES}
        for name, color in (("chosen_change", f"C{2 * i}"), ("rejected_change", f"C{2 * i + 1}")):
            label = f"{name.removesuffix('_change')}, {target}, {method}"
            likelihoods.plot(*curve(path[name]), style, color=color, label=label)
        margin = [path["chosen_change"][step] - path["rejected_change"][step] for step in path["did_entropy"]]
        information.plot(margin, path["did_entropy"].values(), style, color=f"C{i}", label=f"{target}, {method}")
    setting = f"{REFERENCES[0]} rho, chosen between"
    likelihoods.set_xscale("symlog", linthresh=1)
    describe(likelihoods, f"Likelihoods, {setting}", "step of gradient descent", "log pi - log rho (nats)")
    describe(information, f"Information learned, {setting}", "margin (nats)", "DID entropy (nats)")
