"""Files that a command writes, as a whole or not at all, and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.common.files import replacing


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, or leave the old one."""
    with replacing(path) as part:
        part.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole, or leave the old one."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
