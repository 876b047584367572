"""One agent trained, for ``vartext train``: new or from its newest checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents import Agent, Decoding, StopAfter, Wrapper, held_out_scenes, recipes
from agents.callbacks import BestCheckpoint, CheckpointEvery, Interrupt, StopOnSignal
from agents.checkpoints import Checkpoints
from agents.common.schedules import make_schedule
from agents.experiments import run_file
from agents.experiments.agent_options import agent_settings
from agents.experiments.callbacks import CurveEval, ImageBar
from agents.experiments.loading import load_policy, make_env
from agents.experiments.options import (
    INTERRUPTED,
    clear_errors,
    decoding_from,
    option_of,
)
from agents.logs import open_logger
from rewards.reason import reason
from var_env import VARTextVectorEnv


class CurveAndBest(CurveEval, BestCheckpoint):
    """Evaluates, prints a line, and keeps the best policy by word accuracy."""


def learning_rate_of(args: argparse.Namespace) -> Any:
    """The number of ``--learning-rate``, or the ``--schedule`` of it."""
    rate = recipes.options_of(Agent)["learning_rate"] if args.learning_rate is None else args.learning_rate
    if args.schedule is None:
        if args.warmup is not None:
            raise ValueError("--warmup belongs to a --schedule: give one, such as constant")
        return rate
    return make_schedule(args.schedule, rate, 0.05 if args.warmup is None else args.warmup)


def world_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `make_env`."""
    world = {"regions": args.regions, "prompts": args.prompts_from}
    return world | {"reward": args.reward, "reward_kwargs": args.reward_kwargs}


def new_agent(args: argparse.Namespace, checkpoints: Checkpoints) -> Agent | Wrapper:
    """An agent on the policy that is given, when there is no run in the folder yet."""
    settings = agent_settings(args) | {"learning_rate": learning_rate_of(args)}
    if checkpoints.paths():
        raise ValueError(f"{checkpoints.folder} holds a run: go on from it with --resume, or choose another --out")
    policy = load_policy(args)
    common = {"decoding": decoding_from(args, Decoding()), "seed": args.seed, "device": policy.device}
    return recipes.make(args.agent, make_env(policy, **world_of(args)), policy, **common, **settings)


def agent_again(args: argparse.Namespace, checkpoints: Checkpoints) -> tuple[Agent | Wrapper, bool]:
    """The agent of the newest checkpoint, in the world of its run, with what is given and differs told and taken.

    Sets the options that were not given to what they were.

    Returns:
        The agent, and whether the best policy so far was chosen as it will be from now on.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: as in `run_file.keep` and `run_file.require_prompts`; or an earlier version made the folder, and
            ``args`` do not tell the reward.
    """
    settings = agent_settings(args)
    given = {name: value for name in run_file.NAMES if name != "plugin" and (value := getattr(args, name)) is not None}
    given |= settings
    kept = run_file.read(args.out)
    old = kept is None and bool(checkpoints.paths())
    if old and args.reward is None:
        raise ValueError(
            f"{args.out} has no {run_file.NAME}, as earlier versions wrote none, so nothing tells this run's world: "
            "give its --reward again, and --reward-kwargs, --prompts-from, --regions and --images as they were"
        )
    if old and (useless := [name for name in run_file.FIXED if name in given]):
        raise ValueError(f"leave out {option_of(useless[0])}: it is that of the checkpoint")
    kept = kept or {}
    usual = {"learning_rate": recipes.options_of(Agent)["learning_rate"]} | dataclasses.asdict(Decoding())
    usual |= recipes.options_in(kept["agent"]) if "agent" in kept else {}
    changed = dict.fromkeys(given) if old else run_file.changes(kept, given, usual | run_file.DEFAULTS)
    run_file.keep(args, kept, {} if old else given, usual | run_file.DEFAULTS)
    replaced = {name: settings[name] for name in settings.keys() & changed.keys()}
    rate = learning_rate_of(args)
    if changed.keys() & {"learning_rate", "schedule", "warmup"}:
        replaced["learning_rate"] = rate

    def env(agent: Any) -> VARTextVectorEnv:
        envs = make_env(agent.policy, agent.prompts_per_update, **world_of(args))
        run_file.require_prompts(kept, envs.world, "prompts_from" in given)
        return envs

    agent = checkpoints.load(env, args.device, **replaced)
    agent.unwrapped.decoding = decoding_from(args, agent.decoding)
    if agent.processes.is_first and not old:
        for name, was in changed.items():
            same_run = name == "track" or (
                name in run_file.COUNTS and (name != "images" or args.schedule is None)
            )  # a schedule ends with the images
            note = "" if same_run else ": it is another run from here on"
            print(run_file.told(name, given[name], was) + note, file=sys.stderr)
    assert agent.env is not None
    same_prompts = run_file.fingerprint(agent.env.world).get("prompts") == kept.get("prompts")
    return agent, not old and same_prompts and not changed.keys() & {*run_file.JUDGING}


def set_aside(best: Path, updates: int) -> None:
    """Give another name to a best policy that was chosen on other terms, so that the next one does not replace it."""
    if best.is_file():
        aside = best.with_stem(f"{best.stem}-until-{updates}")
        print(f"{best} was chosen on other held-out images: it is {aside.name} from now on", file=sys.stderr)
        for suffix in (".json", best.suffix):
            best.with_suffix(suffix).replace(aside.with_suffix(suffix))


def run(args: argparse.Namespace) -> int:
    checkpoints, best, comparable = Checkpoints(args.out / "checkpoints"), args.out / "best.safetensors", True
    with clear_errors():
        if args.resume:
            agent, comparable = agent_again(args, checkpoints)
        else:
            agent = new_agent(args, checkpoints)
        saves = CheckpointEvery(checkpoints.folder, args.save_every, args.save_total)
        evaluation = CurveAndBest(best, every=args.eval_every, prompts=args.eval_prompts)
        env = agent.unwrapped.env
        assert env is not None
        held_out_scenes(env.world, args.eval_prompts, split=evaluation.split)  # a list may be too small for the split
        agent.processes.barrier()  # all have looked whether there is a run in --out
    assert agent.env is not None
    steps = agent.timesteps(args.images) - agent.num_timesteps
    if agent.images_decoded >= args.images or steps <= 0:
        print(f"{args.out} has seen {agent.images_decoded} images: give a larger --images to go on")
        return 0
    with clear_errors():
        if agent.processes.is_first:
            if not comparable:
                set_aside(best, agent.n_updates)
            run_file.write(args.out, args, agent_settings(args), agent.env.world)
        agent.processes.barrier()
        if args.resume and comparable:
            evaluation.go_on()
        formats = ["tensorboard", *filter(None, [args.track])]
        agent.set_logger(open_logger(args.out, formats, agent.images_decoded if args.resume else None))
    with Interrupt("finishing this update and saving; once more gives up") as interrupt:
        callbacks: list[BaseCallback] = [
            saves,
            evaluation,
            StopAfter(images=args.images),
            StopOnSignal(interrupt),
            ImageBar(args.images, agent.name),
        ]
        try:
            agent.learn(steps, callbacks, reset_num_timesteps=not args.resume)
            agent.logger.close()
            agent.save(args.out / "agent.zip")
            best = agent.best_policy
            agent.processes.write(best, lambda: best.save(args.out / "policy.safetensors"))
        except KeyboardInterrupt:
            print(kept(saves.checkpoints), file=sys.stderr)
            return INTERRUPTED
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # a full disk, numbers that are not finite, ...
            sys.exit(f"error: {reason(error)}\n{kept(saves.checkpoints)}")
    if agent.processes.is_first:
        print(f"{agent.images_decoded} images, {agent.n_updates} updates: {args.out}")
    return INTERRUPTED if interrupt.requested else 0


def kept(checkpoints: Checkpoints) -> str:
    """What is left after an error."""
    paths = checkpoints.paths()
    return f"{paths[0]} is intact: --resume goes on from it" if paths else "nothing was saved yet"
