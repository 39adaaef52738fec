"""What training costs: tokens, what it saves to leave out padding, and a measured step of LitDPO on this machine."""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_did.audit.blocks import Block, Paragraph, Table
from lit_did.audit.settings import Settings
from lit_did.batches.layout import SHORTEST_SHARED
from lit_did.data.collating import collate_packed
from lit_did.data.dataset import PreferenceDataset
from lit_did.models.quiet import lightning_quiet
from lit_did.models.wrappers import is_peft, unwrapped

STEP_TOKENS = 1024  # of the measured step, at least one pair
LONGEST = 60.0  # seconds for all measured steps, by an estimate from the pass over the pairs
STEPS = 2  # the first one warms up
RANK = 16  # of the LoRA adapter that is trained
_WORK = 5.0  # about how much longer than the reference's pass a step takes per token


def examine_cost(
    dataset: PreferenceDataset, reference: nn.Module, settings: Settings, seconds: float
) -> tuple[list[Block], dict[str, Any]]:
    """What an epoch of training costs.

    Args:
        dataset: The pairs.
        reference: The model, which stays as it is: a copy is trained.
        settings: With the number of pairs of a batch.
        seconds: How long the reference took for all pairs.
    """
    figures: dict[str, Any] = dict(tokens_of_epoch(dataset, settings.batch_size, settings.seed))
    tokens = figures["tokens"]
    rows = [
        ("padded to the longest of a batch", figures["padded_tokens"], figures["fill"]),
        ("without padding", tokens, 1.0),
        ("without padding, shared beginnings once", figures["shared_tokens"], 1.0),
    ]
    table = Table(
        "Tokens of an epoch",
        ("layout", "tokens", "share that is no padding"),
        rows,
        f"{len(dataset):,} pairs in batches of {settings.batch_size} in random order. LitDPO uses the last layout "
        "where the model allows it.",
    )
    batch = _some_pairs(dataset, settings.seed)
    of_batch = int(batch["cu_seqlens"][-1])
    expected = seconds / tokens * _WORK * of_batch * STEPS
    why_not = ""
    if is_peft(unwrapped(reference)):
        why_not = "the model has an adapter"
    elif expected > LONGEST:
        why_not = f"it would take about {expected:,.0f} s"
    else:
        try:
            step, memory = measure_step(reference, batch)
        except Exception as error:  # whatever cannot be trained can still be audited
            first = (str(error).splitlines() or [""])[0]
            why_not = f"it failed with {type(error).__name__}: {first}"
    if why_not:
        figures["step_not_measured"] = why_not
        return [table, Paragraph(f"No training step was measured, because {why_not.rstrip('.')}.")], figures
    figures |= {"step_tokens": of_batch, "step_seconds": step, "step_peak_bytes": memory}
    figures["epoch_seconds"] = step / of_batch * tokens
    peak = "" if math.isnan(memory) else f" Peak memory was {memory / 2**30:.1f} GiB, with both models."
    text = (
        f"A step of LitDPO with a LoRA adapter of rank {RANK} on {len(batch['index'])} pairs ({of_batch:,} tokens) "
        f"took {step:.2f} s on the {next(reference.parameters()).device} of this machine, in the model's own "
        f"precision, after one step to warm up.{peak} An epoch of these pairs would take about "
        f"{_duration(figures['epoch_seconds'])}."
    )
    return [table, Paragraph(text)], figures


def tokens_of_epoch(dataset: PreferenceDataset, batch_size: int, seed: int) -> dict[str, float]:
    """The tokens of all pairs, by layout: `tokens`, `padded_tokens`, `shared_tokens`, and `fill` of padded batches."""
    tokens = dataset.num_tokens
    prompts = np.array([len(example.prompt_ids) for example in dataset])
    longest = np.array(
        [
            len(e.prompt_ids)
            + max(
                len(ids) + (0 if context is None else len(context.ids))
                for ids, context in ((e.chosen_ids, e.chosen_context), (e.rejected_ids, e.rejected_context))
            )
            for e in dataset
        ]
    )
    order = np.random.default_rng(seed).permutation(len(dataset))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    padded = sum(2 * len(batch) * int(longest[batch].max()) for batch in batches)
    total = int(tokens.sum())
    return {
        "tokens": total,
        "padded_tokens": padded,
        "shared_tokens": total - int(prompts[prompts >= SHORTEST_SHARED].sum()),
        "fill": total / padded,
    }


def measure_step(reference: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """The seconds and the peak bytes of a step of LitDPO with a LoRA adapter, on a copy of the model.

    The bytes are those of the process on a CPU, and of torch's allocator on a GPU. NaN: unknown.
    """
    import lightning
    from torch.utils.data import DataLoader

    from lit_did.modules import LitDPO

    device = next(reference.parameters()).device
    times: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            times.append(-time.perf_counter())

        def on_train_batch_end(self, *_: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[-1] += time.perf_counter()

    with warnings.catch_warnings(), lightning_quiet(logging.ERROR), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        model = LitDPO(copy.deepcopy(unwrapped(reference)), lora={"r": RANK})
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            barebones=True,
            callbacks=[Clock()],
        )
        _reset_peak(device)
        trainer.fit(model, DataLoader([batch] * STEPS, batch_size=None))  # type: ignore[arg-type]
    return times[-1], _peak(device)


def _some_pairs(dataset: PreferenceDataset, seed: int) -> dict[str, Any]:
    """Random pairs of at most `STEP_TOKENS` tokens, or one pair, as a batch."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    count = int(np.searchsorted(dataset.num_tokens[order].cumsum(), STEP_TOKENS, side="right"))
    return collate_packed([dataset[int(number)] for number in order[: max(1, count)]])


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return math.nan
