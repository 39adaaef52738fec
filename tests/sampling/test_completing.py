"""complete: what a loop over the model's own forward pass says, one prompt at a time, and no trace in the model."""

from __future__ import annotations

import pytest
import torch

from lit_did.sampling.completing import complete
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
        ([[1], [1] * 60], "to be at most 65 tokens together, because the model has 64 positions, but got 69"),
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


def test_draws_follow_the_temperature():
    """At the first token of many rows: close to the softmax; and each row's draws are its own."""
    model = tiny_llama().eval()
    n, temperature = 3000, 0.7
    drawn = complete(model, [[5, 6, 7]] * n, max_new_tokens=1, temperature=temperature, seeds=range(n), batch_size=n)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=67) / n
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
    assert (counts - expected).abs().sum() < 0.15  # 0.4 at another temperature such as 1
    assert (counts - expected).abs().max() < 0.03


def test_draws_do_not_depend_on_the_batch():
    model = tiny_llama().eval()
    options = {"max_new_tokens": 9, "temperature": 1.0}
    seeds = [7, 8, 9, 7]
    together = complete(model, [*PROMPTS[:3], PROMPTS[0]], seeds=seeds, **options)
    assert together[3] == together[0]
    alone = [complete(model, [p], seeds=[s], **options)[0] for p, s in zip(PROMPTS[:3], seeds, strict=False)]
    assert together[:3] == alone
    assert together != complete(model, [*PROMPTS[:3], PROMPTS[0]], seeds=[1, 2, 3, 1], **options)


def test_draws_need_seeds():
    with pytest.raises(ValueError, match="Expected `seeds` to have one for each of 4 prompts, but got None"):
        complete(tiny_llama(), PROMPTS, max_new_tokens=2, temperature=1.0)
    with pytest.raises(ValueError, match=r"Expected `temperature` to be in \[0, inf\)"):
        complete(tiny_llama(), PROMPTS, max_new_tokens=2, temperature=-1.0)
