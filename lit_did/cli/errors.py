"""What a user can mend ends a command in one line, without a traceback."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

PACKAGE = Path(__file__).parents[1]


class InputError(Exception):
    """The user's input cannot be used. Commands print the message without a traceback."""


class Arguments(argparse.ArgumentParser):
    """A parser that ends with one line on stderr and exit status 2 after a wrong option, and knows no abbreviations."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Prints the message with the nearest option, and exits."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            name = match[1].partition("=")[0]
            near = get_close_matches(name, self._option_string_actions, n=1)
            message = (
                f"Expected an option of this command, but got {name}.{f' Did you mean {near[0]}?' if near else ''}"
            )
        self.exit(2, f"error: {' '.join(message.split())}\n")


def run_command(command: Callable[[], int], stopped: str = "Stopped.") -> int:
    """Runs a command and prints what a user can mend as one line on stderr.

    With the environment variable LIT_DID_TRACEBACK=1, errors keep their traceback.

    Args:
        command: The command, which returns its exit status.
        stopped: What to print after an interrupt, followed by the exception's notes.

    Returns:
        The command's exit status, 2 after such an error, or 130 after an interrupt.
    """
    try:
        return command()
    except Exception as error:
        if os.environ.get("LIT_DID_TRACEBACK", "0") != "0" or not can_be_mended(error):
            raise
        text = " ".join([_out_of_memory(error) or str(error), *getattr(error, "__notes__", ())])
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        if not is_interrupt(stop):
            raise
        print(" ".join([stopped, *getattr(stop, "__notes__", ())]), file=sys.stderr)
        return 130


def is_interrupt(stop: BaseException) -> bool:
    """Whether it is Ctrl-C, which Lightning turns into a SystemExit."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def can_be_mended(error: Exception) -> bool:
    """Whether the error is about input, and not a fault of the program.

    These are all `InputError`s, files and hubs that cannot be read, losses that diverge, packages that are missing,
    memory that is full, and what this package raises on purpose: such messages say what was expected.
    """
    if isinstance(error, InputError | OSError | FloatingPointError | ModuleNotFoundError) or _out_of_memory(error):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    ours = traceback is not None and PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents
    return ours and "Expected " in str(error)


def _out_of_memory(error: Exception) -> str | None:
    """What to do about memory that is full. None: the error is another one."""
    # Only the GPU's error has a type of its own. These are the CPU's and those of libraries.
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    full = isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    if not full and not isinstance(error, MemoryError):
        return None
    return (
        "Out of memory. Make the batch size or the longest sequence smaller, or use a smaller number format or another "
        f"device. {(str(error).strip().splitlines() or [''])[0]}"
    )
