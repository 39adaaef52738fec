"""`lit-did plan`: the peak memory of a GPU in a training step, what holds it, and what would help."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lit_did.cli.errors import InputError
from lit_did.cli.functions import call
from lit_did.planning import CARDS, Plan, Run, Switch, fits, plan, plan_of, read_config, switches

GIB, MIB = 2**30, 2**20
NOTEWORTHY = 0.01  # of the peak: what a switch saves at least, to be called a help


def main(arguments: list[str]) -> int:
    """Runs the command."""
    if any(argument.partition("=")[0].replace("-", "_") == "__context_parallel_size" for argument in arguments):
        raise InputError(
            "Expected an option of this command, but got --context_parallel_size. A plan does not know it. As an "
            "estimate, divide --tokens, --length and --prompt_length by it."
        )
    return call(show_plan, "plan", arguments, options_of=(plan,), without=("model",))


def show_plan(model: str, *, advice: bool = True, **options: Any) -> int:
    """Works out the peak memory of a GPU in a training step of LitDPO, what holds it, and what would help.

    It needs neither a GPU nor weights: a model's config.json is enough.

    Args:
        model: A shape that lit-did knows (llama3-8b, llama3-70b), a folder with a config.json, such a file, smollm2, or
            a name of the Hugging Face hub.
        advice: Whether to work out what each switch would change, which takes several times as long.
        **options: Those of `lit_did.planning.plan`.
    """
    run, config = Run(**options), read_config(model)
    found = plan_of(config, run)
    print(describe(model, found))
    if advice:
        print(f"\n{describe_switches(found, switches(config, run))}")
    return 0


def describe(name: str, found: Plan) -> str:
    """A plan as a table of lines."""
    run = found.run
    gpus = "1 GPU" if run.gpus == 1 else f"{run.gpus} GPUs, {_strategy(run)}"
    trained = f"{_billions(found.trained_parameters)} trained"
    pairs = "1 pair" if run.pairs == 1 else f"{run.pairs} pairs"
    unit = _unit(found)
    lines = [
        f"{name}: {_billions(found.parameters)} parameters, {trained}, {gpus}, {run.precision}",
        f"A micro-batch of {pairs} on each GPU: {2 * run.pairs * run.length:,} tokens in sequences of {run.length:,}, "
        f"of which {run.prompt_length:,} are the prompt.",
        "",
        f"Peak memory of a GPU: {_size(found.peak, unit)}, in this part of a step: {found.when}",
        *(f"  {holder:26}{_size(held, unit):>12}" for holder, held in found.held.items() if held),
        "",
        fitting(found),
    ]
    return "\n".join(lines)


def fitting(found: Plan) -> str:
    """A sentence that says into which GPUs a plan fits."""
    cards = [str(card) for card in CARDS if fits(found.peak, card)]
    if not cards:
        return f"It does not fit into a GPU of {CARDS[-1]} GiB, if tensors may take 90% of its memory."
    names = cards[0] if len(cards) == 1 else f"{', '.join(cards[:-1])} and {cards[-1]}"
    return f"It fits into a GPU of {names} GiB, if tensors may take 90% of its memory."


def describe_switches(found: Plan, others: Iterable[Switch]) -> str:
    """A table of what each switch would change, the most helpful first."""
    ordered = sorted(others, key=lambda switch: switch.plan.peak)
    if not ordered:
        return "No switch is left that LitDPO could turn."
    unit = _unit(found)
    lines = [f"{'With one change':36}{'peak':>10}{'saves':>10}  fits   what it costs"]
    for switch in ordered:
        smallest = next((str(card) for card in CARDS if fits(switch.plan.peak, card)), "-")
        peak, saved = _size(switch.plan.peak, unit), _size(found.peak - switch.plan.peak, unit)
        lines.append(f"{switch.name:36}{peak:>10}{saved:>10}  {smallest:>4}   {switch.cost}")
    enough = (1 - NOTEWORTHY) * found.peak
    helpful = [switch for switch in ordered if switch.trains_the_same and switch.plan.peak <= enough]
    if helpful:
        best = helpful[0]
        lines += ["", f"Of those that train the same weights, {best.name} helps most: {_size(best.plan.peak, unit)}."]
    else:
        lines += ["", "None of those that train the same weights lowers the peak by 1%."]
    return "\n".join(lines)


def _unit(found: Plan) -> int:
    """The unit of all sizes of a plan, in bytes."""
    return GIB if found.peak >= GIB else MIB


def _size(size: int, unit: int) -> str:
    return f"{size / unit:.1f} {'GiB' if unit == GIB else 'MiB'}"


def _strategy(run: Run) -> str:
    if run.replicated:
        return "DDP"
    sizes = f"data_parallel_size={run.data_parallel}, tensor_parallel_size={run.tensor_parallel}"
    return f"ModelParallelStrategy({sizes})"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
