"""What policy and reference write after some prompts: the DID entropy of whole completions, and greedy samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lit_did.audit.blocks import Block, SideBySide, Table
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.wording import many
from lit_did.sampling.completing import complete
from lit_did.sampling.prompts import DIDEntropyOfPrompts, did_entropy_of_prompts
from lit_did.sampling.readers import ends_of

NUM_PARTICLES = 128


def did_entropy_of_completions(
    prompts: Sequence[Sequence[int]], policy: nn.Module, reference: nn.Module | None, settings: Settings
) -> tuple[dict[str, Any], list[Finding], list[Block]]:
    """The DID entropy of completions of some prompts, with its verdict.

    Args:
        prompts: Their token ids, at least one.
        policy: The policy.
        reference: The reference. None: the policy without its adapter.
        settings: With `max_new_tokens`, `seed` and `progress`.
    """
    found = did_entropy_of_prompts(
        policy,
        reference,
        [list(map(int, prompt)) for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        num_samples=NUM_PARTICLES,
        seed=settings.seed,
        progress=settings.progress,
    )
    count = len(prompts)
    means = {
        name: Estimate(mean.mean, mean.lower, mean.upper, count) if count > 1 else Estimate(mean.mean, count=count)
        for name, mean in (
            ("did_entropy", found.entropy),
            ("did_entropy_per_token", found.entropy_per_token),
            ("did_concentration", found.concentration),
        )
    }
    figures: dict[str, Any] = {**means, "did_entropy_reliable": found.reliable, "did_entropy_reason": found.reason}
    trust = "reliable" if found.reliable else "not reliable"
    finding = Finding(
        "did_entropy",
        f"The DID entropy of completions of {settings.max_new_tokens} tokens is {means['did_entropy']} nats over "
        f"{many(count, 'prompt')}, {means['did_concentration']} nats below its maximum; the estimate is {trust}.",
        "" if found.reliable else "Lower `max_new_tokens`, or take more samples with `lit-did entropy`.",
        raised=False,
        severity=0.15,
        value=means["did_entropy"],
    )
    return figures, [finding], [_table(found, settings)]


def _table(found: DIDEntropyOfPrompts, settings: Settings) -> Table:
    rows = []
    for number, samples in enumerate(found.prompts, start=1):
        estimate = samples.estimate
        entropy = Estimate(estimate.entropy, estimate.lower, estimate.upper, NUM_PARTICLES)
        rows.append([f"prompt {number}", entropy, samples.concentration, "yes" if estimate.reliable else "no"])
    return Table(
        "DID entropy of whole completions",
        ["", "DID entropy (nats)", "concentration (nats)", "reliable"],
        rows,
        note=f"By sample_did with {NUM_PARTICLES} particles a prompt and at most {settings.max_new_tokens} new tokens. "
        f"{found.reason} This is another quantity than the token DID entropy (`lit-did docs theory`).",
    )


def greedy_samples(
    places: Sequence[int],
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    data: AuditData,
    tokenizer: Any,
    policy: nn.Module,
    reference: nn.Module | None,
    settings: Settings,
) -> SideBySide:
    """Greedy completions of policy and reference side by side.

    Args:
        places: Of the pairs in `data.rows`.
        rows: Their row numbers in the source.
        prompts: The token ids of their prompts.
        data: The pairs.
        tokenizer: The tokenizer.
        policy: The policy.
        reference: The reference. None: the policy without its adapter.
        settings: With `max_new_tokens` and `batch_size`.
    """
    sides: dict[str, dict[str, Any]] = {
        "policy": {"model": policy},
        "reference": {"model": policy, "without_adapter": True} if reference is None else {"model": reference},
    }
    texts: dict[str, list[str]] = {}
    for name, side in sides.items():
        ends = ends_of(side["model"], "auto")
        texts[name] = []
        for ids in complete(
            prompts=[list(map(int, prompt)) for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            **side,
        ):
            cut = "" if ids[-1] in ends else " ..."
            texts[name].append(tokenizer.decode(ids, skip_special_tokens=True) + cut)
    items = [
        (f"{data.called(row)}: {data.texts(place)[0]}", {name: texts[name][i] for name in sides})
        for i, (place, row) in enumerate(zip(places, rows, strict=True))
    ]
    return SideBySide(
        "Greedy completions",
        items,
        note=f"The most likely next token again and again, at most {settings.max_new_tokens}. Three dots: cut there.",
    )
