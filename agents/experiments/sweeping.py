"""Short runs over a grid, and what there is to learn, for ``vartext sweep``."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from tqdm import trange

from agents import GRPO, Decoding, evaluate, held_out_scenes
from agents.conflict import measure
from agents.experiments.loading import copy_of, load_policy, make_env
from agents.experiments.options import clear_errors
from agents.experiments.output import table, write_json
from agents.losses import group_advantages
from agents.rollout import collect
from agents.split_rule import variance_components


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


def trained(args: Any, settings: dict[str, Any]) -> dict[str, float]:
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


def run(args: argparse.Namespace) -> int:
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
            settings = dict(zip(args.grid, values, strict=True))
            rows.append(settings | trained(args, settings))
            if args.json:
                write_json(args.json, {"updates": args.updates, "prompts": args.prompts, "rows": rows})
    print(table(list(rows[0]), [[f"{value:.4g}" for value in row.values()] for row in rows]))
    return 0
