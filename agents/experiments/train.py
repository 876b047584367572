"""Train one agent on VARText-v0, with every setting an option.

    vartext train --images 6400 --out runs/first
    vartext train --images 12800 --out runs/first --resume      # goes on to 12800 images in all
    vartext train --agent vmr+panw+mp --split 3 --alpha 0.8 --out runs/wrapped
    vartext train --support sampler --top-k 20 --guidance 2 --out runs/truncated
    accelerate launch --multi_gpu --num_processes 2 -m agents.cli train --images 6400 --out runs/two
    tensorboard --logdir runs

An agent is an algorithm and wrappers around it, from the inside out, joined by "+"; `vartext compare --agents` tells
which there are.

In --out: TensorBoard events, checkpoints/ (one every --save-every updates, the newest --save-total: all that --resume
needs), policy.safetensors, best.safetensors, the policy with the best word accuracy on held-out prompts, which is not
what it was trained on, and at the end agent.zip, for ``agents.load``.
``vartext evaluate --policy runs/first/policy.safetensors`` measures the result.

Ctrl-C, and the SIGTERM of a cluster, finish the update and save; --resume then goes on as if nothing had happened, bit
for bit on a CPU. So it does from the last checkpoint when training was killed or ended with an error: see
docs/scaling.md, also for several processes and machines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.common.schedules import SCHEDULES
from agents.experiments.agent_options import add_agent_options, add_plugin_option
from agents.experiments.options import (
    Parser,
    add_decoding_options,
    add_model_options,
    add_prompts_option,
    add_regions_option,
    add_reward_options,
    clear_errors,
    require_at_least_one,
)
from agents.experiments.output import require_folder

COUNTS = ("images", "save_every", "save_total", "eval_every", "eval_prompts")  # options of at least 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext train")
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
    parser.rare.add_argument("--save-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.rare.add_argument(
        "--save-total", type=int, default=2, metavar="N", help="checkpoints that are kept (default: %(default)s)"
    )
    parser.rare.add_argument("--eval-every", type=int, default=20, metavar="UPDATES", help="(default: %(default)s)")
    parser.rare.add_argument("--eval-prompts", type=int, default=64, help="from the val split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_model_options(parser)
    add_reward_options(parser)
    add_regions_option(parser)
    add_prompts_option(parser)
    add_decoding_options(parser)
    parser.add_later(lambda _: add_agent_options(parser))
    group = parser.rare_group("the learning rate over time")
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
        require_folder(args.out)
        require_at_least_one(**{n: getattr(args, n) for n in COUNTS})
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.training import run  # not above: it takes torch with it, and --help answers without

    return run(args)
