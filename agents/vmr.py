"""VMR, Value as Middle Return: GRPO in two stages, before and after a middle step m (section 3.3).

A prefix of m grids is worth the soft value of what follows from it, estimated from K suffixes (eq. 10). So a **prefix
update** learns m short grids from a return that the noise of the long suffix no longer blurs, and a **suffix update**
learns the rest from prefixes that stay as they are. Both are GRPO with a KL penalty of their own (eq. 5).

An iteration samples one of two trees, in which branches share all that was computed before the fork:

- prefix: P prompts, G prefixes each, K suffixes each; G values a prompt, normalised among themselves;
- suffix: P prompts, one prefix each, G suffixes; G rewards a prefix, normalised among themselves.

Images are what costs: a prefix update decodes P * G * K of them, and a suffix update P * G.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from agents.base import require_at_least, require_choice
from agents.grpo import GRPO
from agents.registry import register
from agents.rollout import Rollout

ALTERNATIONS = ("fine", "coarse")


def middle_return(returns: Tensor, eta: float) -> Tensor:
    """The soft value of prefixes from the returns of their K suffixes, ``(..., K)`` to ``(...)``.

    ``eta log(1/K sum_k exp(R_k / eta))``, eq. 10: the mean of the returns as eta goes to infinity, and their maximum as
    it goes to 0.
    """
    if not 0 < eta < math.inf:
        raise ValueError(f"eta must be a finite number above 0, got {eta}")
    best = returns.max(-1).values
    excess = (returns - best.unsqueeze(-1)) / eta  # at most 0, so that no exponential overflows
    return best + eta * excess.expm1().mean(-1).log1p()  # log(mean(exp)), and exact for a large eta too


@register("vmr")
class VMR(GRPO):
    """Two-stage GRPO: prefixes learn from the soft value of their suffixes, then suffixes learn.

    Args:
        policy, env: and more keywords, as in `GRPO`.
        split: the middle step m, how many grids the prefix has: a number of grids, or the resolution in pixels at
            which the prefix ends, as ``"m_128"`` or a number larger than T; ``"half"`` is half of the picture's. With
            ``m = T`` there is no suffix, and this is vanilla GRPO.
        suffix_samples: K, suffixes that estimate the value of a prefix.
        eta: temperature of the soft value, in units of the reward.
        prefix_updates, suffix_updates: so many of the one, then so many of the other.
        alternation: "fine" takes turns as above. "coarse" does all prefix updates of a ``learn()`` and then all suffix
            updates, in the same proportion: the paper's 300 and 100 of 400.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        split: int | str = "half",
        suffix_samples: int = 2,
        eta: float = 1.0,
        prefix_updates: int = 3,
        suffix_updates: int = 1,
        alternation: str = "fine",
        **grpo: Any,
    ) -> None:
        require_at_least(1, suffix_samples=suffix_samples, prefix_updates=prefix_updates, suffix_updates=suffix_updates)
        if not 0 < eta < math.inf:
            raise ValueError(f"eta must be a finite number above 0, got {eta}")
        require_choice(ALTERNATIONS, alternation=alternation)
        super().__init__(policy, env, **grpo)
        self.split = self.policy.schedule.middle_step(split)
        if self.split == len(self.policy.schedule) and suffix_samples > 1:
            raise ValueError(
                f"split={split!r} leaves no suffix to sample {suffix_samples} times: choose an earlier split, or "
                "suffix_samples=1 for vanilla GRPO"
            )
        self.suffix_samples, self.eta, self.alternation = suffix_samples, eta, alternation
        self.prefix_updates, self.suffix_updates = prefix_updates, suffix_updates

    def __str__(self) -> str:
        return f"VMR(split={self.split}, suffix_samples={self.suffix_samples}, eta={self.eta})"

    @property
    def stage(self) -> str:
        """What the next update learns: "prefix" or "suffix"."""
        if self.split == len(self.policy.schedule):
            return "prefix"
        if self.alternation == "fine":
            turn = self.n_updates % (self.prefix_updates + self.suffix_updates)
            return "prefix" if turn < self.prefix_updates else "suffix"
        prefix = self.prefix_updates * self._rollout_steps("prefix")
        suffix = self.suffix_updates * self._rollout_steps("suffix")
        done = 1 - self._current_progress_remaining  # of the environment steps
        return "prefix" if done < prefix / (prefix + suffix) else "suffix"

    def iterate(self) -> None:
        stage, everything = self.stage, range(len(self.policy.schedule))
        rollout = self.sample()
        self.learn_from(rollout, everything[: self.split] if stage == "prefix" else everything[self.split :])
        self.logger.record("vmr/suffix_update", float(stage == "suffix"))
        self.logger.record(f"vmr/{stage}_std_in_group", rollout.scores.std(1, correction=0).mean().item())

    def collect(self, seed: int) -> Rollout:
        if self.split == len(self.policy.schedule):
            return super().collect(seed)
        if self.stage == "suffix":
            return self.draw(seed, 1, (self.split, self.group_size))  # one s_m a prompt, shared by G suffixes
        pictures = self.draw(seed, self.group_size, (self.split, self.suffix_samples))
        value = partial(middle_return, eta=self.eta)
        return pictures.merge(self.policy, self.suffix_samples, self.split, value)

    def timesteps(self, images: int) -> int:
        if self.split == len(self.policy.schedule):
            return super().timesteps(images)
        a, b = self.prefix_updates, self.suffix_updates  # one cycle
        steps = a * self._rollout_steps("prefix") + b * self._rollout_steps("suffix")
        pictures = self.prompts_per_update * self.group_size * (a * self.suffix_samples + b)
        return -(-images * steps // pictures)

    def _rollout_steps(self, stage: str) -> int:
        """Environment steps of an iteration: each grid counts once for every row that draws it."""
        m, rest = self.split, len(self.policy.schedule) - self.split
        if stage == "prefix":
            return self.prompts_per_update * self.group_size * (m + self.suffix_samples * rest)
        return self.prompts_per_update * (m + self.group_size * rest)
