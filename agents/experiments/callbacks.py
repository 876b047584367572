"""What watches a run from the command line: the progress bar, and evaluations that print a line."""

from __future__ import annotations

import math
import sys
from typing import Any

from tqdm import tqdm

from agents.base import Agent
from agents.callbacks import AgentCallback, HeldOutEval
from agents.evaluation import Evaluation
from agents.repair import repaired
from agents.wrapper import Wrapper


def budget(agent: Agent | Wrapper) -> dict[str, float]:
    """What the agent has spent so far: the four axes of a learning curve."""
    return {
        "images": agent.images_decoded,
        "tokens": agent.tokens_sampled,
        "updates": agent.n_updates,
        "seconds": agent.seconds,
    }


class CurveEval(HeldOutEval):
    """Held-out evaluation that also logs what had been spent by then, as ``eval/images`` and so on, and prints a line.

    Args:
        base: the evaluation of the policy before training on the same scenes, for ``repair/``: the share of each family
            of planted faults that is repaired since then, see `agents.repair`.
        held_out: options of `HeldOutEval`.
    """

    def __init__(self, *options: Any, base: Evaluation | None = None, **held_out: Any) -> None:
        super().__init__(*options, **held_out)
        self.base = base

    def evaluate(self) -> None:
        super().evaluate()
        found = self.history[-1][1]
        if self.base is not None and self.base.beside and found.beside:
            for family, share in repaired([self.base.beside], [found.beside], n=1).items():
                if not math.isnan(share[0]):
                    self.logger.record(f"repair/{family}", share[0])
        spent = budget(self.model)
        for axis, value in spent.items():
            self.logger.record(f"eval/{axis}", value)
        if not self.model.processes.is_first:
            return
        means = self.history[-1][1].means()
        tqdm.write(
            f"  {spent['images']:>7} images: {self.split} reward {means['reward']:.3f}, word accuracy "
            f"{means['word_accuracy']:.3f}, NED {means['ned']:.3f}, nothing read {means['nothing_read']:.1%}",
            file=sys.stderr,
        )


class ImageBar(AgentCallback):
    """A progress bar over the images of the budget."""

    def __init__(self, images: int, label: str) -> None:
        super().__init__()
        self.images, self.label = images, label

    def _on_training_start(self) -> None:
        self.bar = tqdm(
            total=self.images,
            initial=self.model.images_decoded,
            unit="image",
            desc=self.label,
            dynamic_ncols=True,
            disable=not self.model.processes.is_first,
        )

    def _on_step(self) -> bool:
        self.bar.update(self.model.images_decoded - self.bar.n)
        return True

    def _on_training_end(self) -> None:
        self.bar.close()
