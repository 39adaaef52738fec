"""Pictures of a run: what LitDPO logged, from CSVLogger's file, and the held-out pairs by tag."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_did.demo.held_out import HeldOut

PANELS = (
    ("Loss", "nats", ("loss",)),
    ("Reward margin", "beta times nats", ("reward_margin",)),
    ("Reward accuracy, share of chosen that fell", "", ("reward_accuracy", "chosen_fell")),
    ("Log-ratio of a completion", "nats", ("chosen_log_ratio", "rejected_log_ratio")),
    ("Token DID concentration", "nats a token", ("token_did_concentration",)),
    ("Token DID log-partition", "nats a token", ("token_did_log_partition",)),
    ("KL between policy and reference", "nats a token", ("kl", "reverse_kl")),
    ("Policy entropy", "nats a token", ("policy_entropy",)),
    ("Calibration error of the reward", "", ("calibration_error",)),
)
NEIGHBOURS = 4  # Steps on either side in the mean that a thick curve shows.

STEPS = "optimiser steps"

Series = dict[str, list[tuple[int, float]]]


def read_metrics(path: Path) -> Series:
    """{metric: [(step, value)]} of a `metrics.csv`."""
    series: Series = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def training_picture(metrics: Path, measured: Sequence[HeldOut], target: Path) -> None:
    """Draws what `LitDPO` logged in the file `metrics` over the optimiser steps done before, as a PNG `target`."""
    series = read_metrics(metrics)
    held_out_steps = [held_out.step for held_out in measured]  # Lightning's own are one too low during training
    figure = _figure(13, 9)
    for axes, (title, unit, names) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        for i, name in enumerate(names):
            steps, values = _points(series, f"train/{name}")
            axes.plot(steps, values, color=f"C{i}", linewidth=0.6, alpha=0.35)
            axes.plot(steps, _smooth(values), color=f"C{i}", label=name.replace("_", " "))
            _, values = _points(series, f"val/{name}")
            axes.plot(held_out_steps[: len(values)], values, "o--", color=f"C{i}", linewidth=0.8, markersize=5)
        _describe(axes, title, STEPS, unit)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Training: each step's pairs, thick the mean of up to {2 * NEIGHBOURS + 1} steps. Dots: the held-out pairs.",
        fontsize=10,
    )
    figure.savefig(target, format="png")


def _points(series: Series, name: str) -> tuple[list[int], list[float]]:
    points = series.get(name, [])
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of every value and its neighbours, as many before as after it, so that a curve does not lag."""
    reach = [min(NEIGHBOURS, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - n : i + n + 1]) / (2 * n + 1) for i, n in enumerate(reach)]


def held_out_picture(measured: Sequence[HeldOut], target: Path) -> None:
    """Draws the held-out pairs by tag as a PNG `target`: margin and concentration over training, every pair after it.

    Curves have a band of one standard error.
    """
    figure = _figure(10, 7)
    margins, concentrations, pairs, information = figure.subplots(2, 2).flat
    after = measured[-1]
    for color, kind in enumerate(after.kinds):
        style = {"color": f"C{color}", "label": kind}
        _curve(margins, measured, "reward_margin", kind, style)
        _curve(concentrations, measured, "token_did_concentration", kind, style)
        member = np.array(after.tags) == kind
        margin, concentration, kl = (
            after.values[name].numpy()[member] for name in ("reward_margin", "token_did_concentration", "kl")
        )
        if np.isfinite(margin).any():  # a run that diverged has a picture too
            pairs.ecdf(margin[np.isfinite(margin)], **style)
        information.scatter(kl, concentration, s=16, **style)
    pairs.axvline(0, color="grey", linewidth=0.8)
    _describe(margins, "Reward margin", STEPS, "beta times nats")
    _describe(concentrations, "Token DID concentration: what was learned", STEPS, "nats a token")
    _describe(pairs, "Reward margin of every pair, after training", "beta times nats", "share of pairs below")
    _describe(
        information, "What was learned of every pair", "KL from the reference (nats a token)", "concentration (nats)"
    )
    handles, labels = margins.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(f"{after.count(None)} held-out pairs, {after.step} steps of DPO", x=0.01, ha="left", fontsize=11)
    figure.savefig(target, format="png")


def _curve(axes: Any, measured: Sequence[HeldOut], statistic: str, kind: str, style: dict[str, Any]) -> None:
    steps = [held_out.step for held_out in measured]
    means = np.array([held_out.mean(statistic, kind) for held_out in measured])
    errors = np.array([held_out.standard_error(statistic, kind) for held_out in measured])
    axes.plot(steps, means, "o-", markersize=4, **style)
    if np.isfinite(errors).all():
        axes.fill_between(steps, means - errors, means + errors, color=style["color"], alpha=0.15, linewidth=0)


def _figure(width: float, height: float) -> Figure:
    # The object-oriented interface needs no display and changes no global state.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _describe(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.locator_params(nbins=6)
    if x == STEPS:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_formatter().set_useOffset(False)  # 10.802, not 0.002 beside "+1.08e1"
