"""Trains on one CPU process and sharded over several: run by test_sharded.py.

python -m tests.modules.sharded FOLDER PROCESSES CASE[;CASE ...]

Writes FOLDER/CASE.DATAxTENSOR.RANK: the trained weights, the metrics, and what the ranks held. "resumed CASE" is a run
that goes on from a checkpoint of another layout.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_did import LitDPO, LitDPOPG, LitSFT, PreferenceDataModule, SequenceStatistics
from lit_did.exporting import consolidate_checkpoint
from lit_did.models import policy_and_reference, trial
from lit_did.models.sharding import kept_on_cpu
from tests.modules.tiny import byte_tokenizer, tiny_llama, trainer
from tests.processes import run_ranks

LAYOUTS = {1: ("1x1",), 2: ("2x1", "1x2"), 4: ("2x2", "4x1")}  # by the number of processes
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
# Its loss is a mean over the tokens of a process.
SFT: dict[str, Any] = {"class": LitSFT, "completion": (9, 10)}
PAIRS = 24
STEP = 12  # pairs in an optimiser step
OFFLOADED = "reference on the CPU"
VOCABULARY = 264  # that of the tokenizer, up to a multiple of 8


def rows(seed: int = 0, completion: tuple[int, int] = (2, 30)) -> list[dict[str, str]]:
    """Pairs with completions of at least `completion[0]` and fewer than `completion[1]` characters."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (length,), generator=generator))

    sides = ("chosen", "rejected")
    return [{"prompt": text(8, 20), **{side: text(*completion) for side in sides}} for _ in range(PAIRS)]


def with_entropy(chosen: SequenceStatistics, rejected: SequenceStatistics) -> torch.Tensor:
    """A loss whose backward pass reads the logits of both models. Larger gradients would show norms' float32 sums."""
    return 0.02 * (rejected.log_ratio - chosen.log_ratio - chosen.token_did_entropy)


def tiny_qwen3() -> Qwen3ForCausalLM:
    """Has norms whose gradients transformers sums over the processes."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, initializer_range=0.2)).double()


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: LitDPO's arguments, `trainer`'s, and others of `fit`."""
    plain, tied = {"policy": folder / "plain"}, {"policy": folder / "tied"}
    return {
        "full": plain,
        "tied": tied,
        "object": {"policy": lambda: tiny_llama(vocab_size=VOCABULARY).double()},
        "tied object": {"policy": lambda: tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=True).double()},
        "float32": {**plain, "model_kwargs": {"dtype": torch.float32}},
        "replicated": {**plain, "settings": {"dp_replicate_size": 2}},  # on four processes
        OFFLOADED: {**plain, "settings": {"fsdp_cpu_offload": "reference"}},
        "recomputed": {**plain, "gradient_checkpointing": True},
        "clipped": {**tied, "trainer": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}},
        "clipped by value": {**plain, "trainer": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}},
        "in parts": {**plain, "micro_batch_tokens": 1},
        "norms of heads, in parts": {"policy": tiny_qwen3, "micro_batch_tokens": 1},
        "projected": {**plain, "class": LitDPOPG, "trainer": {"gradient_clip_val": 0.1}},
        "projected, tied, in parts": {**tied, "class": LitDPOPG, "micro_batch_tokens": 1},
        "bfloat16": {**plain, "model_kwargs": {}, "trainer": {"precision": "bf16-mixed"}},
        "cached": {**plain, "cache_reference": folder / "cache", "cache_kind": "logprobs"},
        "cached by each": {**plain, "cache_reference": "own", "cache_kind": "logprobs", "eval_batch_size": 3},
        "cached lora": {**plain, "lora": LORA, "cache_reference": "own", "cache_kind": "logprobs"},
        "with entropy": {**plain, "loss": with_entropy},
        "lora": {**plain, "lora": LORA},
        "lora, tied, recomputed, in parts": {
            **tied,
            "lora": LORA,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 1,
        },
        "lora start": {**plain, "lora": LORA, "reference": "adapter"},
        "lora object": {"policy": lambda: tiny_llama(vocab_size=VOCABULARY).double(), "lora": LORA},
        "lora, projected": {**plain, "class": LitDPOPG, "lora": LORA},
        "sft": {**plain, **SFT},
        "sft, tied, lora, in parts": {**tied, **SFT, "side": "both", "lora": LORA, "micro_batch_tokens": 1},
    }


QUICK = ("full", "lora, tied, recomputed, in parts", OFFLOADED)
OTHERS = (
    ("tied", "object", "tied object", "float32"),
    ("recomputed", "clipped", "clipped by value", "in parts"),
    ("norms of heads, in parts", "projected", "projected, tied, in parts"),
    ("lora", "lora start", "lora object", "lora, projected"),
    ("with entropy", "sft", "sft, tied, lora, in parts"),
)
ON_FOUR = (
    ("full", "clipped", "replicated", "float32"),
    ("recomputed", "projected, tied, in parts", "lora", "lora, tied, recomputed, in parts"),
)
LORA_CASES = tuple(name for name in cases(Path()) if "lora" in name)


class Watch(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if type(value) is torch.Tensor and not value.is_meta:
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


class Save(lightning.Callback):
    """Writes what test_sharded.py compares, on each rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first = None  # loss

    def on_train_start(self, trainer, module):
        self.loaded = sum(model is not None for model in (module.policy, module.reference))
        self.held = sum(_local(p).numel() for p in module.parameters())
        self.all = sum(p.numel() for p in module.parameters())

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.logits = int((batch["labels"] != -100).sum()) * VOCABULARY
        self.watch = Watch()  # of the last batch: the first has a trial of the models
        self.watch.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.watch.__exit__(None, None, None)
        if trainer.global_step == 1:
            self.first = float(trainer.callback_metrics["train/loss"])

    def on_train_end(self, trainer, module):  # later, nothing would be distributed any more
        named = ((n, p) for n, p in module.policy.named_parameters(remove_duplicate=False) if p.requires_grad)
        weights = {n: _whole(p.detach()).clone() for n, p in named}
        models = [model for model in (module.policy, module.reference) if model is not None]
        saved = {
            "weights": weights,
            "metrics": {n: float(v) for n, v in trainer.callback_metrics.items()},
            "held": self.held / self.all,
            "loaded": self.loaded,
            "largest": self.watch.largest / self.logits,
            "fused": [trial._known[model].body is not None for model in models],
            "steps": trainer.global_step,
            "dtypes": [next(model.parameters()).dtype for model in models],
            "first": self.first,
            "on_cpu": [kept_on_cpu(model) for model in models],
        }
        torch.save(saved, f"{self.path}.{trainer.global_rank}")


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def fit(layout: str, path: Path, case: dict[str, Any], checkpoint: Path | None = None, **strategy: Any) -> None:
    data, tensor = map(int, layout.split("x"))
    case = {"class": LitDPO, "trainer": {}, "model_kwargs": {"dtype": torch.float64}, **case}
    kind, options, policy = (case.pop(name) for name in ("class", "trainer", "policy"))
    eval_batch_size, completion = case.pop("eval_batch_size", None), case.pop("completion", (2, 30))
    if case.get("cache_reference") == "own":  # of this layout
        case["cache_reference"] = f"{path}.cache"
    settings = case.pop("settings", {})
    if data > settings.get("dp_replicate_size", 1):
        case["model_kwargs"]["distributed_config"] = settings
    # An adapter gets the first process's values, and a model object has to be the same on all.
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() and not callable(policy) else 0
    torch.manual_seed(7 + rank)
    module = kind(policy() if callable(policy) else policy, learning_rate=1e-2, adam_eps=1e-3, weight_decay=0.1, **case)
    run = trainer(
        devices=data * tensor,
        strategy="auto" if layout == "1x1" else ModelParallelStrategy(data, tensor, **strategy),
        enable_checkpointing=True,
        callbacks=[Save(path), ModelCheckpoint(path.parent, filename=path.name, every_n_train_steps=3)],
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )
    batch_size = STEP // options.get("accumulate_grad_batches", 1) // data
    sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": 64}
    pairs = PreferenceDataModule(rows(0, completion), byte_tokenizer(), val=rows(1, completion)[:8], **sizes)
    run.fit(module, pairs, ckpt_path=checkpoint, weights_only=False if checkpoint else None)


def main(folder: Path, processes: int, names: list[str]) -> None:
    torch.Tensor.pin_memory = lambda tensor: tensor  # it needs a GPU
    policy_and_reference.linear_sequence_statistics = functools.partial(
        policy_and_reference.linear_sequence_statistics, max_extra_bytes=2**14
    )
    for name in names:
        case = cases(folder)[name.removeprefix("resumed ")]
        for layout in LAYOUTS[processes]:
            if "x2" in layout and "lora" in case:  # refused
                continue
            if name.startswith("resumed"):
                resume(layout, folder, name, case)
            else:
                fit(layout, folder / f"{name}.{layout}", case)


def resume(layout: str, folder: Path, name: str, case: dict[str, Any]) -> None:
    """Goes on from the checkpoint of another layout: a file of one process, or a folder of shards."""
    before = {"2x1": "1x1", "1x2": "2x1", "2x2": "1x2", "4x1": "2x1", "1x1": "2x1"}[layout]
    checkpoint = folder / f"{name.removeprefix('resumed ')}.{before}.ckpt"
    if layout == "1x1":
        file = folder / f"{name}, whole.ckpt"
        consolidate_checkpoint(checkpoint, file)
        checkpoint = file
    fit(layout, folder / f"{name}.{layout}", case, checkpoint)


if __name__ == "__main__":
    folder, processes, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(";")
    if not (folder / "plain").exists():
        tiny_llama(vocab_size=VOCABULARY).save_pretrained(folder / "plain")
        tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=True).save_pretrained(folder / "tied")
    run_ranks(processes, main, folder, processes, names)
