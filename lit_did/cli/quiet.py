"""Keeps the libraries' own progress bars and hints off a command's screen. This package's warnings stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quieten() -> None:
    """Silences what transformers, tokenizers, the hub's client, Lightning and jsonargparse say by themselves.

    Call it before they are imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI calls what is deprecated
    if "transformers" in sys.modules:  # it has read these variables
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of source
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addFilter(_warnings_only)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package for speed wherever peft is imported


def _warnings_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
