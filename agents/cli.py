"""The command ``vartext``: everything from pretraining to the tables, one word each.

vartext compare                                  # agents against each other, less than ten minutes on two cores
vartext train --agent vmr+panw --out runs/first
vartext evaluate --policy runs/first/policy.safetensors
vartext COMMAND --help                           # what most people need; --help-all tells the rest
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

COMMANDS = {  # each a module of agents/experiments with a main()
    "compare": "train agents with the same budget and compare them on held-out prompts",
    "ablate": "the paper's ablations, a table and a figure each",
    "report": "write the report.html of a results folder again",
    "train": "train one agent",
    "evaluate": "measure a policy on held-out prompts",
    "tune": "search for the settings of agents, with as many runs for each",
    "bench": "time the environment, the reward, sampling and updates",
    "play": "watch an image grow scale by scale",
    "pretrain": "train the tokenizer and the base policy",
    "sweep": "short runs over a grid of settings, and what there is to learn",
}


def commands() -> dict[str, str]:
    """Those that are here, with what they do."""
    return {name: text for name, text in COMMANDS.items() if find_spec(f"agents.experiments.{name}") is not None}


def usage() -> str:
    """What ``vartext --help`` prints."""
    lines = [f"  {name:<10} {text}" for name, text in commands().items()]
    return "\n".join(["usage: vartext COMMAND [options]", "", (__doc__ or "").strip(), "", "commands:", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        print(usage())
        return 0
    if name not in commands():
        print(f"error: there is no command {name!r}: choose of {', '.join(commands())}", file=sys.stderr)
        return 2
    # Imported here: a command's --help needs its own module alone.
    return import_module(f"agents.experiments.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
