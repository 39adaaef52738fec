"""Every metric in plain NumPy, a loop over sequences and tokens in float64, straight from docs/metrics.md."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def sequences(policy: Tensor, reference: Tensor, labels: Tensor, ignore_index: int, temperature: float) -> list[dict]:
    """For every sequence its labelled tokens' values: {quantity: [tokens]}."""
    found = []
    for z_rows, r_rows, row_labels in zip(policy, reference, labels, strict=True):
        tokens: dict[str, list[float]] = {
            name: []
            for name in (
                "log_ratio",
                "token_did_entropy",
                "token_did_concentration",
                "token_did_log_partition",
                "policy_entropy",
                "kl",
                "reverse_kl",
            )
        }
        for z, r, label in zip(z_rows, r_rows, row_labels.tolist(), strict=True):
            if label == ignore_index:
                continue
            log_pi = log_softmax(z.double().numpy() / temperature)
            log_rho = log_softmax(r.double().numpy() / temperature)
            q = np.exp(log_pi - log_rho)
            partition = q.sum()
            q /= partition
            tokens["log_ratio"].append(log_pi[label] - log_rho[label])
            tokens["token_did_entropy"].append(-(q * np.log(q)).sum())
            tokens["token_did_concentration"].append((q * np.log(q * len(q))).sum())
            tokens["token_did_log_partition"].append(np.log(partition))
            tokens["policy_entropy"].append(-(np.exp(log_pi) * log_pi).sum())
            tokens["kl"].append((np.exp(log_pi) * (log_pi - log_rho)).sum())
            tokens["reverse_kl"].append((np.exp(log_rho) * (log_rho - log_pi)).sum())
        found.append(tokens)
    return found


def expected(
    batches, *, beta=0.1, num_bins=10, unit="nats", ignore_index=-100, temperature=1.0, loss=False
) -> dict[str, float]:
    """{name in DIDMetrics: value} over batches of (policy logits, reference logits, labels)."""
    chosen, rejected, alone = [], [], []
    for policy, reference, labels in batches:
        of_batch = sequences(policy, reference, labels, ignore_index, temperature)
        half = len(of_batch) // 2
        for one, other in zip(of_batch[:half], of_batch[half:], strict=True):
            if one["log_ratio"] and other["log_ratio"]:
                chosen.append(sum(one["log_ratio"]))
                rejected.append(sum(other["log_ratio"]))
        alone += [tokens for tokens in of_batch if tokens["log_ratio"]]
    scale = 1 / np.log(2) if unit == "bits" else 1
    values = {
        name: scale * np.mean([value for tokens in alone for value in tokens[name]])
        for name in (
            "token_did_entropy",
            "token_did_concentration",
            "token_did_log_partition",
            "policy_entropy",
            "kl",
            "reverse_kl",
        )
    }
    log_ratios = [value for tokens in alone for value in tokens["log_ratio"]]
    values["reward"] = beta * np.mean([sum(tokens["log_ratio"]) for tokens in alone])
    values["reward_per_token"] = beta * np.mean(log_ratios)
    chosen, rejected = np.array(chosen), np.array(rejected)
    margin = beta * (chosen - rejected)
    right = np.where(margin > 0, 1.0, np.where(margin == 0, 0.5, 0.0))
    values["reward_margin"] = margin.mean()
    values["reward_accuracy"] = right.mean()
    values["chosen_log_ratio"], values["rejected_log_ratio"] = chosen.mean(), rejected.mean()
    values["chosen_fell"] = (chosen < 0).mean()
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    error = 0.0
    for i in range(num_bins):
        low, high = 0.5 + 0.5 * i / num_bins, 0.5 + 0.5 * (i + 1) / num_bins
        member = (confidence > low) & (confidence <= high) | ((i == 0) & (confidence == 0.5))
        if member.any():
            error += member.mean() * abs(confidence[member].mean() - right[member].mean())
    values["calibration_error"] = error
    if loss:
        values["loss"] = np.log1p(np.exp(-margin)).mean()
    return {name: float(value) for name, value in values.items()}


def make_batches(sizes=(3, 1, 4), *, vocabulary=11, ignore_index=-100, dtype=torch.float32, seed=0, spread=1.5):
    """Batches of uneven numbers of pairs and lengths. The first pair is a tie, the last rejected completion empty."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i, pairs in enumerate(sizes):
        shape = (2 * pairs, 4 + i)
        reference = 2 * torch.randn(*shape, vocabulary, generator=generator)
        policy = reference + spread * torch.randn(*shape, vocabulary, generator=generator)
        labels = torch.randint(vocabulary, shape, generator=generator)
        if 0 <= ignore_index < vocabulary:
            labels[labels == ignore_index] = (ignore_index + 1) % vocabulary
        ignored = torch.rand(shape, generator=generator) < 0.3
        ignored[:, 0] = False  # no sequence is empty by chance
        labels[ignored] = ignore_index
        batches.append([policy.to(dtype), reference.to(dtype), labels])
    for side in batches[0]:
        side[sizes[0]] = side[0]
    batches[-1][2][-1] = ignore_index
    return batches
