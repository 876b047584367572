"""Our transformer as the actor-critic policy of Stable-Baselines3's own, unchanged PPO (or A2C)::

    from stable_baselines3 import PPO

    envs = VARTextVecEnv(gym.make_vec("VARText-v0", num_envs=16))
    T = len(envs.envs.schedule)
    model = PPO(VARActorCriticPolicy, envs, policy_kwargs={"policy": "base"}, n_steps=T, learning_rate=5e-5, gamma=1.0)
    model.learn(100_000)

What it shares with ``agents.PPO``: the network, the kind of critic, and a critic that sends no gradient into the
transformer. What differs is SB3's: an action is a whole grid, and so is the importance ratio, the critic has the
policy's learning rate (SB3 has one for all), every step of the environment runs the transformer from the start, and
there is no KL to a reference. Budgets in images compare; seconds do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from agents import losses
from agents.common.checks import require_choice
from agents.policies import load_policy
from agents.policies.base import Policy
from agents.ppo import Critic, hidden_width, state_features
from agents.rollout import states_by_scale
from agents.sampling import Decoding, draw
from var_env import mdp
from var_env.sb3 import flat_action_space

RATIOS = ("product", "grid")
LIKELIEST = Decoding(temperature=0.0)


class VARActorCriticPolicy(ActorCriticPolicy):
    """Draws the grid of the present scale on the flat canvas of ``VARTextVecEnv``; the canvas's other cells are 0.

    The rows of a batch may be at any scales. Saving and loading a model works as with any policy of SB3. A policy that
    was given as an object is then stored in full, so a path or "base" makes the smaller file.

    Args:
        observation_space, action_space, lr_schedule: given by SB3.
        policy: the transformer, trained in place; "base" is the shipped one, a path loads a file of its ``save``. The
            environment has to use its tokenizer.
        ratio: what an action's log-probability is. "product" is the sum over the grid's tokens, as PPO's theory wants
            it. At 64 tokens such a ratio leaves the clip range after the smallest of steps. "grid" divides the sum by
            the number of tokens, which makes the ratio the geometric mean of theirs. The entropy goes the same way.
        sb3: more keywords of ``ActorCriticPolicy``, such as ``optimizer_class`` and ``optimizer_kwargs``.

    Attributes:
        actor: the transformer.
        critic: the value of a state, from the actor's hidden states, without a gradient to them.

    Raises:
        ValueError: an unknown ratio, or an action space of another tokenizer.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        policy: Policy | str | Path = "base",
        ratio: str = "product",
        **sb3: Any,
    ) -> None:
        require_choice(RATIOS, ratio=ratio)
        super().__init__(observation_space, action_space, lr_schedule, **sb3)
        if not isinstance(policy, Policy):
            policy = load_policy(policy)
        expected = flat_action_space(mdp.action_space(policy.tokenizer))
        if action_space != expected:
            raise ValueError(
                f"the policy's grids need the action space {expected}, got {action_space}: make the environment with "
                "tokenizer=policy.tokenizer, in a VARTextVecEnv or a FlattenCanvas"
            )
        self.actor, self.ratio = policy, ratio
        self.critic = Critic(hidden_width(policy)).to(policy.device)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = self.optimizer_class(weights, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _build(self, lr_schedule: Schedule) -> None:
        """Called by the base class to make its MLPs, of which there are none here."""

    def to(self, *args: Any, **kwargs: Any) -> VARActorCriticPolicy:
        self.actor.tokenizer.to(*args, **kwargs)  # not among the modules, see `Policy`
        return super().to(*args, **kwargs)

    def set_training_mode(self, mode: bool) -> None:
        """Always off: with dropout the ratios would not start at 1."""
        super().set_training_mode(False)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Draw: actions int64 ``(N, H * W)``, values ``(N, 1)`` and log-probabilities ``(N,)``."""
        assert isinstance(obs, dict)
        batch, shape = len(obs["tokens"]), self._canvas_shape
        canvas = torch.zeros(batch, *shape, dtype=torch.int64, device=self.device)
        values, logp = torch.zeros(2, batch, device=self.device)
        for t, rows, hidden in self._hidden(obs):
            h, w = self.actor.schedule.grids[t]
            logits = self.actor.logits(hidden, range(t, t + 1))  # (b, n_t, D, V)
            tokens = draw(logits, None, LIKELIEST if deterministic else Decoding()).tokens  # (b, n_t, D)
            canvas[rows, :h, :w] = tokens.view(-1, h, w, shape[-1])
            values = values.index_copy(0, rows, self.critic(state_features(hidden)))
            logp = logp.index_copy(0, rows, self._of_grid(losses.log_probs(logits, tokens).logp))
        return canvas.flatten(1), values[:, None], logp

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``(N, 1)``, log-probabilities ``(N,)`` and entropies ``(N,)``, in nats, of given actions."""
        canvas = actions.long().view(-1, *self._canvas_shape)
        values, logp, entropy = torch.zeros(3, len(canvas), device=self.device)
        for t, rows, hidden in self._hidden(obs):
            h, w = self.actor.schedule.grids[t]
            tokens = canvas[rows, :h, :w].flatten(1, 2)  # (b, n_t, D)
            seen = losses.log_probs(self.actor.logits(hidden, range(t, t + 1)), tokens)  # (b, n_t)
            values = values.index_copy(0, rows, self.critic(state_features(hidden)))
            logp = logp.index_copy(0, rows, self._of_grid(seen.logp))
            entropy = entropy.index_copy(0, rows, self._of_grid(seen.entropy))
        return values[:, None], logp, entropy

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Values of the states, ``(N, 1)``."""
        assert isinstance(obs, dict)
        values = torch.zeros(len(obs["tokens"]), device=self.device)
        for _, rows, hidden in self._hidden(obs):
            values = values.index_copy(0, rows, self.critic(state_features(hidden)))
        return values[:, None]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)[0]

    def _hidden(self, obs: PyTorchObs) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each scale t that occurs: t, its rows and the hidden states of grid t, ``(b, n_t, W)``."""
        assert isinstance(obs, dict)
        for t, rows, cond, grids in states_by_scale(self.actor, obs):
            yield t, rows, self.actor.hidden(cond, grids, range(t, t + 1))

    @property
    def _canvas_shape(self) -> tuple[int, int, int]:
        """``(H, W, D)``, one row's action before it was flattened."""
        return (*self.actor.schedule.grids[-1], self.actor.tokenizer.depth)

    def _of_grid(self, values: Tensor) -> Tensor:
        """Of the tokens, ``(b, n_t)``, to the grid's, ``(b,)``."""
        return values.sum(1) if self.ratio == "product" else values.mean(1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "policy": self.actor,
            "ratio": self.ratio,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }
