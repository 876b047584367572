"""Best-of-n: no learning, but n images for each prompt when it counts, and the reward chooses."""

from __future__ import annotations

from typing import Annotated, Any

from stable_baselines3.common.type_aliases import MaybeCallback

from agents.common.checks import require_at_least
from agents.common.registry import register
from agents.grpo import GRPO


@register("best_of_n")
class BestOfN(GRPO):
    """Best of n: nothing is learned; of n images for each prompt the best rewarded is used.

    The bar that learning has to clear: it costs n reward calls for every image used, whenever one is used, where a
    trained policy costs one image and no reward call. Like training it follows the reward off the mark, which the
    word accuracy of the chosen images tells.

    ``HeldOutEval``, or `evaluate` with ``best_of=agent.best_of``, choose; `predict` draws one sample, as always. The
    options of `GRPO` are taken, so that wrappers, probes and scripts work as with any agent, and change nothing.

    Args:
        policy, env: and more keywords, as in `GRPO`.
    """

    min_group_size = 1

    def __init__(self, policy: Any, env: Any, *, n: Annotated[int, "images to choose from."] = 8, **grpo: Any) -> None:
        require_at_least(1, n=n)
        super().__init__(policy, env, **grpo)
        self.n = n

    @property
    def best_of(self) -> int:
        return self.n

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> BestOfN:
        """Tell the callback of a beginning and an end, with nothing between: no image is drawn and none is due."""
        return super().learn(0, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
