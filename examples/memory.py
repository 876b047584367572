"""Measure the memory of an update against batch, tokens and vocabulary, and what the options that save it take off.

    python examples/memory.py                                       # a few minutes on two cores
    python examples/memory.py --rows 16 --sides 16 --codes 16384    # one line of the table
    python examples/memory.py --device cuda --rows 32 64 128 --sides 16 24 32

What is measured is a GRPO update with its KL term, by an otherwise default agent, of a policy of the shipped one's size
with random weights, from random grids. The schedule's sides are 1, 2, 4, ... up to --sides, so that 16 is 341 tokens.
Rows, sides and codes are varied one at a time, the other two at the middle of theirs. Columns:

- **plain**: without any of these options.
- **micro_batch**: --micro-batch rows in one forward and backward pass.
- **recompute**: gradient checkpointing, the layers computed again in the backward pass.
- **logit_chunk**: the logits of --logit-chunk tokens of an image at a time.
- **all three** together.

All of them leave the update unchanged, but for rounding, and cost time: recompute another forward pass of the layers,
logit_chunk one of the head. Memory is the peak during the update above what was held just before it: activations and
logits, and the gradients and temporaries of the optimiser's step, which no option takes off (60 MiB or more). Weights
and the optimiser's state are held before.

Every number is of a process of its own. On a CPU it is the process's resident memory, which Linux tells, with an
allocator that hands every tensor of 64 KiB and more back when it is freed (MALLOC_MMAP_THRESHOLD_); on a GPU it is what
torch has allocated. Numbers repeat to a few percent.

In --out: memory.md, the table, and memory.json, all numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import get_device
from tqdm import tqdm

from agents import GRPO
from agents.experiments.options import Parser, clear_errors
from agents.experiments.output import require_folder, table, write_json, write_text
from agents.policies.base import has_bf16
from agents.policies.var_text import VARTextPolicy
from agents.rollout import Rollout
from agents.sampling import Draw
from agents.testing import random_grids
from var_env import ScaleSchedule, Tokenizer
from var_env.scenes import Scene

PROMPT = 'A navy sign that says "KITE" above "RUN" in white letters'
RESET = Path("/proc/self/clear_refs")  # writing 5 makes the peak of a process's memory what it holds now
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is measured in one process."""

    rows: int  # of the update, images
    side: int  # of the finest grid
    codes: int  # the vocabulary
    options: dict[str, Any]  # of the agent

    @property
    def schedule(self) -> ScaleSchedule:
        sides = [2**i for i in range((self.side - 1).bit_length())] + [self.side]
        return ScaleSchedule([(side, side) for side in sides], patch=4)


# In a process of its own ---------------------------------------------------------------------------------------------


def measure(case: Case, device: str) -> int:
    """The bytes that an update takes at its peak."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(case.schedule, vocab_size=case.codes).eval().requires_grad_(False)
    policy = VARTextPolicy(tokenizer)
    agent = GRPO(policy, None, device=device, seed=0, **case.options)
    rollout, steps = random_rollout(policy, case.rows), range(len(policy.schedule))
    agent.update(random_rollout(policy, 1), torch.ones(1), steps)  # from here on the optimiser has its state
    agent.optimizer.zero_grad()
    held = start_peak(agent.device)
    agent.update(rollout, torch.linspace(-1, 1, case.rows), steps)
    return read_peak(agent.device) - held


def random_rollout(policy: VARTextPolicy, rows: int) -> Rollout:
    """What an update asks for, the grids drawn uniformly and no image decoded."""
    grids = [grid.to(policy.device) for grid in random_grids(policy.tokenizer, rows)]
    zeros = [torch.zeros(grid.shape, device=policy.device) for grid in grids]
    return Rollout(
        cond=policy.encode_prompts([PROMPT] * rows),
        scenes=[Scene(PROMPT, ("KITE", "RUN"))] * rows,
        draws=[Draw(grid, nothing, nothing, None) for grid, nothing in zip(grids, zeros, strict=True)],
        scores=torch.zeros(1, rows),
        returns=torch.zeros(1, rows, 1),
        parts={},
        images=np.zeros((rows, 1, 1, 3), np.uint8),
        words_read=[[]] * rows,
        reads=False,
        regions=[np.zeros((0, 4), np.float32)] * rows,
        seconds={},
    )


def start_peak(device: torch.device) -> int:
    """The bytes held now, from which a new peak is counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    RESET.write_text("5")
    return resident("VmRSS")


def read_peak(device: torch.device) -> int:
    """The most bytes held since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    """Bytes of this process's memory, as Linux counts them: VmRSS, or VmHWM, the peak."""
    # Not getrusage's ru_maxrss: that of a new process starts at what its parent held.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# The table -----------------------------------------------------------------------------------------------------------


def columns(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The agent's options, by what the table calls them."""
    options = {"micro_batch": args.micro_batch, "recompute": True, "logit_chunk": args.logit_chunk}
    single = {f"{name}={value}": {name: value} for name, value in options.items()}
    return {"plain": {}, **single, "all three": options}


def cases(args: argparse.Namespace) -> list[Case]:
    """The lines of the table, without options."""
    axes = {"rows": args.rows, "side": args.sides, "codes": args.codes}
    middle = Case(**{name: sorted(values)[len(values) // 2] for name, values in axes.items()}, options={})
    lines = [replace(middle, **{name: value}) for name, values in axes.items() for value in sorted(values)]
    return [line for i, line in enumerate(lines) if line not in lines[:i]]


def in_a_process(case: Case, device: str) -> int:
    """`measure` in a fresh process. ``RuntimeError`` when that ends without a result."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case)), "--device", device]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message: was it killed, for want of memory?"]
        raise RuntimeError(f"the measurement of {case} ended with status {done.returncode}: {reason[0]}")
    return int(done.stdout)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    for option, default, text in (
        ("--rows", [4, 8, 16], "images of an update"),
        ("--sides", [8, 12, 16], "sides of the finest grid, in tokens"),
        ("--codes", [512, 4096, 16384], "sizes of the vocabulary"),
    ):
        shown = " ".join(map(str, default))
        parser.add_argument(
            option, type=int, nargs="+", default=default, metavar="N", help=f"{text} (default: {shown})"
        )
    parser.add_argument("--micro-batch", type=int, default=2, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument("--logit-chunk", type=int, default=32, metavar="N", help="tokens a row (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder (default: %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one case as JSON, in a process of its own
    args = parser.parse_args(argv)
    if min(*args.rows, *args.sides, *args.codes, args.micro_batch, args.logit_chunk) < 1:
        parser.error("--rows, --sides, --codes, --micro-batch and --logit-chunk must be at least 1")
    with clear_errors():
        if not args.measure:  # which writes nothing
            require_folder(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors():
        device = get_device(args.device)
        if device.type == "cpu" and not RESET.exists():
            raise OSError("the peak of a process's memory on the CPU is read from /proc, which Linux has: use a GPU")
        if args.measure:
            print(measure(Case(**json.loads(args.measure)), args.device))
            return 0
        work = [replace(case, options=options) for case in cases(args) for options in columns(args).values()]
        measured = [
            {**asdict(case), "tokens": case.schedule.total_tokens, "bytes": in_a_process(case, args.device)}
            for case in tqdm(work, unit="process", dynamic_ncols=True)
        ]
    headers = ["Rows", "Tokens", "Vocabulary", *columns(args)]
    rows = []
    for first in range(0, len(measured), len(columns(args))):
        line = measured[first : first + len(columns(args))]
        cells = [f"{one['bytes'] / MIB:,.0f} MiB" for one in line]
        rows.append([f"{line[0][name]}" for name in ("rows", "tokens", "codes")] + cells)
    machine = {
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "products": "bf16" if has_bf16(device.type) else "fp32",
    }
    footer = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = f"{table(headers, rows)}\n\nPeak memory of an update, above what was held before it; {footer}.\n"
    print(text, end="")
    write_text(args.out / "memory.md", text)
    write_json(args.out / "memory.json", {"machine": machine, "measured": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
