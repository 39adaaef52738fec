"""SmolLM2 trained by DPO and DPO-PG on open-ended and on factual pairs: the DID's entropy, and what was learned.

Claims (arXiv 2505.23761): open-ended instruction following goes with a high-entropy DID, knowledge-intensive questions
with a low-entropy one; DPO-PG learns the lower one. The DID's entropy is measured as three different quantities: of the
token DIDs at held-out pairs, over fixed candidates, and of whole completions by `lit_did.sampling.sample_did`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_did.data import PreferenceDataModule, read_pairs
from lit_did.demo import PAIRS
from lit_did.experiments.language_model import NAME, QUICK_NAME, LanguageModel, load, sample, score, score_all, train
from lit_did.experiments.reporting import (
    Options,
    Report,
    Table,
    criterion,
    describe,
    draw_cross,
    legend_below,
    sign,
    summary,
)
from lit_did.functional import did_entropy_over_candidates
from lit_did.modules import LitDPO, LitDPOPG
from lit_did.sampling import sample_did

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("open-ended", "factual")
METHODS = {"DPO": LitDPO, "DPO-PG": LitDPOPG}
AT_THE_REFERENCE = ("token_did_concentration", "kl", "concentration_per_kl", "chosen_log_ratio", "margin")
"""quantities that are 0 where the policy is its reference"""
FACTS = ("factual_accuracy", "factual_margin")
CONCENTRATION = ("concentration",)
SMC_VALUES = ("concentration", "half_width")


class Size(NamedTuple):
    """How large the experiment is."""

    steps: int
    batch_size: int
    held_out: int
    """held-out pairs of each kind; training uses the rest"""
    scored: int
    """held-out pairs of each kind for the statistics of token DIDs"""
    max_length: int
    """tokens of a prompt and its completion"""
    prompts: int
    """held-out prompts of each kind, for candidates, SMC and samples"""
    candidates: tuple[int, ...]
    particles: tuple[int, ...]
    max_new_tokens: int
    """of candidates, particles and samples: T"""
    samples: int
    """of each prompt, for diversity"""


FULL = Size(16, 4, 24, 16, 80, 1, (8, 32), (32, 128), 16, 16)
QUICK = Size(2, 2, 4, 4, 160, 1, (4, 8), (8, 16), 4, 4)


def run(options: Options) -> Report:
    """Trains every method on every kind of pairs, with every seed, and measures each policy."""
    size = QUICK if options.quick else FULL
    language_model = load(options.quick)
    rows, smc_rows = [], []
    runs = [(seed, kind, method) for seed in options.all_seeds() for kind in KINDS for method in METHODS]
    for seed, kind, method in tqdm(runs, desc="policies", unit="policy", disable=options.quiet):
        train_pairs, held_out = split(seed, size.held_out)
        data = PreferenceDataModule(
            train_pairs[kind],
            language_model.tokenizer,
            batch_size=size.batch_size,
            max_length=size.max_length,
            as_chat=True,
            drop_last=True,
            seed=seed,
        )
        policy = train(language_model, data, METHODS[method], steps=size.steps, seed=seed)
        about = {"trained_on": kind, "method": method, "seed": seed}
        rows.append(about | measurements(language_model, policy, kind, held_out, size, seed))
        smc_rows += [about | row for row in did_rows(language_model, policy, kind, held_out, size, seed)]
    for seed in options.all_seeds():
        _, held_out = split(seed, size.held_out)
        about = {"trained_on": "nothing", "method": "reference", "seed": seed}
        unchanged = dict.fromkeys(AT_THE_REFERENCE, 0.0)
        rows.append(about | unchanged | abilities(language_model, language_model.model, held_out, size, seed))
    return report(QUICK_NAME if options.quick else NAME, rows, smc_rows, size)


def split(seed: int, held_out: int) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The demo's pairs by kind, in an order of the seed: those to train on, and those held out."""
    every: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for row in read_pairs(PAIRS):
        every[row.pair.tag].append({name: value for name, value in row.pair._asdict().items() if value is not None})
    for pairs in every.values():
        random.Random(seed).shuffle(pairs)
    train_pairs = {kind: pairs[held_out:] for kind, pairs in every.items()}
    return train_pairs, {kind: pairs[:held_out] for kind, pairs in every.items()}


def measurements(
    language_model: LanguageModel, policy: nn.Module, kind: str, held_out: dict[str, list[dict]], size: Size, seed: int
) -> dict[str, float]:
    """A trained policy's token DIDs on held-out pairs of the kind that it was trained on, and its abilities."""
    pairs = answers(language_model, held_out[kind][: size.scored], size)
    statistics = score_all(policy, language_model.model, pairs)
    share = statistics.num_tokens / statistics.num_tokens.sum()
    concentration = float((statistics.token_did_concentration * share).sum())
    kl = float((statistics.kl * share).sum())
    chosen, rejected = statistics.log_ratio.chunk(2)
    return {
        "token_did_concentration": concentration,
        "kl": kl,
        "concentration_per_kl": concentration / kl if kl > 0 else math.nan,
        "chosen_log_ratio": float(chosen.mean()),
        "margin": float((chosen - rejected).mean()),
        **abilities(language_model, policy, held_out, size, seed),
    }


def abilities(
    language_model: LanguageModel, policy: nn.Module, held_out: dict[str, list[dict]], size: Size, seed: int
) -> dict[str, float]:
    """What a policy can do: facts by likelihood, and how varied its open-ended samples are."""
    facts = score_all(policy, None, answers(language_model, held_out["factual"], size))
    right, wrong = (facts.policy_logprob / facts.num_tokens).chunk(2)
    entropies, shares = [], []
    for i, prompt in enumerate(prompts(language_model, held_out["open-ended"], size)):
        completions = sample(
            policy, prompt, count=size.samples, max_new_tokens=size.max_new_tokens, seed=1000 * seed + i
        )
        own = score_all(policy, None, [(prompt, row[row >= 0]) for row in completions])
        entropies.append(float((own.policy_entropy * own.num_tokens).sum() / own.num_tokens.sum()))
        shares.append(distinct_bigrams(completions))
    return {
        "policy_entropy": sum(entropies) / len(entropies),
        "diversity": sum(shares) / len(shares),
        "factual_accuracy": float(((right > wrong) + 0.5 * (right == wrong)).float().mean()),
        "factual_margin": float((right - wrong).mean()),
    }


def did_rows(
    language_model: LanguageModel, policy: nn.Module, kind: str, held_out: dict[str, list[dict]], size: Size, seed: int
) -> list[dict[str, Any]]:
    """The DID's entropy over K candidates and of whole completions by SMC with K particles: a row a prompt and K."""
    rows = []
    length = size.max_new_tokens
    for i, prompt in enumerate(prompts(language_model, held_out[kind], size)):
        # The reference's own completions: the same for every policy of this seed.
        candidates = sample(
            language_model.model, prompt, count=max(size.candidates), max_new_tokens=length, seed=1000 * seed + i
        )
        statistics = score(policy, prompt, candidates)
        for count in size.candidates:
            groups = [x[: len(x) // count * count].view(-1, count) for x in statistics[:2]]
            entropy = float(did_entropy_over_candidates(*groups).mean())
            rows.append({"prompt": i, "estimate": "candidates", "K": count, "concentration": math.log(count) - entropy})
        for count in size.particles:
            samples = sample_did(
                policy, None, prompt, max_new_tokens=length, num_samples=count, seed=seed, progress=False
            )
            estimate = samples.estimate
            rows.append(
                {
                    "prompt": i,
                    "estimate": "SMC",
                    "K": count,
                    "concentration": samples.concentration,
                    "entropy_per_token": samples.entropy_per_token,
                    "half_width": (estimate.upper - estimate.lower) / 2,
                    "reliable": estimate.reliable,
                }
            )
    return rows


def answers(language_model: LanguageModel, pairs: Sequence[dict], size: Size) -> list[tuple[Tensor, Tensor]]:
    """[2 pairs] prompts and their completions: the chosen, then the rejected."""
    end = torch.tensor([language_model.tokenizer.eos_token_id])
    sequences = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt = language_model.prompt(pair["prompt"])
            answer = torch.cat([torch.tensor(language_model.tokenizer(pair[side])["input_ids"]), end])
            sequences.append((prompt, answer[: max(1, size.max_length - prompt.shape[1])]))
    return sequences


def prompts(language_model: LanguageModel, pairs: Sequence[dict], size: Size) -> list[Tensor]:
    """[1, t] token ids of the first held-out prompts."""
    return [language_model.prompt(pair["prompt"]) for pair in pairs[: size.prompts]]


def distinct_bigrams(completions: Tensor) -> float:
    """The share of different ones among all pairs of neighbours in `completions` [n, T], -1 after the end.

    Example:
        >>> distinct_bigrams(torch.tensor([[1, 2, 3], [1, 2, -1]]))  # (1, 2), (2, 3), (1, 2)
        0.6666666666666666
    """
    pairs = torch.stack([completions[:, :-1], completions[:, 1:]], -1).flatten(0, 1)
    pairs = pairs[(pairs >= 0).all(1)]
    return len(pairs.unique(dim=0)) / max(1, len(pairs))


def report(name: str, rows: list[dict], did: list[dict], size: Size) -> Report:
    """The tables and the picture."""
    seeds = sorted({row["seed"] for row in rows})
    by = ("trained_on", "method")
    averaged = average(did, (*by, "seed", "estimate", "K"))
    smc, candidates = ([row for row in averaged if row["estimate"] == name] for name in ("SMC", "candidates"))
    claims = differences(rows, [row for row in smc if row["K"] == max(size.particles)], seeds)
    length = f"T = {size.max_new_tokens}"
    facts = [{name: row[name] for name in (*by, "seed", *FACTS)} for row in rows]
    tables = [
        Table(
            "entropy",
            f"{name}: policies at held-out pairs, and in samples of their own",
            rows,
            by,
            ("token_did_concentration", "kl", "chosen_log_ratio", "margin", "policy_entropy", "diversity"),
        ),
        Table("entropy_facts", "Held-out factual questions", facts, by, FACTS),
        Table(
            "entropy_candidates",
            f"DID over K candidates: log K - H, in nats, {length}, by K",
            candidates,
            by,
            CONCENTRATION,
            "K",
        ),
        Table(
            "entropy_smc",
            f"DID of whole completions by SMC: log of their number - H, in nats, {length}, by number of particles",
            smc,
            by,
            SMC_VALUES,
            "K",
        ),
        Table("entropy_differences", "Differences, seed by seed", claims, ("of", "between"), ("difference",)),
        *(
            Table(f"entropy_{name.lower()}_prompts", "", [row for row in did if row["estimate"] == name])
            for name in ("candidates", "SMC")
        ),
    ]
    reliable = [row["reliable"] for row in did if row["estimate"] == "SMC"]
    notes = [
        "Concentration: how far a distribution is from the uniform one, in nats: 0 where nothing was learned. A high "
        "concentration is a low entropy. Token DID concentration: log V - H of the token DIDs, a mean over tokens. "
        "Log-ratios and margins are in nats a completion, KL and policy entropy in nats a token, the factual margin in "
        "nats a token between two completions.",
        f"{size.steps} steps of {size.batch_size} pairs; {size.held_out} held-out factual pairs; {size.scored} pairs "
        "of each kind for token DIDs. Prompts of each seed for candidates (drawn from the reference), SMC and samples: "
        f"{size.prompts} ({size.samples} samples of each). Diversity: the share of different bigrams. Half width: half "
        f"of SMC's own 95% interval. {sum(reliable)} of {len(reliable)} SMC estimates are called reliable. DPO-PG "
        "takes a projection of our own (`lit-did docs losses`).",
    ]
    return Report(tables, lambda figure: _draw(figure, rows, smc, size), (15, 5.5), notes, _found(name, claims))


def _found(name: str, claims: Sequence[dict]) -> str:
    def finding(of: str, between: str, subject: str) -> str:
        values = [row["difference"] for row in claims if (row["of"], row["between"]) == (of, between)]
        outcome = {1: "higher", -1: "lower", 0: "not clearly different"}[sign(values)]
        return f"{subject} {outcome} (difference {summary(values)})"

    seeds = len({row["seed"] for row in claims})
    kinds, methods = "factual, DPO - open-ended, DPO", "{0}, DPO-PG - {0}, DPO"
    return (
        f"{name}: after DPO on factual pairs, compared with open-ended pairs, "
        f"{finding('token DID concentration', kinds, 'the concentration of the token DIDs is')} and "
        f"{finding('SMC concentration', kinds, 'that of whole completions is')}. After DPO-PG, compared with DPO, "
        + " and ".join(
            finding("token DID concentration", methods.format(kind), f"on {kind} pairs the token DIDs' is")
            for kind in KINDS
        )
        + ". Factual accuracy against the reference: "
        + ", ".join(
            finding("factual accuracy", f"{kind}, DPO - nothing, reference", f"after DPO on {kind} pairs")
            for kind in KINDS
        )
        + f". (A difference counts if {criterion(seeds)}.)"
    )


def average(rows: Sequence[dict], by: Sequence[str]) -> list[dict]:
    """Means of all other numbers over the rows that agree in the columns `by`; "prompt" is left out."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        dict(zip(by, key, strict=True))
        | {
            name: sum(float(row[name]) for row in group) / len(group)
            for name in group[0]
            if name not in by and name != "prompt"
        }
        for key, group in groups.items()
    ]


def differences(rows: Sequence[dict], smc: Sequence[dict], seeds: Sequence[int]) -> list[dict]:
    """What the claims are about, a row a seed: each difference is one of policies that share their seed."""
    found = []

    def add(name: str, source: Sequence[dict], value: str, one: tuple[str, str], other: tuple[str, str]) -> None:
        for seed in seeds:
            a, b = (
                next(r for r in source if (r["trained_on"], r["method"], r["seed"]) == (*which, seed))
                for which in (one, other)
            )
            between = f"{one[0]}, {one[1]} - {other[0]}, {other[1]}"
            found.append({"of": name, "between": between, "seed": seed, "difference": a[value] - b[value]})

    for method in METHODS:
        for name, source, value in (
            ("token DID concentration", rows, "token_did_concentration"),
            ("token DID concentration per KL", rows, "concentration_per_kl"),
            ("SMC concentration", smc, "concentration"),
        ):
            add(name, source, value, ("factual", method), ("open-ended", method))
    for kind in KINDS:
        for name, source, value in (
            ("token DID concentration", rows, "token_did_concentration"),
            ("token DID concentration per KL", rows, "concentration_per_kl"),
            ("SMC concentration", smc, "concentration"),
            ("chosen log-ratio", rows, "chosen_log_ratio"),
            ("policy entropy", rows, "policy_entropy"),
            ("diversity", rows, "diversity"),
            ("factual accuracy", rows, "factual_accuracy"),
        ):
            add(name, source, value, (kind, "DPO-PG"), (kind, "DPO"))
    for kind in KINDS:
        for method in METHODS:
            for name, value in (("factual accuracy", "factual_accuracy"), ("diversity", "diversity")):
                add(name, rows, value, (kind, method), ("nothing", "reference"))
    return found


def _draw(figure: Figure, rows: Sequence[dict], smc: Sequence[dict], size: Size) -> None:
    tokens, completions, abilities_ = figure.subplots(1, 3)
    kl = {(row["trained_on"], row["method"], row["seed"]): row["kl"] for row in rows}
    largest = [row for row in smc if row["K"] == max(size.particles)]
    policies = [(kind, method, f"C{i}") for i, kind in enumerate(KINDS) for method in METHODS]
    for kind, method, color in (*policies, ("nothing", "reference", "grey")):
        for axes, source, x, y in (
            (tokens, rows, "kl", "token_did_concentration"),
            (completions, largest, "kl", "concentration"),
            (abilities_, rows, "diversity", "factual_accuracy"),
        ):
            chosen = [row for row in source if (row["trained_on"], row["method"]) == (kind, method)]
            if not chosen or (kind == "nothing" and axes is not abilities_):
                continue
            at = [kl[kind, method, row["seed"]] if x == "kl" else row[x] for row in chosen]
            label = method if kind == "nothing" else f"{kind}, {method}"
            marker = {"DPO": "o", "DPO-PG": "x"}.get(method, "s")
            draw_cross(axes, at, [row[y] for row in chosen], color=color, marker=marker, label=label)
    for axes in (tokens, completions, abilities_):
        axes.locator_params(nbins=5)
    x = "KL from the reference (nats a token)"
    describe(tokens, "Token DIDs", x, "concentration, log V - H (nats a token)")
    title = f"DID of whole completions by SMC, T = {size.max_new_tokens}"
    describe(completions, title, x, "concentration (nats a completion)")
    describe(abilities_, "Abilities", "diversity (share of different bigrams)", "factual accuracy (share of questions)")
    legend_below(figure, abilities_, 5, len({row["seed"] for row in rows}))
