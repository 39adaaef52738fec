"""Token heat maps: which tokens of a pair the policy raised and lowered, and what policy, reference and DID expect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lit_did.audit.blocks import HeatMaps, HeatPair, HeatToken
from lit_did.audit.policy.scored import SIDES, Scored
from lit_did.audit.source import AuditData
from lit_did.data.collating import IGNORE_INDEX, collate_packed
from lit_did.data.dataset import Example
from lit_did.models.quiet import adapter_off, evaluating
from lit_did.models.wrappers import unwrapped
from lit_did.ops import token_statistics

NUM_PAIRS, NUM_TOP, MOST_TOKENS = 3, 5, 256


class TokenHeat(NamedTuple):
    """The tokens of a completion, as far as they are shown."""

    ids: list[int]
    log_ratio: list[float]
    token_did_entropy: list[float]
    top: dict[str, list[list[tuple[int, float]]]]
    """by distribution and token, the likeliest token ids and their probabilities"""
    num_tokens: int
    """of the whole completion"""


def notable_places(scored: Scored, count: int = NUM_PAIRS) -> dict[str, list[int]]:
    """By what is notable of them, places of pairs: learned most, learned least and learned most wrongly.

    Args:
        scored: Pairs with finite margins.
        count: How many of each kind.
    """
    margin, taken = scored.margin, set[int]()
    kinds = {
        "most": [i for i in np.argsort(-margin, kind="stable") if margin[i] > 0],
        "most wrongly": [i for i in np.argsort(margin, kind="stable") if margin[i] < 0],
        "least": list(np.argsort(np.abs(margin), kind="stable")),
    }
    found = {}
    for kind, places in kinds.items():
        found[kind] = [int(i) for i in places if int(i) not in taken][:count]
        taken.update(found[kind])
    return {kind: found[kind] for kind in ("most", "least", "most wrongly")}


def token_heat(example: Example, policy: nn.Module, reference: nn.Module | None) -> dict[str, TokenHeat]:
    """By side, the tokens of a pair, from the models' own forward passes over one sequence at a time.

    Args:
        example: The tokenised pair.
        policy: The policy.
        reference: The reference. None: the policy without its adapter.
    """
    batch = collate_packed([example])
    bounds, found = batch["cu_seqlens"].tolist(), {}
    for number, side in enumerate(SIDES):
        part = slice(bounds[number], bounds[number + 1])
        ids, labels = batch["input_ids"][0, part], batch["labels"][0, part]
        places = (labels != IGNORE_INDEX).nonzero().flatten()
        shown = places[:MOST_TOKENS]
        ids = ids[: int(shown[-1]) + 1] if len(shown) else ids
        with _running(policy) as run:
            of_policy = run(ids)[shown.to(run.device)]
        with _running(policy if reference is None else reference, without_adapter=reference is None) as run:
            of_reference = run(ids)[shown.to(run.device)].to(of_policy.device)
        found[side] = _heat(of_policy, of_reference, labels[shown], len(places))
    return found


def _heat(policy: Tensor, reference: Tensor, labels: Tensor, num_tokens: int) -> TokenHeat:
    statistics = token_statistics(policy, reference, labels.to(policy.device))
    wide, other = (logits if logits.dtype == torch.float64 else logits.float() for logits in (policy, reference))
    outside = (wide == -math.inf) & (other == -math.inf)
    logits = {"policy": wide, "reference": other, "DID": (wide - other).masked_fill(outside, -math.inf)}
    top = {}
    for name, values in logits.items():
        best = values.softmax(-1).topk(min(NUM_TOP, values.shape[-1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top[name] = [list(zip(*row, strict=True)) for row in rows]
    return TokenHeat(
        labels.tolist(), statistics.log_ratio.tolist(), statistics.token_did_entropy.tolist(), top, num_tokens
    )


class _Run:
    """Returns a model's logits [t, V] of one sequence."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, next(model.parameters()).device

    def __call__(self, ids: Tensor) -> Tensor:
        ids = ids[None].to(self.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


@contextmanager
def _running(model: nn.Module, *, without_adapter: bool = False) -> Iterator[_Run]:
    plain = unwrapped(model)
    with adapter_off(plain) if without_adapter else evaluating(plain):
        yield _Run(plain)


def heat_maps(
    scored: Scored,
    places: Mapping[int, int],
    examples: Mapping[int, Example],
    data: AuditData,
    tokenizer: Any,
    policy: nn.Module,
    reference: nn.Module | None,
) -> list[HeatMaps]:
    """Heat maps of the pairs that were learned most, least and most wrongly.

    Args:
        scored: Pairs with finite margins.
        places: By row number in the source, the pair's place in `data.rows`.
        examples: By row number in the source, the tokenised pair.
        data: The pairs.
        tokenizer: The tokenizer.
        policy: The policy.
        reference: The reference. None: the policy without its adapter.
    """
    blocks = []
    for kind, chosen in notable_places(scored).items():
        pairs = []
        for i in chosen:
            row = int(scored.rows[i])
            heat = token_heat(examples[row], policy, reference)
            cut = [side for side, tokens in heat.items() if tokens.num_tokens > len(tokens.ids)]
            remark = f"Margin {scored.margin[i]:.3g} nats." + (
                f" Only the first {MOST_TOKENS} tokens are shown ({' and '.join(cut)})." if cut else ""
            )
            sides = {side: _tokens(tokens, tokenizer) for side, tokens in heat.items()}
            pairs.append(HeatPair(row, data.texts(places[row])[0], sides, remark))
        if pairs:
            blocks.append(
                HeatMaps(
                    f"Pairs that were learned {kind}",
                    pairs,
                    note="The log-ratio log pi(y) - log rho(y) of each token, and the entropy of its DID "
                    "q = softmax(policy logits - reference logits). Hover or tap a token for the likeliest tokens of "
                    "policy, reference and DID at its place.",
                )
            )
    return blocks


def _tokens(heat: TokenHeat, tokenizer: Any) -> Sequence[HeatToken]:
    names = {
        token: token_text(token, tokenizer)
        for token in {*heat.ids, *(t for rows in heat.top.values() for row in rows for t, _ in row)}
    }
    return [
        HeatToken(
            names[token],
            {
                "log-ratio (nats)": heat.log_ratio[i],
                "token DID entropy (nats)": heat.token_did_entropy[i],
            },
            {name: [(names[t], p) for t, p in rows[i]] for name, rows in heat.top.items()},
        )
        for i, token in enumerate(heat.ids)
    ]


def token_text(token: int, tokenizer: Any) -> str:
    """A token as text, with the space that it begins with."""
    spelled = tokenizer.convert_ids_to_tokens(token)
    if spelled is None:  # the vocabulary of a model may be padded
        return f"<{token}>"
    text = tokenizer.decode([token])
    return f" {text}" if spelled.startswith("\u2581") and not text.startswith(" ") else text or spelled
