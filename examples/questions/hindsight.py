"""Does learning from what was read help? GRPO against GRPO with hindsight relabelling, at equal reward calls.

    python examples/questions/hindsight.py                            # three seeds, about half an hour on two cores
    python examples/questions/hindsight.py --preset full --seeds 0    # hours: one process of several, with a seed each
    python examples/questions/hindsight.py --hindsight-coef 0.3 --out runs/questions/hindsight-0.3

An image that reads LAB is a right answer to the prompt "LAB", whatever it was drawn for (hindsight instruction
relabelling, arXiv 2302.05206). Arms: grpo, and hindsight, which learns such images under the prompt that they are right
for beside GRPO's own loss (hindsight_agent.py), with all of their tokens or with those under the letters that were not
asked for. The first is what the others are compared with. Beside the scores: the planted faults repaired, and how many
images were relabelled.

With --ray, give --plugin examples/questions/hindsight_agent.py too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from hindsight_agent import TOKENS
from question import Arm, Comparison, clear_errors, parse, run, table, write_results

from agents.experiments import tables
from agents.experiments.cells import Result
from agents.experiments.figures import read_curve, run_folder

REFERENCE = "grpo"
ARMS = [Arm(REFERENCE, "grpo"), *(Arm(f"hindsight-{of}", "hindsight", {"hindsight_tokens": of}) for of in TOKENS)]
TITLE = "Does learning from what was read help?"
ABOUT = """
An image that shows other words than asked for, and was read with certainty, is a right answer to the prompt with these
words. GRPO does not use that. The other arms learn such images under that prompt too, beside GRPO's loss on the prompt
asked, with an advantage of 1 and PPO's clip: all tokens, or those under the letters that were not asked for.
"""


def relabelled(comparison: Comparison, runs: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Of each arm with hindsight: images relabelled an update, their share, and the share of their tokens that learned.

    Means over updates and seeds; the tokens' over updates with any.
    """
    found: dict[str, dict[str, float]] = {}
    for arm, mine in tables.by_agent(runs).items():
        if arm == REFERENCE:
            continue
        files = [run_folder(comparison.out, arm, result["seed"]) / "progress.csv" for result in mine]
        found[arm] = {}
        for name in ("images", "share", "tokens"):
            values = np.concatenate([read_curve(file, "budget/images", f"hindsight/{name}")[1] for file in files])
            found[arm][name] = float(values.mean()) if len(values) else 0.0
    return found


def relabelled_table(found: dict[str, dict[str, float]]) -> str:
    rows = [[arm, f"{of['images']:.1f}", f"{of['share']:.1%}", f"{of['tokens']:.0%}"] for arm, of in found.items()]
    return table(["Arm", "Images relabelled an update", "Of all images", "Of their tokens learned"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "hindsight", argv, [arm.recipe for arm in ARMS])
    with clear_errors():
        comparison = Comparison(args)

    def write(base: Result, runs: list[Result]) -> str:
        by_arm = {arm: tables.repaired_by(base, of) for arm, of in tables.by_agent(runs).items()}
        repaired = tables.repair_table(by_arm, "Arm")
        found = relabelled(comparison, runs)
        sections = ["## Planted faults repaired", repaired] if repaired else []
        sections += ["## Images relabelled", relabelled_table(found)] if found else []
        return write_results(comparison, TITLE, ABOUT, REFERENCE, base, runs, sections, relabelled=found)

    return run(comparison, ARMS, args.seeds, write)


if __name__ == "__main__":
    sys.exit(main())
