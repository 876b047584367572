"""Does it pay not to throw VMR's suffixes away? Tree GRPO against VMR and vanilla GRPO, at equal reward calls.

    python examples/questions/tree.py                             # three seeds, about half an hour on two cores
    python examples/questions/tree.py --preset full --seeds 0     # hours: one process of several, with a seed each
    python examples/questions/tree.py --forks 3 --branching "(4, 2)" --out runs/questions/tree-m3

VMR draws K suffixes to value a prefix and throws them away; Tree GRPO learns from every image it decodes, all scales
at once, with the soft value of each node against its siblings' (agents/tree.py). Arms: grpo, vmr+panw+mp, tree,
tree+panw+mp. The first is what the others are compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from question import Arm, Comparison, clear_errors, parse, run, write_results

from agents.experiments.cells import Result

ARMS = [Arm(recipe, recipe) for recipe in ("grpo", "vmr+panw+mp", "tree", "tree+panw+mp")]
REFERENCE = "grpo"
TITLE = "Does it pay not to throw VMR's suffixes away?"
ABOUT = """
VMR values a prefix by K suffixes, which it does not learn from. Tree GRPO forks too, gives each node the soft value of
its leaves (eq. 10, level by level), and every image trains every scale: it makes as many updates as vanilla GRPO of
the same reward calls.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "tree", argv, [arm.recipe for arm in ARMS])
    with clear_errors():
        comparison = Comparison(args)

    def write(base: Result, runs: list[Result]) -> str:
        return write_results(comparison, TITLE, ABOUT, REFERENCE, base, runs)

    return run(comparison, ARMS, args.seeds, write)


if __name__ == "__main__":
    sys.exit(main())
