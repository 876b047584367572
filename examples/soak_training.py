"""Does training stand? Runs that are killed at random moments and go on, and a thousand updates in flat memory.

    python examples/soak_training.py                          # about five minutes on two cores
    python examples/soak_training.py --agents grpo vmr+panw+mp --kills 100 --updates 200
    python examples/soak_training.py --agents --plugin my_agent.py ...   # every registered agent, yours included

With a small tokenizer and a small transformer, both random, and the brightness of images as the reward, so that an
update takes milliseconds:

1. Every agent trains --length updates without a stop. Then it trains again with a checkpoint after each update, its
   process is killed with SIGKILL at a random moment, while it samples, learns or writes a checkpoint, and it goes on
   from the newest one, until it was killed --kills times and has come to the end. Weights, reference, the optimiser's
   state and the sampler's must be the same bit for bit.
2. One agent trains --updates updates, with logs, evaluations and checkpoints. After the first 100 its memory must not
   grow by more than --growth MiB. In fp32: in bf16 on a CPU, oneDNN keeps the code that it makes for every shape it
   meets, and a batch is as wide as its longest prompt, so that memory levels off when all lengths have been seen.

Writes training.json and training.md to --out. Exit status 1 when something differs or grows.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor
from tqdm import tqdm

from agents import Agent, CheckpointEvery, Checkpoints, HeldOutEval, StopAfter, Wrapper, recipes, stored
from agents.callbacks import AgentCallback
from agents.experiments.agent_options import add_plugin_option
from agents.experiments.options import Parser, clear_errors, require_at_least_one
from agents.experiments.output import require_folder, table, write_json, write_text
from agents.logs import open_logger
from agents.policies.var_text import VARTextPolicy
from agents.saving.folder import state_of
from rewards import HasWords, Reward, RewardOutput
from rewards.components import Component
from var_env import ScaleSchedule, Tokenizer, VARTextVectorEnv

FORK = multiprocessing.get_context("fork")  # what is imported need not be imported again
PROMPTS, GROUP = 2, 4
WARM = 100  # updates before memory counts
FOREVER = 10**9
STUCK = 120.0  # seconds
OF_THE_CLOCK = ("seconds", "_num_timesteps_at_start")  # and of the part of a run, by which no learning is changed


def every_recipe() -> list[str]:
    """All algorithms and wrappers, alone, the variants and bundles, and the paper's method."""
    return [*recipes.known(), *recipes.VARIANTS, *recipes.BUNDLES, "vmr+panw+mp"]


class Brightness(Reward):
    """How bright an image is, from 0 to 1; claims to have read a word in its corner."""

    name = "brightness"

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        count, box = len(images), np.array([[0, 0, 8, 8]], np.float32)
        mean = images.mean((1, 2, 3)).astype(np.float32) / 255
        output = RewardOutput(mean, {"mean": mean}, [["SEEN"]] * count, [[0.5]] * count, [box] * count)
        output.components = [[Component("mean", (0,), float(value), box)] for value in mean]
        return output


def world() -> VARTextVectorEnv:
    torch.manual_seed(0)
    schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)  # 21 tokens
    tokenizer = Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)
    envs = VARTextVectorEnv(PROMPTS, tokenizer=tokenizer, reward=Brightness())
    envs.reset(seed=0)
    return envs


def new_agent(recipe: str) -> Agent | Wrapper:
    envs = world()
    policy = VARTextPolicy(envs.tokenizer, width=16, layers=1, heads=2, precision="fp32").eval()
    options = {"group_size": GROUP, "prompts_per_update": PROMPTS, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
    known = recipes.options_in(recipe)
    return recipes.make(recipe, envs, policy, **{name: value for name, value in options.items() if name in known})


def fingerprint(agent: Agent | Wrapper) -> str:
    """A hash of all that learning depends on: weights, states and random numbers, and the budget spent."""
    core, tensors = agent.unwrapped, dict[str, Tensor]()
    content = state_of(core.parts(), tensors)
    for name in ("policy", "reference", "ema"):
        module = getattr(core, name)
        stored.encode({} if module is None else module.state_dict(), tensors, name)
    for name in OF_THE_CLOCK:
        del content["settings"]["dict"][name]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# Killed and gone on --------------------------------------------------------------------------------------------------


@dataclass
class Killed:
    """What became of an agent that was killed again and again."""

    agent: str
    kills: int
    while_writing: int  # of them, those that left half a checkpoint behind
    same: bool
    told: str = ""


def attempt(recipe: str, folder: Path, length: int, out: Path) -> None:
    """In a process of its own: go on, or begin, and write the fingerprint at the end."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder)
    begun = bool(checkpoints.paths())
    agent = checkpoints.load(lambda _: world(), "cpu") if begun else new_agent(recipe)
    agent.unwrapped.set_logger(Logger(None, []))
    callbacks: list[BaseCallback] = [CheckpointEvery(folder, updates=1), StopAfter(updates=length)]
    if agent.n_updates < length:
        agent.learn(FOREVER - agent.num_timesteps, callbacks, reset_num_timesteps=not begun)
    write_text(out, fingerprint(agent))


def killed(recipe: str, kills: int, length: int, seed: int) -> Killed:
    """Train without a stop, then with `kills` of them, and compare."""
    rng, found = random.Random(seed), Killed(recipe, 0, 0, False)
    with tempfile.TemporaryDirectory() as name:
        out, folder = Path(name) / "fingerprint", Path(name) / "whole"
        start = time.monotonic()
        ended(recipe, folder, length, out, STUCK)
        if not out.exists():
            found.told = "did not train"
            return found
        seconds, expected = time.monotonic() - start, out.read_text()
        folder = Path(name) / "killed-0"
        while found.kills < kills:
            out.unlink(missing_ok=True)
            if ended(recipe, folder, length, out, rng.uniform(0, seconds)):
                if not out.exists() or out.read_text() != expected:
                    found.told = "ended otherwise before the last kill"
                    return found
                folder = folder.with_name(f"killed-{found.kills}")  # it was fast: begin again
                continue
            found.kills += 1
            found.while_writing += any(folder.glob(".*-checkpoint-*"))
        out.unlink(missing_ok=True)
        ended(recipe, folder, length, out, STUCK)
        found.same = out.exists() and out.read_text() == expected
        return found


def ended(recipe: str, folder: Path, length: int, out: Path, patience: float) -> bool:
    """Whether an attempt came to its end before it was killed."""
    process = FORK.Process(target=attempt, args=(recipe, folder, length, out))
    process.start()
    process.join(patience)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode != -9


# Memory --------------------------------------------------------------------------------------------------------------


class Memory(AgentCallback):
    """The memory of the process in MiB, after every update."""

    def __init__(self) -> None:
        super().__init__()
        self.mib: list[float] = []

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % 10 == 0:
            gc.collect()  # so that it shows what is held, and not when Python looks
        self.mib.append(psutil.Process().memory_info().rss / 2**20)


def thousand(recipe: str, updates: int, out: Path) -> None:
    """In a process of its own: many updates with all that a run has, and their memory to a file."""
    torch.set_num_threads(1)
    agent, memory = new_agent(recipe), Memory()
    with tempfile.TemporaryDirectory() as folder:
        agent.unwrapped.set_logger(open_logger(folder, ["csv", "tensorboard"]))
        evaluation = HeldOutEval(every=50, prompts=2)
        saves, end = CheckpointEvery(Path(folder) / "checkpoints", 50), StopAfter(updates=updates)
        callbacks: list[BaseCallback] = [saves, evaluation, memory, end]
        agent.learn(FOREVER, callbacks)
        agent.logger.close()
    write_text(out, json.dumps(memory.mib))


def memory_of(recipe: str, updates: int) -> list[float]:
    """MiB before each update; empty when it did not come to its end."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "memory"
        process = FORK.Process(target=thousand, args=(recipe, updates, out))
        process.start()
        process.join()
        return json.loads(out.read_text()) if out.exists() else []


# The script ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--agents", nargs="*", default=[], metavar="AGENT", help="to be killed (default: all)")
    add_plugin_option(parser)
    parser.add_argument("--kills", type=int, default=20, help="of each agent (default: %(default)s)")
    parser.add_argument("--length", type=int, default=6, help="updates of a run that is killed (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1000, help="in flat memory (default: %(default)s)")
    parser.add_argument("--memory-agent", default="vmr+panw+mp", metavar="AGENT", help="(default: %(default)s)")
    parser.add_argument("--growth", type=float, default=16, metavar="MIB", help="that is flat (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a folder (default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_errors():
        require_folder(args.out)
        require_at_least_one(kills=args.kills, length=args.length, updates=args.updates)
        args.agents = args.agents or every_recipe()
        for recipe in [*args.agents, args.memory_agent]:
            recipes.parts_of(recipe)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports what takes a second, before the forks
    start, seeds = time.monotonic(), range(args.seed, args.seed + len(args.agents))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = zip(args.agents, seeds, strict=True)
        futures = [threads.submit(killed, recipe, args.kills, args.length, seed) for recipe, seed in jobs]
        results = [future.result() for future in tqdm(futures, "killed", unit="agent")]
    mib = memory_of(args.memory_agent, args.updates)
    late = mib[WARM:] or mib
    growth = max(late) - late[0] if late else float("inf")
    rows = [[r.agent, str(r.kills), str(r.while_writing), "yes" if r.same else f"NO {r.told}".strip()] for r in results]
    text = table(["agent", "times killed", "while it wrote a checkpoint", "the same in the end"], rows)
    moments = [at for at in (0, WARM, args.updates // 2, len(mib) - 1) if 0 <= at < len(mib)]
    shown = {f"MiB after {at} updates": round(mib[at], 1) for at in moments}
    shown[f"MiB that it grew after the first {WARM}"] = round(growth, 1)
    shown["seconds for all"] = round(time.monotonic() - start)
    memory_rows = [[name, str(value)] for name, value in shown.items()]
    text += "\n\n" + table([f"memory of {args.memory_agent}", ""], memory_rows)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    setting: dict[str, Any] = {
        "kills": args.kills,
        "length": args.length,
        "updates": args.updates,
        "seed": args.seed,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    write_text(args.out / "training.md", text + "\n")
    found = {"setting": setting, "killed": [asdict(r) for r in results], "memory": shown}
    write_json(args.out / "training.json", found)
    return int(not all(r.same for r in results) or growth > args.growth or len(mib) < args.updates)


if __name__ == "__main__":
    sys.exit(main())
