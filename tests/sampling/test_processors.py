"""The logits processors in transformers' `generate`, against whole forward passes of both models without any cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_did.functional import estimate_did_entropy
from lit_did.models.loading import add_lora
from lit_did.sampling import DIDLogitsProcessor, TargetLogitsProcessor
from tests.modules.tiny import VOCABULARY, tiny_gpt2, tiny_llama

PAD = 0
PROMPTS = ([5, 6, 7, 8, 9], [11], [12, 13, 14])
TOLERANCE = 2e-4
"""float32's 1e-6 of logits of some ten, in attention that adds up in other orders; the third below a beta of 0.3"""


def padded(prompts=PROMPTS) -> dict[str, Tensor]:
    """On the left, as `generate` wants them."""
    length = max(map(len, prompts))
    rows = [[PAD] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def generate(model: nn.Module, inputs: dict[str, Tensor], processor, **options):
    defaults = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": PAD, "top_k": 0, "do_sample": True}
    return model.eval().generate(
        **inputs,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
        **{**defaults, **options},
    )


@torch.no_grad()
def logits_after(model: nn.Module, prompt: list[int], sequence: list[int]) -> Tensor:
    """[tokens, V] float64 of every token of `sequence` after the unpadded prompt."""
    ids = torch.tensor([prompt + sequence])
    return model.eval()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_from_the_token_did(make, temperature):
    policy, reference = make(seed=0), make(seed=1)
    inputs = padded()
    processor = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"])
    torch.manual_seed(0)
    output = generate(policy, inputs, processor, temperature=temperature)
    scores = torch.stack(output.scores, 1).double().log_softmax(-1)
    for row, prompt in enumerate(PROMPTS):
        sequence = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        log_ratio = logits_after(policy, prompt, sequence) - logits_after(reference, prompt, sequence)
        expected = (log_ratio / temperature).log_softmax(-1)
        assert (expected - logits_after(policy, prompt, sequence).log_softmax(-1)).abs().max() > 0.5
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=TOLERANCE)


def test_frequencies():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    draws = 4000
    output = generate(
        policy, inputs, DIDLogitsProcessor(policy, reference), max_new_tokens=1, num_return_sequences=draws
    )
    with torch.no_grad():
        chance = (policy(**inputs).logits - reference(**inputs).logits)[0, -1].double().softmax(-1)
    counts = output.sequences[:, -1].bincount(minlength=VOCABULARY)
    z = (counts - draws * chance) / (draws * chance * (1 - chance)).sqrt()
    assert z[draws * chance > 10].abs().max() < 5  # of some sixty standard normal numbers


def test_greedy():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = padded()
    processor = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"])
    output = generate(policy, inputs, processor, do_sample=False, top_k=None)
    for row, prompt in enumerate(PROMPTS):
        sequence = []
        for _ in range(5):
            step = [*sequence, 0]
            log_ratio = logits_after(policy, prompt, step)[-1] - logits_after(reference, prompt, step)[-1]
            sequence.append(int(log_ratio.argmax()))
        assert output.sequences[row, inputs["input_ids"].shape[1] :].tolist() == sequence


def test_beams_take_their_caches_along():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = padded()
    processor = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"])
    output = generate(
        policy, inputs, processor, do_sample=False, top_k=None, num_beams=4, num_return_sequences=4, length_penalty=0.0
    )
    length = inputs["input_ids"].shape[1]
    moved = 0
    for row, sequence in enumerate(output.sequences[:, length:].tolist()):
        score = output.sequences_scores[row]
        prompt = PROMPTS[row // 4]
        log_ratio = logits_after(policy, prompt, sequence) - logits_after(reference, prompt, sequence)
        expected = log_ratio.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None]).sum()
        assert float(score) == pytest.approx(float(expected), abs=5 * TOLERANCE)
        moved += output.beam_indices[row, :5].tolist() != [output.beam_indices[row, 0].item()] * 5
    assert moved  # otherwise no cache had to be reordered


def test_equal_rows_of_unequal_padding_keep_their_own_cache():
    # To the processor these rows look the same. Only the mask shows that the first row's 0 is padding.
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = {"input_ids": torch.tensor([[0, 7], [0, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    processor = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"])
    output = generate(policy, inputs, processor, do_sample=False, top_k=None, num_beams=3, num_return_sequences=3)
    for row, sequence in enumerate(output.sequences[:, 2:].tolist()):
        prompt = [[7], [0, 7]][row // 3]
        log_ratio = logits_after(policy, prompt, sequence) - logits_after(reference, prompt, sequence)
        expected = log_ratio.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None]).mean()
        assert float(output.sequences_scores[row]) == pytest.approx(float(expected), abs=TOLERANCE)


def test_one_processor_for_several_calls():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    processor = DIDLogitsProcessor(policy, reference)
    for prompt in ([5, 6, 7], [5, 6, 7], [9, 8]):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt)).long()}
        torch.manual_seed(1)
        again = generate(policy, inputs, processor)
        torch.manual_seed(1)
        fresh = generate(policy, inputs, DIDLogitsProcessor(policy, reference))
        assert torch.equal(again.sequences, fresh.sequences)


def test_a_mask_belongs_to_its_prompts():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    first, second = padded([[5, 6, 7], [8]]), padded([[9], [10, 11, 12]])
    processor = DIDLogitsProcessor(policy, reference, attention_mask=first["attention_mask"])
    generate(policy, first, processor)
    generate(policy, first, processor)
    with pytest.raises(ValueError, match="the prompts that `attention_mask` belongs to, but got others"):
        generate(policy, second, processor)


def test_masks_that_are_not_the_prompts_own():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = padded()
    one_for_all = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"][:1])
    with pytest.raises(ValueError, match="a row for each prompt, but got 1 for 3 rows of different prompts"):
        generate(policy, inputs, one_for_all)
    on_the_right = DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="padded on the left, but got a row that ends in 0"):
        generate(policy, inputs, on_the_right)


def test_models_with_the_same_logits_are_noticed():
    base = tiny_llama()
    policy = add_lora(base, {"r": 4, "target_modules": "all-linear"})
    with pytest.raises(ValueError, match="share parameters"):
        DIDLogitsProcessor(policy, base)  # peft has put the adapter into it
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    with pytest.warns(UserWarning, match="same logits. So every token is equally likely in their token DID"):
        generate(policy, inputs, DIDLogitsProcessor(policy))
    with pytest.warns(UserWarning, match="same logits. So the target is the reference itself. .* load the reference"):
        generate(base, inputs, TargetLogitsProcessor(policy, beta=1.0))


def test_assisted_decoding_goes_back():
    # Prompt lookup proposes several tokens and takes some of them back: rows get shorter and change.
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, 8).long()}
    plain, assisted = (
        generate(
            policy,
            inputs,
            DIDLogitsProcessor(policy, reference, attention_mask=inputs["attention_mask"]),
            do_sample=False,
            top_k=None,
            **options,
        ).sequences
        for options in ({}, {"prompt_lookup_num_tokens": 2})
    )
    assert torch.equal(plain, assisted)


@pytest.mark.filterwarnings("ignore:.* has no cache of keys and values")
def test_a_second_model_must_not_exclude_what_the_first_does_not():
    policy = tiny_llama(seed=0)
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    for processor in (
        DIDLogitsProcessor(policy, Excluding(tiny_llama(), [1])),
        TargetLogitsProcessor(Excluding(tiny_llama(), [1]), beta=1.0),
    ):
        with pytest.raises(ValueError, match=r"-inf from the second only .*, but got .* row 0"):
            generate(policy, inputs, processor, do_sample=False, top_k=None)


def test_it_reads_every_token_once():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    read = []
    reference.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    generate(policy, inputs, DIDLogitsProcessor(policy, reference))
    # After two and four reads the whole row is compared with what the cache gave.
    assert read == [(1, 3), (1, 1), (1, 4), (1, 1), (1, 1), (1, 6), (1, 1)]


@pytest.mark.filterwarnings("ignore:.* has no cache of keys and values")
def test_what_other_processors_exclude_stays_excluded():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    processor = DIDLogitsProcessor(policy, reference)
    banned = list(range(10, VOCABULARY))
    output = policy.eval().generate(
        **inputs, logits_processor=[processor], suppress_tokens=banned, do_sample=True, top_k=0, max_new_tokens=20
    )
    assert (output[:, 2:] < 10).all()
    scores = torch.tensor([[0.0, -torch.inf, 1.0] + [0.0] * (VOCABULARY - 3)])
    second = Excluding(tiny_llama(), [1])
    for excluding in (DIDLogitsProcessor(policy, second), TargetLogitsProcessor(second, beta=0.5)):
        chances = excluding(inputs["input_ids"], scores).exp()
        assert chances[0, 1] == 0  # on both sides: no NaN
        assert chances.sum().item() == pytest.approx(1, abs=1e-5)


class Excluding(nn.Module):
    """A language model without some tokens."""

    def __init__(self, model: nn.Module, tokens: list[int]) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, input_ids, attention_mask=None):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        outputs.logits[..., self.tokens] = -torch.inf
        return type(outputs)(logits=outputs.logits)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_draws_from_the_target(beta):
    reference, rejected = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = padded()
    processor = TargetLogitsProcessor(rejected, beta=beta, attention_mask=inputs["attention_mask"])
    torch.manual_seed(0)
    output = generate(reference, inputs, processor)
    scores = torch.stack(output.scores, 1).double().log_softmax(-1)
    for row, prompt in enumerate(PROMPTS):
        sequence = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        r, bad = logits_after(reference, prompt, sequence), logits_after(rejected, prompt, sequence)
        torch.testing.assert_close(scores[row], (r + (r - bad) / beta).log_softmax(-1), rtol=0, atol=4 * TOLERANCE)


@pytest.mark.filterwarnings("ignore:.* has no cache of keys and values")
def test_the_target_is_where_dpo_ends():
    # One token, beta = 1/2: pi_l is proportional to rho (rho / pi*)^beta, so the target is pi* itself.
    generator = torch.Generator().manual_seed(0)
    reference, target = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64)
    rejected = reference + 0.5 * (reference - target)
    found = TargetLogitsProcessor(Constant(rejected), beta=0.5)(torch.tensor([[1]]), reference)
    torch.testing.assert_close(found, target.log_softmax(-1), rtol=1e-12, atol=1e-12)


class Constant(nn.Module):
    """A language model that says the same after everything."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids, attention_mask=None):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=self.logits[:, None].expand(*input_ids.shape, -1))


def test_a_policy_without_its_adapter():
    base, policy = tiny_llama(), add_lora(tiny_llama(), {"r": 4, "target_modules": "all-linear"})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    results = []
    for processor in (DIDLogitsProcessor(policy), DIDLogitsProcessor(policy, base)):
        torch.manual_seed(0)
        results.append(generate(policy, inputs, processor))
    assert torch.equal(results[0].sequences, results[1].sequences)
    ours, given = (torch.stack(result.scores) for result in results)
    torch.testing.assert_close(ours, given, rtol=0, atol=1e-5)  # float32
    assert (ours - ours.mean(-1, keepdim=True)).abs().max() > 0.5  # at pi = rho all tokens would be alike
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained


def test_scores_are_a_proposal_for_estimates():
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}
    torch.manual_seed(0)
    output = generate(
        policy, inputs, DIDLogitsProcessor(policy, reference), max_new_tokens=2, num_return_sequences=2000
    )
    completions = output.sequences[:, 2:]
    proposal = policy.compute_transition_scores(output.sequences, output.scores, normalize_logits=True).sum(1)
    with torch.no_grad():
        logprobs = [
            model(output.sequences).logits[:, 1:-1].log_softmax(-1).gather(2, completions[:, :, None]).sum((1, 2))
            for model in (policy, reference)
        ]
        first = [model(torch.tensor([[5, 6]])).logits[:, -1].double().log_softmax(-1) for model in (policy, reference)]
        every = torch.cat([torch.tensor([[5, 6]]).repeat(VOCABULARY, 1), torch.arange(VOCABULARY)[:, None]], 1)
        second = [model(every).logits[:, -1].double().log_softmax(-1) for model in (policy, reference)]
    log_ratio = ((first[0] - first[1])[0, :, None] + second[0] - second[1]).flatten()
    did = log_ratio.log_softmax(0)
    estimate = estimate_did_entropy(*logprobs, proposal, sequences=completions)
    assert estimate.effective_sample_size > 1000
    entropy = float(-(did.exp() * did).sum())
    assert abs(estimate.entropy - entropy) < 2 * (estimate.upper - estimate.entropy)  # four standard errors


# --- errors -----------------------------------------------------------------------------------------------------------

LLAMA = tiny_llama()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DIDLogitsProcessor("name"), TypeError, "`policy` to be a causal language model, but got str"),
        (lambda: DIDLogitsProcessor(LLAMA, "name"), TypeError, "`reference` to be a causal .*, but got str"),
        (lambda: DIDLogitsProcessor(LLAMA), ValueError, "`reference` to be .* None, and `policy` is LlamaForCausalLM"),
        (lambda: DIDLogitsProcessor(LLAMA, LLAMA), ValueError, "share parameters"),
        (lambda: DIDLogitsProcessor(LLAMA, tiny_llama(vocab_size=70)), ValueError, "vocabulary, 67 .* but got 70"),
        (lambda: DIDLogitsProcessor(LLAMA, nn.Linear(2, 2)), TypeError, "which takes `input_ids`, but got Linear"),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(), attention_mask="x"),
            TypeError,
            "zeros and ones .* but got str",
        ),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(), attention_mask=torch.tensor([[0.5, 1]])),
            ValueError,
            r"zeros and ones of shape \[prompts, T\], but got torch.float32 \(1, 2\)",
        ),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(), attention_mask=torch.ones(2)),
            ValueError,
            r"zeros and ones of shape \[prompts, T\], but got torch.float32 \(2,\)",
        ),
        (lambda: TargetLogitsProcessor(tiny_llama(), beta=0.0), ValueError, "`beta` to be above 0, but got 0.0"),
        (lambda: TargetLogitsProcessor(None, beta=1.0), TypeError, "a causal language model, but got NoneType"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        (
            lambda: TargetLogitsProcessor(tiny_llama(vocab_size=70), beta=1.0),
            "one vocabulary, .* has 67 entries and Llama.* 70",
        ),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(pad_token_id=PAD)),
            "`attention_mask` to be the mask of prompts .* row 1 begins with",
        ),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(), attention_mask=torch.ones(3, 6)),
            r"`attention_mask` to be the mask of these prompts, \[prompts, 5\], .* got \(3, 6\)",
        ),
        (
            lambda: DIDLogitsProcessor(LLAMA, tiny_llama(), attention_mask=torch.ones(2, 5)),
            r"`attention_mask` to be the mask of these prompts, .* 3 rows, but got \(2, 5\)",
        ),
    ],
)
def test_errors_in_generate(processor, words):
    with pytest.raises(ValueError, match=words):
        generate(LLAMA, padded(), processor())


def test_a_second_model_with_fewer_embeddings_or_positions():
    inputs = {"input_ids": torch.tensor([[5, 60]]), "attention_mask": torch.ones(1, 2).long()}
    with pytest.raises(ValueError, match=r"`input_ids` to be .* below 50, the vocabulary of .*, but got 60"):
        generate(LLAMA, inputs, TargetLogitsProcessor(tiny_llama(vocab_size=50), beta=1.0))
    with pytest.raises(ValueError, match="at most 3 tokens, the positions of GPT2LMHeadModel, but got 4"):
        generate(LLAMA, inputs, DIDLogitsProcessor(LLAMA, tiny_gpt2(n_positions=3)))
