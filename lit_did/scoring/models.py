"""The models of a measurement: a policy and perhaps its reference, by name or in memory, and the policy's tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lit_did.data.policy_tokenizer import tokenizer_name
from lit_did.models.adapters import ADAPTER
from lit_did.models.names import first_line, local_folder
from lit_did.models.wrappers import is_peft, unwrapped

Model = str | os.PathLike | nn.Module
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
"""number formats of models that commands load"""


def check_models(policy: Model | None, reference: Model | None, *, needs_reference: bool = True) -> None:
    """Finds out what is wrong with the two before anything is loaded.

    Args:
        policy: As for `load_models`. None: there is only the reference.
        reference: As for `load_models`.
        needs_reference: Whether a policy without an adapter needs a reference.

    Raises:
        FileNotFoundError: One is a path where no model is.
        ValueError: There is no reference, and the policy has no adapter.
    """
    if reference == ADAPTER:
        raise ValueError(
            "Expected `reference` to be a model, but got 'adapter', which is for training. If training began with an "
            "adapter, pass its folder. A folder with the name adapter is written './adapter'."
        )
    folders = {}
    for argument, model in (("policy", policy), ("reference", reference)):
        if isinstance(model, str | os.PathLike):
            folders[argument] = local_folder(model, argument)
    if reference is None and needs_reference and policy is not None:
        folder = folders.get("policy")
        if isinstance(policy, nn.Module):
            check_adapter(is_peft(unwrapped(policy)))
        elif folder is not None:
            check_adapter((folder / "adapter_config.json").is_file())


def check_adapter(has_adapter: bool) -> None:
    """Raises ValueError for a policy without an adapter, whose reference cannot be its base."""
    if not has_adapter:
        raise ValueError(
            "Expected `reference` for a policy without an adapter, but got None. Pass the model that the policy was "
            "trained from."
        )


def load_models(
    policy: Model,
    reference: Model | None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, nn.Module | None]:
    """A policy and its reference, to measure them. Models that are given stay as and where they are.

    Args:
        policy: A causal language model of transformers, or its name or path.
        reference: The same. None: there is none.
        dtype: Of models that are given by name. None: float32.
        device: Of models that are given by name. None: the GPU if there is one, else the CPU.
        model_kwargs: Arguments of `from_pretrained` for models that are given by name.

    Raises:
        ValueError: The two models have different vocabularies.
    """
    from lit_did.models.loading import check_same_vocabulary

    options: dict[str, Any] = {"dtype": dtype, "device": device, "model_kwargs": model_kwargs}
    first = load_placed(policy, "policy", **options)
    if reference is None:
        return first, None
    second = load_placed(reference, "reference", **options)
    check_same_vocabulary(first, second)
    return first, second


def load_placed(
    model: Model,
    argument: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """One model, as `load_models` describes them. Errors call it `argument`."""
    from lit_did.models.loading import load_model  # half a second, which checks of arguments do not need

    loaded = load_model(model, argument, {**({} if dtype is None else {"dtype": dtype}), **(model_kwargs or {})})
    return loaded if isinstance(model, nn.Module) else loaded.to(device_of(device)).eval()


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that models are moved to. None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # differs between devices
        raise ValueError(
            f"Expected `device` to be a device of this machine, such as 'cpu', but got {str(device)!r}: "
            f"{first_line(error)}"
        ) from error


def tokenizer_of(policy: Model) -> str:
    """The name or path of a policy's tokenizer.

    Raises:
        ValueError: The policy is a model that was not loaded by name.
    """
    name: Any = policy
    if isinstance(policy, nn.Module):
        name = getattr(policy, "name_or_path", "") or getattr(getattr(policy, "config", None), "name_or_path", "")
        if not name:
            raise ValueError("Expected `tokenizer` for a policy that was not loaded by name, but got None.")
    return tokenizer_name(os.fspath(name))
