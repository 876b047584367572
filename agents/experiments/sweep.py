"""Look for the regime in which GRPO learns, on validation words: short runs over a grid, and what there is to learn.

    python examples/sweep.py --learning-rate 2e-5 5e-5 --kl-coef 0.02 --updates 40
    python examples/sweep.py --group-size 4 8 16 --json runs/sweep.json
    python examples/sweep.py --signal 8
    python examples/sweep.py --prefix-share 64
    python examples/sweep.py --conflict 128

Options that take several values span a grid. Every row starts from the same base policy, prompts and noise; read the
differences with the standard error that is printed. ``--signal N`` trains nothing: it draws N independent batches and
prints the mean cosine between their gradients. Near zero means that an update is mostly noise, and that a small
learning rate, a KL term that pulls back, or more pictures have to carry the learning.

``--prefix-share N`` trains nothing either: for every split m it draws 4 prefixes for each of N prompts and 4 suffixes
for each prefix, and prints how much of the reward's variance within a prompt the prefix decides. That is what VMR's
prefix updates can learn, next to the share of the tokens that they have to learn it with.

``--conflict N`` measures, on one batch of N prompts, how much the gradients of the scales pull against each other, and
how far to trust that: see ``agents/conflict.py``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from tqdm import trange

from agents import GRPO, Decoding, evaluate, held_out_scenes
from agents.conflict import measure
from agents.experiments.loading import copy_of, load_policy, make_env
from agents.experiments.options import add_model_options, clear_errors, make_parser
from agents.experiments.output import table, write_json
from agents.losses import group_advantages
from agents.rollout import collect
from agents.split_rule import variance_components

GRID: dict[str, Any] = {
    "learning_rate": 5e-5,
    "kl_coef": 0.02,
    "group_size": 8,
    "prompts_per_update": 8,
    "temperature": 1.0,
}


def new_agent(args: Any, settings: dict[str, Any], micro_batch: int | None = None) -> GRPO:
    """An agent on a copy of the policy, that logs nowhere."""
    settings = dict(settings)
    decoding = Decoding(temperature=settings.pop("temperature"))
    env = make_env(args.base, settings["prompts_per_update"])
    agent = GRPO(
        copy_of(args.base),
        env,
        decoding=decoding,
        seed=0,
        image_interval=0,
        device=args.base.device,
        micro_batch=micro_batch,
        **settings,
    )
    agent.set_logger(Logger(None, []))
    return agent


def run(args: Any, settings: dict[str, Any]) -> dict[str, float]:
    """Train, then evaluate on validation prompts at temperature 1."""
    agent = new_agent(args, settings)
    for _ in trange(args.updates, desc=str(settings), leave=False):
        agent.iterate()
    scenes = held_out_scenes(make_env(args.base).world, args.prompts, 1, "val")
    result = evaluate(agent.policy, make_env(args.base), scenes)
    error = result.scores.std() / len(scenes) ** 0.5
    kl = agent.logger.name_to_value.get("train/kl", 0.0) if args.updates else 0.0
    return result.means() | {"reward_error": float(error), "kl": float(kl)}


def signal(args: Any, batches: int) -> tuple[float, float]:
    """The mean cosine between the policy gradients of independent batches, and its standard error."""
    agent = new_agent(args, {name: values[0] for name, values in args.grid.items()} | {"kl_coef": 0.0})
    gradients = []
    for _ in trange(batches, desc="batches", leave=False):
        rollout = agent.sample()
        advantages = group_advantages(rollout.scores).flatten()
        logp, _ = agent.policy.evaluate(rollout.cond, rollout.grids, range(len(agent.policy.schedule)))
        parameters = list(agent.policy.parameters())
        parts = torch.autograd.grad(-(advantages * logp.sum((1, 2))).mean(), parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    unit = torch.nn.functional.normalize(torch.stack(gradients), dim=1)
    cosines = (unit @ unit.T)[np.triu_indices(batches, 1)]
    return cosines.mean().item(), cosines.std().item() / len(cosines) ** 0.5


def prefix_shares(args: Any, prompts: int) -> list[list[str]]:
    """A row for each m: the tokens of the prefix, and the variances of the reward between and within prefixes."""
    env, schedule, rows = make_env(args.base, prompts), args.base.schedule, []
    decoding, generator = Decoding(temperature=args.temperature[0]), torch.Generator(args.base.device).manual_seed(0)
    for m in trange(1, len(schedule), desc="splits", leave=False):
        rollout = collect(args.base, env, 4, decoding, generator, fork_at=(m, 4), seed=0)
        between, within = variance_components(rollout.scores.double().unflatten(1, (4, 4)))
        tokens, total = sum(schedule.sizes[:m]), between + within
        share = f"{between / total:.1%}" if total else "no variance"
        rows.append([f"{m}", f"{tokens}", f"{tokens / schedule.total_tokens:.1%}", f"{between:.4f}", f"{within:.4f}"])
        rows[-1].append(share)
    return rows


def conflict_table(args: Any, prompts: int) -> str:
    """A row for each scale: its cosines with all scales, its reliability, and its gradient's share of the length."""
    settings = {name: values[0] for name, values in args.grid.items()} | {"prompts_per_update": prompts}
    agent = new_agent(args, settings, micro_batch=64)
    found, names = measure(agent, agent.sample()), [f"{h}x{w}" for h, w in args.base.schedule.grids]
    shares = found.norms / found.norms.sum()
    rows = [
        [name, *(f"{cosine:+.2f}" for cosine in row.tolist()), f"{trust:+.2f}", f"{share:.2f}"]
        for name, row, trust, share in zip(names, found.cosines, found.reliability, shares, strict=True)
    ]
    return table(["Cosine", *names, "Reliability", "Share of the lengths"], rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--updates", type=int, default=40, help="0 evaluates the base policy (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=192, help="validation prompts (default: %(default)s)")
    parser.add_argument("--signal", type=int, metavar="N", help="compare N gradients, at least 3, and train nothing")
    parser.add_argument("--prefix-share", type=int, metavar="N", help="N prompts, at least 2, and train nothing")
    parser.add_argument("--conflict", type=int, metavar="N", help="N prompts, at least 2, and train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, too")
    for name, default in GRID.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, nargs="+", type=type(default), default=[default], help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.updates < 0 or args.prompts < 2 or (args.signal is not None and args.signal < 3):
        parser.error("--updates must be at least 0, --prompts at least 2 and --signal at least 3")
    if any(prompts is not None and prompts < 2 for prompts in (args.prefix_share, args.conflict)):
        parser.error("--prefix-share and --conflict need at least 2 prompts")
    args.grid = {name: getattr(args, name) for name in GRID}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors():
        args.base = load_policy(args)
        if args.signal:
            mean, error = signal(args, args.signal)
            print(f"mean cosine between {args.signal} gradients: {mean:.4f} +- {error:.4f}")
            return 0
        if args.prefix_share:
            headers = ["m", "Tokens", "Of all", "Variance by prefix", "By suffix", "Decided by prefix"]
            print(table(headers, prefix_shares(args, args.prefix_share)))
            return 0
        if args.conflict:
            print(conflict_table(args, args.conflict))
            return 0
        rows = []
        for values in itertools.product(*args.grid.values()):
            settings = dict(zip(GRID, values, strict=True))
            rows.append(settings | run(args, settings))
            if args.json:
                write_json(args.json, {"updates": args.updates, "prompts": args.prompts, "rows": rows})
    print(table(list(rows[0]), [[f"{value:.4g}" for value in row.values()] for row in rows]))
    return 0
