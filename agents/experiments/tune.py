"""Find settings for each agent with the same number of short trial runs, on validation prompts.

    vartext tune                                            # the four agents of compare, 8 trials each
    vartext tune --agents grpo tree --trials 16 --out runs/tune-two
    vartext tune --ray                                      # many runs at a time
    vartext compare --settings runs/tune/tuned.json         # takes what was found

Every agent gets the same trials: points of one Sobol sequence over the learning rate, the weight of the KL and the
temperature of the sampler in training. VMR takes two more coordinates of the same points, its split m and its K
(suffixes that value a prefix). The best trial by mean reward on the validation prompts gives the agent's settings. No
test prompt is looked at.

In --out: tuned.json (the settings of each agent, with every trial), results.md (a table of the trials), and a folder
for each run. A call that was stopped goes on where it was. To make what was found the default of compare, copy
tuned.json to agents/experiments/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.agent_options import add_plugin_option
from agents.experiments.compare import AGENTS
from agents.experiments.options import Parser, clear_errors, require_at_least_one
from agents.experiments.run_options import Preset, add_run_options, finish

PRESET = Preset(test_prompts=192, val_prompts=8, eval_every=1000)  # no curves, and a verdict on validation prompts


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext tune")
    parser.add_argument("--agents", nargs="+", metavar="AGENT", default=AGENTS, help=f"(default: {' '.join(AGENTS)})")
    add_plugin_option(parser)
    parser.add_argument("--trials", type=int, default=8, help="runs of each agent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100, help="of all runs; none of compare's (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="(default: %(default)s)")
    add_run_options(parser, {"tune": PRESET})
    args = parser.parse_args(argv)
    with clear_errors():
        require_at_least_one(trials=args.trials)
        finish(args, PRESET)
        args.agents = list(dict.fromkeys(args.agents))
    args.seeds = [args.seed]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.tuning import run  # not above: it takes torch with it, and --help answers without

    return run(args)
