"""Prompts that name a class: for class-conditional policies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ClassNames:
    """The classes by number and, where labels are given, by name.

    Attributes:
        labels: one a class, or ``None``.

    Args:
        count: classes, numbered from 0.
        labels: a name for each class, or a JSON file of them: a list, or a mapping from numbers. A label may hold
            several names with commas between them, as ImageNet's do; each of them will do. Case does not matter.

    Raises:
        ValueError: there is not one label a class.

    Examples:
        >>> names = ClassNames(2, ["tench, Tinca tinca", "golden retriever"])
        >>> [names.number(prompt) for prompt in ("1", "Golden Retriever", "tench", "")]
        [1, 1, 0, 2]
    """

    def __init__(self, count: int, labels: Sequence[str] | str | Path | None = None) -> None:
        if isinstance(labels, str | Path):
            labels = listed(json.loads(Path(labels).read_text(encoding="utf-8")))
        if labels is not None and (len(labels) != count or not all(isinstance(label, str) for label in labels)):
            raise ValueError(f"labels must be {count} names, one a class, got {len(labels)}: {list(labels[:2])}...")
        self.count, self.labels = count, None if labels is None else list(labels)
        parts: dict[str, list[int]] = {}
        whole: dict[str, list[int]] = {}
        for number, label in enumerate(labels or []):
            whole.setdefault(label.strip().lower(), []).append(number)
            for name in label.lower().split(","):
                parts.setdefault(name.strip(), []).append(number)
        self._numbers = parts | whole  # a whole label goes before a part of another

    def number(self, prompt: str) -> int:
        """The class of a prompt, ``count`` for an empty one. ``ValueError`` for the name of no class, or of several."""
        text = prompt.strip().lower()
        if not text:
            return self.count
        found = [int(text)] if text.isdecimal() else self._numbers.get(text, [])
        if len(found) == 1 and found[0] < self.count:
            return found[0]
        if len(found) > 1:
            raise ValueError(f"{prompt!r} names the classes {found}: give one of these numbers")
        names = "or give labels= to use names" if self.labels is None else "or one of the labels"
        raise ValueError(f"{prompt!r} is no class: use a number, 0 to {self.count - 1}, {names}")


def listed(labels: Any) -> list[Any]:
    """What a JSON file holds, in the order of the classes; ``None`` where a mapping leaves one out."""
    return [labels.get(str(number)) for number in range(len(labels))] if isinstance(labels, dict) else labels
