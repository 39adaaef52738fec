"""QLoRA: base models whose layers bitsandbytes quantises, and the adapters that are trained on them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_did.models.wrappers import inner, is_peft, unwrapped

_MARKS = ("load_in_", "bnb_4bit_", "llm_int8_")  # keys of bitsandbytes begin with one of these


def quantised(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` whose `quantization_config`, if it is a dict of bitsandbytes, is made an object.

    Raises:
        ModuleNotFoundError: The package bitsandbytes is missing.
        TypeError: It is no configuration.
        ValueError: A key of the dict is unknown, or a value is wrong, or it is for 8 bits.
    """
    config = model_kwargs.get("quantization_config")
    if isinstance(config, Mapping) and _is_of_bitsandbytes(config):
        config = _config(config)
    elif config is not None and not (isinstance(config, Mapping) or hasattr(config, "quant_method")):
        raise TypeError(f"Expected `quantization_config` to be a configuration or its arguments, but got {config!r}.")
    elif type(config).__name__ != "BitsAndBytesConfig":
        return dict(model_kwargs)
    check_not_8bit(config)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "`quantization_config` needs the package bitsandbytes. Run pip install 'lit-did[qlora]'."
        ) from error
    return {**model_kwargs, "quantization_config": config}


def plain_config(model_kwargs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Arguments of `from_pretrained` that a checkpoint can hold: a `BitsAndBytesConfig` is made a dict."""
    config: Any = None if model_kwargs is None else model_kwargs.get("quantization_config")
    if type(config).__name__ != "BitsAndBytesConfig":
        return model_kwargs
    values = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    return {**(model_kwargs or {}), "quantization_config": values}


def check_not_8bit(config: Any) -> None:
    """Raises ValueError for a `BitsAndBytesConfig` of 8 bits. Other configurations pass."""
    if getattr(config, "load_in_8bit", False):
        raise ValueError(
            "Expected a `quantization_config` with `load_in_4bit`, but got `load_in_8bit`. In 8 bits, other tokens of "
            "a batch decide which features bitsandbytes keeps in half precision, so they change a completion's "
            "log-probability."
        )


def keep_gradients(model: nn.Module) -> None:
    """Keeps the 4-bit layers of a model on the CPU differentiable.

    On some CPUs, bitsandbytes rearranges the weights of a layer that runs in eval mode, for a faster kernel in
    bfloat16. That kernel has no gradient, and the layer keeps it in training mode. Such a policy would train wrong, and
    its reference would be compared in another precision.
    """
    layer: Any
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()  # rearranges the weights back


def computes_in_half(model: nn.Module) -> bool:
    """Whether some layers of a model compute in half precision, although its other weights may be float32."""
    return any(getattr(layer, "compute_dtype", None) in (torch.bfloat16, torch.float16) for layer in model.modules())


def check_has_adapter(policy: nn.Module) -> None:
    """Raises ValueError if the policy is quantised and has no adapter. Its quantised weights cannot be trained."""
    model: Any = inner(policy)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    trains = quantizer is None or getattr(quantizer, "is_qat_trainable", False)
    if getattr(model, "is_quantized", False) and not trains and not is_peft(unwrapped(policy)):
        raise ValueError(
            "Expected a quantised `policy` to have an adapter, because its quantised weights cannot be trained, but "
            'got none. Pass `lora`, such as {"target_modules": "all-linear"}, or leave out `quantization_config`.'
        )


def _is_of_bitsandbytes(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "bitsandbytes" or any(str(key).startswith(_MARKS) for key in config)


def _config(values: Mapping[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    given = {key: value for key, value in values.items() if key != "quant_method"}
    for key in given.keys() - known:
        near = difflib.get_close_matches(key, known, 1)
        raise ValueError(
            "Expected `quantization_config` to hold arguments of transformers.BitsAndBytesConfig, but got "
            f"{key!r}.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
    try:
        config = BitsAndBytesConfig(**given)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "Expected `quantization_config` to hold arguments of transformers.BitsAndBytesConfig, but got "
            f"{given}: {error}"
        ) from error
    if not config.is_quantizable():
        raise ValueError(
            f"Expected `quantization_config` to set `load_in_4bit` to true, but got {given}, which quantises nothing."
        )
    return config
