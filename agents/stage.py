"""STAGE, Stable and Generalizable GRPO for Autoregressive Image Generation: its eqs. 5-12, as three wrappers.

Images of one prompt are alike in most places. Where two of them are alike and one is better than its group, the other
worse, their gradients pull the same token both ways. STAGE has three answers, each a wrapper of its own:

- `SimilarityAdvantage`: a token's advantage shrinks with its similarity to the tokens at the same place in the samples
  of the opposite sign (eqs. 5-8);
- `SimilarityKL`: and its KL weighs less where it is unlike them;
- `EntropyReward`: the best samples of a group are worth more when the policy is as uncertain about them as the
  reference is (eqs. 9-12), which also tells samples of equal reward apart.

``agents.make("stage", ...)`` is all three around GRPO, and ``"vmr+stage"`` around VMR.

Where the paper leaves a choice:

- It compares positions of one raster of tokens. Here tokens are compared at the same scale and position. What is
  compared are code vectors, or with ``on="canvas"`` the accumulated feature map at that scale, once its grid is drawn.
- "Opposite" is a product of advantages of at most zero, as in eq. 6. So an advantage of zero is opposite to all, itself
  included, and so is everything to it. Signs are those of the algorithm's own advantages, before any wrapper.
- Where nothing is opposite, eq. 6 is 0/0, there is no conflict, and both weights are one, as without STAGE.
- Its KL weight clips to a range that it does not give. Here it is 0 to 1, as in the authors' program: the multiplier
  of the KL coefficient goes from a at Sim = -1 to a + b from Sim = 0 on.
- The entropy bonus goes to the best by reward, whatever else the agent adds to its scores.

``variant="code"`` follows the authors' program (github.com/krennic999/STAGE) where it departs from the text. It divides
the weights of eq. 7 by their mean over the group, so that they shift the advantage between tokens and shrink nothing.
And it takes from the entropy bonus its mean over the group's best, so that the best are told apart and gain nothing
together: a unique best gets no bonus. One more difference is left out: for an advantage of zero the program counts the
sample itself in the denominator of eq. 6 and not in the numerator.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from agents import logs
from agents.common.checks import require_choice, require_not_negative
from agents.common.registry import register
from agents.grpo import GRPO, TokenWeights
from agents.policies.base import Policy
from agents.rollout import Rollout
from agents.wrapper import Wrapper

VARIANTS = ("paper", "code")
VIEWS = ("codes", "canvas")
LEAST_MEAN = 1e-6  # of weights that are divided by it: below, they are the rounding of zeros


def cosine_similarities(embeddings: Tensor) -> Tensor:
    """Between the samples of a group at each position, eq. 5: ``(..., G, L, C)`` to float32 ``(..., L, G, G)``.

    From -1 to 1; a vector of zeros has the similarity 0 to all.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    return torch.einsum("...ilc,...jlc->...lij", unit, unit).clamp(-1, 1)


def opposite_similarity(embeddings: Tensor, advantages: Tensor) -> Tensor:
    """Sim of eq. 6: how alike each token is to those of its group whose advantage has the opposite sign or is zero.

    Args:
        embeddings: ``(..., G, L, C)``, G samples of L tokens.
        advantages: one a sample, ``(..., G)``, or one a token, ``(..., G, L)``.

    Returns:
        The mean of their cosine similarities, float32 ``(..., G, L)``, from -1 to 1. ``nan`` where there is none, as
        when all advantages of a group are above zero; `similarity_weights` and `kl_weights` know what to do with it.
        For an advantage of zero the mean is over the whole group with the token itself, as the equation has it.
    """
    if advantages.shape not in (embeddings.shape[:-1], embeddings.shape[:-2]):
        raise ValueError(
            f"advantages must be (..., G) or (..., G, L) of the embeddings {tuple(embeddings.shape)}, which are "
            f"(..., G, L, C); got {tuple(advantages.shape)}"
        )
    signs = advantages.sign()  # the product of two small advantages could underflow to zero
    if signs.ndim < embeddings.ndim - 1:
        signs = signs.unsqueeze(-1)  # (..., G, 1), the same at all positions
    signs = signs.transpose(-1, -2)  # (..., L, G)
    opposite = (signs.unsqueeze(-1) * signs.unsqueeze(-2) <= 0).float()  # (..., L, G, G)
    similarity = (opposite * cosine_similarities(embeddings)).sum(-1) / opposite.sum(-1)  # eq. 6
    return similarity.transpose(-1, -2)


def similarity_weights(similarity: Tensor, variant: str = "paper") -> Tensor:
    """M of eq. 7, what the advantage is multiplied with: ``(1 - Sim) / 2``, ``(..., G, L)`` to the same, from 0 to 1.

    One where Sim is ``nan``. With ``variant="code"`` these are then divided by their mean over the group's G * L
    tokens, and may be above one.
    """
    require_choice(VARIANTS, variant=variant)
    weights = ((1 - similarity) / 2).nan_to_num(nan=1.0)  # eq. 7
    if variant == "code":
        weights = weights / weights.mean((-1, -2), keepdim=True).clamp(min=LEAST_MEAN)
    return weights


def kl_weights(similarity: Tensor, a: float = 0.5, b: float = 0.5) -> Tensor:
    """What the KL coefficient is multiplied with: ``a + b clip(Sim + 1, 0, 1)``, ``(..., G, L)`` to the same.

    From a to a + b; one where Sim is ``nan``.
    """
    return (a + b * (similarity + 1).clamp(0, 1)).nan_to_num(nan=1.0)


def top_rewarded(rewards: Tensor) -> Tensor:
    """Which samples have the highest reward of their group, ties included: ``(..., G)`` to bool ``(..., G)``."""
    return rewards == rewards.max(-1, keepdim=True).values


def entropy_bonus(
    rewards: Tensor, entropy: Tensor, ref_entropy: Tensor, coef: float = 0.4, variant: str = "paper"
) -> Tensor:
    """What eq. 12 adds to the rewards: ``coef / (1 + (H_ref - H)^2)`` for the best of each group, 0 for the others.

    Args:
        rewards: ``(..., G)``.
        entropy, ref_entropy: of the policy and of the reference, in nats, a mean over each sample's tokens (eq. 10),
            ``(..., G)``. Those of samples that are not among the best do not matter.
        coef: lambda, at least 0; the bonus is at most this.
        variant: "code" takes the mean bonus of the group's best from each of theirs.
    """
    require_choice(VARIANTS, variant=variant)
    top = top_rewarded(rewards)
    bonus = coef / (1 + (ref_entropy - entropy).square())  # eq. 11
    bonus = torch.where(top, bonus, 0.0)
    if variant == "code":
        mean = bonus.sum(-1, keepdim=True) / top.sum(-1, keepdim=True)
        bonus = torch.where(top, bonus - mean, 0.0)
    return bonus


@torch.no_grad()
def group_similarity(agent: GRPO, rollout: Rollout, steps: range, on: str = "codes") -> Tensor:
    """`opposite_similarity` of the tokens of ``steps`` in a rollout that was judged: ``(P, G, n)``.

    ``on`` is "codes", the code vectors of the tokens, or "canvas", the accumulated feature map after their grid.
    """
    assert rollout.advantages is not None, "judge() it first"
    tokenizer, group_size = agent.policy.tokenizer, rollout.scores.shape[1]
    parts, canvas = [], tokenizer.blank(len(rollout.scenes)) if on == "canvas" else None
    for t, grid in enumerate(rollout.grids[: steps.stop]):
        if canvas is not None:
            canvas = tokenizer.write(t, canvas, grid)
        if t in steps:
            parts.append(tokenizer.embed(t, grid) if canvas is None else tokenizer.read(t, canvas))  # (B, n_t, C)
    embeddings = torch.cat(parts, 1).unflatten(0, (-1, group_size))  # (P, G, n, C)
    advantages = rollout.advantages.to(embeddings.device).unflatten(0, (-1, group_size))  # (P, G) or (P, G, n)
    return opposite_similarity(embeddings, advantages)


def record_scales(agent: GRPO, steps: range, name: str, values: Tensor) -> None:
    """Log ``stage/<name>_<scale>``, the means of ``(P, G, n)`` over each scale, where they are defined."""
    schedule = agent.policy.schedule
    means = [part.nanmean().item() for part in values.split([schedule.sizes[t] for t in steps], -1)]
    for band, mean in logs.by_band(schedule, steps, means).items():
        agent.logger.record(f"stage/{name}_{band}", mean)


@register("similarity")
class SimilarityAdvantage(Wrapper):
    """Shrinks the advantage of tokens that are alike in better and in worse samples (STAGE).

    Eqs. 5-8, see `similarity_weights`. Two equal images, one above the group's mean and one below, teach nothing.
    Logs the means of the weight and of the similarity for every scale, ``stage/weight_`` and ``stage/similarity_``.

    Args:
        agent: the agent, or wrapper, inside.
    """

    min_group_size = 2

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        on: Annotated[str, "what is compared, see `group_similarity`."] = "codes",
        variant: Annotated[
            str,
            '"paper", or "code" for weights with a mean of one in each group.',
        ] = "paper",
    ) -> None:
        require_choice(VIEWS, on=on)
        require_choice(VARIANTS, variant=variant)
        super().__init__(agent)
        self.on, self.variant = on, variant

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        advantages = self.agent.token_advantages(rollout, steps)  # (B, n)
        similarity = group_similarity(self.unwrapped, rollout, steps, self.on)  # (P, G, n)
        weights = similarity_weights(similarity, self.variant)
        record_scales(self.unwrapped, steps, "similarity", similarity)
        record_scales(self.unwrapped, steps, "weight", weights)
        return advantages * weights.flatten(0, 1).to(advantages)  # eq. 8


@register("similarity_kl")
class SimilarityKL(Wrapper):
    """Lowers the KL weight of tokens that differ between better and worse samples (STAGE).

    See `kl_weights`. Only the KL in the loss is weighed: with ``kl_coef=0`` or ``kl_in="reward"`` nothing changes. An
    ``aggregation`` other than "constant" divides by the sum of the weights, of which then only the ratios stay. Logs
    the means of the weight and of the similarity for every scale, ``stage/kl_weight_`` and ``stage/similarity_``.

    Args:
        agent: the agent, or wrapper, inside.
    """

    min_group_size = 2

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        a: Annotated[
            float,
            "the multiplier of the KL coefficient goes from a, for what is opposite, to a + b; at least 0.",
        ] = 0.5,
        b: Annotated[
            float,
            "the multiplier of the KL coefficient goes from a, for what is opposite, to a + b; at least 0.",
        ] = 0.5,
        on: Annotated[str, "what is compared, see `group_similarity`."] = "codes",
    ) -> None:
        require_not_negative(a=a, b=b)
        require_choice(VIEWS, on=on)
        super().__init__(agent)
        self.a, self.b, self.on = a, b, on

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        weights = self.agent.token_weights(rollout, steps)
        similarity = group_similarity(self.unwrapped, rollout, steps, self.on)  # (P, G, n)
        multiplier = kl_weights(similarity, self.a, self.b)
        record_scales(self.unwrapped, steps, "similarity", similarity)
        record_scales(self.unwrapped, steps, "kl_weight", multiplier)
        return weights._replace(kl=weights.kl * multiplier.flatten(0, 1).to(weights.kl))


@register("entropy_reward")
class EntropyReward(Wrapper):
    """Rewards the best samples for an entropy near the reference's, so that it stays (STAGE).

    Eqs. 9-12, see `entropy_bonus`. Only the best samples of each group are computed, by the policy and by the
    reference, without gradients. The reference is the agent's; an agent without one, such as one with ``kl_coef=0``,
    gets the policy as it is when it is wrapped. Logs ``stage/entropy_gap``, the mean over the best of ``|H_ref - H|``.

    Groups whose rewards are all equal no longer teach nothing: the bonus tells their samples apart, and where
    advantages are divided by the group's standard deviation it does so at full size, however small it is.

    Args:
        agent: the agent, or wrapper, inside.
    """

    min_group_size = 2

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        entropy_reward: Annotated[
            float,
            "lambda of eq. 12, at least 0, in units of the reward: the paper's is for rewards from 0 to 1.",
        ] = 0.4,
        variant: Annotated[str, '"paper", or "code" to centre the bonus on the group\'s best.'] = "paper",
    ) -> None:
        require_not_negative(entropy_reward=entropy_reward)
        require_choice(VARIANTS, variant=variant)
        super().__init__(agent)
        self.entropy_reward, self.variant = entropy_reward, variant
        self.unwrapped.require_reference()

    def scores(self, rollout: Rollout, steps: range) -> Tensor:
        scores, rewards = self.agent.scores(rollout, steps), rollout.scores  # (P, G)
        entropy, ref_entropy = self.entropies(rollout, steps)
        bonus = entropy_bonus(rewards, entropy, ref_entropy, self.entropy_reward, self.variant)
        gap = (ref_entropy - entropy).abs()[top_rewarded(rewards)]
        self.unwrapped.logger.record("stage/entropy_gap", gap.mean().item())
        return scores + bonus.to(scores)

    @torch.no_grad()
    def entropies(self, rollout: Rollout, steps: range) -> tuple[Tensor, Tensor]:
        """Of the policy and the reference, a mean over the tokens of ``steps``, ``(P, G)``; zeros but for the best."""
        agent, top = self.unwrapped, top_rewarded(rollout.scores)
        rows = top.flatten().nonzero().flatten().to(agent.device)
        found = []
        for policy in (agent.policy, agent.require_reference()):
            means = agent.in_micro_batches(partial(self.mean_entropies, policy, rollout, steps), rollout, rows)
            entropy = torch.zeros_like(rollout.scores)
            entropy[top] = means.to(entropy)
            found.append(entropy)
        return found[0], found[1]

    def mean_entropies(self, policy: Policy, rollout: Rollout, steps: range, rows: Tensor) -> Tensor:
        """Of some rows, ``(b,)``, eq. 10."""
        return self.unwrapped.log_probs(policy, rollout, rows, steps).entropy.mean(1)
