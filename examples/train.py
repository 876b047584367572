"""Train one agent on VARText-v0, with every setting an option.

    python examples/train.py --images 6400 --out runs/first
    python examples/train.py --images 12800 --out runs/first --resume      # goes on to 12800 images in all
    python examples/train.py --agent vmr+panw+mp --split 3 --alpha 0.8 --out runs/wrapped
    python examples/train.py --support sampler --top-k 20 --guidance 2 --out runs/truncated
    tensorboard --logdir runs

An agent is an algorithm, grpo or vmr, and wrappers around it, panw and mp, from the inside out, joined by "+".

In --out: TensorBoard events, agent.zip (all that --resume needs, also written every --save-every updates) and
policy.safetensors. ``python examples/evaluate.py --policy runs/first/policy.safetensors`` measures the result.

Ctrl-C finishes the update and saves; --resume then goes on as if nothing had happened. So it does from the last
agent.zip when training ended with an error.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import (
    INTERRUPTED,
    METHOD,
    CurveEval,
    ImageBar,
    Interrupt,
    StopOnInterrupt,
    add_decoding_options,
    add_method_options,
    add_model_options,
    add_regions_option,
    clear_errors,
    decoding_from,
    load_policy,
    make_agent,
    make_env,
    make_parser,
    method_from,
    method_of,
    require_at_least_one,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents import GRPO, Agent, Decoding, StopAfter, Wrapper, load
from agents.callbacks import AgentCallback
from agents.losses import KL_KINDS, RATIO_LEVELS

SETTINGS: dict[str, str] = {  # options of the agent that are numbers; the defaults are its own
    "learning_rate": "AdamW's",
    "group_size": "G, pictures for each prompt",
    "prompts_per_update": "P, so that an update learns from P * G pictures",
    "clip_range": "the ratio moves the loss within 1 +- this",
    "kl_coef": "weight of the KL to the policy at the start; 0 is without",
    "advantage_eps": "added to a group's standard deviation",
    "epochs": "passes over a rollout",
    "minibatches": "optimiser steps an epoch",
    "micro_batch": "rows in one forward and backward pass, to fit the memory; changes nothing else",
    "max_grad_norm": "the gradient is scaled down to this norm",
    "image_interval": "updates between two pictures of samples in TensorBoard; 0 for none",
}
CHOICES: dict[str, tuple[Iterable[str], str]] = {
    "kl": (KL_KINDS, "how the KL is estimated"),
    "ratio_level": (RATIO_LEVELS, "level of the importance ratios"),
    "support": (("model", "sampler"), "sampler: renormalise log-probabilities on what a truncated sampler can draw"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--agent", default="grpo", help="such as vmr+panw+mp (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="(default: %(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from agent.zip in --out, with its agent, policy and seed, and its settings but those given again",
    )
    parser.add_argument("--images", type=int, default=6400, help="budget in reward calls (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.add_argument("--eval-prompts", type=int, default=64, help="from the val split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_model_options(parser)
    add_regions_option(parser)
    add_decoding_options(parser)
    group = parser.add_argument_group("the agent")
    defaults = {**inspect.signature(Agent.__init__).parameters, **inspect.signature(GRPO.__init__).parameters}
    for name, text in SETTINGS.items():
        default = defaults[name].default
        group.add_argument(
            option_of(name), type=float if isinstance(default, float) else int, help=f"{text} (default: {default})"
        )
    for name, (choices, text) in CHOICES.items():
        group.add_argument(option_of(name), choices=choices, help=f"{text} (default: {defaults[name].default})")
    add_method_options(parser)
    args = parser.parse_args(argv)
    with clear_errors():
        require_at_least_one(**{n: getattr(args, n) for n in ("images", "save_every", "eval_every", "eval_prompts")})
    return args


def option_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class SaveEvery(AgentCallback):
    """Saves the agent after every n-th update, before it samples again."""

    def __init__(self, updates: int, path: Path) -> None:
        super().__init__()
        self.updates, self.path = updates, path

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % self.updates == 0:
            self.model.save(self.path)


def agent_from(args: argparse.Namespace, path: Path) -> GRPO | Wrapper:
    """A new agent, or the one in ``path`` with the settings that were given again."""
    settings: dict[str, Any] = {name: getattr(args, name) for name in [*SETTINGS, *CHOICES]}
    settings = {name: value for name, value in settings.items() if value is not None}
    method = method_from(args)
    if args.resume:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path} to go on from: leave out --resume")
        agent: GRPO | Wrapper = load(path, device=args.device, **settings, **method)
        agent.set_env(make_env(agent.policy, agent.prompts_per_update, regions=args.regions))
        agent.unwrapped.decoding = decoding_from(args, agent.decoding)
        return agent
    if path.exists():
        raise ValueError(f"{path} exists: go on from it with --resume, or choose another --out")
    unused = sorted(method.keys() - method_of(args.agent, METHOD).keys())
    if unused:
        raise ValueError(
            f"{option_of(unused[0])} does nothing for {args.agent}: choose another --agent, or leave it out"
        )
    policy = load_policy(args)
    env = make_env(policy, regions=args.regions)
    common = {"decoding": decoding_from(args, Decoding()), "seed": args.seed, "device": policy.device}
    return make_agent(args.agent, policy, env, METHOD | method, **common, **settings)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    path = args.out / "agent.zip"
    with clear_errors():
        agent = agent_from(args, path)
        evaluation = CurveEval(args.eval_every, args.eval_prompts)
    if agent.images_decoded >= args.images:
        print(f"{path} has seen {agent.images_decoded} images: give a larger --images to go on")
        return 0
    agent.set_logger(configure(str(args.out), ["tensorboard"]))
    with Interrupt("Ctrl-C: finishing this update and saving; once more gives up") as interrupt:
        callbacks: list[BaseCallback] = [
            SaveEvery(args.save_every, path),
            evaluation,
            StopAfter(images=args.images),
            StopOnInterrupt(interrupt),
            ImageBar(args.images, agent.name),
        ]
        steps = agent.timesteps(args.images - agent.images_decoded)
        try:
            agent.learn(steps, callbacks, reset_num_timesteps=not args.resume)
        except RuntimeError as error:  # such as a reward or a loss that is no finite number
            sys.exit(f"error: {error}\n{path} holds the last checkpoint, intact: --resume goes on from it")
        agent.logger.close()
        agent.save(path)
        policy: Any = agent.policy
        policy.save(args.out / "policy.safetensors")
    print(f"{agent.images_decoded} images, {agent.n_updates} updates: {path}, {args.out / 'policy.safetensors'}")
    return INTERRUPTED if interrupt.requested else 0


if __name__ == "__main__":
    sys.exit(main())
