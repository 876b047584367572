"""Train one agent on VARText-v0, with every setting an option.

    python examples/train.py --images 6400 --out runs/first
    python examples/train.py --images 12800 --out runs/first --resume      # goes on to 12800 images in all
    python examples/train.py --agent vmr+panw+mp --split 3 --alpha 0.8 --out runs/wrapped
    python examples/train.py --support sampler --top-k 20 --guidance 2 --out runs/truncated
    accelerate launch --multi_gpu --num_processes 2 examples/train.py --images 6400 --out runs/two
    tensorboard --logdir runs

An agent is an algorithm and wrappers around it, from the inside out, joined by "+"; compare.py --agents lists them.

In --out: TensorBoard events, checkpoints/ (one every --save-every updates, the newest --save-total: all that --resume
needs), policy.safetensors, best.safetensors, the policy with the best word accuracy on held-out prompts, which is not
what it was trained on, and at the end agent.zip, for ``agents.load``.
``python examples/evaluate.py --policy runs/first/policy.safetensors`` measures the result.

Ctrl-C, and the SIGTERM of a cluster, finish the update and save; --resume then goes on as if nothing had happened, bit
for bit on a CPU. So it does from the last checkpoint when training was killed or ended with an error: see
docs/scaling.md, also for several processes and machines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common import (
    INTERRUPTED,
    CurveEval,
    ImageBar,
    add_agent_options,
    add_decoding_options,
    add_model_options,
    add_plugin_option,
    add_prompts_option,
    add_regions_option,
    add_reward_options,
    agent_settings,
    clear_errors,
    decoding_from,
    load_plugins,
    load_policy,
    make_env,
    make_parser,
    require_at_least_one,
)
from stable_baselines3.common.callbacks import BaseCallback

from agents import Agent, Decoding, StopAfter, Wrapper, held_out_scenes, registry
from agents.callbacks import BestCheckpoint, CheckpointEvery, Interrupt, StopOnSignal
from agents.logs import open_logger
from agents.resume import Checkpoints
from agents.schedules import SCHEDULES, make_schedule

COUNTS = ("images", "save_every", "save_total", "eval_every", "eval_prompts")  # options of at least 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    load_plugins(argv)
    parser = make_parser(__doc__)
    add_plugin_option(parser)
    parser.add_argument("--agent", default="grpo", help="such as vmr+panw+mp (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="(default: %(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its agent, policy and seed, and its settings but those "
        "given again",
    )
    parser.add_argument("--images", type=int, default=6400, help="budget in reward calls (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.add_argument(
        "--save-total", type=int, default=2, metavar="N", help="checkpoints that are kept (default: %(default)s)"
    )
    parser.add_argument("--eval-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.add_argument("--eval-prompts", type=int, default=64, help="from the val split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_model_options(parser)
    add_reward_options(parser)
    add_regions_option(parser)
    add_prompts_option(parser)
    add_decoding_options(parser)
    add_agent_options(parser)
    group = parser.add_argument_group("the learning rate over time")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="what becomes of --learning-rate on the way to --images (default: it stays)",
    )
    group.add_argument(
        "--warmup", type=float, help="the share of the way on which it rises from 0; with --schedule (default: 0.05)"
    )
    args = parser.parse_args(argv)
    with clear_errors():
        require_at_least_one(**{n: getattr(args, n) for n in COUNTS})
    return args


class CurveAndBest(CurveEval, BestCheckpoint):
    """Evaluates, prints a line, and keeps the best policy by word accuracy."""


def agent_from(args: argparse.Namespace, checkpoints: Checkpoints) -> Agent | Wrapper:
    """A new agent, or the one of the newest checkpoint with the settings that were given again."""
    settings = agent_settings(args)
    if args.warmup is not None and args.schedule is None:
        raise ValueError("--warmup belongs to a --schedule: give one, such as constant")
    if args.schedule is not None:
        rate = settings.get("learning_rate", registry.options_of(Agent)["learning_rate"])
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
    return registry.make(args.agent, make_env(policy, **world), policy, **common, **settings)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
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
        agent.set_logger(open_logger(args.out, ["tensorboard"], agent.num_timesteps if args.resume else None))
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
            sys.exit(f"error: {error}\n{kept(saves.checkpoints)}")
    if agent.processes.is_first:
        print(f"{agent.images_decoded} images, {agent.n_updates} updates: {args.out}")
    return INTERRUPTED if interrupt.requested else 0


def kept(checkpoints: Checkpoints) -> str:
    """What is left after an error."""
    paths = checkpoints.paths()
    return f"{paths[0]} is intact: --resume goes on from it" if paths else "nothing was saved yet"


if __name__ == "__main__":
    sys.exit(main())
