"""Tiny DPOTrainers for the tests of DIDCallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.modules.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer()
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")


def dataset(count: int, seed: int = 0) -> Dataset:
    """Pairs of words of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)

    def word() -> str:
        length = int(torch.randint(1, 9, (), generator=generator))
        return "".join(chr(97 + int(i)) for i in torch.randint(26, (length,), generator=generator))

    return Dataset.from_list([{"prompt": word() + "?", "chosen": word(), "rejected": word()} for _ in range(count)])


def llama(seed: int = 0, **options: Any):
    return tiny_llama(seed, vocab_size=len(TOKENIZER), **options)


def gpt2(seed: int = 0, **options: Any):
    return tiny_gpt2(seed, vocab_size=len(TOKENIZER), **options)


def trainer(folder: Path, model: Any, reference: Any = None, *, cls: type = DPOTrainer, **options: Any) -> DPOTrainer:
    """A DPOTrainer on the CPU: 12 pairs to train on, 5 to evaluate; arguments of DPOConfig or of the trainer."""
    of_trainer = {name: options.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in options}
    config = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        **options,
    }
    return cls(
        model=model,
        ref_model=reference,
        args=DPOConfig(**config),
        processing_class=TOKENIZER,
        train_dataset=dataset(12),
        eval_dataset=of_trainer.pop("eval_dataset", dataset(5, seed=1)),
        **of_trainer,
    )
