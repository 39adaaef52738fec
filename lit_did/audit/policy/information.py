"""Token DID entropy, concentration and KL of a policy, and where it lies between reinforcing and exploring."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lit_did.audit.policy.scored import INFORMATION, SIDES, Scored
from lit_did.audit.report import Estimate, Finding
from lit_did.audit.statistics import bootstrap_means, surely_above, surely_below

LABELS = {
    "token_did_entropy": "token DID entropy (nats a token)",
    "token_did_concentration": "token DID concentration (nats a token)",
    "kl": "KL from the reference (nats a token)",
    "entropy_change": "change of the policy's entropy (nats a token)",
}
CLAIM = (
    "The paper claims that a policy with a low-entropy DID reinforces (it concentrates), and that one with a "
    "high-entropy DID explores (it spreads). Our experiments agree only in part: the change of the policy's entropy "
    "depends on where the DID lies, not on how wide it is (`lit-did docs paper`)."
)


def token_means(scored: Scored) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By figure, its mean over the tokens of each pair, [pairs]; and the tokens of each pair, [pairs]."""
    tokens = sum(scored.num_tokens[side] for side in SIDES)
    assert isinstance(tokens, np.ndarray)
    with np.errstate(invalid="ignore"):
        means = {
            name: sum(scored.num_tokens[side] * scored.information[f"{side}_{name}"] for side in SIDES) / tokens
            for name in INFORMATION
        }
        means["entropy_change"] = means.pop("policy_entropy") - means.pop("reference_entropy")
    return means, tokens


def information_figures(scored: Scored) -> dict[str, Estimate]:
    """Means over the tokens of both sides, with the bootstrap's intervals over prompts."""
    means, tokens = token_means(scored)
    values = np.stack([means[name] for name in LABELS], -1)
    found = bootstrap_means(values, np.repeat(tokens[:, None], len(LABELS), 1), scored.groups)
    return dict(zip(LABELS, found, strict=True))


def num_not_finite(scored: Scored) -> int:
    """How many pairs have a figure that is not finite, such as an infinite KL. They are left out of that figure."""
    means, _ = token_means(scored)
    return int((~np.isfinite(np.stack([means[name] for name in LABELS]))).any(0).sum())


def information_findings(figures: Mapping[str, Estimate]) -> list[Finding]:
    """Whether the policy concentrated or spread."""
    change, entropy = figures["entropy_change"], figures["token_did_entropy"]
    if surely_below(change, 0.0):
        position = "it concentrates, which is reinforcing"
    elif surely_above(change, 0.0):
        position = "it spreads, which is exploring"
    else:
        position = "it neither concentrates nor spreads measurably"
    largest = entropy.value + figures["token_did_concentration"].value
    return [
        Finding(
            "position",
            f"The entropy of the policy's next token changed by {change} nats: {position}. Its token DID entropy is "
            f"{entropy} of {largest:.4g} nats.",
            "",
            raised=False,
            severity=0.25,
            value=change,
        )
    ]
