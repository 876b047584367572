"""Callbacks for `Agent.learn`, next to those of Stable-Baselines3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback

from agents.sampling import Decoding
from var_env.scenes import Scene

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.evaluation import Evaluation


class AgentCallback(BaseCallback):
    """A callback that knows its model to be an `Agent`."""

    model: Agent

    def _on_step(self) -> bool:
        return True


class StopAfter(AgentCallback):
    """Ends training when the first of these budgets is spent; the rollout that spends it is still learned from.

    Budgets count the agent's life, so that a resumed run ends where an uninterrupted one does.

    Args:
        images: pictures decoded, each scored once.
        updates: policy updates.
        seconds: of sampling, scoring and updating; evaluations do not count.
    """

    def __init__(self, images: int | None = None, updates: int | None = None, seconds: float | None = None) -> None:
        super().__init__()
        if images is None and updates is None and seconds is None:
            raise ValueError("StopAfter needs a budget: images=, updates= or seconds=")
        self.images, self.updates, self.seconds = images, updates, seconds

    def _on_step(self) -> bool:
        agent = self.model
        if self.locals["envs"].t < len(self.locals["envs"].schedule):
            return True  # in the middle of a picture
        spent = {"images": agent.images_decoded, "updates": agent.n_updates + 1, "seconds": agent.seconds}
        return not any(
            limit is not None and spent[name] >= limit
            for name, limit in (("images", self.images), ("updates", self.updates), ("seconds", self.seconds))
        )


class HeldOutEval(AgentCallback):
    """Evaluates on held-out scenes before the first update, after every n-th and at the end, and logs ``eval/``.

    Beside the reward stand word accuracy and NED, which training does not see: they tell whether to trust it.

    Args:
        every: updates between two evaluations.
        prompts: number of scenes, or the scenes themselves.
        split, seed: where the scenes are drawn from, and the noise; the same for every agent.
        decoding: how pictures are drawn; default as in training.

    Attributes:
        history: (update, Evaluation) pairs.
    """

    def __init__(
        self,
        every: int = 20,
        prompts: int | list[Scene] = 64,
        split: str = "val",
        seed: int = 0,
        decoding: Decoding | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}")
        self.every, self.split, self.seed = every, split, seed
        self.count = prompts if isinstance(prompts, int) else len(prompts)
        self.scenes = [] if isinstance(prompts, int) else list(prompts)
        self.decoding, self.batch_size = decoding, batch_size
        self.history: list[tuple[int, Evaluation]] = []

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % self.every == 0:
            self.evaluate()

    def _on_training_end(self) -> None:
        if not self.history or self.history[-1][0] != self.model.n_updates:
            self.evaluate()
            self.logger.dump(self.model.num_timesteps)

    def evaluate(self) -> None:
        """Evaluate now, and record."""
        from agents.evaluation import evaluate, held_out_scenes

        agent = self.model
        assert agent.env is not None
        self.scenes = self.scenes or held_out_scenes(agent.env.world, self.count, self.seed, self.split)
        decoding = self.decoding or agent.decoding
        result = evaluate(agent.best_policy, agent.env, self.scenes, decoding, self.seed, self.batch_size)
        self.history.append((agent.n_updates, result))
        for name, value in result.means().items():
            self.logger.record(f"eval/{name}", value)


class SampleProgressBar(ProgressBarCallback):
    """The progress bar over environment steps of all rows that an agent samples, forks included."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self._shown)
        self._shown = self.model.num_timesteps
        return True


__all__ = ["HeldOutEval", "StopAfter"]
