"""Stable-Baselines3's zip, which stands alone: settings and counters as JSON, the states of the optimiser and the like
as torch writes them, and the modules as safetensors. Wrappers are kept as their classes and options.

A zip is Stable-Baselines3's habit, for agents to share and to load by one name. Its settings and states are pickled in
part, so reading one runs code that it holds: read only what you trust. The folders of ``folder.py`` run none, and are
what a long run goes on from.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from stable_baselines3.common.save_util import load_from_zip_file, open_path, save_to_zip_file

from agents.common.files import replacing
from agents.saving.saved import Saved
from rewards.reason import reason


def write(saved: Saved, path: str | Path | BinaryIO) -> None:
    """Write an agent; ``.zip`` is added to a path without a suffix. A file that exists is replaced as a whole."""
    data = {
        **saved.settings,
        "generator_state": saved.random["sampler"].numpy().tobytes(),
        "tokenizer_class": type(saved.modules["tokenizer"]),
        "agent_class": saved.agent,
        "wrapper_classes": [wrapper for wrapper, _ in saved.wrappers],
        "wrapper_settings": [options for _, options in saved.wrappers],
    }
    buffer = io.BytesIO()
    save_to_zip_file(buffer, data=data, params=saved.states)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(buffer, "a") as archive:
        for name, module in saved.modules.items():
            file = Path(folder) / f"{name}.safetensors"
            module.save(file)
            archive.write(file, file.name)
    if not isinstance(path, str | Path):
        path.write(buffer.getvalue())
        return
    target = Path(path) if Path(path).suffix else Path(path).with_suffix(".zip")
    with replacing(target) as part:
        part.write_bytes(buffer.getvalue())


def read(
    path: str | Path | BinaryIO, device: torch.device | str = "auto", custom_objects: dict[str, Any] | None = None
) -> Saved:
    """What `write` wrote; of the random states, the sampler's.

    Args:
        device, custom_objects: as in Stable-Baselines3.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no agent wrote it.
    """
    file = open_path(path, "r", suffix="zip")  # type: ignore[arg-type]
    try:
        content = io.BytesIO(file.read())
        data, states, _ = load_from_zip_file(content, device=device, custom_objects=custom_objects)
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content) as archive:
            names = [name for name in archive.namelist() if name.endswith(".safetensors")]
            archive.extractall(folder, names)
            files = {Path(name).stem: Path(folder) / name for name in names}
            assert data is not None, "it holds no settings"
            assert "optimizer" in states, "it holds no state of an optimiser"
            modules = {"tokenizer": data.pop("tokenizer_class").load(files["tokenizer"])}
            for name in files.keys() - modules.keys():
                modules[name] = data["policy_class"].load(files[name], tokenizer=modules["tokenizer"])
        sampler = torch.frombuffer(bytearray(data.pop("generator_state")), dtype=torch.uint8)
        agent = data.pop("agent_class")
        wrappers = list(zip(data.pop("wrapper_classes"), data.pop("wrapper_settings"), strict=True))
        return Saved(agent, data, wrappers, states, modules, {"sampler": sampler})
    except (AssertionError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or was not written by an agent's save(): {reason(error)}") from error
    finally:
        if isinstance(path, str | Path):
            file.close()
