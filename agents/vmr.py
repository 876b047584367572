"""VMR, Value as Middle Return: GRPO in two stages, before and after a middle step m (section 3.3).

The value of a prefix of m grids is the soft mean of the rewards of its continuations. K suffixes estimate it (eq. 10).
A **prefix update** learns the first m grids from this value, which averages over the noise of the long suffix. A
**suffix update** learns the other grids and leaves the prefix as it is. Both are GRPO with a KL penalty of their own
(eq. 5).

An iteration samples one of two trees. Branches share all that was computed before their fork:

- prefix: P prompts, G prefixes for each, K suffixes for each prefix. The G values of a prompt are normalised.
- suffix: P prompts, one prefix for each, G suffixes. The G rewards of a prefix are normalised.

The cost is in images: a prefix update decodes P * G * K of them, and a suffix update P * G.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from agents import losses
from agents.common.checks import require_at_least, require_choice
from agents.common.registry import register
from agents.grpo import GRPO
from agents.rollout import Rollout
from agents.split_rule import SplitRule

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

    With ``split="auto"`` it logs ``vmr/split``, the m of the update. For each m measured so far it logs
    ``vmr/decided_m``, the share of the variance that the prefix decides, and ``vmr/worth_m``, which the rule compares.

    Attributes:
        m: the split of the next update.
        split_rule: what "auto" has measured, else ``None``.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        split: Annotated[
            int | str,
            "the middle step m, how many grids the prefix has: a number of grids, or the resolution in pixels "
            'at which the prefix ends, as ``"m_128"`` or a number larger than T; ``"half"`` is half of the '
            'image\'s. With ``m = T`` there is no suffix, and this is vanilla GRPO. ``"auto"`` looks for m '
            "while it learns, below T, by the rule of ``agents/split_rule.py``: where an update gains most, "
            "told by the share of the returns' variance that the prefix decides and by the tokens on either "
            "side. It needs a K of at least 2.",
        ] = "half",
        suffix_samples: Annotated[int, "K, suffixes that estimate the value of a prefix."] = 2,
        eta: Annotated[float, "temperature of the soft value, in units of the reward."] = 1.0,
        suffix_kl_coef: Annotated[
            float,
            'so much of each suffix\'s KL to the reference, the sum of "k1" over its tokens, is taken off its '
            "return before eq. 10. The paper has 0, and then a prefix neither pays for what its suffixes do "
            "nor, when they are drawn from the trained policy, has the value of eq. 4. With the weight that the "
            'KL has in the objective (``kl_coef`` with ``kl_in="reward"``) and a large eta, two stages have the '
            "optimum of the full horizon: see docs/theory.md.",
        ] = 0.0,
        prefix_updates: Annotated[int, "so many of the one, then so many of the other."] = 3,
        suffix_updates: Annotated[int, "so many of the one, then so many of the other."] = 1,
        alternation: Annotated[
            str,
            '"fine" takes turns as above. "coarse" does all prefix updates of a ``learn()`` and then all suffix '
            "updates, in the same proportion: the paper's 300 and 100 of 400.",
        ] = "fine",
        **grpo: Any,
    ) -> None:
        require_at_least(1, suffix_samples=suffix_samples, prefix_updates=prefix_updates, suffix_updates=suffix_updates)
        if not 0 < eta < math.inf:
            raise ValueError(f"eta must be a finite number above 0, got {eta}")
        if not suffix_kl_coef >= 0:
            raise ValueError(f"suffix_kl_coef must be at least 0, got {suffix_kl_coef}")
        require_choice(ALTERNATIONS, alternation=alternation)
        super().__init__(policy, env, **grpo)
        schedule = self.policy.schedule
        self.split: int | str = split if split == "auto" else schedule.middle_step(split)
        self.split_rule = SplitRule(schedule.sizes) if split == "auto" else None
        if self.split == "auto" and (suffix_samples < 2 or alternation != "fine"):
            raise ValueError(
                "split='auto' compares the suffixes of a prefix, and moves between prefix and suffix updates: it needs "
                f"suffix_samples of at least 2 and alternation='fine', got {suffix_samples} and {alternation!r}"
            )
        if self.split == len(schedule) and suffix_samples > 1:
            raise ValueError(
                f"split={split!r} leaves no suffix to sample {suffix_samples} times: choose an earlier split, or "
                "suffix_samples=1 for vanilla GRPO"
            )
        self.suffix_samples, self.eta, self.alternation = suffix_samples, eta, alternation
        self.suffix_kl_coef = suffix_kl_coef
        self.prefix_updates, self.suffix_updates = prefix_updates, suffix_updates

    def __str__(self) -> str:
        return f"VMR(split={self.split}, suffix_samples={self.suffix_samples}, eta={self.eta})"

    @property
    def m(self) -> int:
        if isinstance(self.split, int):
            return self.split
        assert self.split_rule is not None
        return self.split_rule.choose(self.stage == "prefix", *self._cycle)

    @property
    def _cycle(self) -> tuple[int, int, int]:
        """K, and the updates of a cycle."""
        return self.suffix_samples, self.prefix_updates, self.suffix_updates

    @property
    def stage(self) -> str:
        """What the next update learns: "prefix" or "suffix"."""
        if self.split == len(self.policy.schedule):
            return "prefix"
        if self.alternation == "fine":
            turn = self.n_updates % (self.prefix_updates + self.suffix_updates)
            return "prefix" if turn < self.prefix_updates else "suffix"
        prefix = self.prefix_updates * self._rollout_steps("prefix", self.m)
        suffix = self.suffix_updates * self._rollout_steps("suffix", self.m)
        done = 1 - self._current_progress_remaining  # of the environment steps
        return "prefix" if done < prefix / (prefix + suffix) else "suffix"

    def iterate(self) -> None:
        stage, m, everything = self.stage, self.m, range(len(self.policy.schedule))
        rollout = self.sample()
        self.learn_from(rollout, everything[:m] if stage == "prefix" else everything[m:])
        self.logger.record("vmr/suffix_update", float(stage == "suffix"))
        self.logger.record(
            f"vmr/{stage}_std_in_group", self.processes.gather(rollout.scores).std(1, correction=0).mean().item()
        )
        if self.split_rule is not None:
            if stage == "prefix":
                self.split_rule.observe(m, self.processes.gather(rollout.returns))
            self._record_split(m, self.split_rule)

    def _record_split(self, m: int, rule: SplitRule) -> None:
        self.logger.record("vmr/split", m)
        shares, worths = rule.shares(), rule.worths(*self._cycle)
        for split in shares:
            self.logger.record(f"vmr/decided_m{split}", shares[split])
            self.logger.record(f"vmr/worth_m{split}", worths[split])

    def collect(self, seed: int) -> Rollout:
        m = self.m
        if m == len(self.policy.schedule):
            return super().collect(seed)
        if self.stage == "suffix":
            return self.draw(seed, 1, (m, self.group_size))  # one s_m a prompt, shared by G suffixes
        rollout = self.draw(seed, self.group_size, (m, self.suffix_samples))
        if self.suffix_kl_coef:
            rollout = replace(rollout, returns=rollout.returns - self.suffix_kl_coef * self.suffix_kl(rollout, m))
        value = partial(middle_return, eta=self.eta)
        return rollout.merge(self.policy, self.suffix_samples, m, value)

    def while_scored(self, rollout: Rollout) -> Rollout:
        everything, k = range(len(self.policy.schedule)), self.suffix_samples
        if self.stage == "suffix":
            return self.fill(rollout, everything[self.m :])
        prefixes = rollout.merge(self.policy, k, self.m, lambda returns: returns[..., 0])  # scores are still to come
        prefixes = self.fill(prefixes, everything[: self.m])
        found = {name: values.repeat_interleave(k, 0) for name, values in prefixes.before_update().items()}
        return replace(rollout, **found, version=prefixes.version)  # until `collect` merges the rows

    @torch.no_grad()
    def suffix_kl(self, rollout: Rollout, m: int) -> Tensor:
        """The KL estimate "k1" summed over the grids from m on, in the shape of ``returns``; for one image a row."""
        reference, suffix = self.require_reference(), range(m, len(self.policy.schedule))

        def of_rows(rows: Tensor) -> Tensor:
            mine, ref = (self.log_probs(policy, rollout, rows, suffix).logp for policy in (self.policy, reference))
            return losses.kl_estimate(mine, ref, "k1").sum(1)  # (b,)

        return self.in_micro_batches(of_rows, rollout).view_as(rollout.returns).to(rollout.returns)

    def timesteps(self, images: int) -> int:
        """See `Agent.timesteps`. The earlier the split, the more steps an image takes. "auto" counts with the earliest
        split, so that no run ends before its images are drawn; its remaining progress then ends above 0."""
        if self.split == len(self.policy.schedule):
            return super().timesteps(images)
        m = 1 if self.split_rule is not None else self.m
        a, b = self.prefix_updates, self.suffix_updates  # one cycle
        steps = a * self._rollout_steps("prefix", m) + b * self._rollout_steps("suffix", m)
        per_cycle = self.prompts_per_update * self.group_size * (a * self.suffix_samples + b)
        return -(-images * steps // per_cycle)

    def _rollout_steps(self, stage: str, m: int) -> int:
        """Environment steps of an iteration at a split: each grid counts once for every row that draws it."""
        rest = len(self.policy.schedule) - m
        if stage == "prefix":
            return self.prompts_per_update * self.group_size * (m + self.suffix_samples * rest)
        return self.prompts_per_update * (m + self.group_size * rest)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *(["split_rule"] if self.split_rule is None else [])]
