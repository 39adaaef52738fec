"""Tiny random models of many architectures, and the truth: every sequence alone, in float64."""

from __future__ import annotations

import copy
import math

import torch
import transformers
from torch import Tensor, nn

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.models.trial import layout_of, outputs_of
from lit_did.ops import SequenceStatistics

LAYOUTS = {"padded": (False, False), "packed": (True, False), "shared": (True, True)}
"""`padding_free` and `share` of `layout_of`"""

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # with the default, attention would hardly matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OF = {  # windows shorter than the sequences
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi3": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "embedding_multiplier": 2.0},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"head_dim": 8, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {},
    "GPTNeoX": {},
    "Llama4Text": {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8},
    "Mamba": {},
    "Bloom": {},
}
EAGER_ONLY = ("Gemma2", "GptOss")  # what eager is needed for: a softcap, attention sinks
PACKED = [
    (name, implementation)
    for name in _OF
    if name not in ("Llama4Text", "Mamba", "Bloom")
    for implementation in (["eager"] if name in EAGER_ONLY else ["sdpa", "eager"])
]


def build(name: str, implementation: str | None = None, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A causal language model in eval mode, in float32."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **_OF.get(name, {}), **overrides})
    model = transformers.AutoModelForCausalLM.from_config(
        config, **({} if implementation is None else {"attn_implementation": implementation})
    )
    with torch.no_grad():  # biases and norms' weights, which start at 0 or 1: each its own
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    """Three pairs, padded: [6, T]. Of the first the completions begin alike, of the second one begins the other."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    prompts, alike, one = (ids(9), ids(11), ids(3)), ids(4), ids(7)
    completions = [alike + ids(8), one, ids(2), alike + ids(3), one + ids(5), ids(6)]
    sequences = [(prompts[i % 3], completion) for i, completion in enumerate(completions)]
    length = max(len(p) + len(c) for p, c in sequences)
    batch = {name: torch.zeros(6, length, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((6, length), IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, start - 1 : end - 1] = torch.tensor(completion)
    return batch


def logits_alone(model: nn.Module, sequences: Sequences) -> list[Tensor]:
    """[tokens, V] float64 of every sequence's completion, differentiable in a float64 model's parameters."""
    result = []
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # the number of tokens counts
        sequences = sequences.whole()
    for index in range(sequences.num_sequences):
        place = sequences.slice(index)
        ids = torch.from_numpy(sequences.input_ids[place])[None]
        positions = torch.from_numpy(sequences.position_ids[place])[None]
        options = {} if type(model).__name__.startswith(("Mamba", "Bloom")) else {"position_ids": positions}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0].double()
        result.append(logits[torch.from_numpy(sequences.labels[place]) != IGNORE_INDEX])
    return result


def double(model: nn.Module) -> nn.Module:
    """A float64 copy that computes in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    for module in model.modules():  # some keep tables in float32
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(name, buffer.double(), persistent=False)
    return model


def logits_in(model: nn.Module, sequences: Sequences, **options) -> Tensor:
    """[completion tokens, V], as `completion_statistics` would be given them."""
    with torch.no_grad():
        outputs = outputs_of(model, layout_of(model, sequences, **options))
        return outputs.logits if outputs.hidden is None else outputs.layer.logits(outputs.hidden)


def assert_right(model: nn.Module, truth: nn.Module | None = None) -> None:
    """That the logits of `model`, however they are had, are those of every sequence alone (under `truth`)."""
    sequences = read_sequences(make_batch())
    with torch.no_grad():
        expected = torch.cat(logits_alone(model if truth is None else truth, sequences))
    for padding_free, share in LAYOUTS.values():
        logits = logits_in(model, sequences, padding_free=padding_free, share=share).double()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def true_statistics(policy: nn.Module, reference: nn.Module, sequences: Sequences) -> SequenceStatistics:
    """By their definitions, from the two models' logits."""
    rows = []
    for index, logits in enumerate(zip(*(logits_alone(m, sequences) for m in (policy, reference)), strict=True)):
        labels = torch.from_numpy(sequences.labels[sequences.slice(index)])
        labels = labels[labels != IGNORE_INDEX][:, None]
        log_pi, log_rho = (x.log_softmax(-1) for x in logits)
        log_q, log_z = (log_pi - log_rho).log_softmax(-1), (log_pi - log_rho).logsumexp(-1)
        log_probs = [x.gather(1, labels).sum() for x in (log_pi, log_rho)]
        entropies = [-(x.exp() * x).sum(1).mean() for x in (log_q, log_pi, log_rho)]
        divergences = [(a.exp() * (a - b)).sum(1).mean() for a, b in ((log_pi, log_rho), (log_rho, log_pi))]
        concentration = math.log(log_pi.shape[1]) - entropies[0]
        of_did = log_probs[0] - log_probs[1], entropies[0], concentration
        values = [*log_probs, *of_did, *entropies[1:], *divergences, log_z.sum()]
        rows.append([*values, torch.tensor(len(labels))])
    return SequenceStatistics(*(torch.stack(values) for values in zip(*rows, strict=True)))
