"""Look for the regime in which GRPO learns, on validation words: short runs over a grid, and what there is to learn.

    vartext sweep --learning-rate 2e-5 5e-5 --kl-coef 0.02 --updates 40
    vartext sweep --group-size 4 8 16 --json runs/sweep.json
    vartext sweep --signal 8
    vartext sweep --prefix-share 64
    vartext sweep --conflict 128

Options that take several values span a grid. Every row starts from the same base policy, prompts and noise; read the
differences with the standard error that is printed. ``--signal N`` trains nothing: it draws N independent batches and
prints the mean cosine between their gradients. Near zero means that an update is mostly noise, and that a small
learning rate, a KL term that pulls back, or more images have to carry the learning.

``--prefix-share N`` trains nothing either: for every split m it draws 4 prefixes for each of N prompts and 4 suffixes
for each prefix, and prints how much of the reward's variance within a prompt the prefix decides. That is what VMR's
prefix updates can learn, next to the share of the tokens that they have to learn it with.

``--conflict N`` measures, on one batch of N prompts, how much the gradients of the scales pull against each other, and
how far to trust that: see ``agents/conflict.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.experiments.options import Parser, add_model_options, clear_errors
from agents.experiments.output import require_file

GRID: dict[str, Any] = {
    "learning_rate": 5e-5,
    "kl_coef": 0.02,
    "group_size": 8,
    "prompts_per_update": 8,
    "temperature": 1.0,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext sweep")
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
    with clear_errors():
        require_file(args.json, "--json")
    args.grid = {name: getattr(args, name) for name in GRID}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.sweeping import run  # not above: it takes torch with it, and --help answers without

    return run(args)
