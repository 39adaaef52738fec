"""Trains on one CPU process, and on groups of two that share rows of tokens: run by test_context_parallel.py.

python -m tests.modules.context_parallel FOLDER PROCESSES CASE[;CASE ...]

Writes FOLDER/CASE.STRATEGY.PROCESSES.RANK as `tests.modules.sharded` does. "resumed CASE" goes on from the checkpoint
of a run whose processes did not share rows, or did. "refused" writes errors.
"""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from lit_did import LitDPO, LitDPOPG, PreferenceDataModule
from lit_did.callbacks import ScoreWriter
from lit_did.models import policy_and_reference, varlen
from lit_did.modules.sft import LitSFT
from tests.models import flash
from tests.models.architectures import build
from tests.modules.sharded import LORA, STEP, VOCABULARY, Save, rows
from tests.modules.tiny import byte_tokenizer, loader, make_pairs, tiny_llama, trainer
from tests.processes import run_ranks


def strategies(name: str, processes: int) -> tuple[str, ...]:
    """In which a case is trained. FSDP takes a cached reference by its name only."""
    return ("auto",) if processes == 1 else ("ddp",) if name == "cached" else ("ddp", "fsdp")


def tiny_mistral() -> MistralForCausalLM:
    """Has a sliding window, and two heads for each key head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 9}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, initializer_range=0.2)).double()


def tiny(**overrides: Any) -> Any:
    return tiny_llama(vocab_size=VOCABULARY, **overrides).double()


def cases() -> dict[str, dict[str, Any]]:
    """By name: LitDPO's arguments, `trainer`'s, and others of `fit`.

    "flash": processes that share rows attend to all segments in one call. The one process does not.
    """
    tied = {"policy": functools.partial(tiny, tie_word_embeddings=True)}
    return {
        "full": {"policy": tiny},
        "whole prompts": {"policy": tiny, "share_prompts": False},
        "lora, tied, recomputed, in parts": {
            **tied,
            "lora": LORA,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 1,
            "flash": True,
        },
        "tied": {**tied, "recompute_elementwise": True, "token_did_entropy_weight": 0.1},
        "clipped": {"policy": tiny, "trainer": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}},
        "eager": {"policy": lambda: tiny(attn_implementation="eager"), "lora": LORA, "reference": tiny},
        "window": {"policy": tiny_mistral, "flash": True},
        "projected": {"policy": tiny, "class": LitDPOPG},
        "cached": {"policy": tiny, "cache_reference": True, "cache_kind": "logprobs"},
        "one side": {"policy": tiny, "class": LitSFT},
    }


QUICK = ("full", "lora, tied, recomputed, in parts")
OTHERS = ("whole prompts", "tied", "clipped", "eager", "window", "projected", "cached", "one side")


class Activations(TorchDispatchMode):
    """The number of elements of the largest activation that an operator returns, such as [1, tokens, hidden]."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dim() > 2:  # weights and their gradients have fewer
                self.largest = max(self.largest, value.numel())
        return result


class SaveActivations(Save):
    """Watches activations instead of all tensors."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.logits, self.watch = 1, Activations()
        self.watch.__enter__()


def fit(strategy: str, processes: int, path: Path, case: dict[str, Any], **given: Any) -> None:
    """`given`: `checkpoint`, to go on from; `share`, how many processes share a row."""
    case = {"class": LitDPO, "trainer": {}, "share": 2 if processes > 1 else 1, **case, **given}
    kind, options, policy, share, checkpoint, one_call = (
        case.pop(name, None) for name in ("class", "trainer", "policy", "share", "checkpoint", "flash")
    )
    one_call = one_call and share > 1 and varlen._of_torch() is not None
    if callable(case.get("reference")):
        case["reference"] = case["reference"](seed=1)
    if "cache_reference" in case:
        case["cache_reference"] = f"{path}.cache"
    torch.manual_seed(7)
    settings = {"learning_rate": 1e-2, "adam_eps": 1e-3, "weight_decay": 0.1, "context_parallel_size": share}
    module = kind(policy(), **settings, **case)
    sharded = strategy == "fsdp"
    run = trainer(
        devices=processes,
        strategy=ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False) if sharded else strategy,
        enable_checkpointing=True,
        callbacks=[
            SaveActivations(path),
            ModelCheckpoint(path.parent, filename=path.name, every_n_train_steps=3),
            *[ScoreWriter(f"{path}.csv")] * (path.name.startswith("full.")),
        ],
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )
    batch_size = STEP // options.get("accumulate_grad_batches", 1) // (processes // share)
    data = PreferenceDataModule(rows(), byte_tokenizer(), val=rows(1)[:7], batch_size=batch_size, max_length=64)
    with flash.on_the_cpu() if one_call else nullcontext(flash.calls) as calls:
        calls.clear()
        run.fit(module, data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        assert bool(calls) == bool(one_call)
    if path.name.startswith("full."):
        run.predict(module, data)


def mixing() -> Any:
    """A model that adds the state of the token before, unless it belongs to another sequence."""
    model = tiny_llama()

    def mix(module: Any, arguments: tuple, options: dict[str, Any], output: Any) -> None:
        states = output.last_hidden_state
        places = options.get("position_ids")
        places = torch.arange(states.shape[1])[None] if places is None else places
        output.last_hidden_state = states + torch.nn.functional.pad(states, (0, 0, 1, -1)) * (places > 0)[..., None]

    model.model.register_forward_hook(mix, with_kwargs=True)
    return model


def refusals() -> dict[str, Any]:
    """By name: a function that makes a module, and a strategy."""
    share = {"context_parallel_size": 2}
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    return {
        "three heads": (
            lambda: LitDPO(tiny_llama(hidden_size=24, num_attention_heads=3, num_key_value_heads=3), **share),
            "ddp",
        ),
        "other batches": (lambda: LitDPO(tiny_llama(), **share), "ddp"),
        "tensor parallelism": (lambda: LitDPO(tiny_llama(), **share), ModelParallelStrategy(1, 2)),
        "three processes": (lambda: LitDPO(tiny_llama(), context_parallel_size=3), "ddp"),
        "a cached reference": (lambda: LitDPO(tiny_llama(), **share, cache_reference="cache"), "ddp"),
        "positions of the longest": (lambda: LitDPO(tiny_llama(**dynamic), **share), "ddp"),
        "mixed tokens": (lambda: LitDPO(mixing(), **share), "ddp"),
        "attention of its own": (lambda: LitDPO(build("Bloom", vocab_size=67), **share), "ddp"),
    }


def refuse(path: Path) -> None:
    errors = {}
    for name, (make, strategy) in refusals().items():
        pairs = make_pairs(4)
        run = trainer(devices=2, strategy=strategy, max_epochs=1, use_distributed_sampler=name == "other batches")
        try:
            run.fit(make(), loader(pairs, 2))
            errors[name] = None
        except ValueError as error:
            errors[name] = str(error)
    torch.save(errors, f"{path}.{run.global_rank}")


def main(folder: Path, processes: int, names: list[str]) -> None:
    policy_and_reference.linear_sequence_statistics = functools.partial(
        policy_and_reference.linear_sequence_statistics, max_extra_bytes=2**14
    )
    for name in names:
        for strategy in strategies(name, processes):
            path = folder / f"{name}.{strategy}.{processes}"
            if name == "refused":
                refuse(path)
                break
            case = cases()[name.removeprefix("resumed ")]
            given = {}
            if name.startswith("resumed") and strategy == "ddp":  # one process, then two that share rows
                given = {"checkpoint": folder / f"{name.removeprefix('resumed ')}.auto.1.ckpt"}
            elif name.startswith("resumed"):  # two that share rows, then two that do not
                given = {"checkpoint": folder / f"{name.removeprefix('resumed ')}.ddp.2.ckpt", "share": 1}
            fit(strategy, processes, path, case, **given)


if __name__ == "__main__":
    run_ranks(int(sys.argv[2]), main, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(";"))
