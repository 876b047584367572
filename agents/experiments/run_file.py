"""What defines a run, in a file beside its checkpoints: written before the first update, kept on ``--resume``.

A checkpoint holds the agent and not its world. So ``run.json`` holds what the command was given, defaults included. An
option that is given again and differs is told in one line and taken; some cannot be taken, see `FIXED`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.experiments.options import option_of
from agents.experiments.output import write_json

if TYPE_CHECKING:
    from var_env.scenes import World

NAME = "run.json"
DECODING = ("temperature", "top_k", "top_p", "guidance")
WORLD = ("regions", "prompts_from", "reward", "reward_kwargs")
FILES = ("policy", "tokenizer", "prompts_from")  # options whose value is a path, or can be one
# Of the checkpoint, and of no use to an agent that is there.
FIXED = ("agent", "policy", "world", "tokenizer", "seed", "lora")
JUDGING = (*WORLD, *DECODING, "prompts", "eval_prompts")  # by these the best policy is chosen
COUNTS = {"images": 6400, "save_every": 20, "save_total": 2, "eval_every": 20, "eval_prompts": 64}  # at least 1
DEFAULTS = COUNTS | {"agent": "grpo", "seed": 0, "reward": "ocr", "reward_kwargs": {}}  # where a run does not tell
OF_RUN = ("schedule", "warmup", "track", *COUNTS)
NAMES = ("agent", "policy", "world", "tokenizer", "seed", "plugin", *WORLD, *DECODING, *OF_RUN)


def plain(name: str, value: Any) -> Any:
    """An option's value as the file has it: JSON's types, and paths that are there as absolute ones."""
    if name in FILES and value is not None and Path(value).exists():
        return str(Path(value).resolve())
    return json.loads(json.dumps(value, default=str))


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if value is None:
        return "not given"
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def told(name: str, now: Any, was: Any) -> str:
    """Such as ``--reward ocr, was ocr_edit``."""
    return f"{option_of(name)} {shown(now)}, was {shown(was)}"


def changes(kept: Mapping[str, Any], given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """What is given and differs, with what it was: as it was kept, or else the default."""
    before = {name: kept.get(name, plain(name, default.get(name))) for name in given}
    return {name: was for name, was in before.items() if plain(name, given[name]) != was}


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` wrote into a run's folder; ``None`` when there is no such file. ``ValueError``: it is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("this is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, and it tells what the run is: {error}") from None
    return content


def write(folder: Path, args: argparse.Namespace, settings: Mapping[str, Any], world: World) -> None:
    """Write what defines a run.

    Args:
        folder: of the run.
        args: the command's options; those of `NAMES` that are not ``None`` are kept.
        settings: the agent's, as they were given.
        world: that the run has its prompts from.
    """
    values = {name: getattr(args, name) for name in NAMES} | dict(settings)
    content = {name: plain(name, value) for name, value in values.items() if value is not None}
    write_json(folder / NAME, content | fingerprint(world))


def fingerprint(world: World) -> dict[str, str]:
    """A hash of the prompts of files, as the entry ``prompts``; nothing for rendered words, which are always the same.

    ``ValueError`` when the files have no prompts to train on, or none to validate with.
    """
    from var_env.prompts import PromptWorld

    if not isinstance(world, PromptWorld):
        return {}
    everything = [scene.prompt for split in ("train", "val") for scene in world.held_out(10**9, 0, split)]
    return {"prompts": hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]}


def require_prompts(kept: Mapping[str, Any], world: World, given: bool) -> None:
    """``ValueError`` when prompt files hold others than when the run began, unless they are ``given`` again."""
    now = fingerprint(world).get("prompts")
    if not given and kept.get("prompts") != now:
        source = kept.get("prompts_from")
        raise ValueError(
            f"{source} holds other prompts than when this run began: give --prompts-from {source} to go on with them"
        )


def keep(args: argparse.Namespace, kept: dict[str, Any], given: dict[str, Any], default: Mapping[str, Any]) -> None:
    """Set the options that were not given to what they were when the run began, or when it last went on.

    Args:
        args: the command's options, ``None`` where not given; changed in place.
        kept: what `read` gave.
        given: of ``args``, what was given.
        default: what an option is that was neither given nor kept.

    Raises:
        ValueError: something cannot be had again, or cannot be changed any more.
    """
    here = {Path(plugin).name for plugin in args.plugin}
    for plugin in kept.get("plugin", []):
        if Path(plugin).name not in here:
            raise ValueError(f"this run began with --plugin {plugin}: give it again")
    differing = changes(kept, given, default)
    for name in FIXED:
        if name in differing:
            raise ValueError(
                f"{told(name, given[name], differing[name])}: a run keeps it, so leave it out, or begin another run "
                "with another --out"
            )
    if differing.get("kl_coef", 1) == 0:
        raise ValueError(
            f"{told('kl_coef', given['kl_coef'], 0.0)}: this run kept no reference for a KL, so begin another one"
        )
    source = kept.get("prompts_from")
    if "prompts_from" not in given and source is not None and Path(source).is_absolute() and not Path(source).exists():
        raise ValueError(f"the prompts of this run, {source}, are gone: put them back, or give --prompts-from")
    for name, value in {**default, **kept}.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    if args.regions is not None:
        args.regions = {int(count): share for count, share in args.regions.items()}  # JSON's keys are strings
