"""PPO, actor-critic: a learned value of each state in place of the group's mean (Schulman et al., arXiv 1707.06347).

The steps of the environment are the grids, so an episode has T states, the prompt with the grids so far. A critic
tells each one's value, and generalised advantage estimation (GAE, arXiv 1506.02438) tells from the values how much
better the image's prospects became with each grid. GRPO knows only how much better the image came out than its
group, and says so to all grids alike.

The critic is a small head on the policy's own hidden states, which it reads and does not change. It has a learning
rate of its own: in the policy's step, at 5e-5, a new head would need more than a hundred updates to say 1 where it now
says 0. And it sends no gradient into the policy, so that the policy's step is what the advantages say and of the same
size as that of other agents, without a weight between two losses to tune.

Everything else is GRPO's: prompts, images, optimiser, KL to a reference and wrappers. So PPO against GRPO compares
where advantages come from, and nothing else. For the same reason a rollout is learned from once by default, as by all
agents here; PPO by its book makes several passes, ``epochs=4``.

Against Stable-Baselines3's PPO (``agents/sb3_policy.py`` runs it on the same network):

- the same: GAE, the clipped loss, the advantages divided by their standard deviation;
- different: ratios of tokens and not of whole grids, tokens counting the same and not grids (``ratio_level="grid"`` and
  ``aggregation="step_mean"`` come near), advantages normalised over the rollout and not the minibatch, the KL, a
  critic that is fitted apart, complete episodes only, and the defaults of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import torch
from stable_baselines3.common.utils import explained_variance, update_learning_rate
from torch import Tensor, nn

from agents import logs, losses
from agents.common.checks import require_at_least
from agents.common.registry import register
from agents.grpo import GRPO
from agents.policies.base import Policy
from agents.rollout import Rollout, weights_version
from var_env.seeding import as_seed

CRITIC_MINIBATCHES = 4  # of each epoch over a rollout


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns to fit the values to, ``(B, T)`` both (arXiv 1506.02438, eq. 16).

    ``A_t = sum_k (gamma lambda)^k delta_(t+k)`` with ``delta_t = r_t + gamma V_(t+1) - V_t``, the state after the last
    step being worth 0; the returns are ``A_t + V_t``.

    Args:
        rewards: of each step, ``(B, T)``.
        values: of the state before each step, ``(B, T)``.
        gamma: discount of a step.
        gae_lambda: 0 trusts the next value alone; 1 asks it nothing, and ``A_t`` is what came less ``V_t``.
    """
    advantages = torch.zeros_like(values)
    following, advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])  # (B,) of step t + 1
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantages[:, t] = advantage = delta + gamma * gae_lambda * advantage
        following = values[:, t]
    return advantages, advantages + values


class Critic(nn.Module):
    """The value of a state from the hidden states of the grid to come, in fp32. All values are 0 at first.

    Args:
        width: W of the hidden states.
        seed: of the weights; ``None`` draws from torch's global generator.
    """

    def __init__(self, width: int, seed: int | None = None) -> None:
        super().__init__()
        generator = None if seed is None else torch.Generator().manual_seed(as_seed(seed))
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.orthogonal_(self.inner.weight, gain=2**0.5, generator=generator)
        for weight in (self.inner.bias, self.outer.weight, self.outer.bias):
            nn.init.zeros_(weight)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., W)``, see `state_features`, to ``(...)``."""
        return self.outer(nn.functional.gelu(self.inner(self.norm(features)))).squeeze(-1)


def state_features(hidden: Tensor) -> Tensor:
    """Hidden states of one grid's tokens, ``(B, n_t, W)``, to the critic's input, fp32 ``(B, W)``, without gradient."""
    return hidden.detach().float().mean(1)


def hidden_width(policy: Policy) -> int:
    """W of a policy's hidden states. ``NotImplementedError`` when it shows none."""
    with torch.no_grad():
        return policy.hidden(policy.encode_prompts([""]), [], range(1)).shape[-1]


@register("ppo")
class PPO(GRPO):
    """Actor-critic: a learned value of each state, and an advantage for each grid (GAE).

    Args:
        policy, env: and more keywords, as in `GRPO`. Groups are not compared with each other or within, so that
            ``group_size=1`` with more prompts is possible.
    """

    min_group_size = 1

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        gamma: Annotated[
            float,
            "discount of a grid; 1 is without, the usual choice where the reward comes at the end.",
        ] = 1.0,
        gae_lambda: Annotated[
            float,
            "how far a grid's advantage looks past the next state's value, 0 to 1.",
        ] = 0.95,
        critic_learning_rate: Annotated[float, "of the critic's own AdamW."] = 1e-3,
        critic_epochs: Annotated[int, "passes of the critic over a rollout, after the policy's."] = 4,
        advantage_scale: Annotated[
            str,
            '"batch" divides the centred advantages by their standard deviation over all grids of the rollout; '
            '"none" only centres them.',
        ] = "batch",
        **grpo: Any,
    ) -> None:
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        if not 0 < critic_learning_rate < math.inf:
            raise ValueError(f"critic_learning_rate must be a finite number above 0, got {critic_learning_rate}")
        if advantage_scale == "group":
            raise ValueError("PPO compares no groups: choose advantage_scale='batch' or 'none'")
        require_at_least(1, critic_epochs=critic_epochs)
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.critic_learning_rate, self.critic_epochs = critic_learning_rate, critic_epochs
        super().__init__(policy, env, advantage_scale=advantage_scale, **grpo)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.critic = Critic(hidden_width(self.policy), self.seed).to(self.device)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.critic_learning_rate, weight_decay=0.0
        )

    def fill(self, rollout: Rollout, steps: range) -> Rollout:
        """As in `GRPO`, and with the ``features`` of the states, from the policy as it is before the update."""
        rollout = super().fill(rollout, steps)
        if rollout.features is not None:
            return rollout
        features = self.in_micro_batches(lambda rows: self.features(rollout, rows), rollout)
        return replace(rollout, features=features, version=weights_version(self.policy))

    # Judging ---------------------------------------------------------------------------------------------------------

    def judge(self, rollout: Rollout, steps: range) -> Rollout:
        """As in `GRPO`, and filled.

        Raises:
            ValueError: ``steps`` are not all T grids.
        """
        if steps != range(len(self.policy.schedule)):
            raise ValueError(f"PPO learns all {len(self.policy.schedule)} grids at once, not {steps}")
        return super().judge(self.fill(rollout, steps), steps)

    @torch.no_grad()
    def features(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """What the critic sees of the state before each grid of some rows, ``(b, T, W)``."""
        grids = [grid[rows] for grid in rollout.grids]
        hidden = self.policy.hidden(self.policy.take(rollout.cond, rows), grids, range(len(grids)))  # (b, L, W)
        return torch.stack([state_features(hidden[:, tokens]) for tokens in self.policy.schedule.slices], 1)

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """Each grid's advantage for all of its tokens, ``(B, n)``, normalised over the B * T grids."""
        _, advantages, _ = self.estimates(self.of_all(rollout))  # (B, T)
        centred = advantages - advantages.mean()
        scaled = losses.ADVANTAGE_SCALES[self.advantage_scale](centred, advantages, self.advantage_eps, 1)  # (B, T)
        sizes = torch.tensor([self.policy.schedule.sizes[t] for t in steps], device=scaled.device)
        return self.processes.mine(scaled, len(rollout.scenes)).repeat_interleave(sizes, 1)

    def of_all(self, rollout: Rollout) -> Rollout:
        """A judged rollout with the features and scores of all processes, which fit the same critic to them."""
        assert rollout.features is not None, "judge() it first"
        gather = self.processes.gather
        return replace(rollout, features=gather(rollout.features), scores=gather(rollout.scores))

    @torch.no_grad()
    def estimates(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Values, advantages and returns of a judged rollout, ``(B, T)`` each, with the critic as it is."""
        assert rollout.features is not None, "judge() it first"
        values = self.critic(rollout.features)
        rewards = torch.zeros_like(values)
        rewards[:, -1] = rollout.scores.flatten().to(values)  # the image is complete
        return values, *gae(rewards, values, self.gamma, self.gae_lambda)

    # Learning --------------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, advantages: Tensor, steps: range) -> None:
        """The policy's update, as in `GRPO`, and then the critic's, from a judged rollout."""
        super().update(rollout, advantages, steps)
        self.fit_critic(rollout)

    def fit_critic(self, rollout: Rollout) -> None:
        """Fit the critic to the returns of a judged rollout. The explained variance is that before it."""
        with self.timed("critic"):
            rollout = self.of_all(rollout)
            values, _, returns = self.estimates(rollout)
            assert rollout.features is not None
            update_learning_rate(self.critic_optimizer, self.critic_learning_rate)  # one given to load() holds
            total = 0.0
            for _ in range(self.critic_epochs):
                order = torch.randperm(len(values), generator=self.generator, device=self.device)
                for rows in order.chunk(CRITIC_MINIBATCHES):
                    loss = nn.functional.mse_loss(self.critic(rollout.features[rows]), returns[rows])
                    self.critic_optimizer.zero_grad()
                    loss.backward()
                    self.critic_optimizer.step()
                    total += loss.item() * len(rows)
        self.logger.record("train/value_loss", total / (self.critic_epochs * len(values)))
        explained = explained_variance(values.flatten().cpu().numpy(), returns.flatten().cpu().numpy())
        if math.isfinite(explained):  # equal returns leave nothing to explain
            self.logger.record("train/explained_variance", explained)
        schedule = self.policy.schedule
        for name, mean in logs.by_band(schedule, range(len(schedule)), values.mean(0).tolist()).items():
            self.logger.record(f"values/{name}", mean)

    # Files -----------------------------------------------------------------------------------------------------------

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "critic", "critic_optimizer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, "critic", "critic_optimizer"], variables
