"""Trains on a device that this machine need not have, and counts what would make the host wait for it.

python -m tests.modules.host_waits

Prints JSON: for each case and batch, the operators that wait, with the places that call them.

A program of its own, because PyTorch prepares its backward threads for the devices that it knows at first. Tensors on
the device compute on the CPU, so values are right, and what reads them is found as on a GPU.
"""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lit_did import LitDPO, LitDPOPG
from lit_did.batches import moving
from lit_did.models import trial, varlen
from lit_did.models.flex import FLEX
from lit_did.modules import optimizer
from lit_did.ops import extension
from tests.models import flash, flex
from tests.modules.steps import loader
from tests.modules.tiny import tiny_llama

DEVICE = torch.device("privateuseone", 0)  # the one that PyTorch leaves to others
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_pin_memory",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
}


class Reads(LitDPO):
    """What a step must not do."""

    def training_objective(self, pairs, whole):
        assert bool(pairs.loss.isfinite().all())
        return super().training_objective(pairs, whole)


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 2, "target_modules": "all-linear"}},
    "other terms": {"nll_weight": 0.2, "token_did_entropy_weight": 0.1},
    "projected": {"class": LitDPOPG},
    "cached": {"cache_reference": True},
    "checkpointed": {"gradient_checkpointing": True},
    "elementwise recomputed": {"recompute_elementwise": True},
    "flex attention": {"kernel": FLEX},
    "one segment at a time": {"kernel": None},
    "reads": {"class": Reads},
}


ONLY_HOW = ("gradient_checkpointing", "recompute_elementwise", "kernel")  # what changes no result


class OnDevice(Tensor):
    """A tensor on the device, whose values are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, **options, device=DEVICE)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes tensors on the device, and lists the operators that make the host wait for it."""

    waits: ClassVar[list[str]] = []
    fused_steps: ClassVar[int] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operator where its tensors are, or where it makes new ones."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = any(isinstance(tensor, OnDevice) for tensor in given)
    target = kwargs.get("device")
    goes = there if target is None else torch.device(target).type == DEVICE.type
    if not (there or goes):
        return func(*args, **kwargs)
    Device.fused_steps += func._schema.name == "aten::_fused_adamw_"
    if waits(func, args, kwargs, goes):
        Device.waits.append(f"{func.__name__} in {caller()}")
    plain, options = tree_map(lambda value: value.held if isinstance(value, OnDevice) else value, (args, kwargs))
    if func is torch.ops.aten.copy_.default and not isinstance(args[0], OnDevice):
        return func(*plain, **options)
    if func is torch.ops.aten._to_copy.default:
        result = plain[0].to(options.get("dtype") or plain[0].dtype, copy=True)
    else:
        result = func(*plain, **(options if target is None else {**options, "device": torch.device("cpu")}))
    if not goes:
        return result
    wrapped = tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def waits(func: Any, args: tuple, kwargs: dict, goes: bool) -> bool:
    """Whether PyTorch's implementation for CUDA waits for the device."""
    name = func._schema.name.removeprefix("aten::")
    if name == "_to_copy":  # between devices, it returns when the copy is made
        return isinstance(args[0], OnDevice) != goes and not (goes and kwargs.get("non_blocking"))
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and blocking
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # masks, and indices that are copied there
        places = [index for index in args[1] if index is not None]
        return any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, OnDevice) for i in places)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITING


def caller() -> str:
    """The place outside PyTorch that called the operator."""
    own = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = next((f for f in reversed(own) if f.filename != __file__), own[0])
    return "/".join(Path(frame.filename).parts[-3:]) + f":{frame.name}"


class Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class Steps(lightning.Callback):
    """What waited from the beginning of one batch to that of the next, with what Lightning does between them."""

    def __init__(self) -> None:
        self.of_batches: list[list[str]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.of_batches.append([])
        Device.waits = self.of_batches[-1]

    def on_train_epoch_end(self, trainer, module):
        Device.waits = []


def fit(case: dict[str, Any], device: torch.device, folder: str) -> tuple[list[list[str]], float]:
    """What waited in each batch, and the last loss."""
    case = dict(case)
    kernel = case.pop("kernel", next(iter(varlen.kernels(device)), None))
    if "cache_reference" in case:
        case["cache_reference"] = f"{folder}/{device.type}"
    kind = case.pop("class", LitDPO)
    reference = None if "lora" in case else tiny_llama(1)
    module = kind(tiny_llama(0), reference, micro_batch_tokens=70, learning_rate=1e-2, **case)
    for model in (module.policy, module.reference):
        if model is not None:
            trial.assume_right(model)  # a trial, which is before the first step, reads values
            known = trial._known[model]
            known.found = [found._replace(kernel=kernel) for found in known.found]
    module._noise_checked = module._start_checked = True
    steps = Steps()
    trainer = lightning.Trainer(
        strategy=SingleDeviceStrategy(device, accelerator=Accelerator()),
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[steps],
    )
    torch.manual_seed(0)
    with Device():
        trainer.fit(module, loader(count=32, batch_size=4, packed=True))
    return steps.of_batches, float(trainer.callback_metrics["train/loss"])


def main() -> None:
    _setup_privateuseone_for_python_backend("imitated")  # for this process and for good, so not while it is imported
    torch.imitated.get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpointing asks, without autocast too
    warnings.simplefilter("ignore")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its values on the CPU, and copies them
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else they would keep the class of a CPU's
    moving.ASYNCHRONOUS = varlen.DEVICES = (DEVICE.type,)  # it has flash attention, and takes float32
    varlen.HALF = (torch.float32,)
    flex.replaced_by(flex.dense).start()
    optimizer.FUSED = ("cpu", DEVICE.type)
    extension.fused_devices = lambda: ("cpu", DEVICE.type)
    results: dict[str, dict[str, Any]] = {}
    expected: dict[str, float] = {}  # by what changes results
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            flash.calls.clear()
            flex.calls.clear()
            Device.fused_steps = 0
            waits, loss = fit(case, DEVICE, folder)
            results[name] = {"waits": waits, "calls": len(flash.calls + flex.calls), "fused_steps": Device.fused_steps}
            same = repr({key: value for key, value in case.items() if key not in ONLY_HOW})
            if same not in expected:
                expected[same] = fit(case, torch.device("cpu"), folder)[1]
            results[name]["loss"] = [loss, expected[same]]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
