"""An agent on disk: Stable-Baselines3's zip (settings and counters as JSON, the state of the optimiser and of what else
``_get_torch_save_params`` names), and inside it policy, reference policy and tokenizer as safetensors, so that a
checkpoint stands alone. Wrappers are kept as their classes and options.

A zip is Stable-Baselines3's habit, for agents to share and to load by one name. Its settings and states are pickled in
part, so loading one runs code that it holds: load only what you trust. The checkpoints of ``agents/resume.py`` run
none, and are what a long run goes on from."""

from __future__ import annotations

import inspect
import io
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from stable_baselines3.common.save_util import load_from_zip_file, open_path, save_to_zip_file
from torch import Tensor

from agents.files import replacing
from agents.processes import whole_state
from rewards.reason import reason

if TYPE_CHECKING:
    from agents.base import Agent


def write(agent: Agent, path: str | Path | BinaryIO, left_out: Collection[str]) -> None:
    """Write an agent; ``.zip`` is added to a path without a suffix. A file that exists is replaced as a whole.

    Of several processes, all of which have to call it, the first one writes.
    """
    data = {name: value for name, value in vars(agent).items() if name not in left_out}
    data["generator_state"] = agent.generator.get_state().numpy().tobytes()
    data["tokenizer_class"], data["agent_class"] = type(agent.policy.tokenizer), type(agent)
    data["wrapper_classes"] = [type(wrapper) for wrapper in agent.wrappers]
    data["wrapper_settings"] = [wrapper.settings() for wrapper in agent.wrappers]
    modules: dict[str, Any] = {"policy": agent.policy, "tokenizer": agent.policy.tokenizer}
    modules |= {name: getattr(agent, name) for name in ("reference", "ema") if getattr(agent, name) is not None}
    states = [name for name in agent._get_torch_save_params()[0] if name not in modules]  # the optimiser, a critic
    params = {name: whole_state(getattr(agent, name).state_dict()) for name in states}
    if not agent.processes.is_first:
        for module in modules.values() if agent.processes.shards else ():
            module.state_dict()
        return
    buffer = io.BytesIO()
    save_to_zip_file(buffer, data=data, params=params)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(buffer, "a") as archive:
        for name, module in modules.items():
            file = Path(folder) / f"{name}.safetensors"
            module.save(file)
            archive.write(file, file.name)
    if not isinstance(path, str | Path):
        path.write(buffer.getvalue())
        return
    target = Path(path) if Path(path).suffix else Path(path).with_suffix(".zip")
    with replacing(target) as part:
        part.write_bytes(buffer.getvalue())


def load(
    path: str | Path | BinaryIO,
    env: Any = None,
    device: torch.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
    expected: type = object,
    **replaced: Any,
) -> Any:
    """The agent in a file that `save` wrote, whatever its class, in its wrappers if it had any.

    Args:
        env: what to learn on, so that ``learn(..., reset_num_timesteps=False)`` goes on as if uninterrupted.
        device, custom_objects: as in Stable-Baselines3.
        expected: the class that the agent, or its outermost wrapper, has to be.
        replaced: settings to change, of the agent or of a wrapper, such as ``learning_rate=1e-5``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no agent wrote it, or it holds another agent than expected; or a setting to
            change does not exist.
    """
    data, states, modules = _unpack(path, device, custom_objects)
    agent_class, generator_state = data.pop("agent_class"), data.pop("generator_state")
    wrappers = list(zip(data.pop("wrapper_classes"), data.pop("wrapper_settings"), strict=True))
    del data["tokenizer_class"]
    state = torch.frombuffer(bytearray(generator_state), dtype=torch.uint8)
    agent = rebuild(Saved(agent_class, data, wrappers, states, modules, state), env, device, replaced)
    if not isinstance(agent, expected):
        raise ValueError(f"{path} holds {agent} and no {expected.__name__}: read it with agents.load()")
    return agent


class Saved(NamedTuple):
    """An agent taken apart."""

    agent_class: Any
    settings: dict[str, Any]  # and counters
    wrappers: list[tuple[type, dict[str, Any]]]  # from the inside out, with their options
    states: dict[str, Any]  # state dicts, of the optimiser and the like
    modules: dict[str, Any]  # "policy", and "reference" and "ema" if there are any
    generator_state: Tensor


def rebuild(saved: Saved, env: Any, device: torch.device | str, replaced: dict[str, Any]) -> Any:
    """The agent, with some settings replaced, in its wrappers. ``ValueError`` for a setting that does not exist."""
    agent_class, data, wrappers, states, modules, generator_state = saved
    for _, settings in wrappers:
        settings.update({name: replaced.pop(name) for name in settings.keys() & replaced.keys()})
    unknown = sorted(replaced.keys() - data.keys())
    if unknown:
        known = sorted({*data, *(name for _, settings in wrappers for name in settings)})
        raise ValueError(f"unknown setting {unknown[0]!r}: this agent has {', '.join(known)}")
    data |= replaced
    own = data.keys() & inspect.signature(agent_class.__init__).parameters.keys()  # checked again by the constructor
    agent = agent_class(
        modules["policy"], None, device=device, _init_setup_model=False, **{name: data[name] for name in own}
    )
    vars(agent).update({name: value for name, value in data.items() if name not in own})
    agent._setup_model()
    agent._rollouts = data["_rollouts"]  # seeding starts them again
    for name, state in states.items():
        getattr(agent, name).load_state_dict(state)
    agent.generator.set_state(generator_state)
    for name in modules.keys() & {"reference", "ema"}:
        setattr(agent, name, modules[name].to(agent.device).eval().requires_grad_(False))
    if env is not None:
        agent.set_env(env)
    for wrapper_class, settings in wrappers:
        agent = wrapper_class(agent, **settings)
    return agent


def _unpack(
    path: str | Path | BinaryIO, device: torch.device | str, custom_objects: dict[str, Any] | None
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The settings, the states of the optimiser and the like, and the modules of a checkpoint."""
    if isinstance(path, str | Path) and Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder, and agents.load reads a .zip that save() wrote: a run's folder of checkpoints is for "
            "agents.Checkpoints(FOLDER).load(), and one checkpoint for agents.resume.load(FOLDER)"
        )
    file = open_path(path, "r", suffix="zip")  # type: ignore[arg-type]
    try:
        content = io.BytesIO(file.read())
        data, params, _ = load_from_zip_file(content, device=device, custom_objects=custom_objects)
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content) as archive:
            names = [name for name in archive.namelist() if name.endswith(".safetensors")]
            archive.extractall(folder, names)
            files = {Path(name).stem: Path(folder) / name for name in names}
            assert data is not None, "it holds no settings"
            assert "optimizer" in params, "it holds no state of an optimiser"
            modules = {"tokenizer": data["tokenizer_class"].load(files["tokenizer"])}
            for name in files.keys() - modules.keys():
                modules[name] = data["policy_class"].load(files[name], tokenizer=modules["tokenizer"])
            return data, params, modules
    except (AssertionError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or was not written by an agent's save(): {reason(error)}") from error
    finally:
        if isinstance(path, str | Path):
            file.close()
