"""Evaluation on held-out prompts with the paper's metrics, and intervals for what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agents.beside import applicable_shares, measure_beside
from agents.common.checks import require_at_least
from agents.inner_env import inner_env
from agents.policies.base import Policy
from agents.rollout import Rollout, collect, resized
from agents.sampling import Decoding
from rewards import OCRReward
from rewards.text_metrics import normalized_edit_distance, word_accuracy
from var_env.attributes import Record
from var_env.scenes import Scene, World, drawn
from var_env.seeding import as_seed
from var_env.vector import VARTextVectorEnv


@dataclass
class Evaluation:
    """One image for each of N prompts; every array is ``(N,)``, in the prompts' order.

    Words are those that the reward read; where the reward does not read, those that PP-OCR did.
    """

    scenes: list[Scene]
    scores: np.ndarray  # the reward
    word_accuracy: np.ndarray  # fraction of the target words read exactly
    ned: np.ndarray  # normalised edit distance, higher is better
    nothing_read: np.ndarray  # 1 when no word was read
    parts: dict[str, np.ndarray]  # the reward's parts, NaN where one is not applicable
    words_read: list[list[str]]
    images: np.ndarray  # (N, S, S, 3) uint8
    regions: list[np.ndarray]  # N of (number found, 4), where the reward looked, xyxy in pixels
    grids: list[torch.Tensor]  # T of (min(N, keep_grids), n_t, D), the tokens of the first images
    beside: Record  # what no reward sees, see `attributes`; nothing for scenes that are no `Scene`
    kl: np.ndarray | None = None  # estimate of the KL to the reference, nats an image; None without a reference

    def means(self) -> dict[str, float]:
        """The headline numbers."""
        arrays = {
            "reward": self.scores,
            "word_accuracy": self.word_accuracy,
            "ned": self.ned,
            "nothing_read": self.nothing_read,
        }
        return {name: float(values.mean()) for name, values in arrays.items()}

    def shares(self) -> dict[str, float]:
        """What was measured beside the reward, where it is applicable, one number each."""
        return applicable_shares(self.beside)


def held_out_scenes(world: World, count: int, seed: int = 0, split: str = "test") -> list[Scene]:
    """``count`` scenes like ``world``'s but of another split; the first ones are the same whatever the count.

    A world of prompt files gives each of its prompts once, and all when there are fewer than ``count``. An object of
    one's own that has no ``held_out`` knows no splits: these are scenes of its ``sample``, drawn from the seed.
    """
    seed, held_out = as_seed(seed), getattr(world, "held_out", None)
    return drawn(world, count, seed) if held_out is None else held_out(count, seed, split)


def evaluate(
    policy: Policy,
    env: VARTextVectorEnv | Mapping[str, Any],
    prompts: Sequence[Scene] | int,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 64,
    best_of: int = 1,
    keep_grids: int = 0,
    reference: Policy | None = None,
) -> Evaluation:
    """Draw one image for each prompt, or the best of several, and score it. The same arguments, the same result.

    Args:
        env: gives world, tokenizer and reward; or the arguments of ``VARTextVectorEnv`` but ``num_envs``.
        prompts: scenes, or how many to draw from the test split with ``seed``.
        seed: of the sampler's noise. It reaches no generator but its own, so evaluating does not change training.
        batch_size: images at a time; another size draws other noise.
        best_of: images for each prompt, of which the one with the highest reward is kept, the first of equals.
            All that is returned is of the image kept, so that word accuracy and NED tell what the choice is worth.
        keep_grids: of how many prompts, the first ones, the tokens are returned too, at least 0.
        reference: a policy of the same tokenizer, such as the one before training, to estimate the KL to. Its mean over
            images is unbiased where they are drawn at temperature 1 and untruncated; a single image's may be negative.
    """
    require_at_least(1, batch_size=batch_size, best_of=best_of)
    require_at_least(0, keep_grids=keep_grids)
    seed = as_seed(seed)
    base = VARTextVectorEnv(1, **env) if isinstance(env, Mapping) else inner_env(env)
    scenes = held_out_scenes(base.world, prompts, seed) if isinstance(prompts, int) else list(prompts)
    if not scenes:
        raise ValueError("evaluate needs at least one prompt")
    generator = torch.Generator(policy.device).manual_seed(seed)
    training = policy.training
    policy.eval()
    rollouts = []
    prompts_at_once = max(1, batch_size // best_of)
    for start in range(0, len(scenes), prompts_at_once):
        batch = scenes[start : start + prompts_at_once]
        drawn = collect(policy, resized(base, len(batch)), best_of, decoding, generator, scenes=batch)
        best = drawn.scores.argmax(1, keepdim=True)  # (P, 1)
        rollouts.append(drawn.rows(policy, torch.arange(len(batch))[:, None] * best_of + best))
    kl = None if reference is None else np.concatenate([log_ratio(policy, reference, r) for r in rollouts])
    policy.train(training)
    images = np.concatenate([rollout.images for rollout in rollouts])
    words_read = [words for rollout in rollouts for words in rollout.words_read]
    if not all(rollout.reads for rollout in rollouts):  # word accuracy and NED need a reader
        words_read = OCRReward()(images, scenes).words
    pairs = [(scene.words, read) for scene, read in zip(scenes, words_read, strict=True)]
    return Evaluation(
        scenes=scenes,
        scores=np.concatenate([rollout.scores.flatten().numpy() for rollout in rollouts]),
        word_accuracy=np.array([word_accuracy(words, read) for words, read in pairs]),
        ned=np.array([normalized_edit_distance(words, read) for words, read in pairs]),
        nothing_read=np.array([float(not read) for _, read in pairs]),
        parts={name: np.concatenate([rollout.parts[name] for rollout in rollouts]) for name in rollouts[0].parts},
        words_read=words_read,
        images=images,
        regions=[boxes for rollout in rollouts for boxes in rollout.regions],
        grids=[
            torch.cat([draw.tokens for draw in of_grid])[:keep_grids]
            for of_grid in zip(*(rollout.draws for rollout in rollouts), strict=True)
        ],
        beside=measure_beside(images, scenes, words_read),
        kl=kl,
    )


@torch.no_grad()
def log_ratio(policy: Policy, reference: Policy, rollout: Rollout) -> np.ndarray:
    """``log p(image) - log p_reference(image)`` of each row, ``(B,)``, in nats: its mean is the KL to the reference."""
    steps = range(len(policy.schedule))
    logp, other = (p.evaluate(rollout.cond, rollout.grids, steps)[0] for p in (policy, reference))  # (B, L, D)
    ratio: np.ndarray = (logp - other).double().sum((1, 2)).cpu().numpy()
    return ratio


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``values`` and the ends of its percentile bootstrap interval (Efron, 1979).

    Give differences of paired values, prompt by prompt, for the interval of an improvement.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, got shape {data.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    draws = np.random.default_rng(seed).integers(len(data), size=(n, len(data)))
    low, high = np.quantile(data[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(data.mean()), float(low), float(high)
