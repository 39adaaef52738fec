"""The picture of `lit-did entropy`: every prompt's interval, sorted, and the means."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lit_did.cli.entropy import tag_label

_NAMED = 30  # the most prompts that are written beside their intervals
_LETTERS = 40


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws a report of `lit-did entropy` as a PNG.

    Args:
        report: What the JSON holds.
        path: The picture's file.
    """
    results = sorted(report["prompts"], key=lambda result: result["entropy"])
    colors = {tag: f"C{i % 10}" for i, tag in enumerate(report["by_tag"])}
    rows = 1 + len(colors)
    height = min(0.28 * max(len(results), 8), 9)
    figure = Figure(figsize=(10, height + 0.35 * rows + 1.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    prompts, means = figure.subplots(2, 1, sharex=True, height_ratios=(height, 0.35 * rows + 0.2))
    _draw_prompts(prompts, results, colors)
    _draw_means(means, report, colors)
    overall, arguments = report["overall"], report["arguments"]
    entropy, most = overall["entropy"], report["log_num_completions"]
    if entropy["lower"] is not None:
        for axes in (prompts, means):
            axes.axvspan(entropy["lower"], entropy["upper"], color="black", alpha=0.1, linewidth=0)
    for axes in (prompts, means):
        axes.axvline(entropy["mean"], color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    low, high = prompts.get_xlim()
    if most - high < high - low:  # not where the line would squeeze all intervals
        for axes in (prompts, means):
            axes.axvline(most, color="C3", linestyle="--", linewidth=1)
    above = prompts.secondary_xaxis("top", functions=(lambda x: most - x, lambda x: most - x))
    above.set_xlabel(f"concentration (nats): {most:.1f}, the logarithm of the number of completions, less the entropy")
    means.set_xlabel(f"DID entropy of completions of up to {arguments['max_new_tokens']} tokens (nats)")
    means.xaxis.get_major_formatter().set_useOffset(False)
    _draw_legend(figure, report, colors, most - high < high - low)
    with warnings.catch_warnings():
        # The font has no Chinese or Korean. Its boxes in place of letters are enough.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png", metadata={"Software": None})  # the same bytes for the same numbers


def _draw_prompts(axes: Axes, results: list[dict[str, Any]], colors: dict[str, str]) -> None:
    size = 5 if len(results) <= 60 else 3
    for place, result in enumerate(results):
        color = colors.get(result["tag"], "C0")
        error = [[result["entropy"] - result["lower"]], [result["upper"] - result["entropy"]]]
        axes.errorbar(
            [result["entropy"]],
            [place],
            xerr=error,
            fmt="o",
            color=color,
            markersize=size,
            elinewidth=size / 4 if result["reliable"] else size / 8,
            markeredgewidth=size / 4,
            markerfacecolor=color if result["reliable"] else "white",
            zorder=3 if result["reliable"] else 4,  # rings above the intervals of their neighbours
        )
    axes.set_ylim(-1, len(results))
    if len(results) <= _NAMED:
        axes.set_yticks(range(len(results)), [_short(result["prompt"]) for result in results], fontsize=8)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(results)} prompts, sorted by entropy")


def _draw_means(axes: Axes, report: dict[str, Any], colors: dict[str, str]) -> None:
    tags = report["by_tag"].items()
    groups = [("all prompts", "black", report["overall"])]
    groups += [(_short(tag_label(tag)), colors[tag], found) for tag, found in tags]
    for place, (_, color, found) in enumerate(groups):
        entropy = found["entropy"]
        if entropy["lower"] is not None:
            axes.plot([entropy["lower"], entropy["upper"]], [place, place], color=color, linewidth=1.2)
        axes.plot([entropy["lower_of_these"], entropy["upper_of_these"]], [place, place], color=color, linewidth=4)
        face = color if found["reliable"] else "white"
        axes.plot([entropy["mean"]], [place], "D", color=color, markerfacecolor=face, markersize=6)
    labels = [f"{name} ({found['num_prompts']})" for name, _, found in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)


def _draw_legend(figure: Figure, report: dict[str, Any], colors: dict[str, str], with_most: bool) -> None:
    level = f"{report['arguments']['confidence']:.0%}"
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", label=_short(tag_label(tag)))
        for tag, color in colors.items()
    ]
    handles.append(Line2D([], [], color="grey", marker="o", linestyle="-", label=f"a prompt and its {level} interval"))
    if report["overall"]["num_reliable"] < len(report["prompts"]):
        handles.append(
            Line2D([], [], color="grey", marker="o", markerfacecolor="white", linestyle="", label="unreliable (hollow)")
        )
    handles += [
        Line2D([], [], color="grey", marker="D", linewidth=1.2, label="a mean, for prompts such as these"),
        Line2D([], [], color="grey", linewidth=4, label="the same for these prompts"),
    ]
    if with_most:
        handles.append(Line2D([], [], color="C3", linestyle="--", label="nothing learned"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _short(text: str) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."
