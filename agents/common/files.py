"""Files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives another path, of a file or a folder to write, which then takes the place of ``path``.

    Nobody ever reads half of it: it is on the disk before it gets its name, and after an error nothing of it is left
    and the old one is as it was. A folder takes no folder's place: ``path`` must be free then.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")  # writers of one file do not meet
    try:
        yield part
        for file in sorted(part.rglob("*")) if part.is_dir() else []:
            sync(file)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
