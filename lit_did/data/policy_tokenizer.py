"""Finds the tokenizer that belongs to the policy in training, for a `PreferenceDataModule` without one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def name_of_policy_tokenizer(trainer: Any) -> str:
    """The name or folder of the policy's tokenizer.

    Args:
        trainer: The Trainer, whose LightningModule has the policy. None: there is no Trainer yet.

    Raises:
        ValueError: There is no Trainer, its LightningModule has no policy, or the policy has no name.
    """
    remedy = "Pass `tokenizer`: a tokenizer of transformers, or its name or folder."
    module = getattr(trainer, "lightning_module", None)
    if module is None:
        raise ValueError(
            f"Expected `tokenizer` to be given, because no Trainer has shown yet which policy it runs, but got None. "
            f"{remedy}"
        )
    policy = module.hparams.get("policy")
    if policy is None:
        policy = getattr(module, "policy", None)
    if policy is None:
        raise ValueError(
            f"Expected `tokenizer` to be given, because {type(module).__name__} has no `policy` whose tokenizer could "
            f"be used, but got None. {remedy}"
        )
    name = policy if isinstance(policy, str | os.PathLike) else policy.config.name_or_path
    if not name:
        raise ValueError(
            "Expected `tokenizer` to be given, because `policy` is a model that was loaded from nowhere, so that its "
            f"tokenizer cannot be found, but got None. {remedy}"
        )
    return tokenizer_name(os.fspath(name))


def tokenizer_name(name: str) -> str:
    """The name or folder of a policy's tokenizer: of an adapter's folder without one that of its base model.

    Raises:
        ValueError: The adapter's configuration does not name its base model.
    """
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        file = folder / "adapter_config.json"
        try:
            base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {file} to be JSON with the adapter's `base_model_name_or_path`, but it is not ({error})."
            ) from error
        if not isinstance(base, str):
            raise ValueError(f"Expected `base_model_name_or_path` in {file} to be a model's name, but got {base!r}.")
        return base
    return name
