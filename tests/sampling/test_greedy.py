"""complete: what a loop over the model's own forward pass says, one prompt at a time, and no trace in the model."""

from __future__ import annotations

import pytest
import torch

from lit_did.sampling.greedy import complete
from tests.modules.tiny import tiny_gpt2, tiny_llama
from tests.sampling.test_caches import Forgetful

PROMPTS = [[5, 6, 7], [11], [3, 1, 4, 1, 5, 9, 2], [11, 12]]


def by_hand(model, prompt: list[int], max_new_tokens: int, ends: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_as_one_prompt_at_a_time(make, batch_size):
    model = make().eval()
    with torch.no_grad():
        free = [by_hand(model, prompt, 9, []) for prompt in PROMPTS]
    ends = [free[0][4], free[2][2]]  # so that some completions end early
    with torch.no_grad():
        expected = [by_hand(model, prompt, 9, ends) for prompt in PROMPTS]
    model.generation_config.eos_token_id = ends
    # What a model brings along for chats must not make it draw, or count repetitions.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.5)
    assert complete(model, PROMPTS, max_new_tokens=9, batch_size=batch_size) == expected
    assert len({len(completion) for completion in expected}) > 1  # the premise


def test_no_trace_in_the_model_or_in_random_numbers():
    model = tiny_llama(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.model.layers[0].eval()  # as somebody may have set it
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = complete(model, PROMPTS, max_new_tokens=9)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert first == complete(model.eval(), PROMPTS, max_new_tokens=9)


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([[1], []], "Expected `prompts` to have at least one token each"),
        ([[1], [1] * 60], "to be at most 64 tokens together, the positions of the model, but got 69"),
    ],
)
def test_wrong_prompts(prompts, error):
    with pytest.raises(ValueError, match=error):
        complete(tiny_gpt2(), prompts, max_new_tokens=9)


@pytest.mark.parametrize("after", [0, 9])
def test_a_cache_that_gives_other_results_is_not_used(after):
    broken = Forgetful(0, "other", after)
    broken.generation_config = broken.model.generation_config
    with pytest.warns(UserWarning, match="gives other results with its cache than in its own forward pass"):
        completions = complete(broken, PROMPTS, max_new_tokens=9)
    assert completions == complete(tiny_llama(0), PROMPTS, max_new_tokens=9)
