"""Files that a command writes, as a whole or not at all, checked before its work begins; and tables."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.common.files import replacing

FORMAT = 1  # of results.json; another number when what reads it has to change


def require_folder(path: Path, option: str = "--out") -> None:
    """Check that a folder can be written, now and not after hours of work. Nothing is made.

    Args:
        path: of the folder, which may be missing.
        option: that names it, for the message.

    Raises:
        ValueError: something else has its name, or its parents', or it cannot be written.
    """
    there = path
    while not os.path.lexists(there):
        there = there.parent
    if not os.path.isdir(there):
        raise ValueError(f"{option} {path}: {there} is no folder, choose another one")
    try:
        tempfile.TemporaryFile(dir=there).close()  # the permissions alone do not tell, least of all to root
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot write in {there} ({error.strerror or error})") from None


def require_file(path: Path | None, option: str, suffix: str = "") -> None:
    """Check that a file can be written, as `require_folder` does.

    Args:
        path: of the file, whose folder may be missing; ``None`` when it is not asked for.
        option: that names it, for the message.
        suffix: which its name must have, such as ".png"; any by default.

    Raises:
        ValueError: its name has another suffix or is a folder's, or its folder cannot be written.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{option} {path}: the name must end with {suffix}, such as {path.stem or 'out'}{suffix}")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path}: this is a folder, give the name of a file in it")
    require_folder(path.parent, option)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, or leave the old one."""
    with replacing(path) as part:
        part.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole, or leave the old one."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_results(out: Path, text: Sequence[str], **content: Any) -> None:
    """Write ``results.json`` and then ``results.md``, which every results folder has.

    Args:
        out: the folder.
        text: the paragraphs of results.md.
        content: of results.json, among them ``settings``, ``base`` and ``runs``.
    """
    write_json(out / "results.json", {"format": FORMAT, **content})
    write_text(out / "results.md", "\n\n".join(text) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
