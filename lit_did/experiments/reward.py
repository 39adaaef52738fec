"""Which preference loss learns the target policy? Exact models on the power law, and off it.

The claim (arXiv 2505.23761): where q_{rho / pi_l} is proportional to q_{pi* / rho}^beta, the reward that learns pi* is
DPO's beta log(pi / rho). So DPO's minimiser should be pi*, and that of other losses should not.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_did.experiments.energy_models import (
    Minimum,
    Preferences,
    gaussian,
    jensen_shannon,
    minimise,
    one_thread,
    population_loss,
    random_power_law,
    train,
)
from lit_did.experiments.reporting import (
    Options,
    Report,
    Table,
    describe,
    draw_band,
    draw_points,
    points,
    summary,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA = 0.5
"""the exponent that the preferences are made with"""
SIZES = (32, 128, 1024)
QUICK_SIZES = (32, 64)
"""completions; hyperparameters are chosen, and the law is broken, at the second"""
STEPS = 300
QUICK_STEPS = 100
"""of Adam"""
RECORDED = (0, 1, 2, 4, 8, 16, 32, 64, 100, 150, 200, 250, 300)
"""those whose divergence is written"""
Sizes = dict[str, tuple[float, ...]]
OFF_LAW: Sizes = {"exponent": (0.5, 0.8, 1.0, 1.25, 2.0), "noise": (0.25, 0.5, 1.0), "curvature": (0.25, 0.5, 1.0)}
QUICK_OFF_LAW: Sizes = {"exponent": (0.5, 2.0), "noise": (0.5, 1.0), "curvature": (0.5, 1.0)}
"""in how many ways, and how far: see `off_the_law`"""


class Contestant(NamedTuple):
    """A loss with its usual hyperparameters and others to choose from."""

    title: str
    usual: dict[str, Any]
    grid: list[dict[str, Any]]

    @classmethod
    def of(cls, title: str, loss: str, usual: dict[str, float], **grid: tuple[float, ...]) -> Contestant:
        combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        return cls(title, {"loss": loss, **usual}, [{"loss": loss, **combination} for combination in combinations])


BETAS = (0.1, 0.25, 0.5, 1.0)
CONTESTANTS = (
    Contestant.of("DPO", "sigmoid", {"beta": 0.1}, beta=BETAS),
    Contestant.of("IPO", "ipo", {"beta": 0.1}, beta=(0.05, 0.075, 0.1, 0.125, 0.25, 0.5)),
    Contestant.of("hinge", "hinge", {"beta": 0.1}, beta=(*BETAS, 0.75)),
    Contestant.of("SLiC", "slic", {"beta": 0.1, "nll_weight": 1.0}, beta=BETAS, nll_weight=(0.0, 0.1, 1.0)),
    Contestant.of("CPO", "cpo", {"beta": 0.1, "nll_weight": 1.0}, beta=BETAS, nll_weight=(0.0, 0.1, 1.0)),
    Contestant.of("ORPO", "orpo", {"beta": 0.1}, beta=(0.1, 0.5, 1.0, 2.0, 8.0)),
    Contestant.of("SimPO", "simpo", {"beta": 2.0, "gamma": 1.0}, beta=(0.25, 0.5, 1.0, 2.0), gamma=(0.0, 0.5, 1.0)),
)
KINKED = ("hinge", "slic")
"""losses whose gradient does not vanish at their minimum, where L-BFGS stalls"""


@one_thread()
def run(options: Options) -> Report:
    """Minimises every loss over random models on the power law, then off it."""
    seeds = options.all_seeds()
    models = {size: random_power_law(size, seeds, BETA) for size in (QUICK_SIZES if options.quick else SIZES)}
    size, preferences = list(models.items())[1]
    steps = QUICK_STEPS if options.quick else STEPS
    bar = tqdm(total=4, desc="parts", unit="part", disable=options.quiet)
    grid, tuned = tune(preferences, seeds, steps)
    bar.update()
    noise = gaussian(3, size, seeds)[2]  # the model took the first two
    sizes = QUICK_OFF_LAW if options.quick else OFF_LAW
    off_law, worst = _off_the_law(preferences, noise, tuned, seeds, steps, sizes)
    bar.update()
    on_law = _on_the_law(models, tuned, seeds, steps)
    bar.update()
    tables = [on_law, off_law, _training(preferences, tuned, seeds, steps), Table("reward_grid", "", grid)]
    bar.update()
    bar.close()
    notes = [
        f"Divergence: Jensen-Shannon, in nats, of the loss's minimiser from pi*. The preferences' exponent is {BETA}. "
        f"Tuned: the least mean divergence of a grid at {size} completions, chosen on these very models.",
        "The minimum: L-BFGS until no derivative, scaled by sqrt(rho + pi_l), exceeds 1e-10, or for 200 "
        f"evaluations; the largest left is {_largest(tables[0], 'gradient'):.1g}. Hinge and SLiC, which have kinks: "
        f"{steps} steps of Adam, to a step size of 0.",
        "Off the law, log(rho / pi_l) is `size` times its lawful value (exponent), or has noise or a quadratic term of "
        "`size` standard deviations: with 0.5 and 1, R^2 is 0.8 and 0.5. DPO's own divergences there agree with its "
        f"closed form to {worst:.1g}.",
    ]
    return Report(tables, lambda figure: _draw(figure, tables, size), (15, 8), notes, _found(tables, size))


def learn(preferences: Preferences, loss: dict[str, Any], steps: int = STEPS) -> Minimum:
    """The minimiser of a loss: by L-BFGS, or where it has kinks by Adam, which stops where its step size is 0."""
    if loss["loss"] not in KINKED:
        return minimise(preferences, **loss)
    policy = train(preferences, steps=steps, step_size=0.3, **loss)[-1]
    return Minimum(policy, population_loss(policy, preferences, **loss), torch.full(policy.shape[:-1], torch.nan))


def tune(preferences: Preferences, seeds: range, steps: int) -> tuple[list[dict], dict[str, dict[str, Any]]]:
    """All hyperparameters of all losses: rows for a table, and those of the least mean divergence, by loss."""
    rows, tuned = [], {}
    for contestant in CONTESTANTS:
        divergences: dict[int, float] = {}
        for index, loss in enumerate(contestant.grid):
            minimum = learn(preferences, loss, steps)
            divergence = jensen_shannon(minimum.policy, preferences.target)
            divergences[index] = float(divergence.mean())
            about = {"loss": contestant.title, "hyperparameters": in_words(loss)}
            rows += _rows(about, seeds, divergence=divergence, loss_value=minimum.loss, gradient=minimum.gradient)
        tuned[contestant.title] = contestant.grid[min(divergences, key=divergences.__getitem__)]
    return rows, tuned


def in_words(loss: dict[str, Any]) -> str:
    """The hyperparameters in words.

    Example:
        >>> in_words({"loss": "cpo", "beta": 0.1, "nll_weight": 1.0})
        'beta 0.1, nll weight 1'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in loss.items() if name != "loss")


def off_the_law(preferences: Preferences, kind: str, size: float, noise: Tensor) -> Preferences:
    """The same rho and pi* with rejected completions that break the law log(rho / pi_l) = BETA log(pi* / rho) + const.

    Args:
        preferences: On the law, [..., N].
        kind: "exponent": BETA times `size`. "noise": plus `size` standard deviations of the right-hand side times
            `noise`. "curvature": plus a quadratic of its standardised self, of `size` standard deviations.
        size: How far off; 1 is the law itself for "exponent", 0 for the others.
        noise: [..., N] standard normal.
    """
    lawful = BETA * (preferences.target - preferences.reference)
    spread = lawful.std(-1, keepdim=True)
    if kind == "exponent":
        log_ratio = size * lawful
    elif kind == "noise":
        log_ratio = lawful + size * spread * noise
    else:
        standard = (lawful - lawful.mean(-1, keepdim=True)) / spread
        log_ratio = lawful + size * spread * (standard**2 - 1) / 2**0.5  # of variance 1 for normal log-ratios
    return preferences._replace(rejected=(preferences.chosen - log_ratio).log_softmax(-1))


def closed_form(preferences: Preferences, beta: float) -> Tensor:
    """[..., N] DPO's minimiser whatever the rejected completions: log pi, pi proportional to rho (rho / pi_l)^(1/beta).

    Example:
        >>> on_the_law = random_power_law(4, range(1), beta=0.5)
        >>> bool(jensen_shannon(closed_form(on_the_law, beta=0.5), on_the_law.target) < 1e-15)
        True
    """
    log_ratio = preferences.chosen - preferences.rejected
    return (preferences.reference + log_ratio / beta).log_softmax(-1)


def _on_the_law(models: dict[int, Preferences], tuned: dict[str, dict[str, Any]], seeds: range, steps: int) -> Table:
    rows = []
    for size, preferences in models.items():
        untrained = jensen_shannon(preferences.reference, preferences.target)
        about = {"loss": "none", "setting": "", "hyperparameters": "", "completions": size}
        missing = torch.full_like(untrained, torch.nan)
        rows += _rows(about, seeds, divergence=untrained, loss_value=missing, gradient=missing)
        for contestant in CONTESTANTS:
            for setting, loss in (("usual", contestant.usual), ("tuned", tuned[contestant.title])):
                minimum = learn(preferences, loss, steps)
                about |= {"loss": contestant.title, "setting": setting, "hyperparameters": in_words(loss)}
                divergence = jensen_shannon(minimum.policy, preferences.target)
                rows += _rows(about, seeds, divergence=divergence, loss_value=minimum.loss, gradient=minimum.gradient)
    title = "On the power law: divergence from the target in nats, by number of completions"
    return Table("reward", title, rows, ("loss", "setting", "hyperparameters"), ("divergence",), "completions")


def _off_the_law(
    lawful: Preferences,
    noise: Tensor,
    tuned: dict[str, dict[str, Any]],
    seeds: range,
    steps: int,
    sizes: Sizes,
) -> tuple[Table, float]:
    """The table, and by how much DPO's divergences differ from those of its closed form, at most."""
    rows, worst = [], 0.0
    for kind, size in ((kind, size) for kind, some in sizes.items() for size in some):
        preferences = off_the_law(lawful, kind, size, noise)
        for title, loss in tuned.items():
            divergence = jensen_shannon(learn(preferences, loss, steps).policy, preferences.target)
            rows += _rows({"kind": kind, "size": size, "loss": title}, seeds, divergence=divergence)
            if title == "DPO":
                theory = jensen_shannon(closed_form(preferences, loss["beta"]), preferences.target)
                worst = max(worst, float((divergence - theory).abs().max()))
    title = (
        f"Off the power law, {lawful.reference.shape[-1]} completions, tuned on it: divergence from the target in "
        "nats, by size"
    )
    return Table("reward_off_law", title, rows, ("kind", "loss"), ("divergence",), "size"), worst


def _training(preferences: Preferences, tuned: dict[str, dict[str, Any]], seeds: range, steps: int) -> Table:
    rows = []
    for title, loss in tuned.items():
        policies = train(preferences, steps=steps, step_size=0.1, **loss)
        for step in (step for step in RECORDED if step <= steps):
            divergence = jensen_shannon(policies[step], preferences.target)
            rows += _rows({"loss": title, "step": step}, seeds, divergence=divergence)
    return Table("reward_training", "", rows)


def _rows(about: dict[str, Any], seeds: range, **values: Tensor) -> list[dict[str, Any]]:
    """A row for every replicate."""
    return [
        {**about, "seed": seed, **{name: float(value[i]) for name, value in values.items()}}
        for i, seed in enumerate(seeds)
    ]


def _largest(table: Table, column: str) -> float:
    return max(row[column] for row in table.rows if row[column] == row[column])  # NaN is no number


def _found(tables: list[Table], size: int) -> str:
    on_law, off_law, *_ = tables

    def divergences(table: Table, **where: Any) -> list[float]:
        rows = (row for row in table.rows if all(row[name] == wanted for name, wanted in where.items()))
        return [row["divergence"] for row in rows]

    def nearest(table: Table, titles: list[str], **where: Any) -> str:
        return min(titles, key=lambda title: sum(divergences(table, loss=title, **where)))

    every = [contestant.title for contestant in CONTESTANTS]
    tuned = {"setting": "tuned", "completions": size}
    first = nearest(on_law, every, **tuned)
    second = nearest(on_law, [title for title in every if title != first], **tuned)
    off = {(row["kind"], row["size"]): None for row in off_law.rows if (row["kind"], row["size"]) != ("exponent", 1.0)}
    wins = [nearest(off_law, every, kind=kind, size=amount) for kind, amount in off]
    counts = ", ".join(f"{title} in {wins.count(title)}" for title in sorted(set(wins), key=wins.count, reverse=True))
    usual = divergences(on_law, loss="DPO", setting="usual", completions=size)
    return (
        f"on the power law, with {size} completions, {first} ends nearest to the target, at a divergence of "
        f"{summary(divergences(on_law, loss=first, **tuned))} nats; the next is {second} at "
        f"{summary(divergences(on_law, loss=second, **tuned))}. DPO with its usual beta, "
        f"{CONTESTANTS[0].usual['beta']:g}, ends at {summary(usual)}, the untrained policy is at "
        f"{summary(divergences(on_law, loss='none', completions=size))}. Off the law, of {len(wins)} settings, the "
        f"nearest mean is that of {counts}."
    )


def _draw(figure: Figure, tables: list[Table], size: int) -> None:
    on_law, off_law, training, _ = tables
    (minima, steps, legend), (exponent, noise, curvature) = figure.subplots(2, 3)
    titles = [contestant.title for contestant in CONTESTANTS]
    for i, title in enumerate(titles):
        color = f"C{i}"
        for offset, setting, face in ((-0.15, "usual", "white"), (0.15, "tuned", color)):
            found = points(on_law, "divergence", "completions", loss=title, setting=setting, completions=size)
            style = {"color": color, "markerfacecolor": face, "markersize": 7}
            draw_points(minima, found._replace(x=[i + offset]), "o", **style)
        draw_band(steps, points(training, "divergence", "step", loss=title), color=color)
        for axes, kind in ((exponent, "exponent"), (noise, "noise"), (curvature, "curvature")):
            found = points(off_law, "divergence", "size", loss=title, kind=kind)
            shift = 0.01 * (i - len(titles) // 2)  # so that error bars do not cover one another
            draw_points(axes, found._replace(x=[x + shift for x in found.x]), color=color)
        legend.plot([], [], "o-", color=color, label=title)
    minima.set_xticks(range(len(titles)), titles)
    minima.set_yscale("log")
    steps.set_xscale("symlog", linthresh=1)
    steps.set_yscale("log")
    y = "divergence from the target (nats)"
    describe(minima, f"On the power law: the minimiser, {size} completions", "", y)
    describe(steps, "On the power law: training, tuned losses", "step of Adam", y)
    describe(exponent, "Off the law: its exponent is wrong", f"exponent / {BETA}", y)
    describe(noise, "Off the law: noise", "size (standard deviations of the log-ratio)", y)
    describe(curvature, "Off the law: a quadratic term", "size (standard deviations of the log-ratio)", y)
    legend.axis("off")
    legend.plot([], [], "o", color="grey", markerfacecolor="white", label="usual hyperparameters")
    legend.plot([], [], "o", color="grey", label="tuned hyperparameters")
    seeds = len({row["seed"] for row in training.rows})
    title = f"means over {seeds} seeds\nbars and bands: lowest to highest seed"
    legend.legend(loc="center", frameon=False, title=title)
