"""What an agent is, taken apart and put together again: the one place between an agent and its files.

`Restorable.parts` gives the record, `rebuild` makes the agent of it, and ``agents/saving/`` writes and reads it, as a
zip or as a folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import gymnasium as gym
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.common.processes import Processes, whole_state
from agents.policies.base import Policy
from agents.saving import folder as folders
from agents.saving import zip as zipped
from agents.saving.saved import Saved, global_random_states, set_global_random_states
from var_env.hub import HubMixin, by_name
from var_env.vector import VARTextVectorEnv

RestorableT = TypeVar("RestorableT", bound="Restorable")


class Restorable(HubMixin, BaseAlgorithm):
    """An algorithm of Stable-Baselines3 whose parts can be saved. `Agent` tells what the attributes are."""

    hub_kind, hub_loader = "agent", ("agents", "Agent")
    policy: Policy  # type: ignore[assignment]
    env: VARTextVectorEnv | None  # type: ignore[assignment]
    reference: Policy | None
    ema: Policy | None
    generator: torch.Generator
    processes: Processes

    @property
    def wrappers(self) -> list[Any]:
        """From the inside out."""
        return []

    def _excluded_save_params(self) -> list[str]:
        own = ["reference", "ema", "outermost", "optimizer", "generator", "callback", "lr_schedule"]
        own += ["_last_obs", "_last_episode_starts", "processes", "_steps", "_steps_that_moved"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "optimizer", *(name for name in ("reference", "ema") if getattr(self, name) is not None)], []

    def parts(self, left_out: Collection[str] | None = None) -> Saved:
        """The agent, taken apart, with its wrappers. All of several processes have to call it.

        Args:
            left_out: attributes that are no settings; by default those of ``_excluded_save_params``.
        """
        left_out = self._excluded_save_params() if left_out is None else left_out
        modules = {name: getattr(self, name) for name in ("policy", "reference", "ema")}
        modules = {name: module for name, module in modules.items() if module is not None}
        states = [name for name in self._get_torch_save_params()[0] if name not in modules]  # the optimiser, a critic
        envs = self.env
        return Saved(
            type(self),
            {name: value for name, value in vars(self).items() if name not in left_out},
            [(type(wrapper), wrapper.settings()) for wrapper in self.wrappers],
            {name: whole_state(getattr(self, name).state_dict()) for name in states},
            {**modules, "tokenizer": self.policy.tokenizer},
            {
                "sampler": self.generator.get_state(),
                **global_random_states(),
                "environments": None if envs is None else [rng.bit_generator.state for rng in envs.np_random],
                "environment_seeds": None if envs is None else list(envs.np_random_seed),
            },
        )

    def load_state(self, name: str, state: dict[str, Any]) -> None:
        """Set the optimiser, or whatever has the name, to its state in `parts`."""
        getattr(self, name).load_state_dict(state)

    def restore_random(self, states: dict[str, Any]) -> None:
        """Set the global generators, and the environments', to those of `parts`."""
        set_global_random_states(states)
        rows = states["environments"] or ()
        if self.env is not None and len(rows) == self.env.num_envs:  # another number is another run, or another share
            self.env.set_random_states(rows, states["environment_seeds"])
            self._last_obs = {}  # or learn() would begin with a reset of its own

    def save(
        self,
        path: str | Path | BinaryIO,  # type: ignore[override]
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write all that a resumed run needs to one zip: settings, counters, generator, optimiser and policies.

        Of several processes, all of which have to call it, the first one writes.
        """
        saved = self.parts({*self._excluded_save_params(), *(exclude or ())} - set(include or ()))
        if self.processes.is_first:
            zipped.write(saved, path)
        elif self.processes.shards:
            saved.gather()

    @classmethod
    def load(  # type: ignore[override]
        cls: type[RestorableT],
        path: str | Path | BinaryIO,
        env: str | gym.Env | gym.vector.VectorEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> RestorableT:
        """Read what `save` wrote, an agent of this class without wrappers; `agents.load` reads any.

        With ``env``, ``learn(..., reset_num_timesteps=False)`` goes on as if uninterrupted. ``kwargs`` replace saved
        settings, such as ``learning_rate=1e-5``.
        """
        return load(path, env, device, custom_objects, cls, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        """As a checkpoint's folder, which runs no code when it is read, unlike a zip."""
        folders.write_into(self.parts(), save_directory)
        self._write_config(save_directory)

    @classmethod
    def _from_folder(cls, folder: Path, **options: Any) -> Any:
        return by_name("agents.checkpoints:load_folder")(folder, **options)


def load(
    path: str | Path | BinaryIO,
    env: Any = None,
    device: torch.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
    expected: type = object,
    **replaced: Any,
) -> Any:
    """The agent in a file that `Restorable.save` wrote, whatever its class, in its wrappers if it had any.

    Args:
        path: of the zip, or the open file.
        env: what to learn on, so that ``learn(..., reset_num_timesteps=False)`` goes on as if uninterrupted; or a
            function that makes it for the agent.
        device, custom_objects: as in Stable-Baselines3.
        expected: the class that the agent, or its outermost wrapper, has to be.
        replaced: settings to change, of the agent or of a wrapper, such as ``learning_rate=1e-5``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no agent wrote it, or it holds another agent than expected; or a setting to
            change does not exist.
    """
    agent = rebuild(zipped.read(path, device, custom_objects), env, device, replaced)
    if not isinstance(agent, expected):
        raise ValueError(f"{path} holds {agent} and no {expected.__name__}: read it with agents.load()")
    return agent


def rebuild(saved: Saved, env: Any, device: torch.device | str, replaced: dict[str, Any]) -> Any:
    """The agent of a record, in its wrappers.

    Args:
        env: what to learn on, or a function that makes it for the agent; ``None`` for none.
        device: as in Stable-Baselines3.
        replaced: settings to change, of the agent or of a wrapper.

    Raises:
        ValueError: a setting to change does not exist.
    """
    wrappers = [(wrapper, dict(options)) for wrapper, options in saved.wrappers]
    replaced = dict(replaced)
    for _, options in wrappers:
        options.update({name: replaced.pop(name) for name in options.keys() & replaced.keys()})
    settings = {"temperature_lr": None, **saved.settings}  # files of before the option: learned with the weights
    unknown = sorted(replaced.keys() - settings.keys())
    if unknown:
        known = sorted({*settings, *(name for _, options in wrappers for name in options)})
        raise ValueError(f"unknown setting {unknown[0]!r}: this agent has {', '.join(known)}")
    agent = _bare({**settings, **replaced}, saved, device)
    outermost: Any = agent
    for wrapper, options in wrappers:
        outermost = wrapper(outermost, **options)
    if env is not None:
        agent.set_env(env(outermost) if callable(env) else env)
    if "torch" in saved.random:  # a zip has the sampler's alone
        agent.restore_random(saved.random)
    return outermost


def _bare(settings: dict[str, Any], saved: Saved, device: torch.device | str) -> Any:
    """The agent inside the wrappers, without an environment."""
    make: Any = saved.agent
    own = settings.keys() & inspect.signature(make.__init__).parameters.keys()  # checked again by the constructor
    options = {name: settings[name] for name in own}
    agent = make(saved.modules["policy"], None, device=device, _init_setup_model=False, **options)
    vars(agent).update({name: value for name, value in settings.items() if name not in own})
    agent._setup_model()
    agent._rollouts = settings["_rollouts"]  # seeding starts them again
    for name, state in saved.states.items():
        agent.load_state(name, state)
    agent.generator.set_state(saved.random["sampler"])
    for name in saved.modules.keys() & {"reference", "ema"}:
        setattr(agent, name, saved.modules[name].to(agent.device).eval().requires_grad_(False))
    return agent
