"""Seeds: the same ones wherever one is given."""

from __future__ import annotations

import operator
from typing import Any

LIMIT = 2**64  # torch's generators take no larger ones


def as_seed(seed: Any, name: str = "seed") -> int:
    """A seed as Python's integer, numpy's integers included.

    Args:
        seed: a whole number from 0 to ``2**64 - 1``.
        name: what to call it in errors.

    Raises:
        ValueError: another value.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < LIMIT:
        raise ValueError(f"{name} must be a whole number from 0 to 2**64 - 1, got {seed!r}")
    return number
