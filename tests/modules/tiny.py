"""Tiny random models and preference batches for the LightningModules' tests."""

from __future__ import annotations

import lightning
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 67
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a chat template; its padding token is its EOS. Another `shift` gives other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: (i + shift) % len(alphabet) for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # the default leaves all log-ratios near 0
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def tiny_gpt2(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **overrides}
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **config))


def make_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    return [(ids(2, 6), ids(1, 9), ids(1, 9)) for _ in range(count)]


def collate(pairs) -> dict[str, Tensor]:
    """The documented layout, built by hand."""
    sequences = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    length = max(len(p) + len(c) for p, c in sequences)
    batch = {
        "input_ids": torch.zeros(len(sequences), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(sequences), length, dtype=torch.long),
        "labels": torch.full((len(sequences), length), -100),
    }
    for row, (prompt, completion) in enumerate(sequences):
        n, m = len(prompt), len(completion)
        batch["input_ids"][row, : n + m] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, : n + m] = 1
        batch["labels"][row, n - 1 : n + m - 1] = torch.tensor(completion)
    return batch


def loader(pairs, batch_size: int) -> DataLoader:
    return DataLoader(pairs, batch_size=batch_size, collate_fn=collate)


def trainer(**options) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(**{**defaults, **options})
