"""Callbacks for `Agent.learn`, next to those of Stable-Baselines3."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.base import Agent
from agents.checkpoints import Checkpoints, updates_of
from agents.common.files import replacing
from agents.evaluation import Evaluation, evaluate, held_out_scenes
from agents.policies.base import Policy
from agents.sampling import Decoding
from var_env.scenes import Scene
from var_env.seeding import as_seed

LOWER_IS_BETTER = ("nothing_read",)  # of the metrics in Evaluation.means()


class AgentCallback(BaseCallback):
    """A callback that knows its model to be an `Agent`."""

    model: Agent

    def _on_step(self) -> bool:
        return True


class StopAfter(AgentCallback):
    """Ends training when the first of these budgets is spent; the rollout that spends it is still learned from.

    Budgets count the agent's life, so that a resumed run ends where an uninterrupted one does.

    Args:
        images: decoded so far, each scored once.
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
            return True  # in the middle of an image
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
        decoding: how images are drawn; default as in training.
        reference: a policy to estimate the KL to, logged as ``eval/kl`` in nats an image.

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
        reference: Policy | None = None,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be at least 1 update, got {every}")
        self.every, self.split, self.seed = every, split, as_seed(seed)
        self.count = prompts if isinstance(prompts, int) else len(prompts)
        self.scenes = [] if isinstance(prompts, int) else list(prompts)
        self.decoding, self.batch_size, self.reference = decoding, batch_size, reference
        self.history: list[tuple[int, Evaluation]] = []

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % self.every == 0 and not self.is_up_to_date:  # resampling starts several rollouts
            self.evaluate_and_log()

    def _on_training_end(self) -> None:
        if not self.is_up_to_date:
            self.evaluate_and_log()

    def evaluate_and_log(self) -> None:
        """Evaluate, and write what was found at the images decoded so far, where a curve shows it."""
        self.evaluate()
        self.logger.record("eval/images", self.model.images_decoded)
        self.logger.dump(self.model.images_decoded)

    @property
    def is_up_to_date(self) -> bool:
        """Whether there was no update since the last evaluation."""
        return bool(self.history) and self.history[-1][0] == self.model.n_updates

    def evaluate(self) -> None:
        """Evaluate now, and record."""
        agent = self.model
        assert agent.env is not None
        self.scenes = self.scenes or held_out_scenes(agent.env.world, self.count, self.seed, self.split)
        decoding = self.decoding or agent.decoding
        result = evaluate(
            agent.best_policy,
            agent.env,
            self.scenes,
            decoding,
            self.seed,
            self.batch_size,
            agent.best_of,
            reference=self.reference,
        )
        self.history.append((agent.n_updates, result))
        for name, value in (result.means() | result.shares()).items():
            self.logger.record(f"eval/{name}", value)
        if result.kl is not None:
            self.logger.record("eval/kl", float(result.kl.mean()))


class BestCheckpoint(HeldOutEval):
    """Evaluates as `HeldOutEval` does, and keeps the policy with the best value so far in a file of weights.

    Training raises the reward whether or not the images become better, so the choice is made by a metric that is not
    the reward. What is kept is the agent's ``best_policy``, and the first of equals. Logs ``eval/best_word_accuracy``,
    or whatever the metric is called.

    The best value is not part of an agent's file. It stands beside the weights, in a JSON file of the same name, from
    which ``go_on()`` takes it when a run is resumed.

    Args:
        path: of the safetensors file, replaced as a whole. For ``VARTextPolicy.load`` and ``evaluate.py --policy``.
        metric: a name in ``Evaluation.means()``. Higher is better, but for "nothing_read".
        held_out: options of `HeldOutEval`.

    Attributes:
        best: the value of the policy in the file, ``None`` before there is one.

    Raises:
        ValueError: at the first evaluation, when there is no such metric.
    """

    def __init__(self, path: str | Path, metric: str = "word_accuracy", **held_out: Any) -> None:
        super().__init__(**held_out)
        self.path, self.metric = Path(path), metric
        self.best: float | None = None

    def go_on(self) -> None:
        """Take up the best value of an earlier part of the run, if there was one."""
        if self.path.with_suffix(".json").is_file():
            about = json.loads(self.path.with_suffix(".json").read_text())
            self.best = about["value"] if about["metric"] == self.metric else None

    def evaluate(self) -> None:
        super().evaluate()
        means = self.history[-1][1].means()
        if self.metric not in means:
            raise ValueError(f"unknown metric {self.metric!r}: choose one of {', '.join(means)}")
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        if self.best is None or sign * means[self.metric] > sign * self.best:
            self.model.processes.write(self.model.best_policy, self.write)
            self.best = means[self.metric]
            about = {"metric": self.metric, "value": self.best, "updates": self.model.n_updates, "split": self.split}
            if self.model.processes.is_first:
                with replacing(self.path.with_suffix(".json")) as part:
                    part.write_text(json.dumps(about) + "\n")
        self.logger.record(f"eval/best_{self.metric}", self.best)

    def write(self) -> None:
        """The best policy, to its file."""
        with replacing(self.path) as part:
            self.model.best_policy.save(part)


class CheckpointEvery(AgentCallback):
    """Writes a checkpoint before the first update, after every n-th and at the end, see ``agents/checkpoints.py``.

    Put it before callbacks that evaluate: a run that goes on then evaluates again what was not logged. At the end means
    whenever ``learn()`` returns, so that with `StopOnSignal` a run that is asked to stop loses nothing. After an error
    the last one stays as it is.

    Args:
        folder: for the checkpoints.
        updates: between two of them, at least 1.
        keep: so many stay.

    Raises:
        TypeError: in the beginning, when a setting of the agent cannot be stored.
        ValueError: in the beginning, when the folder holds checkpoints of a later update, and so of another run.
        OSError: when one cannot be written. The earlier ones are as they were.
    """

    def __init__(self, folder: str | Path, updates: int = 20, keep: int = 2) -> None:
        super().__init__()
        if updates < 1:
            raise ValueError(f"updates must be at least 1, got {updates}")
        self.checkpoints, self.updates = Checkpoints(folder, keep), updates
        self.saved: int | None = None  # after so many updates

    def _on_training_start(self) -> None:
        later = [path for path in self.checkpoints.paths() if updates_of(path) > self.model.n_updates]
        if later and self.model.processes.is_first:
            raise ValueError(
                f"{later[0]} is of another run, or of a later part of this one: go on from it with Checkpoints.load(), "
                "or choose another folder"
            )

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % self.updates == 0:
            self.save()

    def _on_training_end(self) -> None:
        self.save()

    def save(self) -> None:
        """Write one now, unless there was no update since the last."""
        if self.model.n_updates != self.saved:  # the batches of one update are not told apart
            self.checkpoints.save(self.model)
            self.saved = self.model.n_updates


class Interrupt:
    """SIGINT (Ctrl-C) and SIGTERM inside the ``with`` block: the first asks for a stop in good order, which
    `StopOnSignal` gives; the next raises KeyboardInterrupt.

    Cluster managers send SIGTERM before they take a machine back. Only Python's main thread may enter the block.

    Args:
        notice: printed at the first signal.

    Attributes:
        requested: whether there was a signal.
    """

    def __init__(self, notice: str = "stopping after this update; once more gives up") -> None:
        self.notice, self.requested = notice, False

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write(f"\n{signal.Signals(number).name}: {self.notice}", file=sys.stderr)


class StopOnSignal(AgentCallback):
    """Ends training after the update that the signal of an `Interrupt` fell into, so that a resumed run is exact."""

    def __init__(self, interrupt: Interrupt) -> None:
        super().__init__()
        self.interrupt = interrupt

    def _on_step(self) -> bool:
        envs = self.locals["envs"]
        return not self.interrupt.requested or envs.t < len(envs.schedule)


__all__ = ["BestCheckpoint", "CheckpointEvery", "HeldOutEval", "Interrupt", "StopAfter", "StopOnSignal"]
