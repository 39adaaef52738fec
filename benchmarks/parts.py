"""Where the time of LitDPO's training steps goes: timers around the real calls in a Trainer's run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch
from torch import Tensor, nn

from benchmarks import trainers
from lit_did.models import policy_and_reference
from lit_did.models.loading import is_peft
from lit_did.modules import dpo

PARTS = (
    "data",
    "reference forward",
    "policy forward",
    "output layer and statistics",
    "their backward",
    "policy backward",
    "optimiser",
    "metrics",
    "rest",
)
TOLERANCE = 0.05  # Of a step, and seconds: the most that the sum of the parts may differ from the recorded time.


class Parts(lightning.Callback):
    """Seconds of every part of every step. Time that belongs to no other part is `rest`.

    One clock is read where a part ends and the next begins, so no time counts twice. The backward pass of the output
    layer and the statistics ends when the gradient of the policy's last hidden states is known.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._step = dict.fromkeys(PARTS, 0.0)
        self._read = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._watch(_layers(module.policy))
        if module.reference is not None and hasattr(module.reference, "get_decoder"):
            self._watch(_layers(module.reference))
        for name in ("update", "log_all"):
            setattr(module.train_metrics, name, self._timed("metrics", getattr(module.train_metrics, name)))
        # Lightning logs, calls the optimiser and then its hook.
        module.optimizers(use_pl_optimizer=False).register_step_post_hook(lambda *_: self._end("optimiser"))
        self._end("rest")

    def on_train_batch_start(self, *args: Any) -> None:
        self._end("data")

    def on_train_batch_end(self, *args: Any) -> None:
        self._end("rest")
        self.steps.append(self._step)
        self._step = dict.fromkeys(PARTS, 0.0)

    def mean(self, run: trainers.Run) -> dict[str, float]:
        """Every part's seconds a step, without the first step.

        Raises:
            RuntimeError: Their sum is not the time of a step.
        """
        parts = {part: statistics.fmean(step[part] for step in self.steps[1:]) for part in PARTS}
        total, whole = sum(parts.values()), statistics.fmean(run.seconds[1:])
        if abs(total - whole) > TOLERANCE * (1 + whole):
            raise RuntimeError(f"Expected the parts of a step to be {whole:.3g} s together, but got {total:.3g}.")
        return parts

    @contextmanager
    def watching(self) -> Iterator[None]:
        """LitDPO's calls and torch's backward, timed."""
        backward = self._timed("policy backward", Tensor.backward)
        output = self._timed("output layer and statistics", policy_and_reference.completion_statistics)
        check = self._timed("metrics", dpo.count_bad_gradients)
        with (
            mock.patch.object(Tensor, "backward", backward),
            mock.patch.object(policy_and_reference, "completion_statistics", output),
            mock.patch.object(dpo, "count_bad_gradients", check),
        ):
            yield

    def _end(self, part: str) -> None:
        """Adds the time since the clock was read last to `part`."""
        before, self._read = self._read, time.perf_counter()
        self._step[part] += self._read - before

    def _timed(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._end("rest")
            try:
                return function(*args, **kwargs)
            finally:
                self._end(part)

        return timed

    def _watch(self, layers: nn.Module) -> None:
        """Times a model's layers: the policy's where gradients are kept, else the reference's."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self._end("policy forward")
                output[0].register_hook(lambda _: self._end("their backward"))
            else:
                self._end("reference forward")

        layers.register_forward_pre_hook(lambda *_: self._end("rest"))
        layers.register_forward_hook(after)


def _layers(model: nn.Module) -> nn.Module:
    return (model.get_base_model() if is_peft(model) else model).get_decoder()


def profile(task: trainers.Task, options: Mapping[str, Any]) -> dict[str, float]:
    """Trains, and returns where the time of a step went."""
    parts = Parts()
    with parts.watching():
        run = trainers.lit_did(task, callbacks=[parts], **options)
    return parts.mean(run)


def draw(profiles: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """Writes a PNG: one bar for each profile, with its parts end to end.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.6 * len(profiles)), layout="constrained")
    panel = figure.subplots()
    names = list(profiles)[::-1]  # the first on top
    left = [0.0] * len(names)
    for i, part in enumerate(PARTS):
        widths = [profiles[name][part] for name in names]
        panel.barh(names, widths, left=left, color="lightgrey" if part == "rest" else f"C{i}", label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.set(xlabel="seconds a step")
    panel.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
