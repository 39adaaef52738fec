"""Digests of the content of files, which are kept so that an unchanged file is not read again."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_YOUNG = 2.0  # seconds in which a file may change twice and keep its times


def file_digest(path: Path, kept: Path) -> str:
    """The digest of a file's content.

    Reading it takes a second or so for each gigabyte. So the digest is kept under the file's path, inode, size and
    times of change. A file that was changed in the last seconds may change again without another time, so its digest
    is not kept.

    Args:
        path: The file.
        kept: The folder in which digests are kept.
    """
    status = path.stat()
    marks = (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = kept / hashlib.blake2b(repr(marks).encode(), digest_size=16).hexdigest()
    if known.exists():
        return known.read_text()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - status.st_ctime > _YOUNG:
        with suppress(OSError):  # a folder that may only be read
            kept.mkdir(parents=True, exist_ok=True)
            unfinished = kept / f".{known.name}.{uuid4().hex}"  # other processes may do the same
            unfinished.write_text(digest)
            unfinished.replace(known)
    return digest
