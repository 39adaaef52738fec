"""Loads a policy and its reference, adds LoRA, freezes, and checks that the two fit together."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lit_did.models import varlen
from lit_did.models.adapters import (
    ADAPTER,
    HAS_ADAPTER,
    adapter_config,
    adapter_folder,
    check_adapter_folder,
    check_one_adapter,
    import_peft,
    on_base,
)
from lit_did.models.names import first_line, load_by_name, raised_by_library
from lit_did.models.quantisation import check_not_8bit, keep_gradients, quantised
from lit_did.models.sharding import is_sharded
from lit_did.models.wrappers import adapter_marks, is_peft


def load_model(model: str | os.PathLike | nn.Module, argument: str, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """Loads a causal language model of transformers in float32.

    In bfloat16 weights, AdamW's steps with a learning rate of 1e-6 are lost in rounding. For mixed precision, use the
    Trainer's `precision`.

    Args:
        model: "smollm2", a folder or a name of the hub. The name of an adapter loads it on its base model, as a
            `peft.PeftModel` whose adapter trains. A module is returned unchanged.
        argument: The name of the argument, for errors.
        model_kwargs: Arguments of `from_pretrained`, which may set another `dtype`, or a `quantization_config` as an
            object or a dict.

    Raises:
        TypeError: `model` is of another type.
        FileNotFoundError: There is no such folder, and the hub has no such model. Or an adapter's base is missing.
        ConnectionError: The hub cannot be reached, and the model is not on this machine.
        ValueError: An adapter does not fit its base model.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"Expected `{argument}` to be a model or its name, but got {type(model).__name__}.")
    from transformers import AutoModelForCausalLM

    def load(name: str, **options: Any) -> nn.Module | str:
        folder = adapter_folder(name, options)
        # transformers looks for an adapter of the same name, and would ask the hub for it.
        where = {key: value for key, value in options.items() if key == "local_files_only"}
        if folder is not None:
            return folder
        loaded = AutoModelForCausalLM.from_pretrained(name, adapter_kwargs=where, **options)
        check_not_8bit(getattr(loaded.config, "quantization_config", None))  # of a folder
        keep_gradients(loaded)
        return loaded

    options = {"dtype": torch.float32, **quantised(_renamed(model_kwargs))}
    found = load_by_name(load, model, argument, **options)
    if isinstance(found, nn.Module):
        return found
    config = adapter_config(found, argument)
    of_base = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    if config.revision is not None:
        of_base["revision"] = config.revision
    base = load_by_name(load, config.base_model_name_or_path, f"base_model_name_or_path` of `{argument}", **of_base)
    return on_base(base, found, argument)


def _renamed(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Renames `torch_dtype` to `dtype`. transformers ignores the older name if both are present.

    Raises:
        ValueError: Both are present with different values, or torch has no such number format.
    """
    renamed = dict(model_kwargs)
    if "torch_dtype" in renamed:
        dtype = renamed.pop("torch_dtype")
        if renamed.setdefault("dtype", dtype) != dtype:
            raise ValueError(
                "Expected `model_kwargs` to hold only one of `dtype` and `torch_dtype`, but got "
                f"{renamed['dtype']} and {dtype}."
            )
    dtype = renamed.get("dtype")
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(
            f"Expected `dtype` of `model_kwargs` to be a number format of torch, such as bfloat16, but got {dtype!r}."
        )
    return renamed


def load_pair(
    policy: str | nn.Module,
    reference: Any,
    lora: Any,
    *,
    model_kwargs: Mapping[str, Any],
    needs_reference: bool,
    reference_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, nn.Module | Literal["adapter"] | None]:
    """A policy, with its adapter, and the reference if one is given, as LitDPO documents them.

    A sharded policy that is given by name cannot be copied, so that its reference is loaded too. A reference by name
    is loaded with `reference_kwargs`, if they are given.
    """
    if not isinstance(policy, nn.Module):
        check_adapter_folder(policy, reference, lora)  # before anything is loaded
    given, policy = policy, load_model(policy, "policy", model_kwargs)
    copied = reference is None and lora is None and needs_reference and not is_peft(policy)
    if copied and is_sharded(policy) and not isinstance(given, nn.Module):
        reference = given
    if reference == ADAPTER:
        if lora is None:
            check_one_adapter(policy)
    elif reference is not None:
        reference = load_model(reference, "reference", reference_kwargs or model_kwargs)
        check_separate(policy, reference)  # before peft changes the policy in place
        check_same_vocabulary(policy, reference)
    return policy if lora is None else add_lora(policy, lora), reference


def load_reference(reference: str | os.PathLike | nn.Module, policy: nn.Module) -> nn.Module:
    """A reference for measurements beside `policy`.

    Args:
        reference: A module, which is returned unchanged, or the name or path of a model, which is loaded and frozen.
        policy: The policy, whose dtype the loaded model gets.

    Raises:
        TypeError: `reference` is of another type.
    """
    if isinstance(reference, nn.Module):
        return reference
    dtype = next(parameter.dtype for parameter in policy.parameters() if parameter.is_floating_point())
    return freeze(load_model(reference, "reference", {"dtype": dtype}))


def add_lora(model: nn.Module, lora: Any, adapter_name: str = "default") -> nn.Module:
    """Adds a LoRA adapter to `model`, in place, and returns it as a PeftModel.

    Args:
        model: A model without an adapter.
        lora: A `peft.LoraConfig`, or its arguments as a dict.
        adapter_name: The adapter's name.

    Raises:
        TypeError: A key of the dict is not an argument of `peft.LoraConfig`.
        ValueError: `model` is a PeftModel, or the adapter does not fit it.
    """
    if is_peft(model):
        raise ValueError(HAS_ADAPTER)
    peft = import_peft("`lora`")
    given, lora = lora, lora_config(lora)
    with warnings.catch_warnings():  # peft uses a deprecated name of transformers
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        try:
            return peft.get_peft_model(model, lora, adapter_name=adapter_name)
        except ValueError as error:  # such as target modules that the model does not have
            raise ValueError(f"Expected `lora` to fit the policy, but: {error}") from error
        except Exception as error:  # peft checks few of the values
            if not raised_by_library(error):
                raise
            raise ValueError(_refused(given, error)) from error


def lora_config(lora: Any) -> Any:
    """A `peft.LoraConfig` from its arguments as a dict. Another object is returned unchanged.

    Raises:
        TypeError: A key of the dict is not an argument of `peft.LoraConfig`.
        ValueError: peft refuses a value.
    """
    if not isinstance(lora, Mapping):
        return lora
    peft = import_peft("`lora`")
    known = {field.name for field in fields(peft.LoraConfig) if field.init}
    for name in lora:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else " The most used are r, lora_alpha and target_modules."
            raise TypeError(f"Expected `lora` to hold arguments of peft.LoraConfig, but got {name!r}.{hint}")
    try:
        return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **lora})
    except Exception as error:
        if not raised_by_library(error):
            raise
        raise ValueError(_refused(lora, error)) from error


def _refused(lora: Any, error: Exception) -> str:
    return f"Expected `lora` to hold values that peft.LoraConfig accepts, but got {lora}: {first_line(error)}"


def check_adapter_is_all_that_trains(policy: nn.Module, adapter: str | None = None) -> None:
    """Raises ValueError unless training leaves a PeftModel unchanged but for its adapters.

    Args:
        policy: The PeftModel.
        adapter: The adapter that is the reference, for the error. None: none.
    """
    marks = adapter_marks(policy)
    outside = [n for n, p in policy.named_parameters() if p.requires_grad and not any(mark in n for mark in marks)]
    if outside:
        raise ValueError(
            "Expected only the adapter of `policy` to be trained, because its reference is the policy with "
            f"{'the adapter switched off' if adapter is None else 'another adapter'}, but {len(outside)} "
            f"other parameters are trained too. The first is {outside[0]}. Freeze them (for LoRA, use bias='none'), or "
            "pass a `reference`."
        )


def check_adapter(adapter: Any, policy: nn.Module | None) -> None:
    """Checks the name of the adapter that is the reference.

    Args:
        adapter: The name.
        policy: The PeftModel. None: the policy is not its own reference.

    Raises:
        TypeError: `adapter` is not a string.
        ValueError: The policy is not its own reference, has no such adapter, or trains this one.
    """
    peft: Any = policy
    if not isinstance(adapter, str):
        raise TypeError(f"Expected `adapter` to be the name of an adapter or None, but got {type(adapter).__name__}.")
    if peft is None:
        raise ValueError(f"Expected `adapter` to be None unless a PeftModel is its own reference, but got {adapter!r}.")
    if adapter not in peft.peft_config:
        names = ", ".join(map(repr, peft.peft_config))
        raise ValueError(f"Expected `adapter` to be one of the adapters of `policy`, {names}, but got {adapter!r}.")
    if adapter in peft.active_adapters:
        raise ValueError(
            f"Expected `adapter` to be another adapter than the active one, but got {adapter!r}, which is active. The "
            "policy would be its own reference, and every log-ratio 0. Activate the adapter in training with "
            "`policy.set_adapter`."
        )


def check_positions_are_kept(policy: nn.Module) -> None:
    """Raises ValueError if the adapter of a PeftModel puts virtual tokens before every sequence."""
    peft: Any = policy
    config = peft.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"Expected `policy` to have an adapter inside its layers, such as LoRA, but got {config.peft_type.value}, "
            "whose virtual tokens shift every position."
        )


def check_separate(policy: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError if the two models share parameters, because training one would change the other."""
    own = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in own for parameter in reference.parameters()):
        raise ValueError(
            "Expected `reference` and `policy` to be separate models, but they share parameters. Load the reference "
            "separately. For a PeftModel, leave `reference` out: peft changes its base model in place, and the "
            "reference is then the policy with its adapter switched off."
        )


def check_same_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError if the two configurations have different vocabulary sizes."""
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (policy, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"Expected `reference` to have the policy's vocabulary, {sizes[0]} entries, but got {sizes[1]}."
        )


def check_can_be_copied(policy: nn.Module, *, adapter: bool = False) -> None:
    """Raises ValueError if the policy is sharded. Copies of sharded modules fail, on some processes or on all.

    Args:
        policy: The policy.
        adapter: Whether only its adapter is copied. Then its base model may be sharded.
    """
    trained = (parameter for parameter in policy.parameters() if parameter.requires_grad)
    if any(isinstance(parameter, DTensor) for parameter in trained) if adapter else is_sharded(policy):
        raise ValueError(
            "Expected `reference` to be given for a `policy` whose parameters are sharded, because such a module "
            "cannot be copied. Pass a second model that was loaded and sharded in the same way."
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients."""
    return freeze(copy.deepcopy(model))


def freeze(model: nn.Module) -> nn.Module:
    """`model` itself, in eval mode without gradients."""
    return model.eval().requires_grad_(False)


def checkpoint_activations(model: nn.Module, keep_products: bool = False) -> None:
    """Recomputes the activations of every layer in the backward pass.

    Args:
        model: A model of transformers, perhaps with an adapter.
        keep_products: Whether to keep the results of matrix products and attention, and to recompute only the rest,
            which is cheap (torch's selective checkpointing).

    Raises:
        ValueError: The model does not support checkpointing.
    """
    # Not reentrant, because that kind needs an input with a gradient, and frozen embeddings have none.
    options: dict[str, Any] = {"use_reentrant": False}
    transformers_model: Any = model
    if keep_products:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _products())
    if hasattr(model, "activation_checkpointing_enable"):
        transformers_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        transformers_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _products() -> list[Any]:
    """Operators that are expensive: matrix products and attention, as far as the installed torch has them."""
    names = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", *(f"_scaled_dot_product_{kind}" for kind in _ATTENTION))
    of_torch = [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]
    return [*of_torch, *varlen.operators()]


_ATTENTION = (
    *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
    "fused_attention_overrideable",
)
