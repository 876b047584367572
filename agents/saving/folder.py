"""A folder that holds an agent, and no code: tensors are safetensors, the rest is JSON.

- ``policy.safetensors``, ``tokenizer.safetensors``, and ``reference.safetensors`` and ``ema.safetensors`` if there are
  any, each a file that its class loads;
- ``state.json`` and ``state.safetensors``: the agent's class, settings and counters, its wrappers, the states of
  optimiser and critic, and all random states, the environments' included; see ``stored.py``;
- ``SHA256SUMS`` of the others: ``sha256sum -c SHA256SUMS`` checks them, and so does `verify`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents.policies import load_policy
from agents.saving import stored
from agents.saving.saved import Saved
from rewards.reason import reason
from var_env.tokenizers import load_tokenizer
from var_env.weights import write_tensors

FORMAT = 1
SUMS = "SHA256SUMS"
NOT_STORED = (  # Stable-Baselines3's: made again by the constructor and by set_env(), or of no use here
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


def write(saved: Saved, folder: Path) -> None:
    """An agent, into a new folder.

    Raises:
        OSError: it could not be written.
        TypeError: a setting of the agent cannot be stored; see ``stored.py``.
    """
    folder.mkdir(parents=True)
    for name, module in saved.modules.items():
        module.save(folder / f"{name}.safetensors")
    tensors: dict[str, Tensor] = {}
    content = state_of(saved, tensors)
    write_tensors(folder / "state.safetensors", tensors)
    (folder / "state.json").write_text(json.dumps(content, indent=1) + "\n")
    sums = "".join(f"{digest(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
    (folder / SUMS).write_text(sums)


def write_into(saved: Saved, folder: Path) -> None:
    """`write` into a folder that exists, in place of the agent that is there; other files stay."""
    with tempfile.TemporaryDirectory(dir=folder) as part:
        write(saved, Path(part) / "agent")
        for old in folder.glob("*.safetensors"):  # such as the reference of an agent that had one
            old.unlink()
        for file in (Path(part) / "agent").iterdir():
            file.replace(folder / file.name)


def state_of(saved: Saved, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``state.json`` of an agent, the tensors in it apart. ``TypeError`` when something cannot be stored."""
    parts = {
        "settings": {name: value for name, value in saved.settings.items() if name not in NOT_STORED},
        "wrappers": [(wrapper.__name__, options) for wrapper, options in saved.wrappers],
        "states": saved.states,
        "random": saved.random,
    }
    return {
        "format": FORMAT,
        "agent": saved.agent.__name__,
        "versions": {package: metadata.version(package) for package in ("torch", "numpy", "stable-baselines3")},
        **{name: stored.encode(part, tensors, name) for name, part in parts.items()},
    }


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            found.update(piece)
    return found.hexdigest()


def verify(path: str | Path) -> None:
    """``ValueError`` naming what is wrong with a folder, unless it is whole. ``FileNotFoundError``: there is none."""
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


def read(path: Path, class_named: Callable[[str], type]) -> Saved:
    """What `write` wrote, from a folder that `verify` found whole.

    Args:
        class_named: the class of an agent or a wrapper by its name; ``ValueError`` when there is none.

    Raises:
        ValueError: it is of another format, or names a class that is not known here.
    """
    try:
        content = json.loads((path / "state.json").read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version reads {FORMAT}")
        tensors = load_file(path / "state.safetensors")
        names = ("settings", "wrappers", "states", "random")
        settings, wrappers, states, random_states = (stored.decode(content[name], tensors) for name in names)
    except (KeyError, SafetensorError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    tokenizer = load_tokenizer(path / "tokenizer.safetensors")
    files = {name: path / f"{name}.safetensors" for name in ("policy", "reference", "ema")}
    modules = {name: load_policy(file, tokenizer) for name, file in files.items() if file.is_file()}
    return Saved(
        class_named(content["agent"]),
        settings,
        [(class_named(name), options) for name, options in wrappers],
        states,
        {**modules, "tokenizer": tokenizer},
        random_states,
    )
