"""Tree GRPO: every image that is decoded teaches every scale.

VMR draws K suffixes to value a prefix (eq. 10 of *VAR RL Done Right*), learns the prefix, and throws the suffixes
away; those it learns from are drawn anew, for one prefix a prompt. Here the G images of a prompt are the leaves of
one tree, which forks before one or several grids, and one update learns all T grids from it:

- a leaf is worth its reward, and a node the soft value of its children: eq. 10, level by level;
- the grids between two forks belong to the node at their end, and their tokens' advantage is what that node is worth
  more than its siblings, which share everything before these grids.

Images cost as much as GRPO's, P * G an update, and grids before a fork are drawn once for all that follows.

**Baselines.** A node is compared with others only, never with itself. Otherwise its own share in the mean would shrink
the advantages of k siblings by ``(k - 1) / k``, each level's by another factor, and the gradient would no longer point
where that of the expected reward does. Whatever does not depend on a node's own tokens is a fair baseline, and the mean
of the siblings is not always the best: of a pair, each would be judged by a single image. So ``baseline="shrunk"``
draws it towards the baseline of their parent, as far as the spread of the values says (`sibling_weight`). The more
chance there is among siblings, the nearer this comes to GRPO's baseline, the mean of the prompt.

**When it pays.** Say a share rho of the reward's variance within a prompt is decided before the fork, and that nodes
fork into pairs. Against as many images that share nothing, the noise of the gradient before the fork is ``1 + rho``
times as much, as there are fewer prefixes, and the baseline's own noise comes on top when they are few. That after the
fork is ``1 - rho^2`` times, from the better baseline, where the siblings' mean alone would make it ``2 - 2 rho``. So a
fork pays where much is decided before it and most of the gradient's noise comes after it, and otherwise costs a little.
``vartext sweep --prefix-share 64`` measures rho.

**Shared tokens.** All G leaves are rows of the update, and tokens that leaves share are in each of them, with the same
advantage. As all rows count the same, a token counts as often as there are leaves below it. So each level's part of the
loss is a mean over that level's nodes, of which all have as many leaves, and that of the KL likewise: no weights are
needed, and wrappers, micro-batches and optimiser steps know nothing of trees. MP's mask gates each leaf's copy by what
was read in that leaf, and a shared token counts by the share of its leaves that need it. To compute shared tokens once
in the update would take attention over a tree, for an eighth of the tokens: that is what pairs at the half of the
shipped schedule share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor

from agents import losses
from agents.common.checks import require_choice
from agents.common.registry import register
from agents.grpo import GRPO
from agents.rollout import Rollout
from agents.vmr import middle_return

BASELINES = ("shrunk", "siblings")


def node_values(scores: Tensor, branching: Sequence[int], eta: float) -> list[Tensor]:
    """The soft value of the nodes of every level, the coarsest first, from the scores of the leaves ``(P, G)``.

    Node i of a level has the ``branching`` of the next one as children, side by side from ``i * k`` on; the last level
    is the leaves. The trees' roots, the prompts, are left out: level j is ``(P, branching[0] * ... * branching[j])``.
    """
    values = [scores]
    for k in branching[:0:-1]:
        values.insert(0, middle_return(values[0].unflatten(1, (-1, k)), eta))  # eq. 10
    return values


def centred_values(values: Sequence[Tensor], branching: Sequence[int], baseline: str = "shrunk") -> list[Tensor]:
    """What each node is worth more than its baseline, which its own tokens have no part in: as `node_values`.

    An only child has its parent's baseline. Where there is nobody to compare with, the difference is 0.
    """
    found: list[Tensor] = []
    above: Tensor | None = None  # the baselines of the level's parents, (P, N)
    for value, k in zip(values, branching, strict=True):
        siblings = value.unflatten(1, (-1, k))  # (P, N, k)
        if k > 1:
            others = (siblings.sum(-1, keepdim=True) - siblings) / (k - 1)
            if above is not None and baseline == "shrunk":
                weight = sibling_weight(siblings, others, above.unsqueeze(-1))[:, None, None]
                others = weight * others + (1 - weight) * above.unsqueeze(-1)
            above = others.flatten(1)
        found.append(torch.zeros_like(value) if above is None else value - above)
    return found


def sibling_weight(siblings: Tensor, others: Tensor, above: Tensor) -> Tensor:
    """How far to trust the mean of a node's siblings against their parent's baseline, ``(P,)`` from 0 to 1.

    Both estimate what the parent is worth. With s^2 the variance of the one and t^2 the squared error of the other,
    ``t^2 / (s^2 + t^2)`` makes the error of their mix the least. s^2 shows in the spread of siblings, and s^2 + t^2 in
    the distance of the two. A prompt's weight is taken from the other prompts, so that it does not depend on the
    prompt's own images and leaves the gradient unbiased; with a single prompt it is 1.

    Args:
        siblings: values of the k children of each of N nodes, ``(P, N, k)``.
        others: the mean of each child's siblings, ``(P, N, k)``.
        above: the baseline of their parent, ``(P, N, 1)``.
    """
    noise = siblings.var(-1).mean(1) / (siblings.shape[-1] - 1)  # (P,) s^2
    distance = (others - above).square().mean((1, 2))  # (P,) s^2 + t^2
    elsewhere = 1 - torch.eye(len(noise), dtype=noise.dtype, device=noise.device)  # (P, P)
    return (1 - (elsewhere @ noise) / (elsewhere @ distance).clamp(min=1e-30)).clamp(0, 1)


@register("tree")
class TreeGRPO(GRPO):
    """GRPO on a tree of images: all scales learn at once, from soft values among siblings.

    Without forks this is GRPO. With ``advantage_scale="none"`` and a large ``eta`` the expected gradient is that of the
    expected reward, times GRPO's own ``(G - 1) / G``.

    Logs ``tree/spread_``, the standard deviation of the values of siblings at each level, from 1, the coarsest.

    Args:
        policy, env: and more keywords, as in `GRPO`. ``advantage_scale="group"`` divides all advantages of a prompt by
            the standard deviation of its G scores, and "batch" all of the batch by one of theirs: what levels weigh
            against each other is as without.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        forks: Annotated[
            int | str | Sequence[int | str],
            "before which grids the tree forks, from coarse to fine; each as VMR's ``split``, how many grids "
            "come before the fork. One may stand without a tuple.",
        ] = "half",
        branching: Annotated[
            Sequence[int] | None,
            "children of the prompt, and of each node at every fork; their product is ``group_size``. ``None``: "
            "2 at each fork and the rest at the prompt, so that 8 images and one fork are 4 times 2. An only "
            "child of the prompt learns nothing.",
        ] = None,
        eta: Annotated[
            float,
            "temperature of the soft value, in units of the reward. The larger, the nearer to the mean.",
        ] = 1.0,
        baseline: Annotated[
            str,
            'what a node is compared with: "siblings", their mean, or "shrunk", the same drawn towards the '
            "baseline of their parent.",
        ] = "shrunk",
        group_size: int = 8,
        **grpo: Any,
    ) -> None:
        if not 0 < eta < math.inf:
            raise ValueError(f"eta must be a finite number above 0, got {eta}")
        require_choice(BASELINES, baseline=baseline)
        super().__init__(policy, env, group_size=group_size, **grpo)
        schedule = self.policy.schedule
        splits = [forks] if isinstance(forks, int | str) else forks
        self.forks = tuple(schedule.middle_step(split) for split in splits)
        ends = [0, *self.forks, len(schedule)]
        if any(m >= later for m, later in pairwise(ends)):
            raise ValueError(
                f"forks={forks!r} are before grids {', '.join(map(str, self.forks))}: give each once, from coarse to "
                f"fine, and leave a grid after the last, that is at most {len(schedule) - 1} of {len(schedule)}"
            )
        self.branching = self._branching(branching)
        self.eta, self.baseline = eta, baseline

    def _branching(self, branching: Sequence[int] | None) -> tuple[int, ...]:
        """As given, checked, or the default."""
        pairs = 2 ** len(self.forks)
        if branching is None and self.forks and (self.group_size % pairs or self.group_size == pairs):
            raise ValueError(
                f"group_size={self.group_size} is no multiple of {pairs}, 2 for each of the {len(self.forks)} forks, "
                f"that leaves the prompt 2 children or more: choose {2 * pairs}, {3 * pairs}, ..., or give branching"
            )
        found = (self.group_size // pairs, *[2] * len(self.forks)) if branching is None else tuple(branching)
        if len(found) != len(self.forks) + 1 or any(not isinstance(k, int) or k < 1 for k in found):
            raise ValueError(
                f"branching must be {len(self.forks) + 1} whole numbers of at least 1, for the prompt and each of the "
                f"{len(self.forks)} forks, got {branching!r}"
            )
        if math.prod(found) != self.group_size:
            raise ValueError(
                f"branching={branching!r} makes {math.prod(found)} images, not group_size={self.group_size}"
            )
        return found

    def __str__(self) -> str:
        return f"TreeGRPO(forks={self.forks}, branching={self.branching}, eta={self.eta})"

    def collect(self, seed: int) -> Rollout:
        return self.draw(seed, self.branching[0], tuple(zip(self.forks, self.branching[1:], strict=True)))

    def timesteps(self, images: int) -> int:
        nodes = [math.prod(self.branching[: level + 1]) for level in range(len(self.branching))]  # of each level
        ends = [0, *self.forks, len(self.policy.schedule)]
        steps = sum(count * (end - begin) for count, (begin, end) in zip(nodes, pairwise(ends), strict=True))
        return -(-images * steps // self.group_size)

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """That of each token's node, ``(B, n)``. A rollout that was drawn with other forks is judged by those."""
        scores, group_size = self.processes.gather(rollout.scores).double(), rollout.scores.shape[1]  # (P, G)
        later = [k for _, k in rollout.forks]
        branching = [group_size // math.prod(later), *later]
        values = node_values(scores, branching, self.eta)
        self.record(values, branching)
        centred = torch.stack(
            [
                part.repeat_interleave(group_size // part.shape[1], 1)
                for part in centred_values(values, branching, self.baseline)
            ],
            1,
        )  # (P, levels, G)
        centred = centred * (group_size - 1) / group_size  # without forks, scores less their group's mean
        scale = losses.ADVANTAGE_SCALES[self.advantage_scale]
        advantages = scale(centred.flatten(1), scores, self.advantage_eps, 1).view_as(centred)
        advantages = advantages.masked_fill(losses.zero_variance(scores)[:, None, None], 0.0)
        levels = [sum(m <= t for m, _ in rollout.forks) for t in steps for _ in range(self.policy.schedule.sizes[t])]
        advantages = advantages[:, levels].transpose(1, 2)  # (P, G, n)
        return self.processes.mine(advantages, len(rollout.scores)).flatten(0, 1).float()

    def record(self, values: Sequence[Tensor], branching: Sequence[int]) -> None:
        """Log the spread of siblings at each level."""
        for level, (value, k) in enumerate(zip(values, branching, strict=True), 1):
            if k > 1:
                spread = value.unflatten(1, (-1, k)).var(-1).mean().sqrt()
                self.logger.record(f"tree/spread_{level}", spread.item())
