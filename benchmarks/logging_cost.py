"""What logging the DID costs a training step: LitDPO with all its metrics at every step, and DIDMonitor beside it.

python -m benchmarks.logging_cost [--model NAME_OR_PATH] [--steps 20] [--batch-size 4] [--max-length 256]

The parts are timed within real training steps, so that noise affects them and the step alike. These count as logging:
the operator's forward without its matrix products, although the loss needs most of it; updating the metrics; computing,
logging and resetting them. The targets are at most 3% of a step for LitDPO, and for DIDMonitor at its default of every
50 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning
import torch
from rich.console import Console
from rich.table import Table

from lit_did import DIDMonitor, LitDPO, PreferenceDataModule
from lit_did.cli.errors import Arguments
from lit_did.demo import PAIRS, smollm2
from lit_did.modules import dpo
from lit_did.modules.pairs import PairMetrics
from lit_did.ops import linear
from lit_did.ops.partials import Partials

TARGET = 0.03
DEFAULT_EVERY = 50  # the Trainer's log_every_n_steps
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}  # the demo's


class Clock(lightning.Callback):
    """Seconds of every optimiser step and of the watched parts, without the warm-up steps."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.steps: list[float] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self._parts: dict[str, float] = defaultdict(float)
        self._begin = 0.0

    def watch(self, part: str, function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += time.perf_counter() - begin

        return watched

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._parts.clear()
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        duration = time.perf_counter() - self._begin
        if batch_idx >= self.warmup:
            self.steps.append(duration)
            for part, seconds in self._parts.items():
                self.parts[part].append(seconds)


@contextmanager
def watched(clock: Clock):
    """Times the parts of LitDPO that log."""
    update, log, monitor = PairMetrics.update, PairMetrics.log_all, DIDMonitor._arguments
    with (
        # What the operator does besides the matrix products.
        mock.patch.object(Partials, "add", clock.watch("operator, forward", Partials.add)),
        mock.patch.object(Partials, "merge", clock.watch("operator, forward", Partials.merge)),
        mock.patch.object(Partials, "finish", clock.watch("operator, forward", Partials.finish)),
        mock.patch.object(linear, "sequence_reduction", clock.watch("operator, forward", linear.sequence_reduction)),
        mock.patch.object(PairMetrics, "update", clock.watch("metrics: update", update)),
        mock.patch.object(PairMetrics, "log_all", clock.watch("metrics: compute and log", log)),
        mock.patch.object(dpo, "count_bad_gradients", clock.watch("gradients: check", dpo.count_bad_gradients)),
        mock.patch.object(DIDMonitor, "_arguments", clock.watch("DIDMonitor: forward passes", monitor)),
    ):
        yield


def run(options: argparse.Namespace, model: Any, lora: dict | None, monitor: bool) -> Clock:
    """Trains a few steps."""
    clock = Clock(warmup=2)
    lightning.seed_everything(0, verbose=False)
    module = LitDPO(model, lora=lora, learning_rate=1e-5)
    data = PreferenceDataModule(
        PAIRS, options.tokenizer, batch_size=options.batch_size, max_length=options.max_length, as_chat=True
    )
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=options.steps + clock.warmup,
        log_every_n_steps=1,
        # The clock starts before the monitor measures.
        callbacks=[clock, DIDMonitor(every_n_steps=1)] if monitor else [clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    with watched(clock):
        trainer.fit(module, data)
    return clock


def report(title: str, clock: Clock, monitored: Clock) -> None:
    """Prints the parts of a step, and how they compare with the targets."""
    step = statistics.median(clock.steps)
    table = Table(title=title, title_justify="left")
    for heading in ("", "ms, median", "% of a step", "target"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(name: str, seconds: float, target: str = "") -> None:
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{100 * seconds / step:.2f}", target)

    def verdict(share: float) -> str:
        return f"{100 * TARGET:g} %, {'met' if share <= TARGET else 'MISSED'}"

    row("a step", step)
    for part, seconds in clock.parts.items():
        row(part, statistics.median(seconds))
    logging = statistics.median(map(sum, zip(*clock.parts.values(), strict=True)))
    row("all of LitDPO's logging", logging, verdict(logging / step))
    passes = statistics.median(monitored.parts["DIDMonitor: forward passes"])
    row("DIDMonitor, a step that it measures", passes)
    row(f"DIDMonitor, every {DEFAULT_EVERY} steps", passes / DEFAULT_EVERY, verdict(passes / DEFAULT_EVERY / step))
    Console(width=100).print(table)


def main() -> None:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: name or path (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 2 to warm up")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256, help="most tokens of a prompt and completion")
    parser.add_argument("--kinds", nargs="+", choices=("lora", "full"), default=("lora", "full"))
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = options.model or smollm2()
    options.tokenizer = AutoTokenizer.from_pretrained(name)
    for kind in options.kinds:
        clocks = []
        for monitor in (False, True):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            clocks.append(run(options, model, LORA if kind == "lora" else None, monitor))
        report(f"{kind}, {options.batch_size} pairs a step, {torch.get_num_threads()} threads", *clocks)


if __name__ == "__main__":
    main()
