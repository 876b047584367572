"""The checkpoints of a run, from which it goes on exactly as if it had never stopped.

A checkpoint is a folder, ``checkpoint-00000040`` after 40 updates; ``agents/saving/folder.py`` tells what is in it.

It is written under another name, waits until the disk has it, and is renamed. So the newest one is whole, unless the
disk itself lost something; then the one before it is used. Loading runs no code that a file names: classes are those
that are known already. The prompts to come are a function of the seed and a counter, and so need no file.

Callbacks have no state here. `HeldOutEval` evaluates again where the run goes on, with the same result.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from agents import restorable
from agents.base import Agent
from agents.common.files import replacing
from agents.common.processes import current
from agents.recipes import known
from agents.restorable import rebuild
from agents.saving import folder as folders
from agents.wrapper import Wrapper

NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints of one run, of which the newest are kept. One process at a time writes them.

    Args:
        folder: holds them, and is made when the first one is saved.
        keep: so many stay, at least 1. With 2, there is one left when the newest turns out to be damaged.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a whole number of at least 1, got {keep!r}")
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """The folders of the checkpoints, the newest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=updates_of, reverse=True)

    def save(self, agent: Agent | Wrapper) -> Path:
        """Write a checkpoint, and remove those that are too old.

        Raises:
            OSError: it could not be written; the earlier ones are as they were.
            TypeError: a setting of the agent cannot be stored; see ``agents/saving/stored.py``.
        """
        path, processes = self.folder / f"checkpoint-{agent.n_updates:08}", agent.unwrapped.processes
        if processes.is_first or processes.shards:
            saved = agent.parts()
        if processes.is_first:
            with replacing(path) as part:
                folders.write(saved, part)
                if path.exists():  # of the same update, as after going on from it
                    path.rename(self.folder / f"replaced-{path.name}")  # until the new one has its place
            for old in [*self.paths()[self.keep :], *self.folder.glob("replaced-*")]:
                shutil.rmtree(old, ignore_errors=True)
        elif processes.shards:
            saved.gather()
        processes.barrier()
        return path

    def newest(self) -> Path:
        """The newest checkpoint that is whole. A damaged one is warned of and set aside.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: all of them are damaged.
        """
        self.tidy()
        paths = self.paths()
        if not paths:
            raise FileNotFoundError(f"there is no checkpoint in {self.folder}: begin a new run (leave out --resume)")
        for path in paths:
            try:
                folders.verify(path)
                return path
            except ValueError as error:
                aside = path.with_name(f"damaged-{path.name}")
                warnings.warn(f"{error}; set aside as {aside.name}, the one before it is used", stacklevel=3)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        raise ValueError(f"all checkpoints in {self.folder} are damaged: start again, or go on from an agent's zip")

    def tidy(self) -> None:
        """Finish, or take back, what a process that was killed left unfinished."""
        for part in self.folder.glob(".*-checkpoint-*"):
            shutil.rmtree(part, ignore_errors=True)
        for old in self.folder.glob("replaced-checkpoint-*"):
            path = old.with_name(old.name.removeprefix("replaced-"))
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)

    def load(self, env: Any = None, device: torch.device | str = "auto", **replaced: Any) -> Agent | Wrapper:
        """The agent of the `newest` checkpoint, ready to go on; in every process of a run.

        Args:
            env, device, replaced: as in `load`.

        Raises:
            FileNotFoundError, ValueError: as in `newest` and `load`.
        """
        processes = current()
        path = self.newest() if processes.is_first else None
        path = processes.broadcast(path)
        assert path is not None
        return rebuild(folders.read(path, class_named), env, device, replaced)


def updates_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def load(
    path: str | Path | BinaryIO,
    env: Any = None,
    device: torch.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
    **replaced: Any,
) -> Any:
    """The agent that was saved, whatever its class, in its wrappers if it had any; from a zip or from a checkpoint.

    Args:
        path: the zip, an open one too, or the checkpoint's folder.
        env: what to learn on; an id, a single environment or a batched one, or a function that makes it for the agent.
        device: as in Stable-Baselines3.
        custom_objects: as in Stable-Baselines3, for a zip.
        replaced: settings to change, of the agent or of a wrapper, such as ``learning_rate=1e-5``. The run is then
            another one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no agent wrote it, or its agent's class is not known here; or a setting to change
            does not exist.
    """
    if isinstance(path, str | Path) and Path(path).is_dir():
        return load_folder(path, env, device, **replaced)
    return restorable.load(path, env, device, custom_objects, **replaced)


def load_folder(
    path: str | Path, env: Any = None, device: torch.device | str = "auto", **replaced: Any
) -> Agent | Wrapper:
    """The agent of one checkpoint. ``agent.learn(agent.steps_left, ..., reset_num_timesteps=False)`` then goes on.

    The global generators of torch, numpy and Python are set back, too. ``Args`` and ``Raises`` as in `load`.
    """
    folders.verify(path)
    return rebuild(folders.read(Path(path), class_named), env, device, replaced)


def class_named(name: str) -> type:
    """An agent's or a wrapper's class, among those that are known by now.

    Raises:
        ValueError: there is none of that name.
    """
    known()  # those of this package
    waiting: list[type] = [Agent, Wrapper]
    while waiting:
        cls = waiting.pop()
        if cls.__name__ == name:
            return cls
        waiting += cls.__subclasses__()
    raise ValueError(
        f"no agent or wrapper {name} is known here: import the module that defines it (--plugin FILE does)"
    )
