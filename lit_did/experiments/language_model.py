"""What the experiments on a real language model share: SmolLM2-135M-Instruct with LoRA, training, sampling, scoring."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_did.batches import IGNORE_INDEX
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.modules import LitDPO
from lit_did.ops import SequenceStatistics

NAME = "SmolLM2-135M-Instruct"
QUICK_NAME = "A tiny random model (says nothing about the claims)"
QUICK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # the usual leaves all log-ratios near 0
}
"""the configuration of a tiny random model"""
HINTS = (
    "does not have many workers",
    "LeafSpec",
    "in eval mode",
    "is_gradient_checkpointing",
    "is zero",
    "You defined a `validation_step`",
)
"""hints and deprecations of libraries that a reader of results cannot act on"""


class LanguageModel(NamedTuple):
    """A model of transformers, which stays unchanged, and its tokenizer."""

    model: Any
    tokenizer: Any

    def prompt(self, text: str) -> Tensor:
        """[1, t] token ids of a user's message, up to where the assistant's answer begins."""
        messages = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return torch.tensor([ids["input_ids"]])


def load(quick: bool) -> LanguageModel:
    """SmolLM2-135M-Instruct, or with `quick` a tiny random model with the same tokenizer, which takes seconds."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from lit_did.demo import smollm2

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = smollm2()
    if quick:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **QUICK))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return LanguageModel(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder))


def train(
    language_model: LanguageModel,
    data: lightning.LightningDataModule | DataLoader,
    kind: type[LitDPO] = LitDPO,
    *,
    steps: int,
    seed: int,
    beta: float = 0.1,
) -> nn.Module:
    """A LoRA policy of the model, trained by `kind`, in eval mode. Its base model is the reference.

    Args:
        language_model: The model to start from, which stays unchanged.
        data: Batches as LitDPO takes them.
        kind: The class of module.
        steps: The number of optimiser steps, a batch each.
        seed: The seed of the adapter's initialisation.
        beta: DPO's beta.
    """
    lightning.seed_everything(seed, verbose=False)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in HINTS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        module = kind(
            copy.deepcopy(language_model.model),
            beta=beta,
            lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            learning_rate=4e-4,
            warmup_steps=0.1,
            schedule="linear",
        )
        trainer = lightning.Trainer(
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)
    assert module.policy is not None  # the trainer has set it up
    return module.policy.eval()


@torch.no_grad()
def sample(
    model: Any, prompt: Tensor, *, count: int, max_new_tokens: int, seed: int, temperature: float = 1.0
) -> Tensor:
    """[count, T] int64 completions of `prompt` [1, t] drawn from `model`, -1 after the end of each."""
    torch.manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=prompt.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        num_return_sequences=count,
        pad_token_id=int(ends[0]),
    )[:, prompt.shape[1] :]
    ended = torch.isin(output, ends).cumsum(1)
    return output.masked_fill((ended - torch.isin(output, ends).long()) > 0, -1)


def score(policy: nn.Module, prompt: Tensor, completions: Tensor) -> SequenceStatistics:
    """Statistics [n] of `completions` [n, T] (-1 after the end) of one prompt, under a LoRA policy and its base."""
    models = PolicyAndReference(policy)
    return models.measure(models.read(batch_of([(prompt, row[row >= 0]) for row in completions])))


def score_all(
    policy: nn.Module, reference: nn.Module | None, sequences: Sequence[tuple[Tensor, Tensor]]
) -> SequenceStatistics:
    """Statistics [n] of prompts [1, t] and completions [m]. Without a reference the policy is its own.

    Sequences of similar lengths share a batch, so that there is little padding.
    """
    models = PolicyAndReference(policy, policy if reference is None else reference, freeze=False)
    order = sorted(range(len(sequences)), key=lambda i: sum(part.numel() for part in sequences[i]))
    parts = []
    for start in range(0, len(order), 8):
        batch = batch_of([sequences[i] for i in order[start : start + 8]])
        parts.append(models.measure(models.read(batch)))
    back = torch.tensor(order).argsort()
    return SequenceStatistics(*(torch.cat(values)[back] for values in zip(*parts, strict=True)))


def batch_of(sequences: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as LitDPO documents it, of pairs of a prompt [1, t] and a completion [n], padded on the right."""
    length = max(prompt.shape[1] + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(sequences):
        begin, end = prompt.shape[1], prompt.shape[1] + len(completion)
        input_ids[row, :end] = torch.cat([prompt[0], completion])
        attention_mask[row, :end] = 1
        labels[row, begin - 1 : end - 1] = completion
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
