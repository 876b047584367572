"""Train agents from the same base policy with the same budget and compare them on the same held-out prompts.

    vartext compare                                  # less than ten minutes on two cores
    vartext compare --preset full --out runs/full    # hours: five seeds, a larger budget; --ray for many at a time
    vartext compare --preset paper --images 6400     # the paper's batches and sampler, section 4.1
    vartext compare --agents                         # lists the agents
    vartext compare --agents grpo vmr+panw+mp stage ppo reinforce rloo
    vartext compare --agents grpo+panw --alpha 0.8 --images 6400 --out runs/panw-alone
    vartext compare --plugin my_agent.py --agents grpo mine vmr+mine
    tensorboard --logdir runs                                   # scalars, images and texts while it trains

An agent is an algorithm and wrappers around it, joined by "+". The default is the paper's method step by step: grpo,
vmr, vmr+panw, vmr+panw+mp. docs/agents.md tells them apart. Your own joins with one decorator, see
examples/custom_agent.py.

In --out: report.html (all of it to look at in a browser: tables, curves, the same prompts drawn by all agents),
results.md (the tables), results.json (settings, versions, every score), curves.png, budgets.png (the held-out curves
against images, tokens, updates and seconds), frontier.png (against the KL to the base policy), before_after.png, and
for each run AGENT/seedK/ with TensorBoard events, progress.csv, policy.safetensors, result.json, and the images of a
few prompts as they grew, gallery.png and .json.

All agents start from the same weights, see the same training prompts in the same order, decode alike, and are
evaluated with the same noise on test prompts, whose words are in no training prompt. The budget is counted in images
decoded and scored: the K suffixes by which VMR values a prefix cost K.

Ctrl-C, or SIGTERM, finishes the update, evaluates what has been learned so far, writes everything and exits with status
130; a second one skips that evaluation. The same command with the same --out then goes on where it was. So it does when
it was killed, from the last checkpoint, one every --save-every updates, with the same result.

Several processes may share one --out when each has --seeds or --agents of its own: a process trains nothing but its own
runs, files are replaced as a whole, and the tables and images show the runs of the process that wrote them last. A
last call with all agents and seeds trains nothing and collects everything.

With --ray (pip install "vartext[ray]") one call trains as many runs at a time as there are CPUs, or shares of GPUs
(--ray-gpus), on this machine or in a cluster. A run whose worker dies goes on from its last checkpoint, elsewhere if
need be. With as many threads as without Ray, the scores are the same. ray_runs.py tells more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.experiments.agent_options import add_plugin_option
from agents.experiments.cells import AXES, Result
from agents.experiments.options import Parser, clear_errors, option_of
from agents.experiments.output import require_folder
from agents.experiments.run_options import Preset, add_run_options, add_settings_option, finish

AGENTS = ("grpo", "vmr", "vmr+panw", "vmr+panw+mp")  # the paper's method, step by step
PRESETS: dict[str, Preset] = {
    "quick": Preset(schedule="constant", warmup=0.0),  # its settings were found so, and a rate that falls costs it more
    "full": Preset(images=6400, test_prompts=512, val_prompts=128, eval_every=25),
    # Section 4.1 of the paper: 1,200 updates of 16 x 16 images, and its sampler. The learning rates that it names, 1e-6
    # and 1e-5, are those of a network a thousand times as large; --learning-rate 1e-5 takes the larger one.
    "paper": Preset(
        images=307_200,
        group_size=16,
        prompts_per_update=16,
        guidance=5.0,
        top_k=2,
        top_p=0.9,
        test_prompts=512,
        val_prompts=128,
        eval_every=5,
    ),
}
METHOD: dict[str, dict[str, Any]] = {  # settings of agents that a preset brings; options that are given come first
    "paper": {"split": "quarter", "suffix_samples": 2, "eta": 1.0, "prefix_updates": 3, "suffix_updates": 1}
    | {"alpha": 0.6, "weight_decay": 0.05}
}
SEEDS = {"quick": [0], "full": [0, 1, 2, 3, 4], "paper": [0, 1, 2, 3, 4]}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext compare")
    parser.add_argument(
        "--agents",
        nargs="*",
        metavar="AGENT",
        default=AGENTS,
        help=f"without names: list what there is (default: {' '.join(AGENTS)})",
    )
    add_plugin_option(parser)
    add_settings_option(parser)
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="one run each (default: 0 in quick, 0 1 2 3 4 in others)"
    )
    parser.add_argument("--out", type=Path, help="folder for all that is written (default: runs/compare-PRESET)")
    parser.rare.add_argument(
        "--x-axis", choices=list(AXES), default="images", help="of curves.png (default: %(default)s)"
    )
    add_run_options(parser, PRESETS)
    args = parser.parse_args(argv)
    from agents import recipes  # not above: the agents take torch with them, and --help answers without

    if not args.agents:
        print(recipes.listing())
        sys.exit()
    with clear_errors():
        finish(args, PRESETS[args.preset])
        args.agents = list(dict.fromkeys(args.agents))
        unused = args.method.keys() - {name for agent in args.agents for name in recipes.options_in(agent)}
        if unused:
            raise ValueError(f"none of {', '.join(args.agents)} has the option {option_of(min(unused))}: leave it out")
        args.method = METHOD.get(args.preset, {}) | args.method
    args.seeds = list(dict.fromkeys(args.seeds or SEEDS[args.preset]))
    args.out = args.out or Path("runs") / f"compare-{args.preset}"
    with clear_errors():
        require_folder(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments import compare_report
    from agents.experiments.runs import Comparison

    with clear_errors():
        comparison = Comparison(args)
        plan = [comparison.cell(agent, seed) for agent in args.agents for seed in args.seeds]
    method: dict[str, Any] = {name: value for cell in plan for name, value in cell.method.items()}
    described = {**comparison.described, "agents": args.agents, **method}

    def write(base: Result, results: list[Result]) -> str:
        tables = compare_report.write_report(args.out, described, base, results, args.x_axis)
        files = "report.html, results.md, results.json, curves.png, budgets.png, before_after.png"
        return f"{tables}\n\n{args.out}: {files}; tensorboard --logdir {args.out}"

    return comparison.run(plan, write)
