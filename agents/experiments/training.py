"""One agent trained, for ``vartext train``: new or from its newest checkpoint."""

from __future__ import annotations

import argparse
import sys

from stable_baselines3.common.callbacks import BaseCallback

from agents import Agent, Decoding, StopAfter, Wrapper, held_out_scenes, recipes
from agents.callbacks import BestCheckpoint, CheckpointEvery, Interrupt, StopOnSignal
from agents.checkpoints import Checkpoints
from agents.common.schedules import make_schedule
from agents.experiments.agent_options import agent_settings
from agents.experiments.callbacks import CurveEval, ImageBar
from agents.experiments.loading import load_policy, make_env
from agents.experiments.options import (
    INTERRUPTED,
    clear_errors,
    decoding_from,
)
from agents.logs import open_logger
from rewards.reason import reason


class CurveAndBest(CurveEval, BestCheckpoint):
    """Evaluates, prints a line, and keeps the best policy by word accuracy."""


def agent_from(args: argparse.Namespace, checkpoints: Checkpoints) -> Agent | Wrapper:
    """A new agent, or the one of the newest checkpoint with the settings that were given again."""
    settings = agent_settings(args)
    if args.warmup is not None and args.schedule is None:
        raise ValueError("--warmup belongs to a --schedule: give one, such as constant")
    if args.schedule is not None:
        rate = settings.get("learning_rate", recipes.options_of(Agent)["learning_rate"])
        settings["learning_rate"] = make_schedule(args.schedule, rate, 0.05 if args.warmup is None else args.warmup)
    world = {"regions": args.regions, "prompts": args.prompts_from}
    world |= {"reward": args.reward, "reward_kwargs": args.reward_kwargs}
    if args.resume:
        agent = checkpoints.load(
            lambda agent: make_env(agent.policy, agent.prompts_per_update, **world), args.device, **settings
        )
        agent.unwrapped.decoding = decoding_from(args, agent.decoding)
        return agent
    if checkpoints.paths():
        raise ValueError(f"{checkpoints.folder} holds a run: go on from it with --resume, or choose another --out")
    policy = load_policy(args)
    common = {"decoding": decoding_from(args, Decoding()), "seed": args.seed, "device": policy.device}
    return recipes.make(args.agent, make_env(policy, **world), policy, **common, **settings)


def run(args: argparse.Namespace) -> int:
    saves = CheckpointEvery(args.out / "checkpoints", args.save_every, args.save_total)
    with clear_errors():
        agent = agent_from(args, saves.checkpoints)
        evaluation = CurveAndBest(args.out / "best.safetensors", every=args.eval_every, prompts=args.eval_prompts)
        if args.resume:
            evaluation.go_on()
        env = agent.unwrapped.env
        assert env is not None
        held_out_scenes(env.world, args.eval_prompts, split=evaluation.split)  # a list may be too small for the split
        agent.processes.barrier()  # all have looked whether there is a run in --out
    steps = agent.timesteps(args.images) - agent.num_timesteps
    if agent.images_decoded >= args.images or steps <= 0:
        print(f"{args.out} has seen {agent.images_decoded} images: give a larger --images to go on")
        return 0
    with clear_errors():
        agent.set_logger(open_logger(args.out, ["tensorboard"], agent.images_decoded if args.resume else None))
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
