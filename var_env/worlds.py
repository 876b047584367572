"""The rendered worlds by name, each with what a base policy of it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from var_env.faults import Faults
from var_env.room import ROOM_SCHEDULE, Room, RoomFaults
from var_env.scenes import World
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.residual import DEFAULT_SCHEDULE


@dataclass(frozen=True)
class NamedWorld:
    """A world and what belongs to it.

    Attributes:
        world: draws its scenes.
        schedule: the grids of its tokenizer.
        faults: the class of its tables of planted faults.
        tokenizer: the shipped tokenizer's file in ``var_env/assets``.
        policy: the name of the shipped base policy, see ``agents.policies``.
        weigh_cells: whether a tokenizer's loss is weighted on the glyphs' cells, and not on their ink alone.
    """

    world: type[World]
    schedule: ScaleSchedule
    faults: type[Faults]
    tokenizer: str
    policy: str
    weigh_cells: bool = False


SMALL = "small"
WORLDS = {
    SMALL: NamedWorld(World, DEFAULT_SCHEDULE, Faults, "tokenizer.safetensors", "base"),
    "room": NamedWorld(Room, ROOM_SCHEDULE, RoomFaults, "room_tokenizer.safetensors", "room", weigh_cells=True),
}


def named_world(name: str) -> NamedWorld:
    """The entry of `WORLDS`. ``ValueError``: there is none of this name."""
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}: choose one of {', '.join(WORLDS)}")
    return WORLDS[name]


def make_world(
    name: str,
    split: str = "train",
    regions: Mapping[Any, float] | str | None = None,
    size: int | None = None,
) -> World:
    """A world by name.

    Args:
        name: one of `WORLDS`.
        split, regions: as in :class:`~var_env.scenes.World`.
        size: the image's height and width in pixels; by default that of its schedule.

    Raises:
        ValueError: an unknown name, or a size, a split or regions that the world cannot have.
    """
    entry = named_world(name)
    side = entry.schedule.canvas[0] * entry.schedule.patch
    return entry.world(size=side if size is None else size, split=split, regions=regions)


def shipped_tokenizer(name: str) -> Path:
    """The file of a world's shipped tokenizer. ``ValueError``: none is shipped."""
    path = Path(str(resources.files("var_env") / "assets" / named_world(name).tokenizer))
    if not path.is_file():
        raise ValueError(
            f"no tokenizer is shipped for the world {name!r}: give the file of one, which "
            f"`vartext pretrain --world {name} tokenizer` makes"
        )
    return path
