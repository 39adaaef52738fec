"""Samples for the metrics that take log-ratios or log-probabilities, for one process and for two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNTS = {7: 60, -3: 40, 2**40: 2, 12: 1, 5: 3}  # samples of each prompt; the last one's policy could write none


def completions(seed: int = 0) -> dict[str, Tensor]:
    """Of `DIDEntropy`: samples of five prompts, mixed; every fourth completion comes twice."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(COUNTS.values())
    policy, reference, proposal = -5 * torch.rand(3, total, generator=generator, dtype=torch.float64) - 1
    proposal = policy - reference + 0.3 * proposal - 8
    prompt = torch.cat([torch.full((count,), prompt) for prompt, count in COUNTS.items()])
    policy[prompt == 5] = -math.inf
    policy[3] = -math.inf
    sequences = torch.randint(100, (total, 6), generator=generator)
    length = torch.randint(2, 7, (total,), generator=generator)
    sequences[torch.arange(6) >= length[:, None]] = -1
    sequences[1::4] = sequences[0::4][: len(sequences[1::4])]
    order = torch.randperm(total, generator=generator)
    samples = {
        "policy_logprob": policy, "reference_logprob": reference, "proposal_logprob": proposal, "group": prompt,
        "sequences": sequences,
    }  # fmt: skip
    return {name: value[order] for name, value in samples.items()}


def batches_of(samples: dict[str, Tensor], sizes=(1, 30, 0, 20, 55)) -> list[dict[str, Tensor]]:
    """A prompt's samples fall into several; token ids are no wider than the batch needs."""
    sides = {name: value.split(list(sizes)) for name, value in samples.items()}
    parts = [{name: side[i] for name, side in sides.items()} for i in range(len(sizes))]
    for part in parts:
        if part["sequences"].dim() == 2 and len(part["sequences"]):
            part["sequences"] = part["sequences"][:, : int((part["sequences"] >= 0).sum(1).max())]
    return parts


def log_ratios(with_prompts: bool) -> list[tuple]:
    """Of `PowerLawExponent`: uneven batches far from zero and from each other; no prompt is in two of them."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i, count in enumerate((7, 1, 20, 2)):
        prompt = 10 * i + torch.randint(5, (count,), generator=generator)
        v = torch.randn(count, generator=generator, dtype=torch.float64) - 100 * i - 1000
        u = 0.4 * v + torch.randn(count, generator=generator, dtype=torch.float64) - 20 * i
        batches.append((u, v, prompt) if with_prompts else (u, v))
    return batches
