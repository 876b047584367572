"""Weights on disk: one safetensors file, with the class and the configuration of what they are in its metadata.

Reading a file imports nothing that it names: the class is looked up among those that are known by then.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rewards.reason import reason

ClassT = TypeVar("ClassT", bound=type)


class Weights(dict[str, Tensor]):
    """A state dict from a file.

    Attributes:
        tokenizer: the `fingerprint` of the tokenizer that the weights were trained on, ``None`` if the file has none.
    """

    tokenizer: str | None = None


def save_module(module: nn.Module, path: str | Path, half: bool = False) -> None:
    """Write a module's state dict, with its ``config`` in the metadata, to one safetensors file.

    When the module has a ``tokenizer``, as policies do, the file says which, by `fingerprint`, `form_of` and the world.

    ``half`` stores floating-point weights as bfloat16.

    Raises:
        OSError: it cannot be written, the disk being full for example.
    """
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}
    if half:
        weights = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"class": type(module).__name__, "config": json.dumps(module.config)}
    tokenizer = getattr(module, "tokenizer", None)
    if isinstance(tokenizer, nn.Module):
        metadata["tokenizer"] = fingerprint(tokenizer)
        metadata["tokenizer_form"] = json.dumps(form_of(tokenizer))
        if getattr(tokenizer, "world", None) is not None:
            metadata["world"] = str(tokenizer.world)
    write_tensors(path, weights, metadata)


def form_of(tokenizer: Any) -> dict[str, Any]:
    """The class and the form of a tokenizer, which a policy's weights have to fit, as JSON has it."""
    grids = [list(grid) for grid in tokenizer.schedule.grids]
    form = {"grids": grids, "vocab_size": tokenizer.vocab_size, "depth": tokenizer.depth}
    return {"class": type(tokenizer).__name__, **form}


def check_form(path: str | Path, tokenizer: Any, maker: str) -> None:
    """``ValueError`` saying what differs when the policy in a file was trained on a tokenizer of another form.

    It comes before the policy is made, which may fail on another form. That a tokenizer of the same form is the very
    one, `load_weights` checks.
    """
    written = json.loads(read_metadata(path, maker).get("tokenizer_form", "null"))
    if written is not None and written != (given := form_of(tokenizer)):
        name = next(name for name, value in written.items() if given[name] != value)
        raise ValueError(
            f"the policy in {path} belongs to a {written['class']} with {name} {written[name]!s:.80}, and the one "
            f"given is a {given['class']} with {name} {given[name]!s:.80}: give the tokenizer that it was "
            "trained on, with --tokenizer FILE or load_policy(FILE, tokenizer)"
        )


def fingerprint(module: nn.Module) -> str:
    """A name for a module's configuration and weights, 16 hexadecimal digits.

    Weights count as rounded to bfloat16, so that a copy that was stored as such has the same one. Settings that are the
    constructor's defaults do not count, so that a class may gain a setting and its files stay valid.
    """
    parameters = inspect.signature(type(module)).parameters
    config = dict(getattr(module, "config", {}))
    told = {n: v for n, v in config.items() if n not in parameters or v != parameters[n].default}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.bfloat16() if values.is_floating_point() else values
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of tensors on the CPU. ``OSError`` when it cannot be written."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # which is no OSError, even when the disk is full
        raise OSError(f"cannot write {path}: {error}") from error


def load_config_and_weights(path: str | Path, maker: str) -> tuple[dict, Weights]:
    """Read a file that :func:`save_module` wrote; floating-point weights come back as float32.

    Raises:
        FileNotFoundError: there is no such file; the message names the command that makes one.
        ValueError: the file is not such a file, or it is cut short.
    """
    metadata = read_metadata(path, maker)
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(metadata["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"cannot read weights from {path}, corrupt or not made by {maker}: {error}") from error
    found = Weights({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    found.tokenizer = metadata.get("tokenizer")
    return config, found


def read_metadata(path: str | Path, maker: str) -> dict[str, str]:
    """The metadata of a safetensors file, with the errors of `load_config_and_weights`."""
    if Path(path).is_dir():
        files = ", ".join(sorted(file.name for file in Path(path).glob("*.safetensors"))) or "none"
        raise FileNotFoundError(f"{path} is a folder: give one .safetensors file; it has {files}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors file, or make one with {maker}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read weights from {path}, corrupt or not made by {maker}: {error}") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """``load_state_dict`` of what `load_config_and_weights` gave.

    Raises:
        ValueError: naming the source and what does not fit; or the module's ``tokenizer`` is another than the one that
            the file names. A file that names none goes with any.
    """
    trained_on, tokenizer = getattr(weights, "tokenizer", None), getattr(module, "tokenizer", None)
    if trained_on is not None and isinstance(tokenizer, nn.Module) and fingerprint(tokenizer) != trained_on:
        raise ValueError(
            f"{source} was trained on another tokenizer (fingerprint {trained_on}) than the one given "
            f"({fingerprint(tokenizer)}), whose tokens mean other things: give its own, by tokenizer= or --tokenizer"
        )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]] or [reason(error)]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        owner = "their own configuration"
        if tokenizer is not None:
            owner += (
                f" on this {type(tokenizer).__name__}: give the tokenizer that they were trained on, --tokenizer FILE"
            )
        raise ValueError(f"the weights in {source} do not fit {owner}: {wrong[0]}{more}") from error


def saved_class(path: str | Path, base: ClassT, homes: Mapping[str, str], maker: str) -> ClassT:
    """The class of what a file holds: ``base`` or one derived from it.

    Args:
        homes: class name to module, for those that are imported when a file asks for them. Classes of other projects
            are found once their module is imported.

    Raises:
        FileNotFoundError, ValueError: as `load_config_and_weights`; the class is not known.
    """
    metadata = read_metadata(path, maker)
    name: Any = metadata.get("class", next(iter(homes)))
    kind, wanted = kind_of(metadata), "tokenizer" if base.__name__.endswith("Tokenizer") else "policy"
    if kind != wanted:
        raise ValueError(f"{path} holds a {kind} and no {wanted}: give it as --{kind}, and a {wanted} as --{wanted}")
    if name in homes:
        return getattr(importlib.import_module(homes[name]), name)
    for known in _family(base):
        if known.__name__ == name:
            return known  # type: ignore[return-value]
    raise ValueError(
        f"{path} holds a {name}, which is not known here: import the module that defines it (--plugin FILE does), or "
        f"give a file of {', '.join(homes)}"
    )


def kind_of(metadata: Mapping[str, str]) -> str:
    """What a file holds, ``"policy"`` or ``"tokenizer"``, by its class, or without one by its configuration."""
    if "class" in metadata:
        return "tokenizer" if metadata["class"].endswith("Tokenizer") else "policy"
    return "tokenizer" if "grids" in json.loads(metadata.get("config", "{}")) else "policy"


def _family(base: type) -> Iterator[type]:
    """A class and all that are derived from it."""
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _family(child)
