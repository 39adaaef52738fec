"""Adapters on disk and as references: loading one on its base, keeping a frozen copy of it, saving it alone."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_did.models.names import first_line, local_folder, raised_by_library
from lit_did.models.wrappers import inner, is_peft, unwrapped

ADAPTER = "adapter"
"""The `reference` that is a frozen copy of the policy's adapter. It is never a path."""
REFERENCE_ADAPTER = "lit_did_reference"
"""The name of that copy among the adapters of the policy."""
HAS_ADAPTER = (
    "Expected `lora` to be None for a `policy` that already has an adapter (a PeftModel, or the name of one), but got "
    "a configuration. Leave `lora` out: the policy's own adapter is trained. To train a new adapter on top of it, "
    "merge the old one first (`merge_and_unload`)."
)
_FILE_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""the arguments of `from_pretrained` that find a file of a repository"""


def adapter_folder(name: str, model_kwargs: Mapping[str, Any]) -> str | None:
    """The folder of an adapter. From the hub it is downloaded.

    Args:
        name: A folder, or a name of the hub.
        model_kwargs: Arguments of `from_pretrained`.

    Returns:
        The folder. None: a model has this name.

    Raises:
        FileNotFoundError: The folder holds no weights of the adapter.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    of_file = {key: model_kwargs[key] for key in _FILE_KWARGS if model_kwargs.get(key) is not None}
    file = find_adapter_config_file(name, **of_file)
    if file is None:
        return None
    if not os.path.isdir(name):
        of_file.pop("subfolder", None)
        snapshot_download(name, allow_patterns="*adapter_model.*", **of_file)
    folder = Path(file).parent
    if not any(folder.glob("adapter_model.*")):
        raise FileNotFoundError(f"{folder} holds an adapter_config.json, but no adapter_model.safetensors.")
    return str(folder)


def check_adapter_folder(policy: str | os.PathLike, reference: Any, lora: Any) -> None:
    """Raises ValueError if a folder, which is to be the policy, does not fit `reference="adapter"` or `lora`."""
    folder = local_folder(policy, "policy")
    if folder is None:  # the hub has it
        return
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and lora is not None:
        raise ValueError(HAS_ADAPTER)
    if not is_adapter and lora is None and isinstance(reference, str) and reference == ADAPTER:
        raise ValueError(_no_adapter(str(policy)))


def adapter_config(folder: str, argument: str) -> Any:
    """The configuration of the adapter in a folder, a `peft.PeftConfig` that names its base model.

    Raises:
        ModuleNotFoundError: The package peft is missing.
        ValueError: It does not name its base model, or the folder also holds a model.
    """
    peft = import_peft(f"`{argument}` ({folder}) is an adapter, which")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except Exception as error:
        if not raised_by_library(error):
            raise
        raise ValueError(
            f"Expected `{argument}` to have an adapter_config.json that peft reads, but {folder} does not: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(config.base_model_name_or_path, str) or not config.base_model_name_or_path:
        raise ValueError(
            f"Expected the adapter of `{argument}` to name its base model in adapter_config.json "
            f"(`base_model_name_or_path`), but got "
            f"{config.base_model_name_or_path!r} in {folder}."
        )
    if os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"Expected `{argument}` to be a folder with a model or with an adapter, but {folder} holds both. Move one "
            "of them to a folder of its own."
        )
    return config


def on_base(base: nn.Module | str, folder: str, argument: str) -> nn.Module:
    """The adapter in `folder` on its base model, as a `peft.PeftModel` in eval mode whose adapter trains.

    Args:
        base: The base model. The folder of an adapter is refused.
        folder: The folder of the adapter.
        argument: The name of the argument, for errors.

    Raises:
        ValueError: The adapter does not fit the base model.
    """
    if not isinstance(base, nn.Module):
        raise ValueError(
            f"Expected the base model of `{argument}` ({folder}) to be a model, but got another adapter, {base}. "
            "Merge that one first: peft's `merge_and_unload`, then `save_pretrained`."
        )
    peft = import_peft(f"`{argument}`")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # Weights that the file lacks would start at random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    except Exception as error:  # peft's: other shapes, missing or broken weights, other layers
        if not (isinstance(error, UserWarning) or raised_by_library(error)):
            raise
        raise ValueError(
            f"Expected `{argument}` to be an adapter that fits its base model, but {folder} does not: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def import_peft(what: str) -> Any:
    """The package peft. Raises ModuleNotFoundError, which begins with `what`, if it is not installed."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs the package peft. Run pip install 'lit-did[lora]'.") from error
    return peft


def freeze_start(policy: nn.Module) -> str:
    """Adds a frozen copy of the present adapter of a PeftModel to it, and returns the copy's name.

    Args:
        policy: The model. A copy from an earlier call is replaced.

    Raises:
        ValueError: The policy is no PeftModel, has more than one active adapter, or peft cannot add a second one.
    """
    peft: Any = policy
    active = check_one_adapter(policy)
    if REFERENCE_ADAPTER in peft.peft_config:  # of an earlier training of this model
        peft.delete_adapter(REFERENCE_ADAPTER)
    config = copy.deepcopy(peft.peft_config[active])
    config.inference_mode = True
    # The values are copied. Some ways to start an adapter change the base model, and so does a second replication.
    for name, value in (("init_lora_weights", True), ("layer_replication", None)):
        if hasattr(config, name):
            setattr(config, name, value)
    trains = {name: parameter.requires_grad for name, parameter in _tensors(policy).items()}
    try:
        peft.add_adapter(REFERENCE_ADAPTER, config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f'Expected a `policy` whose adapter can be copied for `reference="{ADAPTER}"`, but peft raised: {error} '
            "Pass a second model as `reference`."
        ) from error
    tensors = _tensors(policy)
    for name, tensor in tensors.items():
        if name in trains:
            tensor.requires_grad_(trains[name])  # peft makes whole adapters trainable
        else:
            source = ".".join(active if part == REFERENCE_ADAPTER else part for part in name.split("."))
            tensor.requires_grad_(False).data = tensors[source].detach().clone()
    return REFERENCE_ADAPTER


def check_one_adapter(policy: nn.Module) -> str:
    """The name of the active adapter. Raises ValueError unless there is exactly one."""
    peft: Any = policy
    if not is_peft(policy):
        raise ValueError(_no_adapter(type(policy).__name__))
    if len(peft.active_adapters) != 1:
        raise ValueError(
            f'Expected `policy` to have one active adapter with `reference="{ADAPTER}"`, but got '
            f"{', '.join(peft.active_adapters)}. Combine them with peft's `add_weighted_adapter`."
        )
    return peft.active_adapters[0]


def _no_adapter(policy: str) -> str:
    return (
        f'Expected `policy` to have an adapter with `reference="{ADAPTER}"`, which keeps a frozen copy of it, but got '
        f"{policy} without one. Pass a PeftModel or an adapter's folder as `policy`, or leave `reference` out. To use "
        f"a model in a folder of this name, write './{ADAPTER}'."
    )


def warn_if_untrained(policy: nn.Module) -> None:
    """Warns if the active LoRA adapter of a PeftModel has no effect yet, so that a copy of it is the base model."""
    active = check_one_adapter(policy)
    tensors = {name: tensor for name, tensor in _tensors(policy).items() if active in name.split(".")}
    last = [tensor for name, tensor in tensors.items() if "lora_B." in name or "lora_embedding_B." in name]
    others = any("modules_to_save." in name or "trainable_tokens_" in name for name in tensors)
    if not last or others or any(tensor.is_meta or bool(tensor.any()) for tensor in last):
        return
    warnings.warn(
        f'`reference="{ADAPTER}"` keeps a frozen copy of an adapter that was not trained yet: its `lora_B` weights are '
        "0. So the reference is the base model without an adapter. If the policy should start from a trained (SFT) "
        "adapter, pass that adapter's folder as `policy`, without `lora`. If it should start from the base model, "
        "leave `reference` out, which gives the same results.",
        stacklevel=2,
    )


def save_policy(policy: nn.Module, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
    """Saves a policy so that `from_pretrained` opens the folder: the whole model, or the active adapter alone.

    A PeftModel's own `save_pretrained` also writes its other adapters, such as the frozen copy that is the reference,
    and puts an adapter that is not named "default" into a subfolder.

    Args:
        policy: The model, perhaps compiled or wrapped for DDP.
        folder: The folder. It is made if it does not exist.
        state: Whole tensors by their names in the policy's `state_dict`, to be saved instead of its own.
    """
    model: Any = unwrapped(policy)
    state = None if state is None else dict(state)
    if not is_peft(model):
        (model if state is None else _unsharded(model)).save_pretrained(folder, state_dict=state)
        return
    active = model.active_adapter
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(
            str(folder),
            selected_adapters=[active],
            state_dict=state,
            save_embedding_layers="auto" if _is_resized(model) else False,
        )
    inside = Path(folder, active)
    if active != "default":
        for file in inside.iterdir():
            file.replace(Path(folder, file.name))
        inside.rmdir()


def _unsharded(model: Any) -> Any:
    """A model without weights, if transformers has sharded this one: it would gather on all processes what is whole."""
    if getattr(model.config, "distributed_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    with torch.device("meta"):
        whole = type(model)(config)
    whole.generation_config = model.generation_config
    whole._weight_conversions = getattr(model, "_weight_conversions", None)
    return whole


def _is_resized(policy: Any) -> bool:
    """Whether the base model's vocabulary is another one than on disk, so that its embeddings belong to the adapter.

    peft would ask the hub, which takes most of a minute if it cannot be reached.
    """
    from transformers import AutoConfig

    base = inner(policy)
    try:
        saved = AutoConfig.from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError):  # there is none on this machine
        return False
    return getattr(saved, "vocab_size", None) != getattr(base.config, "vocab_size", None)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return dict(chain(*named))
