"""Checkpoints from which a run goes on exactly as if it had never stopped.

A checkpoint is a folder, ``checkpoint-00000040`` after 40 updates:

- ``policy.safetensors``, ``tokenizer.safetensors``, and ``reference.safetensors`` and ``ema.safetensors`` if there are
  any, each a file that its class loads;
- ``state.json`` and ``state.safetensors``: the agent's class, settings and counters, its wrappers, the states of
  optimiser and critic, and all random states, the environments' included; see ``agents/stored.py``;
- ``SHA256SUMS`` of the others: ``sha256sum -c SHA256SUMS`` checks them, and so does every `load`.

It is written under another name, waits until the disk has it, and is renamed. So the newest one is whole, unless the
disk itself lost something; then the one before it is used. Loading runs no code that a file names: classes are those
that are known already. The prompts to come are a function of the seed and a counter, and so need no file.

Callbacks have no state here. `HeldOutEval` evaluates again where the run goes on, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents import stored
from agents.checkpoint import Saved, rebuild
from agents.common import processes
from agents.common.files import replacing
from agents.policies import load_policy
from agents.recipes import known
from var_env.tokenizers import load_tokenizer
from var_env.weights import write_tensors

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.wrapper import Wrapper

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
SUMS = "SHA256SUMS"
NOT_STORED = (  # made again by the constructor and by set_env(), or of no use to an agent of this package
    "policy_class",
    "policy_kwargs",
    "observation_space",
    "action_space",
    "n_envs",
    "start_time",
    "action_noise",
    "ep_info_buffer",
    "ep_success_buffer",
    "_last_original_obs",
    "_stats_window_size",
)


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
            TypeError: a setting of the agent cannot be stored; see ``agents/stored.py``.
        """
        path, together = self.folder / f"checkpoint-{agent.n_updates:08}", agent.unwrapped.processes
        if together.is_first:
            with replacing(path) as part:
                write(agent, part)
                if path.exists():  # of the same update, as after going on from it
                    path.rename(self.folder / f"replaced-{path.name}")  # until the new one has its place
            for old in [*self.paths()[self.keep :], *self.folder.glob("replaced-*")]:
                shutil.rmtree(old, ignore_errors=True)
        elif together.shards:
            take_part(agent)
        together.barrier()
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
                verify(path)
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
        together = processes.current()
        path = self.newest() if together.is_first else None
        path = together.broadcast(path)
        assert path is not None
        return read(path, env, device, replaced)


def updates_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


# Writing -------------------------------------------------------------------------------------------------------------


def write(agent: Agent | Wrapper, folder: Path) -> None:
    """All that a run needs to go on, into a new folder. ``OSError`` or ``TypeError`` as in `Checkpoints.save`."""
    core = agent.unwrapped
    folder.mkdir(parents=True)
    for name, module in modules_of(core).items():
        module.save(folder / f"{name}.safetensors")
    tensors: dict[str, Tensor] = {}
    content = state_of(core, tensors)
    write_tensors(folder / "state.safetensors", tensors)
    (folder / "state.json").write_text(json.dumps(content, indent=1) + "\n")
    sums = "".join(f"{digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
    (folder / SUMS).write_text(sums)


def take_part(agent: Agent | Wrapper) -> None:
    """What a process has to do while the first one writes, where each holds a part of the weights."""
    for module in modules_of(agent.unwrapped).values():
        module.state_dict()
    state_of(agent.unwrapped, {})


def modules_of(agent: Agent) -> dict[str, Any]:
    """The policies that there are, and the tokenizer."""
    found = {name: getattr(agent, name) for name in ("policy", "reference", "ema") if getattr(agent, name) is not None}
    return {**found, "tokenizer": agent.policy.tokenizer}


def state_of(agent: Agent, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``state.json`` of an agent, the tensors in it apart. ``TypeError`` when something cannot be stored."""
    left_out = {*agent._excluded_save_params(), *NOT_STORED}
    states = [name for name in agent._get_torch_save_params()[0] if name not in ("policy", "reference", "ema")]
    parts = {
        "settings": {name: value for name, value in vars(agent).items() if name not in left_out},
        "wrappers": [(type(wrapper).__name__, wrapper.settings()) for wrapper in agent.wrappers],
        "states": {name: getattr(agent, name).state_dict() for name in states},  # the optimiser's, a critic's
        "random": random_states(agent),
    }
    return {
        "format": FORMAT,
        "agent": type(agent).__name__,
        "versions": {package: metadata.version(package) for package in ("torch", "numpy", "stable-baselines3")},
        **{name: stored.encode(part, tensors, name) for name, part in parts.items()},
    }


def random_states(agent: Agent) -> dict[str, Any]:
    """Of the sampler, the environments, and the global generators of torch, numpy and Python."""
    envs = agent.env
    return {
        "sampler": agent.generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "environments": None if envs is None else [rng.bit_generator.state for rng in envs.np_random],
        "environment_seeds": None if envs is None else list(envs.np_random_seed),
    }


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            found.update(piece)
    return found.hexdigest()


# Reading -------------------------------------------------------------------------------------------------------------


def verify(path: str | Path) -> None:
    """``ValueError`` naming what is wrong with a checkpoint, unless it is whole. ``FileNotFoundError``: no folder."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        lines = (path / SUMS).read_text().splitlines()
        sums = {name: found for found, name in (line.split("  ", 1) for line in lines)}
        for name in sorted({"policy.safetensors", "tokenizer.safetensors", "state.json", "state.safetensors", *sums}):
            if digest(path / name) != sums.get(name):
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from error


def load(path: str | Path, env: Any = None, device: torch.device | str = "auto", **replaced: Any) -> Agent | Wrapper:
    """The agent of one checkpoint. ``agent.learn(agent.steps_left, ..., reset_num_timesteps=False)`` then goes on.

    The global generators of torch, numpy and Python are set back, too.

    Args:
        path: the checkpoint's folder.
        env: what to learn on; an id, a single environment or a batched one, or a function that makes it for the agent.
        device: as in Stable-Baselines3.
        replaced: settings to change, of the agent or of a wrapper, such as ``learning_rate=1e-5``. The run is then
            another one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or of another format, or its agent's class is not known here; or a setting to change
            does not exist.
    """
    verify(path)
    return read(Path(path), env, device, replaced)


def read(path: Path, env: Any, device: torch.device | str, replaced: dict[str, Any]) -> Agent | Wrapper:
    """`load` of a checkpoint that is known to be whole: to hash its files once, in one process, is enough."""
    try:
        content = json.loads((path / "state.json").read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version reads {FORMAT}")
        tensors = load_file(path / "state.safetensors")
        names = ("settings", "wrappers", "states", "random")
        settings, wrappers, states, generators = (stored.decode(content[name], tensors) for name in names)
    except (KeyError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error
    tokenizer = load_tokenizer(path / "tokenizer.safetensors")
    files = {name: path / f"{name}.safetensors" for name in ("policy", "reference", "ema")}
    modules = {name: load_policy(file, tokenizer) for name, file in files.items() if file.is_file()}
    saved = Saved(
        class_named(content["agent"]),
        settings,
        [(class_named(name), options) for name, options in wrappers],
        states,
        modules,
        generators["sampler"],
    )
    agent = rebuild(saved, None, device, replaced)
    if env is not None:
        agent.unwrapped.set_env(env(agent) if callable(env) else env)
    restore_random(agent.unwrapped, generators)
    return agent


def class_named(name: str) -> type:
    """An agent's or a wrapper's class, among those that are known by now.

    Raises:
        ValueError: there is none of that name.
    """
    from agents.base import Agent
    from agents.wrapper import Wrapper

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


def restore_random(agent: Agent, states: dict[str, Any]) -> None:
    """Set all generators but the sampler's to `random_states`."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])
    envs, rows = agent.env, states["environments"] or ()
    if envs is not None and len(rows) == envs.num_envs:  # another number is another run, or another share of it
        envs.set_random_states(rows, states["environment_seeds"])
        agent._last_obs = {}  # or learn() would begin with a reset of its own
