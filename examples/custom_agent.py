"""An algorithm of your own, from scratch, beside vanilla GRPO: trained, evaluated and drawn by compare.py.

    python examples/custom_agent.py                                # a few minutes on two cores
    python examples/custom_agent.py --images 6400 --beta 0.2       # options of compare.py, and of the agent
    python examples/compare.py --plugin examples/custom_agent.py --agents soft_best vmr ppo

An agent writes one round, `iterate`: sample, learn. The loop, the budget, callbacks, TensorBoard, predict, save and
load are `Agent`'s. To change how GRPO treats its tokens, a wrapper is less work: see custom_wrapper.py.

The idea here: imitate your own images, the better the more. An image's weight is the softmax of the rewards in its
group, so there is no baseline, no ratio, no reference and nothing to clip (reward-weighted regression, Peters and
Schaal, 2007).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from agents import Agent, register
from agents.experiments import compare


@register("soft_best")
class SoftBest(Agent):
    """Reward-weighted regression: imitates its own samples by the softmax of their rewards.

    Args:
        policy, env: and more keywords, as in `Agent`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        beta: Annotated[float, "temperature of the softmax, in units of the reward."] = 0.3,
        **common: Any,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be above 0, got {beta}")
        self.beta = beta
        super().__init__(policy, env, **common)

    def iterate(self) -> None:
        rollout = self.sample()  # G images for each of P prompts, scored
        weights = (rollout.scores / self.beta).softmax(1).flatten().to(self.device)  # (B,), each group sums to 1
        with self.updating():
            everything = range(len(self.policy.schedule))
            logp, entropy = self.policy.evaluate(rollout.cond, rollout.grids, everything)  # (B, L, D)
            per_image = logp.sum(-1).mean(1)  # (B,)
            loss = -(weights * per_image).sum() / self.prompts_per_update
            self.optimizer.zero_grad()
            loss.backward()
            norm = self.optimizer_step()
        self.logger.record("train/loss", loss.item())
        self.logger.record("train/entropy", entropy.mean().item())
        self.logger.record("train/grad_norm", norm)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    start = ["--agents", "grpo", "soft_best", "--images", "1600", "--out", str(Path("runs") / "custom-agent")]
    return compare.main([*start, *given])


if __name__ == "__main__":
    sys.exit(main())
