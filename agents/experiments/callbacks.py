"""What watches a run from the command line: the progress bar, and evaluations that print a line."""

from __future__ import annotations

import sys

from tqdm import tqdm

from agents.base import Agent
from agents.callbacks import AgentCallback, HeldOutEval
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

    In TensorBoard an evaluation stands at the step of the next update; the curves want its own place.
    """

    def evaluate(self) -> None:
        super().evaluate()
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
    """A progress bar over the pictures of the budget."""

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
