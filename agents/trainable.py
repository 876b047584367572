"""The weights of an agent: its policy, their average, the optimiser, and their shards on several processes."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from stable_baselines3.common import utils
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from agents.common import processes
from agents.parameter_groups import group_names, regrouped
from agents.policies.base import Policy
from agents.restorable import Restorable
from agents.timing import timed


class Trainable(Restorable):
    """An algorithm whose policy learns by gradient steps. `Agent` tells what the attributes are."""

    weight_decay: float
    max_grad_norm: float
    temperature_lr: float | Schedule | None
    lr_factor: float
    max_skipped: int
    ema_decay: float | None
    skipped_steps: int
    _skipped_in_a_row: int
    _steps: int  # of the optimiser in this learn()
    _steps_that_moved: int
    seconds: float

    def _setup_model(self) -> None:
        self.policy.eval()  # no dropout of prompts, here or in the reference
        if self.ema_decay is not None:
            self.ema = frozen_copy(self.policy)
        self.lr_schedule = utils.FloatSchedule(self.learning_rate)
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in self._groups()],
            lr=self.lr_schedule(1.0),
            betas=(0.9, 0.95),
            weight_decay=self.weight_decay,
        )

    def _groups(self) -> list[list[nn.Parameter]]:
        """The optimiser's parameters, with the learned temperatures as a second group if they have their own rate."""
        weights = dict(self.policy.named_parameters())
        names = group_names(self.policy, self.temperature_lr)
        return [[weights[name] for name in group] for group in names]

    def load_state(self, name: str, state: dict[str, Any]) -> None:
        super().load_state(name, regrouped(state, self.optimizer, self.policy) if name == "optimizer" else state)

    @property
    def n_updates(self) -> int:
        return self._n_updates

    @property
    def best_policy(self) -> Policy:
        """What to evaluate and to ship: the averaged policy if there is one, else the policy."""
        return self.policy if self.ema is None else self.ema

    def _shard(self) -> None:
        """Shard the policies and the optimiser's state, when that is asked for and not done yet."""
        if not self.processes.shards:
            return
        before = [group["params"] for group in self.optimizer.param_groups]
        for policy in (self.policy, self.reference, self.ema):
            if policy is not None:
                self.processes.shard(policy)
        after = self._groups()
        state = [self.optimizer.state[weight] for group in before for weight in group]
        self.optimizer.state = defaultdict(dict)
        for group, weights in zip(self.optimizer.param_groups, after, strict=True):
            group["params"] = weights
        for weight, values in zip(chain.from_iterable(after), state, strict=True):
            if values:
                self.optimizer.state[weight] = {k: processes.sharded_like(v, weight) for k, v in values.items()}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the time of the ``with`` block to ``seconds``, and logs it as ``time/`` and the phase."""
        seconds: dict[str, float] = {}
        with timed(seconds, phase):
            yield
        self.seconds += seconds[phase]
        self.logger.record(f"time/{phase}", seconds[phase])

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around the learning of an iteration: sets the learning rate, and counts and times the update."""
        with self.timed("update"):
            self._set_learning_rates()
            yield
            self._n_updates += 1
        self.logger.record("train/n_updates", self.n_updates)

    def _set_learning_rates(self) -> None:
        """Those of the optimiser's groups at this place of the run, and their weight decay."""
        self._update_learning_rate(self.optimizer)
        if len(self.optimizer.param_groups) > 1:
            assert self.temperature_lr is not None
            rate = utils.FloatSchedule(self.temperature_lr)(self._current_progress_remaining)
            self.optimizer.param_groups[1]["lr"] = rate
        for group in self.optimizer.param_groups:
            group["lr"] *= self.lr_factor
            group["weight_decay"] = self.weight_decay  # a checkpoint's groups have that of their time
        self.logger.record("train/learning_rate", self.optimizer.param_groups[0]["lr"])

    def optimizer_step(self, loss: Tensor | None = None) -> float:
        """Sum the gradient over processes, clip it, take the step, move the average; returns the gradient's norm.

        Learned temperatures with a rate of their own are clipped apart; the norm is then that of the weights alone.
        When the gradient is not finite, or the loss if it is given, the step is skipped: the weights stay, a warning
        tells, and what is returned is not finite.

        Raises:
            RuntimeError: more than ``max_skipped`` steps in a row were not finite; the weights are as before them.
        """
        self.processes.sum_gradients(self.policy.parameters())
        groups = self.optimizer.param_groups
        norms = [nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm) for group in groups]
        size, *apart = [processes.whole(norm).item() for norm in norms]
        total = 0.0 if loss is None else self.processes.reduce([loss.item()])[0]
        if not all(map(math.isfinite, (size, *apart, total))):
            whole = math.hypot(size, *apart)
            self._skip("gradient norm" if math.isfinite(total) else "loss", whole if math.isfinite(total) else total)
            return math.nan
        for norm in apart:
            self.logger.record_mean("train/temperature_grad_norm", norm)
        self._skipped_in_a_row = 0
        self._steps += 1
        self._steps_that_moved += size > 0 and any(group["lr"] > 0 for group in groups)
        self.optimizer.step()
        if self.ema is not None:
            assert self.ema_decay is not None
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.policy.parameters()), 1 - self.ema_decay)
        return size

    def _skip(self, name: str, value: float) -> None:
        """Count a step that would ruin the weights; ``RuntimeError`` when there were too many."""
        self.optimizer.zero_grad()
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        told = (
            f"the {name} of update {self.n_updates + 1} is {value}: the step was not applied and the weights are as "
            "before it"
        )
        if self._skipped_in_a_row > self.max_skipped:
            raise RuntimeError(
                f"{told}, {self._skipped_in_a_row} in a row; lower learning_rate, raise kl_coef, or load an earlier "
                "checkpoint"
            )
        warnings.warn(f"{told}; training ends when more than {self.max_skipped} in a row are so", stacklevel=3)


def frozen_copy(policy: Policy) -> Policy:
    """Weights of its own, without gradients; the tokenizer is shared."""
    return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer}).requires_grad_(False)
