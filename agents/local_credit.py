"""Local credit: a token's advantage is that of the parts of the reward that lie above it, and of no others.

GRPO gives each token of an image the whole image's advantage, and so a token of one word learns from the luck of the
others. A reward that says where its parts came from (`rewards.components`) tells more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents import losses
from agents.common.registry import register
from agents.grpo import GRPO
from agents.mask_propagation import boxes_to_mask, propagate_mask, visible_boxes
from agents.rollout import Rollout
from agents.wrapper import Wrapper
from rewards.components import Component
from var_env.schedule import ScaleSchedule

ROUNDING = 1e-6  # of float32 scores, against the largest


def values_of(images: Sequence[Sequence[Component]]) -> Tensor:
    """The values of the components of N images of one prompt, float64 ``(N, C)``, C being all that one of them has.

    A component is the same in two images where its kind and indices are. It is worth 0 in an image that lacks it.
    """
    place = places_of(images)
    values = torch.zeros(len(images), len(place), dtype=torch.float64)
    for row, found in enumerate(images):
        for part in found:
            values[row, place[part.kind, part.indices]] += part.value
    return values


def places_of(images: Sequence[Sequence[Component]]) -> dict[tuple[str, tuple[int, ...]], int]:
    """The column of each component, in the order in which they first occur."""
    return {key: i for i, key in enumerate(dict.fromkeys((part.kind, part.indices) for f in images for part in f))}


def tokens_of(images: Sequence[Sequence[Component]], schedule: ScaleSchedule, steps: range) -> Tensor:
    """Which tokens of the grids in ``steps`` each component reaches, float32 0 or 1 ``(N, C, n)``, see `values_of`.

    Its boxes on the finest grid, propagated from finer to coarser as in Mask Propagation. A component without a place
    in an image reaches the cells that no placed one claims there, and all cells where none are left.
    """
    place = places_of(images)
    finest = torch.zeros(len(images), len(place), *schedule.canvas, dtype=torch.bool)
    for row, found in enumerate(images):
        for part in found:
            if part.boxes is not None and len(visible_boxes(part.boxes, schedule)):
                finest[row, place[part.kind, part.indices]] |= boxes_to_mask(part.boxes, schedule)
    placed = finest.flatten(2).any(2)[:, :, None, None]  # (N, C, 1, 1)
    left = ~finest.any(1, keepdim=True)  # (N, 1, H, W)
    left = left | ~left.flatten(1).any(1)[:, None, None, None]
    masks = propagate_mask(torch.where(placed, finest, left).flatten(0, 1), schedule)
    return torch.cat([masks[t].flatten(1) for t in steps], 1).float().unflatten(0, placed.shape[:2])


def above_mean(values: Tensor, rounding: float = 0.0) -> Tensor:
    """Each column of ``(N, C)`` less its mean, and exactly 0 where the column's numbers differ by rounding alone."""
    equal = values.amax(0) - values.amin(0) <= rounding
    return (values - values.mean(0)).masked_fill(equal, 0.0)


@register("local")
class LocalCredit(Wrapper):
    """Local credit: a token's advantage is that of the reward's parts whose place it is in.

    The parts are the rollout's ``components``, such as letters. Each has a baseline of its own: letter k of word w is
    compared with the same letter in the other images of its prompt, wherever it stands there. A part's region is its
    boxes, propagated from fine to coarse as in Mask Propagation: the tokens that lie under it at any scale. A part
    without a place, such as a letter of a word that was not found, goes to the tokens that no placed part claims. What
    the parts leave of the score (what the reward has beside them, a KL in the reward, the soft value of VMR) goes to
    all tokens, as in GRPO. With one part that covers the image this is GRPO.

    It assumes that a part depends on nothing but the tokens of its region: on the reward's side that it is a sum of
    such parts, on the policy's that a coarse token moves only the finer ones that it covers. Then what is left out of a
    token's advantage is independent of the token given what came before, as a baseline is, and the expected gradient is
    that of GRPO with the group's mean as baseline, ``(G - 1) / G`` of the true one, with less variance. Where parts
    interact it is biased. A part that needs two words to be right, split between the two, teaches each token its own
    half of it, so pairs of words weigh less than they should. A coarse token that moves what lies elsewhere, as
    attention allows, learns nothing from that. Attention also lets a token know what was drawn elsewhere before it,
    and this does no harm. A reward that gives an interaction a part of its own with both places, as `ocr` does with
    whole words, is not biased by it.

    All parts are divided alike, as ``advantage_scale`` says, by the standard deviation that their sum has when they
    vary independently: the root of the sum of their variances over the images of a prompt. Each by its own would weigh
    a letter that is nearly always right as much as one that is half the time. The standard deviation of the sum may
    be 0 where the parts differ, and would then blow them up.

    Under VMR the credit of a prefix is the mean over its K images, each with its own places, and the baselines are over
    all G K.

    Related: factored policy gradients (arXiv 2102.10362) leave out of each action's advantage the terms that it has no
    influence on, by a graph that is given; here the graph comes from boxes, and differs between images.
    Action-dependent baselines (arXiv 1803.07246) learn what the other actions are worth; what they gain over
    state-dependent ones has been found small (arXiv 1802.10031). Here nothing is learned.

    Takes the place of the advantages of the agent inside, so it refuses agents and wrappers that have others than
    GRPO's. It goes inside of wrappers that change advantages, such as STAGE's, and on either side of PANW and MP.

    Logs ``local/placed``, the share of the components that have a place, and ``local/left``, the standard deviation of
    what the parts leave of the scores within a prompt, against that of the scores: near 0 where they are a sum of the
    parts.

    Args:
        agent: the agent, or wrapper, inside.

    Raises:
        ValueError: an agent inside that judges tokens or images in another way; in learning, a reward that gives no
            components.
    """

    min_group_size = 2

    def __init__(self, agent: GRPO | Wrapper) -> None:
        if isinstance(agent, GRPO | Wrapper):
            require_plain(agent)
        super().__init__(agent)

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        require_components(rollout)
        agent, (prompts, group), k = self.unwrapped, rollout.scores.shape, rollout.suffixes
        schedule, scores = agent.policy.schedule, rollout.scores.double().cpu()
        local: list[Tensor] = []  # of each prompt (G, n)
        spread, left = torch.zeros(prompts, dtype=torch.float64), torch.zeros_like(scores)  # (P,), (P, G)
        for p in range(prompts):
            images = rollout.components[p * group * k : (p + 1) * group * k]  # G K of them
            values = values_of(images)  # (G K, C)
            remainder = scores[p] - values.sum(1).view(group, k).mean(1)  # (G,)
            left[p] = above_mean(remainder[:, None], ROUNDING * scores[p].abs().max().item()).squeeze(1)
            centred = above_mean(values)
            tokens = tokens_of(images, schedule, steps).double()  # (G K, C, n)
            placed = torch.einsum("ic,icn->in", centred, tokens)
            local.append(placed.view(group, k, -1).mean(1) + left[p][:, None])
            spread[p] = (centred.var(0).sum() + left[p].var()).sqrt()
        self.record(rollout, left)
        advantages = torch.stack(local) * self.factors(spread, group)[:, None, None]  # (P, G, n)
        return advantages.flatten(0, 1).float().to(agent.device)

    def factors(self, spread: Tensor, group: int) -> Tensor:
        """What ``advantage_scale`` multiplies the advantages of each prompt by, ``(P,)``, from their spread, ``(P,)``.

        Asked of scores that have just this standard deviation; 0 where there is none.
        """
        agent = self.unwrapped
        unit = torch.linspace(-1, 1, group, dtype=spread.dtype)
        unit = unit / unit.std()
        scores = agent.processes.gather(spread[:, None] * unit)  # (P, G), "batch" looks at all of them
        scaled = losses.ADVANTAGE_SCALES[agent.advantage_scale](scores, scores, agent.advantage_eps, 1)
        return torch.where(spread > 0, agent.processes.mine(scaled, len(spread))[:, 0] / (spread * unit[0]), 0.0)

    def record(self, rollout: Rollout, left: Tensor) -> None:
        """Log how many components have a place, and how much of the scores they leave."""
        parts = [part for found in rollout.components for part in found]
        scores = rollout.scores.double().cpu()
        centred = scores - scores.mean(1, keepdim=True)
        logger = self.unwrapped.logger
        logger.record("local/placed", sum(part.boxes is not None for part in parts) / len(parts))
        if centred.any():
            logger.record("local/left", (left.norm() / centred.norm()).item())


def require_plain(agent: GRPO | Wrapper) -> None:
    """``ValueError`` unless the advantages of an agent and its wrappers are GRPO's own."""
    algorithm = agent.unwrapped
    if type(algorithm).advantages is not GRPO.advantages:
        raise ValueError(
            f"LocalCredit takes the place of an agent's advantages, and {type(algorithm).__name__} has its own: wrap "
            "an agent with GRPO's, such as grpo, dr_grpo, reinforce or vmr"
        )
    for wrapper in algorithm.wrappers:
        if type(wrapper).token_advantages is not Wrapper.token_advantages:
            raise ValueError(
                f"LocalCredit would undo what {type(wrapper).__name__} inside it does to advantages: put it inside, as "
                "in 'local+similarity'"
            )


def require_components(rollout: Rollout) -> None:
    """``ValueError`` naming the first image whose reward gave no components."""
    for image, found in enumerate(rollout.components):
        if not found:
            prompt = rollout.scenes[image // rollout.suffixes].prompt
            raise ValueError(
                f"the reward gave no components for image {image}, {prompt!r}, and LocalCredit needs to know where the "
                "score came from: use a reward that fills RewardOutput.components, such as 'ocr', 'ocr_edit' or "
                "'geneval', or train without 'local'"
            )
