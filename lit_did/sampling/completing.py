"""Completions of many prompts, greedy or drawn, without a trace in the model or in random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lit_did.arguments import check_integer, check_range
from lit_did.models.quiet import random_numbers_kept
from lit_did.sampling.readers import CachedModel, ends_of, left_padded, warn_without_cache

BATCH_SIZE = 16


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    without_adapter: bool = False,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """The most likely next token after each prompt, or one that is drawn, again and again up to the end.

    The model's `generation_config` says which tokens end a completion; nothing else of it is used. The model runs in
    eval mode: without dropout and without gradient checkpointing. DDP and `torch.compile` around it do not run. With a
    sharded model, all processes call this together, with the same prompts.

    Args:
        model: A causal language model of transformers, perhaps with an adapter.
        prompts: The token ids of each prompt, at least one.
        max_new_tokens: The most tokens of a completion.
        batch_size: How many prompts run at once. Shorter ones are padded on the left.
        without_adapter: Whether to run `model`, a PeftModel, without its adapter.
        temperature: Divides the logits of the distribution that tokens are drawn from. 0: the most likely token.
        seeds: Of each prompt's draws, which depend on nothing else. Needed unless `temperature` is 0.

    Returns:
        The token ids of each completion, with the token that ends it, if it ends.

    Raises:
        TypeError, ValueError: An argument is out of range. A prompt is empty, or has no room for `max_new_tokens`
            within the positions of the model.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_range("temperature", temperature, "[0, inf)")
    if temperature and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(f"Expected `seeds` to have one for each of {len(prompts)} prompts, but got {seeds}.")
    if not all(map(len, prompts)):
        raise ValueError("Expected `prompts` to have at least one token each, but got an empty one.")
    # The last token is not read.
    longest, limit = max(map(len, prompts)) + max_new_tokens, CachedModel(model).max_tokens + 1
    if longest > limit:  # even if the completion may end earlier: it need not do so the next time
        raise ValueError(
            f"Expected the longest prompt and `max_new_tokens` to be at most {limit} tokens together, because "
            f"the model has {limit - 1} positions, but got {longest}."
        )
    ends = ends_of(model, "auto")
    device = next(model.parameters()).device
    completions: list[list[int]] = []
    cache = True
    with random_numbers_kept(device), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            token_ids, mask = left_padded([torch.tensor(list(map(int, prompt))) for prompt in prompts[part]])
            # Made again for a second attempt, which draws the same.
            choose = partial(_Choice, temperature, [] if seeds is None else seeds[part])
            reader = CachedModel(model, without_adapter=without_adapter, cache=cache)
            rows, agrees = _complete(reader, token_ids, mask, max_new_tokens, ends, choose())
            if not agrees:
                warn_without_cache(reader.name, "gives other results with its cache than in its own forward pass")
                cache = False
                reader = CachedModel(model, without_adapter=without_adapter, cache=cache)
                rows, _ = _complete(reader, token_ids, mask, max_new_tokens, ends, choose())
            completions += rows
    return completions


class _Choice:
    """Chooses the next token of each row: the most likely one, or one that is drawn with the row's own numbers."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> list[int]:
        if not self.temperature:
            return logits.argmax(-1).tolist()
        probabilities = (logits.double() / self.temperature).softmax(-1).cpu()
        rows = zip(probabilities, self.generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def _complete(
    reader: CachedModel, token_ids: Tensor, mask: Tensor, max_new_tokens: int, ends: list[int], choice: _Choice
) -> tuple[list[list[int]], bool]:
    """The completions, and whether the model's own forward pass confirms the last token's logits."""
    completions: list[list[int]] = [[] for _ in token_ids]
    logits = reader.read(token_ids, mask)
    for step in range(max_new_tokens):
        for completion, token in zip(completions, choice(logits), strict=True):
            if not completion or completion[-1] not in ends:
                completion.append(token)
        if step == max_new_tokens - 1 or all(completion[-1] in ends for completion in completions):
            break
        logits = reader.read(torch.tensor([[completion[-1]] for completion in completions]))
    return completions, not reader.has_cached or reader.agrees(logits)
