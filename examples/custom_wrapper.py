"""An idea of your own around any agent: a wrapper in a dozen lines, compared with what it wraps.

    python examples/custom_wrapper.py                                               # a few minutes on two cores
    python examples/custom_wrapper.py --agents vmr vmr+coarse_first --images 6400

The idea here is a curriculum, coarse grids first. To try another, change `CoarseFirst`: `token_weights` gets the
rollout (grids, rewards, advantages, regions that were read, ...) and the scales of the update, and returns what each
token counts. Two more hooks, for rewards and for advantages, are in agents/wrapper.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

from agents import GRPO, Wrapper, register
from agents.experiments import compare
from agents.grpo import TokenWeights
from agents.rollout import Rollout


@register("coarse_first")
class CoarseFirst(Wrapper):
    """A curriculum: coarse grids learn first, and the KL holds all of them all the time.

    Args:
        agent: the agent to wrap.
    """

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        updates_per_scale: Annotated[
            int,
            "grid t + 1 joins after ``t * updates_per_scale`` updates.",
        ] = 3,
    ) -> None:
        super().__init__(agent)
        self.updates_per_scale = updates_per_scale

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        weights = self.agent.token_weights(rollout, steps)  # policy, kl and entropy, (B, n) each
        sizes = torch.tensor([self.policy.schedule.sizes[t] for t in steps])
        scale = torch.tensor(list(steps)).repeat_interleave(sizes)  # (n,)
        joined = scale * self.updates_per_scale <= self.n_updates
        return weights._replace(policy=weights.policy * joined.to(weights.policy))


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    start = ["--agents", "grpo", "grpo+coarse_first", "--images", "1600", "--out", str(Path("runs") / "custom-wrapper")]
    return compare.main([*start, *given])


if __name__ == "__main__":
    sys.exit(main())
