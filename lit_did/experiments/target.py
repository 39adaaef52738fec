"""How far draws from the target, token by token, are from the policy that DPO ends at: exact, on enumerable models.

Where chosen completions come from rho and rejected ones from pi_l, DPO ends at pi* proportional to
rho (rho / pi_l)^(1/beta) over whole completions. `TargetLogitsProcessor` draws every token from
softmax(r + (r - l) / beta), r and l the two models' logits. That distribution is normalised after every prefix, so for
completions of two tokens or more it is another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_did.experiments.energy_models import gaussian, jensen_shannon, kl, one_thread
from lit_did.experiments.reporting import (
    Options,
    Report,
    Table,
    describe,
    draw_points,
    legend_below,
    points,
    summary,
)
from lit_did.functional import enumerate_did
from lit_did.functional.enumeration import NextToken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA = 0.5
VOCABULARY = 5
"""tokens; the first one ends a completion"""
LENGTHS = (1, 2, 3, 4, 5, 6)
QUICK_LENGTHS = (1, 2, 3)
"""T, where completions are cut"""
TEMPERATURES = (0.7, 1.4)
"""targets softmax(r / temperature) at every token, those of `dynamics` on a language model"""
SHOWN = ("kl", "jensen_shannon", "kl_reference")


@one_thread()
def run(options: Options) -> Report:
    """Compares the two distributions on random bigram models."""
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    rows = make_rows(options.all_seeds(), lengths)
    title = "Draws token by token against the policy that DPO ends at, in nats, by the longest length T"
    table = Table("target", title, rows, ("rejected", "T"), SHOWN)
    notes = [
        f"Random bigram models of {VOCABULARY} tokens, including an end token; the logits r of rho are standard "
        f"normal; beta {BETA}. Rejected completions come from a model with other logits, such that (r - l) / beta is "
        "standard normal too, or from the one that makes softmax(r / temperature) the target at every token.",
        "pi*: proportional to rho (rho / pi_l)^(1/beta) over whole completions, enumerated. kl: KL(draws, pi*). "
        "jensen shannon: their Jensen-Shannon divergence. kl reference: KL(pi*, rho), for scale.",
    ]
    return Report([table], lambda figure: _draw(figure, table, options), (11, 5), notes, _found(rows, max(lengths)))


def make_rows(seeds: range, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for every kind of rejected completions, length and seed."""
    references, noise = gaussian(2, VOCABULARY**2, seeds).unflatten(-1, (VOCABULARY, VOCABULARY))
    rows = []
    for seed, reference, other in zip(seeds, references, noise, strict=True):
        # The logits l of the rejected side, from the target's: l = r + beta (r - target).
        kinds = {"another model": reference - BETA * other}
        kinds |= {f"temperature {t:g}": reference + BETA * (reference - reference / t) for t in TEMPERATURES}
        for name, rejected in kinds.items():
            for length in lengths:
                found = compare(bigram(reference), bigram(rejected), length, beta=BETA, eos_token_id=0)
                rows.append({"rejected": name, "T": length, "seed": seed, **found})
    return rows


def bigram(logits: Tensor) -> NextToken:
    """The model with `logits` [V, V] by the token before. Row 0 is for the first token, since 0 ends a completion."""
    return lambda prefixes: logits[prefixes[:, -1] if prefixes.shape[1] else torch.zeros(len(prefixes)).long()]


def compare(
    reference: NextToken, rejected: NextToken, max_new_tokens: int, *, beta: float, eos_token_id: int | None
) -> dict[str, float]:
    """The divergences `SHOWN`, by enumeration of all completions.

    Args:
        reference: From prefixes [n, t] to the logits [n, V] of the reference.
        rejected: The same of the rejected completions' model.
        max_new_tokens: T, where completions are cut.
        beta: DPO's beta, above 0.
        eos_token_id: The token that ends a completion, if any.

    Returns:
        {name: nats}.

    Example:
        >>> reference, rejected = bigram(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), bigram(torch.zeros(2, 2))
        >>> one, two = (compare(reference, rejected, n, beta=0.5, eos_token_id=None)["kl"] for n in (1, 2))
        >>> round(one, 9), round(two, 9)  # both prefixes have the same normalizer
        (0.0, 0.0)
    """

    def token_by_token(prefixes: Tensor) -> Tensor:
        logits = reference(prefixes).log_softmax(-1)
        return logits + (logits - rejected(prefixes).log_softmax(-1)) / beta

    drawn, other = (
        enumerate_did(model, reference, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
        for model in (token_by_token, rejected)
    )
    rho, pi_l = other.reference_logprob, other.policy_logprob
    target = (rho + (rho - pi_l) / beta).log_softmax(0)
    return {
        "kl": float(kl(drawn.policy_logprob, target)),
        "jensen_shannon": float(jensen_shannon(drawn.policy_logprob, target)),
        "kl_reference": float(kl(target, rho)),
    }


def _found(rows: list[dict[str, Any]], length: int) -> str:
    def values(name: str, kind: str, of_length: int) -> list[float]:
        return [row[name] for row in rows if (row["rejected"], row["T"]) == (kind, of_length)]

    at_one = max(row["kl"] for row in rows if row["T"] == 1)
    differences = ", ".join(
        f"{summary(values('kl', kind, length))} ({kind})" for kind in dict.fromkeys(row["rejected"] for row in rows)
    )
    share = [
        100 * row["kl"] / row["kl_reference"]
        for row in rows
        if row["rejected"] == "another model" and row["T"] == length
    ]
    return (
        f"for completions of one token the two distributions are the same (KL at most {at_one:.1g} nats). Up to "
        f"{length} tokens their KL is, in nats, {differences}. For the other model that is "
        f"{sum(share) / len(share):.0f}% of KL(pi*, rho) on average."
    )


def _draw(figure: Figure, table: Table, options: Options) -> None:
    divergence, scale = figure.subplots(1, 2, sharey=True)
    longer = table._replace(rows=[row for row in table.rows if row["T"] > 1])  # at 1 they are equal
    for i, kind in enumerate(dict.fromkeys(row["rejected"] for row in table.rows)):
        style = {"color": f"C{i}", "label": f"rejected: {kind}"}
        draw_points(divergence, points(longer, "kl", "T", rejected=kind), **style)
        draw_points(scale, points(longer, "kl_reference", "T", rejected=kind), **style)
    divergence.set_yscale("log")
    for axes in (divergence, scale):
        axes.set_xticks(sorted({row["T"] for row in longer.rows}))
    x = "longest length T (tokens)"
    describe(divergence, "Draws token by token against pi*", x, "KL(draws, pi*) (nats)")
    describe(scale, "For scale: pi* against the reference", x, "KL(pi*, rho) (nats)")
    legend_below(figure, divergence, 3, options.seeds)
