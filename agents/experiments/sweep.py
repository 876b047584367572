"""Look for the regime in which GRPO learns, on validation words: short runs over a grid, and what there is to learn.

    vartext sweep --learning-rate 2e-5 5e-5 --kl-coef 0.02 --updates 40
    vartext sweep --group-size 4 8 16 --json runs/sweep.json
    vartext sweep --signal 8
    vartext sweep --prefix-share 64
    vartext sweep --fault-share 64 --json runs/faults.json --png runs/faults.png
    vartext sweep --conflict 128
    vartext sweep --neighbour-width 0.1 0.25 0.5 1

Options that take several values span a grid. Every row starts from the same base policy, prompts and noise; read the
differences with the standard error that is printed.

``--signal N`` trains nothing: it draws N independent batches, of 64 images unless told otherwise, and prints the mean
cosine between GRPO's gradients, the learned temperatures left out. Near zero means that an update is mostly noise, and
that a small learning rate, a KL term that pulls back, or more images have to carry the learning. It is a gate of the
world, PASS or FAIL, and the exit status is 1 when it is missed: at least 0.05, with a standard error of at most 0.01 by
the jackknife over batches. Where N is too small for the error, the table says which N to try.

``--prefix-share N`` trains nothing either: for every split m it draws 4 prefixes for each of N prompts and 4 suffixes
for each prefix, and prints how much of the reward's variance within a prompt the prefix decides. That is what VMR's
prefix updates can learn, next to the share of the tokens that they have to learn it with.

``--fault-share N`` measures in the same way at which grid planted faults are decided (docs/faults.md): for every split
m the share of the variance of right or wrong that the prefix decides, for affected letters, words that may be missing
and affected inks, on N validation prompts. ``--json`` writes it, ``--png`` draws it. A raster has too many splits to
try all: eight stand for them.

``--conflict N`` measures, on one batch of N prompts, how much the gradients of the scales pull against each other, and
how far to trust that: see ``agents/conflict.py``.

``--neighbour-width W ...`` measures how wide the neighbourhoods of ``soft_codes`` may be: for each width how often
other words are read when all tokens of an image are swapped for neighbours, one image for each of ``--prompts``.
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
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--signal", type=int, metavar="N", help="compare N gradients, at least 3, and train nothing")
    modes.add_argument("--prefix-share", type=int, metavar="N", help="N prompts, at least 2, and train nothing")
    modes.add_argument("--fault-share", type=int, metavar="N", help="N prompts, at least 2, and train nothing")
    modes.add_argument("--conflict", type=int, metavar="N", help="N prompts, at least 2, and train nothing")
    modes.add_argument(
        "--neighbour-width", type=float, nargs="+", metavar="W", help="widths of soft_codes to try, and train nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the shares of --fault-share")
    for name, default in GRID.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, nargs="+", type=type(default), default=[default], help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.updates < 0 or args.prompts < 2 or (args.signal is not None and args.signal < 3):
        parser.error("--updates must be at least 0, --prompts at least 2 and --signal at least 3")
    if any(prompts is not None and prompts < 2 for prompts in (args.prefix_share, args.fault_share, args.conflict)):
        parser.error("--prefix-share, --fault-share and --conflict need at least 2 prompts")
    if args.json and (args.prefix_share or args.conflict):
        parser.error("--prefix-share and --conflict write no file: leave out --json")
    if args.png and not args.fault_share:
        parser.error("--png draws what --fault-share measures: add --fault-share N")
    with clear_errors():
        require_file(args.json, "--json")
        require_file(args.png, "--png", ".png")
    args.grid = {name: getattr(args, name) for name in GRID}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.sweeping import run  # not above: it takes torch with it, and --help answers without

    return run(args)
