"""Pictures of a training run, from the CSV file that Lightning's CSVLogger writes, and of held-out pairs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_did.report.held_out import HeldOut

PANELS = (
    ("Loss", "nats", ("loss",)),
    ("Reward margin", "nats times beta", ("reward_margin",)),
    ("Reward accuracy, share of chosen that fell", "", ("reward_accuracy", "chosen_fell")),
    ("Log-ratio of a completion", "nats", ("chosen_log_ratio", "rejected_log_ratio")),
    ("DID entropy", "nats a token", ("token_did_entropy",)),
    ("DID log-partition", "nats a token", ("token_did_log_partition",)),
    ("KL between policy and reference", "nats a token", ("kl", "reverse_kl")),
    ("Policy entropy", "nats a token", ("policy_entropy",)),
    ("Calibration error of the reward", "", ("calibration_error",)),
)
WINDOW = 10  # optimiser steps


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{metric: [(step, value)]} of a `metrics.csv`."""
    series: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def training_picture(metrics: Path, target: Path) -> None:
    """Draws what `LitDPO` logged in the file `metrics` over optimiser steps, as a PNG `target`.

    Thin: `train/`, each step of a batch of its own; thick: the mean of up to `WINDOW` steps; dots: `val/`.
    """
    series = read_metrics(metrics)
    figure = _figure(13, 9)
    for axes, (title, unit, names) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        for i, name in enumerate(names):
            steps, values = _points(series, f"train/{name}")
            axes.plot(steps, values, color=f"C{i}", linewidth=0.6, alpha=0.35)
            axes.plot(steps, _smooth(values), color=f"C{i}", label=name.replace("_", " "))
            axes.plot(*_points(series, f"val/{name}"), "o--", color=f"C{i}", linewidth=0.8, markersize=5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(unit)
        axes.yaxis.get_major_formatter().set_useOffset(False)  # 10.802, not 0.002 beside "+1.08e1"
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, format="png")


def _points(series: dict[str, list[tuple[int, float]]], name: str) -> tuple[list[int], list[float]]:
    points = series.get(name, [])
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """The mean of every value and of those before it, up to `WINDOW` in all."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def held_out_picture(before: HeldOut, after: HeldOut, target: Path) -> None:
    """Draws held-out pairs after training, by tag: reward margins, and DID entropy against KL; as a PNG `target`."""
    import numpy as np

    figure = _figure(12, 4)
    margins, information, change = figure.subplots(1, 3)
    tags = np.array(after.tags)
    groups = sorted(set(after.tags))
    for group in groups:
        member = tags == group
        margin = after.values["reward_margin"].numpy()[member]
        if np.isfinite(margin).any():  # a run that diverged has a picture too
            margins.ecdf(margin[np.isfinite(margin)], label=group)
        information.scatter(
            after.values["kl"].numpy()[member], after.values["token_did_entropy"].numpy()[member], s=14, label=group
        )
    margins.axvline(0, color="grey", linewidth=0.8)
    _describe(margins, "Reward margin after training", "beta times log-ratio difference", "share of pairs below")
    _describe(
        information, "Information learned, a pair each", "KL from the reference (nats a token)", "DID entropy (nats)"
    )

    positions = np.arange(len(groups))
    for offset, (held_out, label) in enumerate(((before, "before"), (after, "after"))):
        height = [held_out.mean("token_did_entropy", group) for group in groups]
        change.bar(positions + 0.4 * offset - 0.2, height, width=0.38, label=label)
    change.set_xticks(positions, groups)
    lowest = min(after.mean("token_did_entropy", group) for group in groups)
    highest = max(before.mean("token_did_entropy", group) for group in groups)
    if np.isfinite([lowest, highest]).all():
        change.set_ylim(lowest - 2 * max(highest - lowest, 1e-3), highest + max(highest - lowest, 1e-3))
    _describe(change, "DID entropy (axis cut)", "", "nats a token")
    figure.savefig(target, format="png")


def _figure(width: float, height: float) -> Figure:
    # The object-oriented interface: no display is needed and no global state touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _describe(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    axes.yaxis.get_major_formatter().set_useOffset(False)
