"""Training steps on a few pairs, recorded: what the tests of LitDPO's step share."""

from __future__ import annotations

from functools import partial

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_did import LitDPO
from lit_did.data.collating import collate_packed, collate_pairs
from lit_did.data.dataset import Example
from tests.modules.tiny import VOCABULARY, tiny_llama, trainer

PLAIN = {"padding_free": False, "share_prompts": False, "micro_batch_tokens": None, "recompute_elementwise": False}
SWITCHES = [
    {"padding_free": True, "share_prompts": False, "micro_batch_tokens": None},
    {"padding_free": True, "share_prompts": True, "micro_batch_tokens": None},
    {"padding_free": True, "share_prompts": True, "micro_batch_tokens": 1},
    {"padding_free": True, "share_prompts": True, "micro_batch_tokens": 70},
    {"padding_free": False, "share_prompts": True, "micro_batch_tokens": 70},
    {},
]
# A large eps keeps Adam from turning rounding of small gradients into whole steps.
OPTIMISER = {"learning_rate": 1e-2, "adam_eps": 1e-2}


def examples(count: int = 8) -> list[Example]:
    """Pairs whose prompts are long enough to share, of uneven lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).numpy()

    return [Example(ids(9, 15), ids(1, 12), ids(1, 12), index=i, weight=1.0) for i in range(count)]


def loader(count: int = 8, batch_size: int = 4, packed: bool = False) -> DataLoader:
    collate = collate_packed if packed else partial(collate_pairs, pad_token_id=0)
    return DataLoader(examples(count), batch_size=batch_size, collate_fn=collate)


class Record(lightning.Callback):
    """Gradients and logged values at every optimiser step, and what the weights are in the end."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([p.grad.clone() for p in module.policy.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.logged) < trainer.global_step:
            self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_fit_end(self, trainer, module):
        self.weights = [p.detach().clone() for p in module.policy.parameters() if p.requires_grad]


def train(module: LitDPO, data: DataLoader | None = None, **options) -> Record:
    record = Record()
    run = trainer(**{"max_epochs": 1, **options}, callbacks=[record])
    run.fit(module, loader() if data is None else data)
    assert len(record.gradients) == run.global_step == len(record.logged) > 1
    return record


def make(kind: type = LitDPO, **options) -> LitDPO:
    return kind(tiny_llama(0), tiny_llama(1), **{**OPTIMISER, **options})


def assert_same(one: Record, other: Record, atol: float = 1e-6) -> None:
    """To float32's rounding of sums over some hundred tokens."""
    for mine, theirs in zip([*one.gradients, one.weights], [*other.gradients, other.weights], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=max(atol, 1e-4 * b.abs().max().item()))
    for mine, theirs in zip(one.logged, other.logged, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
