"""Checks of options, with one clear line for a bad value."""

from __future__ import annotations

from collections.abc import Iterable


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


def require_groups(part: type, group_size: int) -> None:
    """``ValueError`` for groups that are too small for an agent or a wrapper, by its ``min_group_size``."""
    least = getattr(part, "min_group_size", 1)
    if group_size < least:
        raise ValueError(
            f"{part.__name__} compares the images of a prompt with each other and needs a group_size of at least "
            f"{least}, got {group_size}: alone, an image teaches nothing. Give more, or an agent without groups, ppo"
        )


def require_above(least: float, **options: float | None) -> None:
    """``ValueError`` naming the first option that is neither ``None`` nor above ``least``."""
    for name, value in options.items():
        if value is not None and not value > least:
            raise ValueError(f"{name} must be above {least:g}, got {value}")
