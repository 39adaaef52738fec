"""What `lit-did fit` and the others refuse before they load anything, and which errors of a run a user can mend."""

from __future__ import annotations

import re
import traceback

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_did.cli.errors import InputError, can_be_mended

COUNTS = {
    "seed_everything": (0, 2**32 - 1),
    "save_every": (1, None),
    "trainer.accumulate_grad_batches": (1, None),
    "trainer.check_val_every_n_epoch": (1, None),
    "trainer.val_check_interval": (1, None),
    "trainer.num_nodes": (1, None),
}
"""the smallest and the largest values that whole numbers can have"""
NAMES = {"seed_everything": "seed"}


def check_counts(config: Namespace) -> None:
    """Raises InputError if a whole number of the configuration is too small or too large."""
    for key, (least, most) in COUNTS.items():
        value = config[key]
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= (most or value):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise InputError(f"Expected `{NAMES.get(key, key)}` to be a whole number, {wanted}, but got {value}.")


def as_input_error(error: Exception, begun: bool) -> Exception | None:
    """An error that is about the user's input, as an error with one line. None: it is a fault of the program.

    Args:
        error: What a run raised.
        begun: Whether its first batch had begun. Before, Lightning, torch and loggers check what they were given.
    """
    if can_be_mended(error):
        return error
    text = str(error)
    if isinstance(error, MisconfigurationException) or "conditioned on metric" in text:  # EarlyStopping's `monitor`
        return InputError(text)
    if begun:
        return None
    if "`val_check_interval`" in text and "number of the training batches" in text:
        interval, batches = re.findall(r"\((\d+)\)", text)
        return InputError(
            f"Expected `trainer.val_check_interval` to be at most the {batches} batches of an epoch, but got "
            f"{interval}. A fraction such as 0.5 is a part of an epoch. To count batches over epochs, add "
            "`--trainer.check_val_every_n_epoch null`."
        )
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    loggers = any("/lightning/pytorch/loggers/" in file for file in files)
    if loggers or isinstance(error, TypeError | ValueError):
        where = "the logger" if loggers else "the run"
        return InputError(
            f"Expected options with which {where} can be set up, but: {text.strip() or type(error).__name__} "
            "(LIT_DID_TRACEBACK=1 shows where.)"
        )
    return None
