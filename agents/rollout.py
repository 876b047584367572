"""Sampling pictures: unroll a policy in lockstep environments, and what came of it.

`unroll` is the inner loop and knows nothing of groups; `collect` draws G pictures for each of P prompts, or a tree of
them, for VMR and Tree GRPO. A prompt's condition is encoded once, and cache and environments are forked from there:
what pictures share is computed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from agents.common.processes import Processes
from agents.losses import zero_variance
from agents.policies.base import Policy
from agents.sampling import Decoding, SharedNoise, draw
from rewards.base import HasWords, Reward, RewardOutput
from rewards.serving.pool import RewardPool, join
from var_env import mdp
from var_env.env import VARTextEnv
from var_env.scenes import Scene
from var_env.vector import VARTextVectorEnv

Forks = tuple[tuple[int, int], ...]  # (m, k): before grid m every row became k


def make_envs(env: str | gym.Env | gym.vector.VectorEnv, num_envs: int) -> VARTextVectorEnv:
    """``num_envs`` environments in lockstep from an id, a single environment or a batched one.

    An environment of another batch size gives its world, tokenizer and reward to a new one.
    """
    made = gym.make_vec(env, num_envs=num_envs) if isinstance(env, str) else env
    base = made.unwrapped
    if not isinstance(base, VARTextEnv | VARTextVectorEnv):
        raise ValueError(f"agents need VARText-v0, as an id, an environment or a batched environment; got {env!r}")
    if isinstance(base, VARTextVectorEnv) and base.num_envs == num_envs:
        return base
    return resized(base, num_envs)


def resized(env: VARTextEnv | VARTextVectorEnv, num_envs: int, reward: Reward | None = None) -> VARTextVectorEnv:
    """New environments that share the world, the tokenizer and, unless another is given, the reward of another."""
    return VARTextVectorEnv(num_envs, world=env.world, tokenizer=env.tokenizer, reward=reward or env.reward)


class Ahead(NamedTuple):
    """Something a policy says of the rows of a rollout, computed before the update that asks for it."""

    values: Tensor  # (B, ...)
    what: str
    policy: Policy
    version: int  # of its weights, see `weights_version`
    steps: range  # the grids it is about

    def rows(self, index: Tensor) -> Ahead:
        """That of some rows, int64, which may repeat."""
        return self._replace(values=self.values[index])


def weights_version(policy: Policy) -> int:
    """Another number after every change of the weights in place, as optimisers and ``load_state_dict`` make them."""
    return sum(weight._version for weight in policy.parameters())


@dataclass
class Rollout:
    """What one iteration sampled: ``B = P * G`` rows to learn from, row ``p * G + g`` being sample g of prompt p.

    A row was decoded and scored as ``K`` pictures, picture ``b * K + k`` being suffix k of row b. K is 1, and a row
    is a picture, but for the prefixes of VMR, whose grids end before the picture does: see `merge`.

    An update asks for ``cond``, ``grids``, ``behaviour_logp`` and ``support``; the rest is for rewards, masks and eyes.
    """

    cond: Any  # the policy's condition, B rows
    scenes: list[Scene]  # B
    grids: list[Tensor]  # of (B, n_t, D) int64, all T of them or a prefix
    behaviour_logp: list[Tensor]  # of (B, n_t, D), under the sampler
    tail_mass: list[Tensor]  # of (B, n_t, D), the model's probability of codes that the sampler could not draw
    support: list[Tensor | None]  # of bool (B, n_t, D, V), when it was kept and the sampler truncated
    scores: Tensor  # (P, G) float32, what a row is worth: the reward, until an agent adds to it
    returns: Tensor  # (P, G, K) float32, the rewards of its pictures
    parts: dict[str, np.ndarray]  # each (B * K,), NaN where a part is not applicable
    images: np.ndarray  # (B * K, S, S, 3) uint8
    words_read: list[list[str]]  # B * K
    regions: list[np.ndarray]  # B * K of (number found, 4), xyxy in pixels
    seconds: dict[str, float]  # "sampling", "reward", "decode", the rest of the environment, and "ahead" with a pool
    advantages: Tensor | None = None  # (B,) or (B, n), once an algorithm has judged the rows
    features: Tensor | None = None  # (B, T, W) float32, what PPO's critic saw of the state before each grid
    forks: Forks = ()  # where the pictures of a prompt parted, see `collect`
    ahead: tuple[Ahead, ...] = ()  # of these rows and grids, for the update: see `known`

    @property
    def suffixes(self) -> int:
        """K, the pictures of each row."""
        return self.returns.shape[2]

    def with_ahead(self, what: str, policy: Policy, steps: range, values: Tensor) -> Rollout:
        """The rollout with ``values``, ``(B, ...)``: what the policy, as it is, says of its rows in ``steps``."""
        return replace(self, ahead=(*self.ahead, Ahead(values, what, policy, weights_version(policy), steps)))

    def known(self, what: str, policy: Policy, steps: range) -> Tensor | None:
        """The ``values`` of `with_ahead`, if there are any, of these steps and of the policy as it is now."""
        key = what, policy, weights_version(policy), steps
        return next((found.values for found in self.ahead if found[1:] == key), None)

    def require_finite(self) -> None:
        """``ValueError`` naming the first reward that is not a finite number, and its prompt."""
        returns = self.returns.flatten()  # (B * K,)
        for picture in (~returns.isfinite()).nonzero().flatten().tolist():
            row = picture // self.suffixes
            raise ValueError(
                f"the reward of row {row}, {self.scenes[row].prompt!r}, is {returns[picture]}: rewards must be finite "
                "numbers; mend the reward function and resume from the last checkpoint"
            )

    def merge(self, policy: Policy, suffixes: int, grids: int, value: Callable[[Tensor], Tensor]) -> Rollout:
        """One row for each ``suffixes`` rows that share their first ``grids`` grids, the others left out.

        ``policy`` made the condition, and ``value`` maps returns ``(P, G, K)`` to the new rows' scores ``(P, G)``.
        """
        returns = self.returns.unflatten(1, (-1, suffixes)).flatten(2)  # (P, G, K)
        return replace(
            self,
            cond=policy.take(self.cond, torch.arange(0, len(self.scenes), suffixes, device=policy.device)),
            scenes=self.scenes[::suffixes],
            grids=[grid[::suffixes] for grid in self.grids[:grids]],
            behaviour_logp=[logp[::suffixes] for logp in self.behaviour_logp[:grids]],
            tail_mass=[mass[::suffixes] for mass in self.tail_mass[:grids]],
            support=[None if kept is None else kept[::suffixes] for kept in self.support[:grids]],
            scores=value(returns),
            returns=returns,
            ahead=tuple(found._replace(values=found.values[::suffixes]) for found in self.ahead),
        )

    def groups(self, policy: Policy, keep: Tensor) -> Rollout:
        """Some prompts with all their rows and pictures; ``policy`` made the condition, ``keep`` is bool ``(P,)``."""
        return self.rows(policy, torch.arange(self.scores.numel()).view_as(self.scores)[keep])

    def rows(self, policy: Policy, index: Tensor) -> Rollout:
        """Some rows with their pictures: int64 ``(P', G')``, which rows of this rollout are those of the new one."""
        chosen, k = index.flatten(), self.suffixes
        pictures = (chosen[:, None] * k + torch.arange(k)).flatten().tolist()  # B' * K
        on_device = chosen.to(self.grids[0].device)
        return replace(
            self,
            cond=policy.take(self.cond, on_device),
            scenes=[self.scenes[row] for row in chosen.tolist()],
            grids=[grid[on_device] for grid in self.grids],
            behaviour_logp=[logp[on_device] for logp in self.behaviour_logp],
            tail_mass=[mass[on_device] for mass in self.tail_mass],
            support=[None if kept is None else kept[on_device] for kept in self.support],
            scores=self.scores.flatten()[index],
            returns=self.returns.flatten(0, 1)[index],
            parts={name: values[pictures] for name, values in self.parts.items()},
            images=self.images[pictures],
            words_read=[self.words_read[picture] for picture in pictures],
            regions=[self.regions[picture] for picture in pictures],
            advantages=None if self.advantages is None else self.advantages[on_device],
            features=None if self.features is None else self.features[on_device],
            ahead=tuple(found.rows(on_device) for found in self.ahead),
        )

    @staticmethod
    def concatenate(policy: Policy, rollouts: Sequence[Rollout]) -> Rollout:
        """The prompts of several rollouts of the same G and K in one; ``policy`` encodes the prompts together."""
        scenes = [scene for rollout in rollouts for scene in rollout.scenes]
        first = rollouts[0]

        def joined(name: str) -> list[Any]:
            return [
                None if parts[0] is None else torch.cat(parts)
                for parts in zip(*(getattr(rollout, name) for rollout in rollouts), strict=True)
            ]

        return replace(
            first,
            cond=policy.encode_prompts([scene.prompt for scene in scenes]) if scenes else first.cond,
            scenes=scenes,
            grids=joined("grids"),
            behaviour_logp=joined("behaviour_logp"),
            tail_mass=joined("tail_mass"),
            support=joined("support"),
            scores=torch.cat([rollout.scores for rollout in rollouts]),
            returns=torch.cat([rollout.returns for rollout in rollouts]),
            parts={name: np.concatenate([rollout.parts[name] for rollout in rollouts]) for name in first.parts},
            images=np.concatenate([rollout.images for rollout in rollouts]),
            words_read=[words for rollout in rollouts for words in rollout.words_read],
            regions=[boxes for rollout in rollouts for boxes in rollout.regions],
            seconds={name: sum(rollout.seconds[name] for rollout in rollouts) for name in first.seconds},
            advantages=None,
            features=None,
            ahead=tuple(
                parts[0]._replace(values=torch.cat([part.values for part in parts]))
                for parts in zip(*(rollout.ahead for rollout in rollouts), strict=False)
                if all(part[1:] == parts[0][1:] for part in parts)
            ),
        )

    def scored(self, found: RewardOutput) -> Rollout:
        """The rollout of one picture a row with what a reward found in its pictures."""
        mdp.require_applicable(found, self.scenes)
        scores = torch.as_tensor(found.scores).view_as(self.scores)
        return replace(
            self,
            scores=scores,
            returns=scores.unsqueeze(2),
            parts=found.parts,
            words_read=found.words,
            regions=found.regions,
        )

    def summary(self, processes: Processes = Processes()) -> dict[str, float]:  # noqa: B008 (alone)
        """Scalars to log: the reward's mean and spread, its parts where they apply, and the sampler's tail.

        Over the rollouts of all processes, each of which has to call it.
        """
        returns, scores = processes.gather(self.returns).double(), processes.gather(self.scores)
        groups = scores.double().std(1, correction=0)
        parts = {name: processes.gather(torch.as_tensor(self.parts[name])).numpy() for name in sorted(self.parts)}
        applicable = {name: parts[name][~np.isnan(parts[name])] for name in self.parts}
        tail = torch.cat(self.tail_mass, 1)  # (B, L, D)
        return {
            "reward": returns.mean().item(),
            "reward_std": returns.std(correction=0).item(),
            "reward_std_in_group": groups.mean().item(),
            "zero_variance_groups": zero_variance(scores).double().mean().item(),
            "tail_mass": processes.mean(tail.double().sum().item(), tail.numel()),
            **{name: float(values.mean()) for name, values in applicable.items() if values.size},
        }


@dataclass
class Trail:
    """What `unroll` drew, one entry a step: ``B`` rows, grid t of ``n_t`` tokens with ``D`` codes each."""

    grids: list[Tensor] = field(default_factory=list)  # (B, n_t, D) int64
    logp: list[Tensor] = field(default_factory=list)  # (B, n_t, D) under the sampler
    tail_mass: list[Tensor] = field(default_factory=list)  # (B, n_t, D)
    support: list[Tensor | None] = field(default_factory=list)  # (B, n_t, D, V)
    info: dict[str, Any] = field(default_factory=dict)  # of the last environment step
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "decode": 0.0, "reward": 0.0})

    def take(self, index: Tensor) -> Trail:
        """Rows of what was drawn; ``index`` may repeat and drop."""
        return replace(
            self,
            grids=[grid[index] for grid in self.grids],
            logp=[logp[index] for logp in self.logp],
            tail_mass=[mass[index] for mass in self.tail_mass],
            support=[None if kept is None else kept[index] for kept in self.support],
        )


class TimedReward(Reward):
    """A reward that keeps the time, so that the last step's is told apart from decoding."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.seconds = reward, reward.name, 0.0

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Left to the reward, which may ask for more than words or for less."""

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        start = time.perf_counter()
        output = self.reward(images, scenes)
        self.seconds += time.perf_counter() - start
        return output


class Deferred(Reward):
    """Hands pictures to a pool of workers and gives zeros for the time being; ``output`` waits for the scores."""

    def __init__(self, pool: RewardPool) -> None:
        self.pool, self.name = pool, pool.name

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Left to the pool."""

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        self.future = self.pool.submit(images, scenes)
        return RewardOutput(np.zeros(len(images), np.float32))

    def output(self) -> RewardOutput:
        """What the pool found."""
        return self.future.result()


class Caches:
    """The policy's cache and, for guidance, that of the empty prompt, which move together."""

    def __init__(self, policy: Policy, cond: Any, guided: bool) -> None:
        self.policy = policy
        self.pair = [policy.begin(cond)] + ([policy.begin(policy.null_cond(cond))] if guided else [])

    def step(self, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Conditional and empty-prompt logits of grid t, ``(B, n_t, D, V)``."""
        logits = []
        for i, cache in enumerate(self.pair):
            out, self.pair[i] = self.policy.step(cache, t, features, previous)
            logits.append(out)
        return logits[0], logits[1] if len(logits) > 1 else None

    def fork(self, index: Tensor) -> Caches:
        """Rows of both, copied; ``index`` repeats, reorders and drops."""
        forked = object.__new__(Caches)
        forked.policy, forked.pair = self.policy, [self.policy.fork(cache, index) for cache in self.pair]
        return forked


@torch.no_grad()
def unroll(
    policy: Policy,
    envs: VARTextVectorEnv,
    caches: Caches,
    steps: range,
    decoding: Decoding,
    generator: torch.Generator | SharedNoise | None = None,
    keep_support: bool = False,
    on_step: Callable[[VARTextVectorEnv], None] | None = None,
) -> Trail:
    """Continue the episodes in ``envs`` over ``steps``, which start at ``envs.t``. Uses caches and envs up.

    ``on_step`` is called after each environment step and may raise to stop. Decoding and scoring the pictures is part
    of the last step.
    """
    trail, timer = Trail(), TimedReward(envs.reward)
    previous = envs.grids[-1].to(policy.device) if envs.t else None
    for t in steps:
        start = time.perf_counter()
        features = envs.tokenizer.read(t, envs.canvas).to(policy.device)  # (B, n_t, C)
        logits, null_logits = caches.step(t, features, previous)
        drawn = draw(logits, null_logits, decoding, generator)
        previous = drawn.tokens
        trail.grids.append(drawn.tokens)
        trail.logp.append(drawn.logp)
        trail.tail_mass.append(drawn.tail_mass)
        trail.support.append(drawn.support if keep_support else None)
        sampled = time.perf_counter()
        trail.seconds["sampling"] += sampled - start
        envs.reward = timer
        try:
            trail.info = envs.step(drawn.tokens)[-1]
        finally:
            envs.reward = timer.reward
        trail.seconds["decode"] += time.perf_counter() - sampled
        if on_step is not None:
            on_step(envs)
    trail.seconds["decode"] -= timer.seconds
    trail.seconds["reward"] += timer.seconds
    return trail


@torch.no_grad()
def collect(
    policy: Policy,
    envs: VARTextVectorEnv,
    group_size: int,
    decoding: Decoding,
    generator: torch.Generator | SharedNoise | None = None,
    *,
    fork_at: tuple[int, int] | Forks | None = None,
    scenes: Sequence[Scene] | None = None,
    seed: int | None = None,
    keep_support: bool = False,
    on_step: Callable[[VARTextVectorEnv], None] | None = None,
) -> Rollout:
    """Reset P environments and draw ``group_size`` pictures for each of their prompts.

    The prompts are ``scenes``, one for each environment, or else what ``envs`` samples, from ``seed`` if it is given.

    With ``fork_at=(m, k)``, every row forks into k before grid m, which share what they have so far, the cache
    included: then a prompt has ``group_size * k`` pictures, those of one prefix side by side. Several such pairs, m
    growing, fork one after the other.
    """
    length = len(envs.schedule)
    pairs = fork_pairs(fork_at, length)
    start = time.perf_counter()
    envs.reset(seed=seed, options=None if scenes is None else {"scenes": list(scenes)})
    cond = policy.encode_prompts([scene.prompt for scene in envs.scenes])  # P rows
    caches, rows = Caches(policy, cond, decoding.guided), envs
    trails: list[Trail] = []
    seconds = {"sampling": time.perf_counter() - start}
    forks = [(0, group_size), *pairs]
    for (begin, k), (end, _) in zip(forks, [*forks[1:], (length, 1)], strict=True):
        start = time.perf_counter()
        index = torch.arange(rows.num_envs, device=policy.device).repeat_interleave(k)
        caches, rows = caches.fork(index), rows.fork(k)
        trails = [trail.take(index) for trail in trails]
        seconds["sampling"] += time.perf_counter() - start
        trails.append(unroll(policy, rows, caches, range(begin, end), decoding, generator, keep_support, on_step))
        for phase, elapsed in trails[-1].seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + elapsed
    info = trails[-1].info
    per_prompt = rows.num_envs // envs.num_envs
    scores = torch.as_tensor(info["score"], dtype=torch.float32).view(-1, per_prompt)  # (P, G)
    return Rollout(
        cond=policy.take(cond, torch.arange(envs.num_envs, device=policy.device).repeat_interleave(per_prompt)),
        scenes=list(rows.scenes),
        grids=[grid for trail in trails for grid in trail.grids],
        behaviour_logp=[logp for trail in trails for logp in trail.logp],
        tail_mass=[mass for trail in trails for mass in trail.tail_mass],
        support=[kept for trail in trails for kept in trail.support],
        scores=scores,
        returns=scores.unsqueeze(2),
        parts=info["parts"],
        images=info["image"],
        words_read=info["words_read"],
        regions=info["regions"],
        seconds=seconds,
        forks=pairs,
    )


def fork_pairs(fork_at: tuple[int, int] | Forks | None, length: int) -> Forks:
    """The forks of `collect`, one or several, in a schedule of ``length`` grids; ``ValueError`` for other than that."""
    pairs = [] if not fork_at else [fork_at] if isinstance(fork_at[0], int) else fork_at
    found = tuple((m, k) for m, k in pairs)
    if not all(0 < m < length and k >= 1 for m, k in found):
        raise ValueError(f"fork_at=(m, k) needs 0 < m < {length} and k of at least 1, got {fork_at}")
    if any(m >= later for (m, _), (later, _) in pairwise(found)):
        raise ValueError(f"fork_at needs its forks from coarse to fine, each at a grid of its own, got {fork_at}")
    return found


def collect_in_parts(
    policy: Policy,
    envs: VARTextVectorEnv,
    group_size: int,
    decoding: Decoding,
    parts: int,
    seed: int,
    while_scored: Callable[[Rollout], Rollout] = lambda rollout: rollout,
    **more: Any,
) -> Rollout:
    """`collect`, the prompts in several parts: while one is scored by a `RewardPool`, the next is drawn.

    The same prompts as in one part, with other noise: the sampler draws for one part after the other. When all are
    drawn, ``while_scored`` may add to the rollout what needs no scores, which are zeros then. Its time is "ahead", and
    the time for the reward is what is left of it after that.

    Raises:
        ValueError: the environment's reward is no pool.
    """
    if not isinstance(envs.reward, RewardPool):
        raise ValueError(
            f"to score beside sampling takes a RewardPool, such as reward='pool', reward_kwargs={{'reward': "
            f"{envs.reward.name!r}}}; the environment has the reward {envs.reward.name!r}"
        )
    envs.reset(seed=seed)
    drawn: list[Rollout] = []
    deferred: list[Deferred] = []
    for scenes in np.array_split(np.arange(envs.num_envs), min(parts, envs.num_envs)):
        mine = [envs.scenes[i] for i in scenes]
        deferred.append(Deferred(envs.reward))
        part = resized(envs, len(mine), deferred[-1])
        drawn.append(collect(policy, part, group_size, decoding, scenes=mine, **more))
    start = time.perf_counter()
    rollout = while_scored(drawn[0] if len(drawn) == 1 else Rollout.concatenate(policy, drawn))
    waiting = time.perf_counter()
    rollout = rollout.scored(join([part.output() for part in deferred]))
    rollout.seconds["ahead"] = waiting - start
    rollout.seconds["reward"] += time.perf_counter() - waiting
    return rollout


@torch.no_grad()
def act(policy: Policy, observation: dict[str, Any], decoding: Decoding) -> np.ndarray:
    """The next grid on the canvas, int64 ``(H, W)`` for one observation, ``(N, H, W)`` for a batch at any scales.

    Where tokens have several codes there is a last axis of D.
    Computes all earlier scales again; to sample whole pictures, `unroll` is faster.
    """
    schedule, scales = policy.schedule, np.atleast_1d(observation["scale"])
    code = mdp.code_shape(policy.tokenizer)
    action = np.zeros((len(scales), *schedule.grids[-1], *code), np.int64)
    for t, rows, cond, grids in states_by_scale(policy, observation):
        logits = policy(cond, grids, range(t, t + 1))
        null_logits = policy(policy.null_cond(cond), grids, range(t, t + 1)) if decoding.guided else None
        h, w = schedule.grids[t]
        drawn = draw(logits, null_logits, decoding).tokens.view(len(rows), h, w, *code)
        action[rows.cpu(), :h, :w] = drawn.cpu().numpy()
    return action if np.ndim(observation["scale"]) else action[0]


def prompts_of(observation: Mapping[str, Any], scale: int | None = None) -> list[str]:
    """The prompts of one observation or a batch, arrays or tensors; with ``scale``, of rows that await that grid."""
    prompts = torch.atleast_2d(torch.as_tensor(observation["prompt"])).cpu().numpy()  # (N, bytes)
    scales = torch.as_tensor(observation["scale"]).flatten().tolist()  # N
    rows = [row for row, t in zip(prompts, scales, strict=True) if scale is None or t == scale]
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def states_by_scale(policy: Policy, observation: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, Any, list[Tensor]]]:
    """The rows of a batch of observations, arrays or tensors, that await grid t, for each t that occurs.

    Gives t, the rows, int64 ``(b,)``, their condition, and their grids before t, ``(b, n_s, D)`` each.
    """
    flat = torch.as_tensor(observation["tokens"], device=policy.device)
    flat = flat.view(-1, policy.schedule.total_tokens, policy.tokenizer.depth)  # (N, L, D)
    prompts = prompts_of(observation)
    scales = torch.as_tensor(observation["scale"]).flatten().cpu()  # (N,)
    for t in scales.unique().tolist():
        if t >= len(policy.schedule):
            raise ValueError(f"the episode is over, there is no grid {t}: reset the environment")
        rows = (scales == t).nonzero().flatten()
        cond = policy.encode_prompts([prompts[row] for row in rows.tolist()])
        rows = rows.to(policy.device)
        yield t, rows, cond, [flat[rows, part] for part in policy.schedule.slices[:t]]
