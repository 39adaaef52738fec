"""A DPO step on a random Llama: LitDPO beside a plain padded step in torch, on the same tokens.

python -m benchmarks.llama_step [--device cuda] [--size 1b] [--pairs 8] [--length 1024] [--steps 6]

It uses bfloat16 weights, AdamW and full fine-tuning. The plain step runs policy and reference on the padded batch and
computes the log-softmax of their logits in float32. The reference is another random model, so losses are not log 2. The
losses of the first step must agree. The first two steps of a run are not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import report
from lit_did import LitDPO
from lit_did.cli.errors import Arguments
from lit_did.models.trial import attention_used

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    # As Llama 3.2's two small models.
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
LEARNING_RATE, BETA, WARMUP = 1e-6, 0.1, 2
TOLERANCE = 0.02  # of a loss, relative: bfloat16 hidden states, in another order
PLAIN = "plain torch, padded"
CONTESTANTS: dict[str, dict[str, object] | None] = {
    PLAIN: None,
    "lit_did": {},
    "lit_did, prompts not shared": {"share_prompts": False},
    "lit_did, padded": {"padding_free": False, "share_prompts": False},
}


def make_batches(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Padded batches as LitDPO documents them. Prompts have a quarter to a half of the length; completions vary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, longest = SIZES[options.size]["vocab_size"], options.length

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

    batches = []
    for _ in range(options.steps + WARMUP):
        prompts = [tokens(longest // 4, longest // 2) for _ in range(options.pairs)]
        rows = [(prompt, tokens(longest // 8, longest // 2)) for prompt in 2 * prompts]
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
        labels = torch.full((len(rows), length), -100)
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            mask[row, :end] = 1
            labels[row, len(prompt) - 1 : end - 1] = torch.tensor(completion)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


class Clock:
    """Seconds between the ends of steps, and their losses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, loss: Tensor) -> None:
        self.losses.append(loss.item())  # waits for the device
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        laps = [end - begin for begin, end in zip(self.times, self.times[1:], strict=False)]
        return laps[WARMUP - 1 :]


def plain(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, batches: Sequence[Mapping[str, Tensor]], clock: Clock
) -> str:
    """Trains with a step in plain torch. Returns the attention of the policy."""
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def logprobs(model: LlamaForCausalLM, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        picked = logits.float().log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        return (picked * (batch["labels"] != -100)).sum(-1)

    for batch in batches:
        there = {name: value.to(clock.device) for name, value in batch.items()}
        with torch.no_grad():
            expected = logprobs(reference, there)
        chosen, rejected = (logprobs(policy, there) - expected).chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.detach())
    return f"attention {policy.config._attn_implementation!r}, padded"


class Steps(lightning.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.clock.step(trainer.callback_metrics["train/loss"])


def ours(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    batches: Sequence[Mapping[str, Tensor]],
    clock: Clock,
    **options: object,
) -> str:
    """Trains with LitDPO and a Trainer. Returns the attention of the policy."""
    module = LitDPO(policy, reference, beta=BETA, learning_rate=LEARNING_RATE, **options)
    trainer = lightning.Trainer(
        accelerator=clock.device.type,
        devices=1,
        precision="bf16-true",
        max_steps=len(batches),
        log_every_n_steps=1,
        callbacks=[Steps(clock)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.policy is not None
    return attention_used(module.policy)


def run(name: str, options: argparse.Namespace, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, object]:
    """A contestant's figures."""
    device = torch.device(options.device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = LlamaConfig(max_position_embeddings=2 * options.length, pad_token_id=0, **SIZES[options.size])
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.device(device):
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    clock = Clock(device)
    switches = CONTESTANTS[name]
    train: Callable = plain if switches is None else ours
    attention = train(*models, batches, clock, **(switches or {}))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds": clock.seconds, "losses": clock.losses, "peak_gib": peak, "attention": attention}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, object]]:
    """Parses the command line and runs; returns what it writes as JSON."""
    parser = Arguments(
        prog="python -m benchmarks.llama_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--device", default="cuda", choices=["cpu", "cuda"], help="(default: %(default)s)")
    add("--size", default="1b", choices=SIZES, help="(default: %(default)s)")
    add("--pairs", type=int, default=8, help="pairs a step (default: %(default)s)")
    add("--length", type=int, default=1024, help="most tokens of a sequence (default: %(default)s)")
    add("--steps", type=int, default=6, help="timed steps (default: %(default)s)")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    add("--output", type=Path, default=Path("bench_output"), help="folder for llama_step.json")
    options = parser.parse_args(arguments)
    batches = make_batches(options)
    tokens = [int(batch["attention_mask"].sum()) for batch in batches[WARMUP:]]
    padded = [batch["input_ids"].numel() for batch in batches[WARMUP:]]
    print(report.machine(torch.device(options.device)))
    print(f"Llama {options.size}, {options.pairs} pairs a step: {statistics.mean(tokens):.0f} tokens, "
          f"{statistics.mean(padded):.0f} with padding.", flush=True)  # fmt: skip
    runs, wrong = {}, []
    for name in options.contestants:
        try:
            runs[name] = run(name, options, batches)
        except (RuntimeError, ValueError, TypeError) as error:  # the others' figures are kept
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            print(f"FAILED {wrong[-1]}", flush=True)
            continue
        seconds, losses = runs[name]["seconds"], runs[name]["losses"]
        peak = "" if runs[name]["peak_gib"] is None else f"peak {runs[name]['peak_gib']:5.1f} GiB, "
        print(
            f"{name:28} {statistics.median(seconds):7.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}), "
            f"{peak}losses {', '.join(f'{loss:.4f}' for loss in losses[:4])}; "
            f"{runs[name]['attention']}",
            flush=True,
        )
        first = next(iter(runs.values()))["losses"]
        if not abs(losses[0] - first[0]) <= TOLERANCE * first[0]:
            wrong.append(f"{name}: the loss of the first step is {losses[0]}, but {next(iter(runs))} has {first[0]}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "llama_step.json").write_text(json.dumps(runs, indent=1) + "\n")
    if wrong:
        raise SystemExit("\n".join(wrong))
    if {PLAIN, "lit_did"} <= runs.keys():
        medians = {name: statistics.median(runs[name]["seconds"]) for name in (PLAIN, "lit_did")}
        print(", ".join(f"{name}: {seconds:.3f} s a step" for name, seconds in medians.items()))
    return runs


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # It is another model on purpose.
    warnings.filterwarnings("ignore", "At the first step the policy should equal its reference")
    main()
