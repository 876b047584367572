"""The paper's ablations: a table and a figure each, all from the same base policy with the same budget.

    vartext ablate                            # all of them, three seeds: about 90 minutes on two cores
    vartext ablate m                          # the middle step: Table 3a and Figure 2
    vartext ablate alpha --fine               # Table 3b, and 0.2 to 1.4 in steps of 0.1
    vartext ablate mp alternation k --seeds 0 1 2 --out runs/ablate
    vartext ablate m alpha --seeds 0 1 2 --out runs/ablate --ray    # many runs at a time
    tensorboard --logdir runs

    m            VMR with every split (Table 3a, Figure 2)
    alpha        VMR + PANW with every exponent (Table 3b, Figure 7a)
    mp           VMR + PANW with and without MP (Table 4a, Figure 7b)
    alternation  VMR + PANW, prefix and suffix updates in turns or in two blocks (Table 4b)
    k            VMR + PANW + MP with every number of suffixes a prefix (Table 5)

What a table does not change is as `vartext tune` found it for VMR, for VMR + PANW, or for VMR + PANW + MP.

In --out: report.html (all of it to look at in a browser), results.md (the tables, with the paper's rows beside ours),
results.json, a figure each (m.png, ...), tokens_per_step.png (Figure 1), and for each run, a cell and a seed, what
`vartext compare` writes for one. A cell's folder is named by what it is, so that tables share cells, and a finished one
is not trained again: the same command goes on after Ctrl-C, and the report also shows the other tables whose cells are
all there.

Several processes may share one --out when each has tables or --seeds of its own that share no cell: a process trains
nothing but its own runs and files are replaced as a whole. A last call with all tables and seeds collects everything.
With --ray (pip install "vartext[ray]") one call trains many runs at a time, on this machine or in a cluster, as
`vartext compare` does; ray_runs.py tells more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import Parser, clear_errors
from agents.experiments.output import require_folder
from agents.experiments.run_options import Preset, add_run_options, add_settings_option, finish

TABLES = ("m", "alpha", "mp", "alternation", "k")  # see `ablations.TABLES`
PRESET = Preset(images=2560, test_prompts=512, val_prompts=128)
SEEDS = [0, 1, 2]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext ablate")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--fine", action="store_true", help="alpha from 0.2 to 1.4 in steps of 0.1, too")
    seeds = " ".join(map(str, SEEDS))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=SEEDS, help=f"(default: {seeds})")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="(default: %(default)s)")
    add_settings_option(parser)
    add_run_options(parser, {"ablate": PRESET})
    args = parser.parse_args(argv)
    with clear_errors():
        require_folder(args.out)
        finish(args, PRESET)
        unknown = [name for name in args.tables if name not in TABLES]
        if unknown:
            raise ValueError(f"unknown table {unknown[0]!r}: choose of {', '.join(TABLES)}")
    args.tables = list(dict.fromkeys(args.tables or TABLES))
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.ablations import run  # not above: it takes torch with it, and --help answers without

    return run(args)
