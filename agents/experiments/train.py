"""Train one agent on VARText-v0, with every setting an option.

    vartext train --images 6400 --out runs/first
    vartext train --images 12800 --out runs/first --resume      # goes on to 12800 images in all
    vartext train --agent vmr+panw+mp --split 3 --alpha 0.8 --out runs/wrapped
    vartext train --support sampler --top-k 20 --guidance 2 --out runs/truncated
    accelerate launch --multi_gpu --num_processes 2 -m agents.cli train --images 6400 --out runs/two
    tensorboard --logdir runs

An agent is an algorithm and wrappers around it, from the inside out, joined by "+"; `vartext compare --agents` tells
which there are.

In --out: TensorBoard events; checkpoints/ (one every --save-every updates, the newest --save-total) and run.json (all
options), which --resume needs; policy.safetensors; best.safetensors, the policy with the best word accuracy on held-out
prompts, which is not what it was trained on; and at the end agent.zip, for ``agents.load``.
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
    add_track_option,
    clear_errors,
    option_of,
    require_at_least_one,
)
from agents.experiments.output import require_folder
from agents.experiments.run_file import COUNTS, DEFAULTS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext train")
    add_plugin_option(parser)
    parser.add_argument("--agent", help=f"such as vmr+panw+mp (default: {DEFAULTS['agent']})")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="(default: %(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with all options as they were but those given again; what "
        "differs is told, and agent, policy and seed stay",
    )
    parser.add_argument("--images", type=int, help=f"budget in reward calls (default: {COUNTS['images']})")
    for name, metavar, text in (
        ("save_every", "UPDATES", ""),
        ("save_total", "N", "checkpoints that are kept "),
        ("eval_every", "UPDATES", ""),
        ("eval_prompts", "N", "from the val split "),
    ):
        parser.rare.add_argument(option_of(name), type=int, metavar=metavar, help=f"{text}(default: {COUNTS[name]})")
    parser.add_argument("--seed", type=int, help=f"(default: {DEFAULTS['seed']})")
    add_model_options(parser)
    add_reward_options(parser)
    parser.set_defaults(reward=None, reward_kwargs=None)  # so that what is given again can be told apart
    add_regions_option(parser)
    add_prompts_option(parser)
    add_track_option(parser)
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
        require_at_least_one(**{n: getattr(args, n) for n in COUNTS if getattr(args, n) is not None})
    if not args.resume:
        vars(args).update({name: value for name, value in DEFAULTS.items() if getattr(args, name) is None})
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.training import run  # not above: it takes torch with it, and --help answers without

    return run(args)
