"""Short runs over a grid, and what there is to learn, for ``vartext sweep``."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from tqdm import trange

from agents import GRPO, Decoding, evaluate, held_out_scenes
from agents.conflict import measure
from agents.experiments.fault_shares import draw_shares, fault_shares, share_table
from agents.experiments.gates import gate_table
from agents.experiments.gradient_signal import signal, signal_gates
from agents.experiments.loading import copy_of, load_policy, make_env
from agents.experiments.neighbour_widths import neighbour_widths, width_table
from agents.experiments.options import clear_errors
from agents.experiments.output import table, write_json
from agents.experiments.tables import number
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


def first_of_grid(args: Any) -> dict[str, Any]:
    """The first value of each option that spans a grid."""
    return {name: values[0] for name, values in args.grid.items()}


def run_signal(args: Any, batches: int) -> int:
    """Print the gate of the signal; the exit status."""
    agent = new_agent(args, first_of_grid(args) | {"kl_coef": 0.0})
    mean, error = signal(agent, batches)
    gates = signal_gates(mean, error, batches, agent.group_size * agent.prompts_per_update)
    if args.json:
        write_json(args.json, {"cosine": mean, "error": error, "gates": [gate.to_dict() for gate in gates]})
    print(gate_table("Gate", gates))
    return int(not all(gate.met for gate in gates))


def run_fault_shares(args: Any, prompts: int) -> None:
    """Print, write and draw at which grid each family of faults is decided."""
    env, schedule = make_env(args.base, reward="ocr"), args.base.schedule
    scenes = held_out_scenes(env.world, prompts, 1, "val")
    rows = fault_shares(args.base, env, scenes, Decoding(temperature=args.temperature[0]))
    if args.json:
        shares = [
            {name: [number(v) for v in value] if isinstance(value, tuple) else value for name, value in row.items()}
            for row in rows
        ]
        write_json(args.json, {"prompts": len(scenes), "rows": shares})
    if args.png:
        draw_shares(args.png, rows, schedule)
    print(share_table(rows, schedule))


def run_neighbour_widths(args: Any) -> None:
    """Print, and write, how often the reading changes with the neighbourhoods of each width."""
    env = make_env(args.base, reward="ocr")
    scenes = held_out_scenes(env.world, args.prompts, 1, "val")
    rows = neighbour_widths(args.base, env, scenes, Decoding(temperature=args.temperature[0]), args.neighbour_width)
    if args.json:
        write_json(args.json, {"prompts": len(scenes), "rows": rows})
    print(width_table(rows))


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
    settings = first_of_grid(args) | {"prompts_per_update": prompts}
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
            return run_signal(args, args.signal)
        if args.prefix_share:
            headers = ["m", "Tokens", "Of all", "Variance by prefix", "By suffix", "Decided by prefix"]
            print(table(headers, prefix_shares(args, args.prefix_share)))
            return 0
        if args.fault_share:
            run_fault_shares(args, args.fault_share)
            return 0
        if args.neighbour_width:
            run_neighbour_widths(args)
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
