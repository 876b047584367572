"""Write report.html of a results folder again, a page to look at in a browser.

    vartext report runs/compare-quick
    vartext report results/quick                # a folder without its runs: as far as its files go

`vartext compare`, `ablate` and `tune` and the scripts of examples/questions write the page themselves, beside
results.md. It is one file, which opens without a network: the tables, the curves, the faults repaired, and the same
prompts drawn by all agents, with what was read and how each image grew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import Parser, clear_errors


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext report")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the --out of the command that made it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments import html_report  # not above: it takes torch with it, and --help answers without

    with clear_errors():
        print(html_report.write(args.folder))
    return 0
