"""Earlier names of what stands in ``agents/restorable.py`` and ``agents/saving/``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agents.restorable import load, rebuild
from agents.saving import zip as zipped
from agents.saving.saved import Saved

if TYPE_CHECKING:
    from agents.base import Agent


def write(agent: Agent, path: str | Path | BinaryIO, left_out: Collection[str]) -> None:
    """See `zip.write`."""
    zipped.write(agent.parts(left_out), path)


__all__ = ["Saved", "load", "rebuild", "write"]
