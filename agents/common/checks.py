"""Checks of options, with one clear line for a bad value."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any


def require_choice(choices: Iterable[str], **options: str) -> None:
    """``ValueError`` naming the first option that is none of the choices."""
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


def require_at_least(least: int, **options: int) -> None:
    """``ValueError`` naming the first option that is no whole number of at least ``least``."""
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def require_not_negative(**options: float) -> None:
    """``ValueError`` naming the first option that is not a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def require_seed(seed: Any, bits: int = 64) -> None:
    """``ValueError`` unless the seed is ``None`` or a whole number, Python's or numpy's, of so many bits."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if seed is not None and not (whole and 0 <= seed < 2**bits):
        raise ValueError(f"seed must be a whole number of 0 to 2**{bits} - 1, got {seed!r}")
