"""GRPO that also learns in hindsight: an image that reads LAB is a right answer to the prompt "LAB".

Hindsight instruction relabelling (arXiv 2302.05206), beside GRPO's own loss and from the same images. An image whose
words were read with certainty, and are others than its prompt asks for, is learned once more under the prompt that
asks for the words that were read. ``hindsight.py`` compares it with GRPO. With ``--ray``, or in other commands, it is a
plugin::

    vartext compare --plugin examples/questions/hindsight_agent.py --agents grpo hindsight
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import GRPO, register
from agents.common.checks import require_choice
from agents.local_credit import places_of, tokens_of
from agents.logs import Tokens
from agents.losses import TokenWeights
from agents.rollout import Rollout
from rewards.components import Component
from var_env import ScaleSchedule, World
from var_env.scenes import Scene, split_of

TOKENS = ("letters", "all")
SHORTEST = 3  # letters of a word that the world asks for
ABOVE = " above "  # what stands between the quoted words of a prompt


# Which prompt ---------------------------------------------------------------------------------------------------------


def right_scene(
    scene: Scene,
    words: Sequence[str],
    confidences: Sequence[float],
    lines: np.ndarray,
    world: World,
    certainty: float,
) -> Scene | None:
    """The scene whose prompt an image is a right answer to: the same template and colours with the words that it shows.

    Args:
        scene: what the image was drawn for.
        words, confidences: what was read in it and how surely, 0 to 1.
        lines: the boxes of the lines read, ``(n, 4)``, xyxy in pixels.
        world: draws the scenes.
        certainty: the least confidence of a word.

    Returns:
        ``None`` where there is no such prompt: nothing was read, a word is doubtful, words stand side by side, the
        words are those asked for (in any order, as the reward has it), or the world could not ask for them.
    """
    if not words or min(confidences, default=0.0) < certainty or len(lines) != len(words):
        return None
    order = np.argsort(lines[:, 1], kind="stable")  # from the top
    lines = lines[order]
    if ((lines[1:, 1] + lines[1:, 3]) / 2 < lines[:-1, 3]).any():  # a middle beside the line above
        return None
    read = tuple(words[i].upper() if words[i].isascii() else words[i] for i in order)
    if sorted(read) == sorted(word.upper() for word in scene.words) or not could_ask(world, read):
        return None
    asked, shown = (ABOVE.join(f'"{word}"' for word in some) for some in (scene.words, read))
    if scene.prompt.count(asked) != 1:
        return None
    return replace(scene, prompt=scene.prompt.replace(asked, shown), words=read, boxes=())


def could_ask(world: World, words: Sequence[str]) -> bool:
    """Whether a world's prompts may ask for these words: their number, their letters, and their split.

    Words of another split are left out, or held-out words would leak into training.
    """
    return world.regions.get(len(words), 0) > 0 and all(
        set(word) <= set(ascii_uppercase)
        and SHORTEST <= len(word) <= world.max_letters
        and split_of(word) == world.split
        for word in words
    )


def tokens_that_differ(found: Sequence[Component], schedule: ScaleSchedule, steps: range) -> Tensor:
    """The tokens of ``steps`` under the letters of an image that were not asked for, float32 0 or 1 ``(n,)``.

    From the components of the score for the prompt asked. They are letters that are read as others, letters that are
    too many, and letters that are missing, whose place is where no other letter stands; see `local_credit.tokens_of`.
    """
    wrong = {(one.kind, one.indices) for one in found if one.kind == "spurious"}
    wrong |= {(one.kind, one.indices) for one in found if one.kind == "letter" and one.value == 0}
    chosen = [i for key, i in places_of([found]).items() if key in wrong]
    n = sum(schedule.sizes[t] for t in steps)
    return tokens_of([found], schedule, steps)[0, chosen].amax(0) if chosen else torch.zeros(n)


# The agent ------------------------------------------------------------------------------------------------------------


class Relabelled(NamedTuple):
    """R images of a rollout of B, under the prompts that they are right answers to; n tokens each."""

    rollout: Rollout
    place: Tensor  # int64 (B,), which of the R images a row is; -1 for none
    tokens: Tensor  # float32 (R, n), 1 where a token learns, else 0
    old: Tensor  # float32 (R, n), log-probabilities under these prompts before the update


@register("hindsight")
class Hindsight(GRPO):
    """GRPO that learns images with other words than asked for under the prompts that ask for them.

    Its loss is GRPO's, on the prompts asked, with all of its baselines and negative advantages, plus
    ``hindsight_coef`` times PPO's clipped surrogate (eq. 7) with an advantage of 1 on the relabelled images. The ratio
    compares the policy under the relabelled prompt with itself before the update. A token weighs what it does in
    GRPO's term. Sampling, reward calls and optimiser steps are GRPO's.

    Logs ``hindsight/images``, how many images of an update were relabelled, ``hindsight/share``, the same as a share of
    all, and ``hindsight/tokens``, the share of their tokens that learned from it.

    Args:
        policy, env: and more keywords, as in `GRPO`.

    Raises:
        ValueError: a coefficient below 0, a certainty outside 0 to 1, or an environment whose world has prompts
            of its own; in learning, ``hindsight_tokens="letters"`` with a reward that does not tell letters apart.
    """

    relabelled: Relabelled | None = None  # while an update descends

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        hindsight_coef: Annotated[float, "weight of the relabelled images, at least 0; 0 is GRPO."] = 0.1,
        hindsight_tokens: Annotated[
            str, 'which of their tokens learn: "letters", those under letters that were not asked for, or "all".'
        ] = "letters",
        certainty: Annotated[float, "the least confidence of each word read, 0 to 1."] = 0.9,
        **grpo: Any,
    ) -> None:
        require_choice(TOKENS, hindsight_tokens=hindsight_tokens)
        if not 0 <= hindsight_coef < math.inf:
            raise ValueError(f"hindsight_coef must be a finite number of at least 0, got {hindsight_coef}")
        if not 0 <= certainty <= 1:
            raise ValueError(f"certainty must lie between 0 and 1, got {certainty}")
        self.hindsight_coef, self.hindsight_tokens, self.certainty = hindsight_coef, hindsight_tokens, certainty
        super().__init__(policy, env, **grpo)
        if self.processes.shards:  # who would have to compute as often as each other
            raise ValueError("hindsight learns another number of rows in each process: train it with whole weights")

    def _bind(self, env: Any) -> None:
        super()._bind(env)
        assert self.env is not None
        if getattr(type(self.env.world), "sample", None) is not World.sample:
            raise ValueError(
                f"hindsight writes prompts as var_env.World does, and {type(self.env.world).__name__} has its own: use "
                "an environment of that world, or grpo"
            )

    def descend(self, rollout: Rollout, advantages: Tensor, steps: range) -> tuple[list[Tokens], list[float]]:
        self.relabelled = self.look_back(rollout, steps) if self.hindsight_coef else None
        try:
            return super().descend(rollout, advantages, steps)
        finally:
            del self.relabelled  # back to the class's None: nothing of it is saved

    @torch.no_grad()
    def look_back(self, rollout: Rollout, steps: range) -> Relabelled | None:
        """The images that are right answers to other prompts than theirs; ``None`` without any. Logs how many."""
        assert self.env is not None
        found: dict[int, tuple[Scene, Tensor]] = {}  # by row
        for row, scene in enumerate(rollout.scenes):
            read = rollout.words_read[row], rollout.confidences[row], rollout.regions[row]
            other = right_scene(scene, *read, self.env.world, self.certainty)
            if other is not None:
                tokens = self.tokens_to_learn(rollout, row, steps)
                if tokens.any():  # a word that was read in two parts has none that differs
                    found[row] = other, tokens
        scenes, masks = [other for other, _ in found.values()], [tokens for _, tokens in found.values()]
        kept = sum(tokens.mean().item() for tokens in masks)
        images, kept, everything = self.processes.reduce([len(found), kept, len(rollout.scenes)])
        self.logger.record("hindsight/images", images)
        self.logger.record("hindsight/share", images / everything)
        if images:
            self.logger.record("hindsight/tokens", kept / images)
        if not found:
            return None
        rows = torch.tensor(list(found))
        place = torch.full((len(rollout.scenes),), -1)
        place[rows] = torch.arange(len(rows))
        cond = self.policy.encode_prompts([scene.prompt for scene in scenes])
        bare = replace(rollout, old_logp=None, old_soft=None, ref_logp=None)  # which are under the prompts asked
        shown = replace(bare.rows(self.policy, rows[None]), scenes=scenes, cond=cond)
        old = self.in_micro_batches(lambda some: self.log_probs(self.policy, shown, some, steps).compared, shown)
        return Relabelled(shown, place.to(self.device), torch.stack(masks).to(self.device), old)

    def tokens_to_learn(self, rollout: Rollout, row: int, steps: range) -> Tensor:
        """Which tokens of a relabelled image learn, float32 0 or 1 ``(n,)``."""
        schedule, found = self.policy.schedule, rollout.components[row]
        if self.hindsight_tokens == "all":
            return torch.ones(sum(schedule.sizes[t] for t in steps))
        if not any(part.kind == "letter" for part in found):
            raise ValueError(
                f"the reward gave no letters for image {row}, {rollout.scenes[row].prompt!r}: use 'ocr' or 'ocr_edit', "
                "or hindsight_tokens='all'"
            )
        return tokens_that_differ(found, schedule, steps)

    def loss(
        self,
        rollout: Rollout,
        rows: Tensor,
        advantages: Tensor,
        weights: TokenWeights,
        old: Tensor | None,
        steps: range,
    ) -> tuple[Tensor, Tokens]:
        loss, seen = super().loss(rollout, rows, advantages, weights, old, steps)
        if self.relabelled is None:
            return loss, seen
        place = self.relabelled.place[rows]  # (b,)
        mine = place >= 0
        if mine.any():
            loss = loss + self.hindsight_coef * self.hindsight_loss(place[mine], weights.policy[mine], steps)
        return loss, seen

    def hindsight_loss(self, images: Tensor, weights: Tensor, steps: range) -> Tensor:
        """The clipped surrogate of some relabelled images, int64 ``(r,)``, with GRPO's weights of their tokens."""
        assert self.relabelled is not None
        shown, _, tokens, old = self.relabelled
        new = self.log_probs(self.policy, shown, images, steps).compared  # (r, n)
        right = torch.ones(len(images), device=self.device)  # the advantage
        loss, _ = self.policy_loss(new, old[images], right, steps)  # (r, n)
        return (weights * tokens[images] * loss).sum()

    def places_to_learn(self, advantages: Tensor) -> Tensor:
        if self.relabelled is None:
            return super().places_to_learn(advantages)
        return torch.arange(len(advantages), device=self.device)  # relabelled images of equal rewards teach as well
