"""The dynamics of DPO on a real language model: SmolLM2 towards a known target, on preferences near the power law.

The target is the reference at another temperature, softmax(r / temperature) at every token: below 1 it reinforces what
the reference says, above 1 it explores. Chosen completions are the reference's own. Rejected ones are drawn token by
token from softmax(r + beta (r - r / temperature)). This is the law at every token, but not over whole completions: each
token is normalised on its own, so DPO's optimum on these pairs is near the target and not equal to it. The experiment
`target` measures the difference on enumerable models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lit_did.data import read_pairs
from lit_did.demo import PAIRS
from lit_did.experiments.language_model import NAME, QUICK_NAME, LanguageModel, batch_of, load, sample, score, train
from lit_did.experiments.reporting import Options, Table, summary
from lit_did.models.quiet import evaluating
from lit_did.ops import SequenceStatistics, sequence_statistics

BETA = 0.5
TARGETS = {"reinforcing": 0.7, "exploring": 1.4}
"""{name: temperature}"""
THEORY = "theory, at the target"
CHANGES = ("chosen_change", "rejected_change", "entropy_change", "token_did_entropy")


class Size(NamedTuple):
    """How large the experiment is."""

    train_prompts: int
    test_prompts: int
    pairs: int
    """of each prompt"""
    max_new_tokens: int
    steps: int
    batch_size: int


FULL = Size(16, 4, 4, 24, 24, 4)
QUICK = Size(2, 1, 2, 6, 2, 2)


class Pair(NamedTuple):
    """Token ids: prompt [1, t], completions [n], [m]."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


def table(options: Options) -> Table:
    """The table of `rows`."""
    title = f"{QUICK_NAME if options.quick else NAME}, towards softmax(r / temperature), in nats a token"
    return Table("dynamics_language_model", title, rows(options), ("target", "of"), CHANGES)


def rows(options: Options) -> list[dict]:
    """The change from the reference to the target by theory, and after DPO: two rows a run."""
    size = QUICK if options.quick else FULL
    language_model = load(options.quick)
    found = []
    for seed in tqdm(options.all_seeds(), desc="seeds", unit="seed", disable=options.quiet):
        for name, temperature in TARGETS.items():
            pairs = draw(language_model, temperature, size, seed)
            train_pairs, test_pairs = pairs[: size.train_prompts * size.pairs], pairs[size.train_prompts * size.pairs :]
            loader: DataLoader = DataLoader(
                train_pairs,  # type: ignore[arg-type]  # a list is a map-style data set
                size.batch_size,
                shuffle=True,
                drop_last=True,
                collate_fn=collate,
                generator=torch.Generator().manual_seed(seed),
            )
            policy = train(language_model, loader, steps=size.steps, seed=seed, beta=BETA)
            theory = at_target(language_model.model, test_pairs, temperature)
            trained = changes(*(measure_side(policy, test_pairs, side) for side in ("chosen", "rejected")))
            found += [
                {"target": name, "seed": seed, "of": of, **values}
                for of, values in ((THEORY, theory), (f"DPO, {size.steps} steps", trained))
            ]
    return found


def note(options: Options) -> str:
    """How the rows of the language model were made."""
    size = QUICK if options.quick else FULL
    temperatures = ", ".join(f"{value} ({name})" for name, value in TARGETS.items())
    return (
        f"The language model: LoRA, {size.steps} steps of {size.batch_size} pairs, beta {BETA}; {size.train_prompts} "
        f"prompts to train on, {size.test_prompts} held out, {size.pairs} pairs each of {size.max_new_tokens} tokens. "
        "Chosen ones are the reference's. Rejected ones are drawn token by token from softmax(r + beta (r - r / "
        f"temperature)), temperature {temperatures}, which is normalised at every token: DPO's optimum is near the "
        "target and not equal to it (the experiment `target` measures the difference on enumerable models). All values "
        "are means over the tokens of held-out completions; the DID entropy is that of the token DIDs."
    )


def found(table: Table, options: Options) -> str:
    """What DPO did to the language model, from the rows of `table`."""
    trained = [row for row in table.rows if row["of"] != THEORY]
    fell = sum(row["chosen_change"] < 0 for row in trained)
    changes_of_entropy = [
        f"{summary([row['entropy_change'] for row in trained if row['target'] == target])} ({target})"
        for target in dict.fromkeys(row["target"] for row in trained)
    ]
    return (
        f"{QUICK_NAME if options.quick else NAME}: the chosen log-likelihood fell in {fell} of {len(trained)} "
        f"trainings, and the policy's entropy changed by {', '.join(changes_of_entropy)} nats a token."
    )


def draw(language_model: LanguageModel, temperature: float, size: Size, seed: int) -> list[Pair]:
    """Pairs that obey the power law at every token, `size.pairs` for each of some of the demo's prompts."""
    texts = [row.pair.prompt for row in read_pairs(PAIRS)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    # r + beta (r - r / temperature), the logits of rejected completions, is r at another temperature.
    temperatures = (1.0, 1 / (1 + BETA * (1 - 1 / temperature)))
    pairs = []
    for i in order[: size.train_prompts + size.test_prompts]:
        prompt = language_model.prompt(texts[i])
        sides = [
            sample(
                language_model.model,
                prompt,
                count=size.pairs,
                max_new_tokens=size.max_new_tokens,
                seed=100_000 * (seed + 1) + 10 * i + number,
                temperature=value,
            )
            for number, value in enumerate(temperatures)
        ]
        pairs += [Pair(prompt, *(side[side >= 0] for side in pair)) for pair in zip(*sides, strict=True)]
    return pairs


def collate(pairs: list[Pair]) -> dict[str, Tensor]:
    """A batch as LitDPO takes it. Completions end where they were cut: no end of sequence that nobody drew."""
    return batch_of([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs])


def measure_side(policy: nn.Module, pairs: list[Pair], side: str) -> SequenceStatistics:
    """Statistics [pairs] of the chosen or of the rejected completions under a LoRA policy and its base."""
    parts = [score(policy, pair.prompt, getattr(pair, side)[None]) for pair in pairs]
    return SequenceStatistics(*map(torch.cat, zip(*parts, strict=True)))


def at_target(model: nn.Module, pairs: list[Pair], temperature: float) -> dict[str, float]:
    """`changes` of a policy that is the target: softmax(r / temperature)."""
    sides = []
    for side in ("chosen", "rejected"):
        batch = batch_of([(pair.prompt, getattr(pair, side)) for pair in pairs])
        with evaluating(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        sides.append(sequence_statistics(logits / temperature, logits, batch["labels"]))
    return changes(*sides)


def changes(chosen: SequenceStatistics, rejected: SequenceStatistics) -> dict[str, float]:
    """From the reference to a policy, means over tokens, in nats a token.

    - `chosen_change`: E_rho[log pi - log rho], exact at every prefix: -KL(rho, pi)
    - `rejected_change`: of log pi - log rho at the rejected tokens
    - `entropy_change`: of the policy's entropy, at the reference's prefixes
    - `token_did_entropy`: of the token DIDs there
    """

    def mean(side: SequenceStatistics, values: Tensor) -> float:
        return float((values.double() * side.num_tokens).sum() / side.num_tokens.sum())

    return {
        "chosen_change": -mean(chosen, chosen.reverse_kl),
        "rejected_change": float(rejected.log_ratio.double().sum() / rejected.num_tokens.sum()),
        "entropy_change": mean(chosen, chosen.policy_entropy - chosen.reference_entropy),
        "token_did_entropy": mean(chosen, chosen.token_did_entropy),
    }
