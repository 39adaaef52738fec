"""A batch makes one way: it stays on the CPU until it is laid out, and nothing is read back from the device."""

from __future__ import annotations

import pickle
import sys
from types import FrameType

import lightning
import pytest
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.distributed.utils import _to_kwargs

from lit_did import LitDPO, LitDPOPG
from lit_did.batches import layout
from tests.modules.steps import loader, make
from tests.modules.tiny import trainer

READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")


def _is_ours(frame: FrameType | None) -> bool:
    """Whether lit_did called, not a model. The operators read values on a CPU only, to check them."""
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    file = "" if frame is None else frame.f_code.co_filename
    return "/lit_did/" in file and "/lit_did/ops/" not in file


class OnDevice(Tensor):
    """A tensor that stands for one on a GPU, as does all that is computed from it. It records what reads it back."""

    reads: list[str] | None = None  # None: nothing is recorded

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        name = getattr(function, "__name__", "")
        if OnDevice.reads is not None and name in READS and _is_ours(sys._getframe(1)):
            OnDevice.reads.append(name)
        return super().__torch_function__(function, types, arguments, keywords or {})

    def __format__(self, specification: str) -> str:
        return format(self.as_subclass(Tensor), specification)


class Recording(lightning.Callback):
    """Records steps of training and validation.

    Not the first of training, which tries the models and checks their start, and not the last, which is logged.
    """

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        OnDevice.reads = self.reads if 0 < batch_idx < trainer.num_training_batches - 1 else None

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        OnDevice.reads = self.reads

    def on_train_batch_end(self, *_):
        OnDevice.reads = None

    def on_validation_batch_end(self, *_):
        OnDevice.reads = None

    def __init__(self) -> None:
        self.reads: list[str] = []


def reads_of(module: LitDPO, monkeypatch, **options) -> list[str]:
    original, moved = layout._tensor, []

    def move(*arguments) -> Tensor:
        moved.append(1)
        return original(*arguments).as_subclass(OnDevice)

    monkeypatch.setattr(layout, "_tensor", move)
    recording = Recording()
    run = trainer(max_epochs=1, callbacks=[recording], log_every_n_steps=100, num_sanity_val_steps=0)
    run.fit(module, loader(12, 4, **options), loader(8, 4, **options))
    assert moved  # the premise
    return recording.reads


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LitDPO, {}),
        (LitDPO, {"padding_free": False, "micro_batch_tokens": 70}),
        (LitDPO, {"token_did_entropy_weight": 0.1, "nll_weight": 0.2}),
    ],
)
def test_nothing_is_read_back(kind, options, packed, monkeypatch):
    assert reads_of(make(kind, **options), monkeypatch, packed=packed) == []


def test_a_batch_that_is_moved_first_is_read_back(monkeypatch):
    """The other side: what the test above would see if Lightning moved the batch."""

    class Moved(LitDPO):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return {name: value.as_subclass(OnDevice) for name, value in batch.items()}

    assert "cpu" in reads_of(make(Moved), monkeypatch)


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
def test_the_batch_stays_where_it_is(kind):
    """Even where DDP and FSDP move the tensors among a step's arguments."""
    device, batch = torch.device("meta"), next(iter(loader()))
    left = make(kind).transfer_batch_to_device(batch, device, 0)
    (arguments,), _ = _to_kwargs((left, 0), {}, device, False)
    assert {value.device.type for value in arguments[0].values()} == {"cpu"}
    assert all(arguments[0][name] is value for name, value in batch.items())
    assert extract_batch_size(pickle.loads(pickle.dumps(left))) == extract_batch_size(batch)
