"""UnfinishedFile: a file that appears when it is whole. What a killed process leaves of one is removed later."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing that may be in use is removed
    fcntl = None

_PREFIX = ".unfinished_"


class UnfinishedFile:
    """A file in a folder `.unfinished_*` beside its target, which `finish` moves into place and `close` removes.

    It is locked while it is open. The kernel releases the lock when the process dies, so `remove_unfinished` can tell
    a live writer's folder from one that was left behind.

    Args:
        target: The path of the finished file. Its folder exists.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        linked = False
        while not linked:  # between two of these lines another process may take the folder for one left behind
            self._folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=_PREFIX, ignore_cleanup_errors=True)
            with suppress(FileNotFoundError):
                self.stream = open(Path(self._folder.name) / target.name, "wb")  # noqa: SIM115
                with suppress(OSError):  # a file system without locks
                    _lock(self.stream.fileno(), wait=True)
                linked = os.fstat(self.stream.fileno()).st_nlink > 0

    def finish(self) -> None:
        """Moves the file to its target."""
        self.stream.close()
        os.replace(self.stream.name, self._target)

    def close(self) -> None:
        """Removes what is not finished."""
        with suppress(OSError):  # what is still buffered may not fit on a full disk
            self.stream.close()
        self._folder.cleanup()


def remove_unfinished(path: str | os.PathLike) -> None:
    """Removes from the folder `path` the unfinished files that no process has open."""
    for folder in Path(path).glob(f"{_PREFIX}*"):
        with ExitStack() as opened, suppress(OSError):  # in use, of another owner, gone, or on a system without locks
            for file in folder.iterdir():
                _lock(opened.enter_context(open(file, "ab")).fileno(), wait=False)
            shutil.rmtree(folder)


def _lock(descriptor: int, *, wait: bool) -> None:
    """Raises OSError where another process has the lock, or none can be had."""
    if fcntl is None:
        raise OSError("this system has no flock")
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
