"""Wrappers change what an agent learns from a rollout. PANW, MP and the parts of STAGE are wrappers.

A wrapper has three hooks. An update calls each of them once, in this order:

- `scores`, ``(P, G)``: what each row is worth, before it is compared with its group.
- `token_advantages`, ``(B, n)``: how good each token was, from the algorithm's ``rollout.advantages``.
- `token_weights`: how much each token counts in the policy term, in the KL and in the entropy bonus.

Your own wrapper overrides some of these hooks, calls the same hook of the agent inside, and changes the result::

    class CoarseOnly(Wrapper):
        def __init__(self, agent, *, scales=3):
            super().__init__(agent)
            self.scales = scales  # stored under the option's name: that is how it is printed and saved

        def token_weights(self, rollout, steps):
            weights = self.agent.token_weights(rollout, steps)  # (B, n) each
            ...
            return weights._replace(policy=weights.policy * mask)

    agent = CoarseOnly(PANW(VMR("base", "VARText-v0", split=4)), scales=2)
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeVar

from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from agents import restorable
from agents.common.checks import require_groups
from agents.grpo import GRPO, TokenWeights
from agents.rollout import Rollout

WrapperT = TypeVar("WrapperT", bound="Wrapper")


class Wrapper:
    """Base class of the wrappers. Everything that it does not define is the wrapped agent's.

    A wrapper cannot be taken off. The innermost agent knows its outermost wrapper, so it learns, saves and loads with
    the whole chain, whichever of them is called. A wrapper gives the attributes of the agent inside. Setting one of
    them on the wrapper raises `AttributeError`: set a wrapper's options on that wrapper, all else on ``unwrapped``.

    Args:
        agent: an agent, or the outermost wrapper of one. Options of a subclass are keywords and are stored as
            attributes of the same names.

    Attributes:
        agent: the next one inside.
        unwrapped: the innermost agent, which samples and learns.
        min_group_size: of the class: 2 where a wrapper compares the images of a prompt with each other.
    """

    agent: GRPO | Wrapper
    unwrapped: GRPO
    min_group_size = 1

    def __init__(self, agent: GRPO | Wrapper) -> None:
        if not isinstance(agent, GRPO | Wrapper):
            raise TypeError(f"{type(self).__name__} wraps GRPO or an algorithm derived from it, got {agent!r}")
        innermost: GRPO = agent.unwrapped
        if agent is not innermost.outermost:
            raise ValueError(f"{agent} is already inside {innermost.outermost}: wrap that one")
        require_groups(type(self), innermost.group_size)
        vars(self).update(agent=agent, unwrapped=innermost)  # past __setattr__, which asks them
        innermost.outermost = self

    def scores(self, rollout: Rollout, steps: range) -> Tensor:
        """What each row is worth, ``(P, G)``, see `GRPO.scores`."""
        return self.agent.scores(rollout, steps)

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """The advantage of each token of ``steps``, ``(B, n)``, see `GRPO.token_advantages`."""
        return self.agent.token_advantages(rollout, steps)

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        """The weights of the tokens of ``steps``, see `GRPO.token_weights`."""
        return self.agent.token_weights(rollout, steps)

    @classmethod
    def option_names(cls) -> list[str]:
        """The options of this wrapper, without those of the agent inside."""
        return list(inspect.signature(cls.__init__).parameters)[2:]  # after self and agent

    def settings(self) -> dict[str, Any]:
        """The options of this wrapper and their values, without those of the agent inside."""
        return {name: getattr(self, name) for name in self.option_names()}

    @property
    def name(self) -> str:
        return f"{self.agent.name}_{type(self).__name__.lower()}"

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({self.agent}{options})"

    def __getattr__(self, name: str) -> Any:
        if name in ("agent", "unwrapped"):  # not set yet: do not ask an agent that is not there
            raise AttributeError(name)
        return getattr(self.agent, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in vars(self) or hasattr(type(self), name) or name in self.option_names()):
            self._require_own(name)
        super().__setattr__(name, value)

    def _require_own(self, name: str) -> None:
        """``AttributeError`` when a wrapper or the agent inside has the attribute: set here, it would not reach it."""
        link = vars(self).get("agent")  # not there yet in the constructor
        while isinstance(link, Wrapper):
            if name in link.option_names():
                raise AttributeError(
                    f"{name} is an option of {type(link).__name__} inside this wrapper: set it on .agent"
                )
            link = link.agent
        if hasattr(link, name):
            raise AttributeError(
                f"{name} belongs to {type(link).__name__} inside {type(self).__name__}: set it on .unwrapped"
            )

    def learn(
        self: WrapperT,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> WrapperT:
        """See `Agent.learn`."""
        self.unwrapped.learn(
            total_timesteps,
            callback,
            log_interval,
            self.name if tb_log_name is None else tb_log_name,
            reset_num_timesteps,
            progress_bar,
        )
        return self

    @classmethod
    def load(cls: type[WrapperT], path: str | Path, env: Any = None, **options: Any) -> WrapperT:
        """Read the file of an agent whose outermost wrapper is this one; see `Agent.load` for the options."""
        return restorable.load(path, env, expected=cls, **options)
