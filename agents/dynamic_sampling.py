"""Dynamic sampling: learn only from groups whose rewards differ (DAPO, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from agents.base import Agent, StopLearning
from agents.losses import zero_variance
from agents.rollout import Rollout


def sample_useful(agent: Agent, sample: Callable[[], Rollout], max_batches: int) -> Rollout:
    """The groups of a rollout whose rewards differ; other prompts are drawn until there are as many as in one batch.

    Args:
        agent: knows the policy, the processes, and whether a callback wants it to stop; logs the numbers.
        sample: draws a batch.
        max_batches: so many at most; 1 only drops.

    Returns:
        A rollout of at most as many prompts as one batch has. The first batch as it is, when no group is useful.
    """
    rollout = sample()
    batches, wanted = 1, len(rollout.scores)
    kept = [rollout.groups(agent.policy, ~zero_variance(rollout.scores))]
    while not agent._stop and batches < max_batches:
        if not agent.processes.any(sum(len(part.scores) for part in kept) < wanted):
            break
        try:
            more = sample()
        except StopLearning:  # a callback wants no more: learn from what there is
            break
        batches += 1
        kept.append(more.groups(agent.policy, ~zero_variance(more.scores)))
    useful = Rollout.concatenate(agent.policy, kept)
    agent.logger.record("rollout/batches", batches)
    agent.logger.record("rollout/groups_kept", len(useful.scores))
    if len(useful.scores) == 0:
        return rollout  # nothing to learn but the KL
    return useful.groups(agent.policy, torch.arange(len(useful.scores)) < wanted)
