"""Mixtures: a weighted sum of rewards, with each of them logged under its own name.

>>> reward = combine({"ocr": 1.0, "strict": 0.0}, {"strict": {"reward": "ocr", "penalty_weight": 1.0}})
>>> reward.weights
{'ocr': 1.0, 'strict': 0.0}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, Reward, RewardOutput, check_count
from rewards.components import Component


def combine(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    normalise: str | Mapping[str, Sequence[float]] = "none",
) -> Combined:
    """A mixture of rewards by their names, see `Combined`. Its arguments can be written as JSON.

    Args:
        weights: what each reward counts; by its name in `rewards.make`, or by one of your own without a slash.
        options: for each reward its own options, and under "reward" the name for `rewards.make` where the mixture calls
            it otherwise: ``{"strict": {"reward": "ocr", "penalty_weight": 1.0}}``. That puts a reward in twice, and
            gives a short name to one that is a URL.
        normalise: see `Combined`.

    Raises:
        ValueError: as `Combined`, for options of a reward that has no weight, and from `rewards.make`.
    """
    from rewards import make

    if not isinstance(weights, Mapping):
        raise ValueError(f"weights must map the names of rewards to numbers, as in {{'ocr': 1.0}}; got {weights!r}")
    for name in options or {}:
        if name not in weights:
            raise ValueError(f"options for {name!r}, which has no weight; the mixture is of {', '.join(weights)}")
    rewards = {}
    for name in weights:
        chosen = dict((options or {}).get(name, {}))
        rewards[name] = make(chosen.pop("reward", name), **chosen)
    return Combined(rewards, weights, normalise)


class Combined(Reward):
    """The weighted sum of several rewards, ``sum_i w_i s_i``.

    A weight is any finite number: below 0 for what is to be kept down, 0 for a reward that is logged and nothing else,
    the metric beside the reward that shows when the reward is being hacked.

    A reward that is not applicable to a sample adds nothing there. The weights of the others stay as they are: they
    also settle what a point of one reward is worth in points of another, which must not change from prompt to prompt.
    Samples to which other rewards apply are therefore on other levels, which is no matter within a group of one prompt.
    Where no reward with a weight applies, the mixture does not apply.

    Parts: each reward's score as it gave it, before `normalise`, under its name, as in "ocr", and each of its parts
    behind a slash, as in "ocr/word_accuracy". Words and confidences are those of the first reward, in the order
    of `rewards` and whatever its weight, that looks for words, and regions those of the first that reads images at all.
    So name the one that Mask Propagation and the evaluation are to go by before the others. Components are those of all
    rewards with a weight that give some, as large as they are in the sum, with kinds such as "ocr/letter".

    Args:
        rewards: the rewards by name.
        weights: a number for each of the same names, at least one of them not 0.
        normalise: what is done to scores before they are weighted. "none": nothing. "range": each reward's own
            `score_range` is mapped to [0, 1]. A mapping of names to (low, high) gives the ranges, where a reward states
            none or where those that occur are narrower. Scores beyond a range given so go beyond [0, 1]. There is no
            scaling by the statistics of a batch: a score would depend on its neighbours in it, an image alone would
            have none, and an evaluation would always find the mean 0.

    Raises:
        ValueError: an empty mixture, names that differ, a name with a slash, a weight that is not a finite number,
            weights that are all 0, or a range that is missing or empty.
    """

    name = "combine"

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        normalise: str | Mapping[str, Sequence[float]] = "none",
    ) -> None:
        if not rewards:
            raise ValueError("a mixture needs at least one reward, as in {'ocr': 1.0, 'clip': 0.3}")
        if set(rewards) != set(weights):
            raise ValueError(f"the weights are of {', '.join(weights) or 'nothing'}, the rewards {', '.join(rewards)}")
        for name, weight in weights.items():
            if "/" in name:
                raise ValueError(
                    f"{name!r} has a slash, which names parts: give it another name in the weights, and in the options "
                    f"{{NAME: {{'reward': {name!r}}}}}"
                )
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")
        if not any(weights.values()):
            raise ValueError(f"the weights of {', '.join(weights)} are all 0: one must count")
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}
        self.ranges = self._ranges(normalise)

    def _ranges(self, normalise: str | Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
        """(low, high) for each reward that counts; nothing when scores are taken as they are."""
        if normalise == "none":
            return {}
        if isinstance(normalise, str) and normalise != "range":
            raise ValueError(f"unknown normalise {normalise!r}: choose 'none', 'range', or ranges by name")
        given: Mapping[str, Sequence[float]] = {} if isinstance(normalise, str) else normalise
        for name in given:
            if name not in self.rewards:
                raise ValueError(f"a range for {name!r}, which is not in the mixture of {', '.join(self.rewards)}")
        ranges = {}
        for name in [name for name, weight in self.weights.items() if weight]:
            found = given.get(name, self.rewards[name].score_range)
            if found is None:
                raise ValueError(f"reward {name!r} states no range: give it, normalise={{{name!r}: (low, high)}}")
            if len(found) != 2 or not all(map(math.isfinite, found)) or not found[0] < found[1]:
                raise ValueError(f"the range of {name!r} must be two finite numbers, low < high; got {found!r}")
            ranges[name] = (float(found[0]), float(found[1]))
        return ranges

    def load(self) -> None:
        """Load the models of all rewards that have one."""
        for reward in self.rewards.values():
            if hasattr(reward, "load"):
                reward.load()

    def describe(self) -> dict[str, str]:
        found = {name: reward.describe() for name, reward in self.rewards.items()}
        return {f"{name}/{key}": value for name, described in found.items() for key, value in described.items()}

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes with what each of the rewards needs."""
        check_count(scenes, count)
        for reward in self.rewards.values():
            reward.check_scenes(scenes, count)

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        outputs = {name: reward(images, scenes) for name, reward in self.rewards.items()}
        scores, applicable = np.zeros(len(images)), np.zeros(len(images), bool)
        for name, output in outputs.items():
            weight = self.weights[name]
            if weight:
                low, high = self.ranges.get(name, (0.0, 1.0))
                scaled = (output.scores.astype(np.float64) - low) / (high - low)
                scores += np.where(output.applicable, weight * scaled, 0)
                applicable |= output.applicable

        parts: dict[str, NDArray[np.float32]] = {}
        for name, output in outputs.items():
            parts[name] = np.ma.masked_array(output.scores, ~output.applicable)
            for part, values in output.parts.items():
                parts[f"{name}/{part}"] = np.ma.masked_array(values, np.isnan(values))
        lists = [(output.words, output.confidences) for output in outputs.values() if output.reads_words]
        words, confidences = lists[0] if lists else ([], [])
        regions = next((output.regions for output in outputs.values() if output.reads), [])
        components = [self._components(outputs, image) for image in range(len(images))]
        return RewardOutput(scores.astype(np.float32), parts, words, confidences, regions, applicable, components)

    def _components(self, outputs: Mapping[str, RewardOutput], image: int) -> list[Component]:
        """The components of the rewards that count, as large as they are in the mixture's score."""
        found: list[Component] = []
        for name, weight in self.weights.items():
            low, high = self.ranges.get(name, (0.0, 1.0))
            if weight and outputs[name].applicable[image]:
                found += [part.scaled(weight / (high - low), f"{name}/") for part in outputs[name].components[image]]
        return found
