"""Sampling: a policy draws images in environments that step together, and `Rollout` records the result.

`unroll` is the inner loop and knows nothing of groups. `collect` draws G images for each of P prompts, or a tree of
images for VMR and Tree GRPO. What images share is computed once: a prompt is encoded once, and the policy's cache and
the environments are forked where images part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.beside import applicable_shares, measure_beside
from agents.common.processes import Processes
from agents.inner_env import inner_env
from agents.losses import zero_variance
from agents.policies.base import Policy
from agents.sampling import Decoding, Draw, SharedNoise, draw
from agents.timing import timed
from rewards.base import Reward, RewardOutput
from rewards.components import Component
from rewards.serving.pool import RewardPool, join
from var_env import mdp
from var_env.env import VARTextEnv
from var_env.scenes import Scene
from var_env.vector import VARTextVectorEnv

Forks = tuple[tuple[int, int], ...]  # (m, k): before grid m every row became k


def make_envs(env: str | gym.Env | gym.vector.VectorEnv | VecEnv, num_envs: int) -> VARTextVectorEnv:
    """``num_envs`` environments in lockstep from an id, a single environment or a batched one.

    An environment of another batch size gives its world, tokenizer and reward to a new one. ``ValueError`` for what
    `inner_env` refuses.
    """
    base = inner_env(gym.make_vec(env, num_envs=num_envs) if isinstance(env, str) else env)
    if isinstance(base, VARTextVectorEnv) and base.num_envs == num_envs:
        return base
    return resized(base, num_envs)


def resized(env: VARTextEnv | VARTextVectorEnv, num_envs: int, reward: Reward | None = None) -> VARTextVectorEnv:
    """New environments that share the world, the tokenizer and, unless another is given, the reward of another."""
    return VARTextVectorEnv(num_envs, world=env.world, tokenizer=env.tokenizer, reward=reward or env.reward)


def weights_version(policy: Policy) -> int:
    """Another number after every change of the weights in place, as optimisers and ``load_state_dict`` make them."""
    return sum(weight._version for weight in policy.parameters())


@dataclass
class Rollout:
    """What one iteration sampled: ``B = P * G`` rows to learn from, row ``p * G + g`` being sample g of prompt p.

    A row was decoded and scored as ``K`` images; image ``b * K + k`` is suffix k of row b. Usually K is 1 and a row is
    an image. Only the prefixes of VMR have more, because their grids end before the image does: see `merge`.

    An update reads ``cond`` and ``draws``. Rewards, masks and logs read the rest.
    """

    cond: Any  # the policy's condition, B rows
    scenes: list[Scene]  # B
    draws: list[Draw]  # one a grid, all T of them or a prefix; with their support when it was kept
    scores: Tensor  # (P, G) float32, what a row is worth: the reward, until an agent adds to it
    returns: Tensor  # (P, G, K) float32, the rewards of its images
    parts: dict[str, np.ndarray]  # each (B * K,), NaN where a part is not applicable
    images: np.ndarray  # (B * K, S, S, 3) uint8
    words_read: list[list[str]]  # B * K
    reads: bool  # whether the reward looked for words; if not, nobody did
    regions: list[np.ndarray]  # B * K of (number found, 4), xyxy in pixels
    seconds: dict[str, float]  # "sampling", "reward", "decode", the rest of the environment, and "ahead" with a pool
    confidences: list[list[float]] = field(default_factory=list)  # B * K, one in [0, 1] for each of words_read
    components: list[list[Component]] = field(default_factory=list)  # B * K, each empty where the reward gives none
    advantages: Tensor | None = None  # (B,) or (B, n), once an algorithm has judged the rows
    forks: Forks = ()  # where the images of a prompt parted, see `collect`
    # What the policies say of these rows before the update, n being the tokens of the grids that it learns.
    old_logp: Tensor | None = None  # (B, n) float32, of the policy
    old_soft: Tensor | None = None  # (B, n) float32, of the policy and the tokens' neighbourhoods, with soft codes
    ref_logp: Tensor | None = None  # (B, n) float32, of the reference
    features: Tensor | None = None  # (B, T, W) float32, what PPO's critic sees of the state before each grid
    version: int | None = None  # of the policy's weights that these are of, see `weights_version`

    def __post_init__(self) -> None:
        self.confidences = self.confidences or [[]] * len(self.images)
        self.components = self.components or [[]] * len(self.images)

    @property
    def grids(self) -> list[Tensor]:
        """The tokens of each grid, ``(B, n_t, D)`` int64."""
        return [draw.tokens for draw in self.draws]

    @property
    def suffixes(self) -> int:
        """K, the images of each row."""
        return self.returns.shape[2]

    def require_current(self, policy: Policy, steps: range) -> None:
        """Check that what the policies say of the rows, if given, belongs to today's weights and these steps.

        Raises:
            ValueError: the weights have changed since, as after an update.
        """
        if self.version not in (None, weights_version(policy)):
            raise ValueError(
                "the weights have changed since this rollout's log-probabilities were computed: sample a new one, or "
                "set its old_logp, old_soft, ref_logp, features and version to None to have them computed again"
            )
        shape = len(self.scenes), sum(policy.schedule.sizes[t] for t in steps)
        for logp in (self.old_logp, self.old_soft, self.ref_logp):
            assert logp is None or logp.shape == shape, f"log-probabilities of {tuple(logp.shape)}, not {shape}"

    def require_finite(self) -> None:
        """``ValueError`` naming the first reward that is not a finite number, and its prompt."""
        returns = self.returns.flatten()  # (B * K,)
        for image in (~returns.isfinite()).nonzero().flatten().tolist():
            row = image // self.suffixes
            raise ValueError(
                f"the reward of row {row}, {self.scenes[row].prompt!r}, is {returns[image]}: rewards must be finite "
                "numbers; mend the reward function and resume from the last checkpoint"
            )

    def merge(self, policy: Policy, suffixes: int, grids: int, value: Callable[[Tensor], Tensor]) -> Rollout:
        """Merge each run of ``suffixes`` rows, which share their first ``grids`` grids, into one row of those grids.

        ``policy`` made the condition, and ``value`` maps returns ``(P, G, K)`` to the new rows' scores ``(P, G)``.
        """
        returns = self.returns.unflatten(1, (-1, suffixes)).flatten(2)  # (P, G, K)
        first = slice(None, None, suffixes)
        return replace(
            self,
            cond=policy.take(self.cond, torch.arange(0, len(self.scenes), suffixes, device=policy.device)),
            scenes=self.scenes[first],
            draws=[draw.take(first) for draw in self.draws[:grids]],
            scores=value(returns),
            returns=returns,
            **{name: values[first] for name, values in self.before_update().items()},
        )

    def before_update(self) -> dict[str, Any]:
        """Those of ``old_logp``, ``old_soft``, ``ref_logp`` and ``features`` that are not ``None``, by name."""
        found = {name: getattr(self, name) for name in ("old_logp", "old_soft", "ref_logp", "features")}
        return {name: values for name, values in found.items() if values is not None}

    def groups(self, policy: Policy, keep: Tensor) -> Rollout:
        """Some prompts with all their rows and images; ``policy`` made the condition, ``keep`` is bool ``(P,)``."""
        return self.rows(policy, torch.arange(self.scores.numel()).view_as(self.scores)[keep])

    def rows(self, policy: Policy, index: Tensor) -> Rollout:
        """Some rows with their images: int64 ``(P', G')``, which rows of this rollout are those of the new one."""
        chosen, k = index.flatten(), self.suffixes
        images = (chosen[:, None] * k + torch.arange(k)).flatten().tolist()  # B' * K
        on_device = chosen.to(self.draws[0].tokens.device)
        return replace(
            self,
            cond=policy.take(self.cond, on_device),
            scenes=[self.scenes[row] for row in chosen.tolist()],
            draws=[draw.take(on_device) for draw in self.draws],
            scores=self.scores.flatten()[index],
            returns=self.returns.flatten(0, 1)[index],
            parts={name: values[images] for name, values in self.parts.items()},
            images=self.images[images],
            words_read=[self.words_read[image] for image in images],
            regions=[self.regions[image] for image in images],
            confidences=[self.confidences[image] for image in images],
            components=[self.components[image] for image in images],
            advantages=None if self.advantages is None else self.advantages[on_device],
            **{name: values[on_device] for name, values in self.before_update().items()},
        )

    @staticmethod
    def concatenate(policy: Policy, rollouts: Sequence[Rollout]) -> Rollout:
        """Join rollouts of the same G and K, prompt after prompt; ``policy`` encodes all prompts in one batch."""
        scenes = [scene for rollout in rollouts for scene in rollout.scenes]
        first, before = rollouts[0], [rollout.before_update() for rollout in rollouts]
        assert all(rollout.version == first.version for rollout in rollouts), "of one policy, as it is"
        joined: dict[str, Any] = {name: torch.cat([found[name] for found in before]) for name in before[0]}
        return replace(
            first,
            cond=policy.encode_prompts([scene.prompt for scene in scenes]) if scenes else first.cond,
            scenes=scenes,
            draws=[Draw.join(parts) for parts in zip(*(rollout.draws for rollout in rollouts), strict=True)],
            scores=torch.cat([rollout.scores for rollout in rollouts]),
            returns=torch.cat([rollout.returns for rollout in rollouts]),
            parts={name: np.concatenate([rollout.parts[name] for rollout in rollouts]) for name in first.parts},
            images=np.concatenate([rollout.images for rollout in rollouts]),
            words_read=[words for rollout in rollouts for words in rollout.words_read],
            regions=[boxes for rollout in rollouts for boxes in rollout.regions],
            confidences=[found for rollout in rollouts for found in rollout.confidences],
            components=[found for rollout in rollouts for found in rollout.components],
            seconds={name: sum(rollout.seconds[name] for rollout in rollouts) for name in first.seconds},
            advantages=None,
            **joined,
        )

    def scored(self, found: RewardOutput) -> Rollout:
        """This rollout, of one image a row, with the scores and the findings of a reward."""
        mdp.require_applicable(found, self.scenes)
        scores = torch.as_tensor(found.scores).view_as(self.scores)
        return replace(
            self,
            scores=scores,
            returns=scores.unsqueeze(2),
            parts=found.parts,
            words_read=found.words,
            reads=found.reads_words,
            regions=found.regions,
            confidences=found.confidences,
            components=found.components,
        )

    def summary(self, processes: Processes = Processes()) -> dict[str, float]:  # noqa: B008 (alone)
        """Scalars to log: the reward's mean and spread, its parts, metrics beside it, and the sampler's tail mass.

        Parts and metrics are means over the samples to which they apply. All processes must call this, because the
        numbers are over the rollouts of all of them.
        """
        returns, scores = processes.gather(self.returns).double(), processes.gather(self.scores)
        groups = scores.double().std(1, correction=0)
        parts = {name: processes.gather(torch.as_tensor(self.parts[name])).numpy() for name in sorted(self.parts)}
        applicable = {name: parts[name][~np.isnan(parts[name])] for name in self.parts}
        scenes = [scene for scene in self.scenes for _ in range(self.suffixes)]  # B * K
        record = measure_beside(self.images, scenes, self.words_read if self.reads else None)
        beside = {name: processes.gather(torch.as_tensor(values)).numpy() for name, values in record.items()}
        tail = torch.cat([draw.tail_mass for draw in self.draws], 1)  # (B, L, D)
        return {
            "reward": returns.mean().item(),
            "reward_std": returns.std(correction=0).item(),
            "reward_std_in_group": groups.mean().item(),
            "zero_variance_groups": zero_variance(scores).double().mean().item(),
            "tail_mass": processes.mean(tail.double().sum().item(), tail.numel()),
            **{name: float(values.mean()) for name, values in applicable.items() if values.size},
            **applicable_shares(beside),
        }


@dataclass
class Trail:
    """What `unroll` drew, one entry a step: ``B`` rows, grid t of ``n_t`` tokens with ``D`` codes each."""

    draws: list[Draw] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "decode": 0.0, "reward": 0.0})
    images: np.ndarray | None = None  # (B, S, S, 3) uint8, after the last grid
    answer: Future[RewardOutput] | None = None  # of the reward, after the last grid

    @property
    def grids(self) -> list[Tensor]:
        """The tokens of each grid, ``(B, n_t, D)`` int64."""
        return [draw.tokens for draw in self.draws]


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
    """Continue the episodes in ``envs`` over ``steps``, which start at ``envs.t``. Changes ``caches`` and ``envs``.

    ``on_step`` is called after each environment step and may raise to stop. After the last grid the images are first
    decoded and handed to the reward.
    """
    trail = Trail()
    seconds = trail.seconds
    previous = envs.grids[-1].to(policy.device) if envs.t else None
    for t in steps:
        with timed(seconds, "sampling"):
            features = envs.tokenizer.read(t, envs.canvas).to(policy.device)  # (B, n_t, C)
            logits, null_logits = caches.step(t, features, previous)
            drawn = draw(logits, null_logits, decoding, generator)
            previous = drawn.tokens
            trail.draws.append(drawn if keep_support else drawn._replace(support=None))
        with timed(seconds, "decode"):
            envs.advance(drawn.tokens)
        if envs.t == len(envs.schedule):
            with timed(seconds, "decode"):
                trail.images = envs.decode()
            with timed(seconds, "reward"):
                trail.answer = envs.reward.submit(trail.images, envs.scenes)
            if not isinstance(envs.reward, RewardPool):  # whose answer may be there or not, as chance has it
                envs.conclude(trail.images, trail.answer.result())
        if on_step is not None:
            on_step(envs)
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
    """Reset P environments and draw ``group_size`` images for each of their prompts.

    The prompts are ``scenes``, one for each environment, or else what ``envs`` samples, from ``seed`` if it is given.

    With ``fork_at=(m, k)``, every row forks into k rows before grid m. They share their grids and their cache so far.
    A prompt then has ``group_size * k`` images, and those of one prefix stand side by side. Several such pairs, with
    growing m, fork one after the other.
    """
    rollout, answer = collect_unscored(
        policy,
        envs,
        group_size,
        decoding,
        generator,
        fork_at=fork_at,
        scenes=scenes,
        seed=seed,
        keep_support=keep_support,
        on_step=on_step,
    )
    with timed(rollout.seconds, "reward"):
        return rollout.scored(answer.result())


@torch.no_grad()
def collect_unscored(
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
) -> tuple[Rollout, Future[RewardOutput]]:
    """`collect` without waiting for the reward: a rollout whose scores are NaN, and the answer that `scored` takes."""
    length = len(envs.schedule)
    pairs = fork_pairs(fork_at, length)
    seconds: dict[str, float] = {}
    with timed(seconds, "sampling"):
        envs.reset(seed=seed, options=None if scenes is None else {"scenes": list(scenes)})
        cond = policy.encode_prompts([scene.prompt for scene in envs.scenes])  # P rows
        caches, rows = Caches(policy, cond, decoding.guided), envs
    draws: list[Draw] = []
    forks = [(0, group_size), *pairs]
    for (begin, k), (end, _) in zip(forks, [*forks[1:], (length, 1)], strict=True):
        with timed(seconds, "sampling"):
            index = torch.arange(rows.num_envs, device=policy.device).repeat_interleave(k)
            caches, rows = caches.fork(index), rows.fork(k)
            draws = [drawn.take(index) for drawn in draws]
        trail = unroll(policy, rows, caches, range(begin, end), decoding, generator, keep_support, on_step)
        draws += trail.draws
        for phase, elapsed in trail.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + elapsed
    assert trail.images is not None and trail.answer is not None  # the last trail ends after the last grid
    per_prompt = rows.num_envs // envs.num_envs
    scores = torch.full((envs.num_envs, per_prompt), torch.nan)  # (P, G)
    rollout = Rollout(
        cond=policy.take(cond, torch.arange(envs.num_envs, device=policy.device).repeat_interleave(per_prompt)),
        scenes=list(rows.scenes),
        draws=draws,
        scores=scores,
        returns=scores.unsqueeze(2),
        parts={},
        images=trail.images,
        words_read=[[]] * rows.num_envs,
        reads=False,
        regions=[np.zeros((0, 4), np.float32)] * rows.num_envs,
        seconds=seconds,
        forks=pairs,
    )
    return rollout, trail.answer


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
    """`collect` in several parts of the prompts: a `RewardPool` scores one part while the next one is drawn.

    The prompts are the same as in one part. The noise is not, because the sampler draws for one part after the other.
    When all are drawn, scores are still NaN, and ``while_scored`` may add to the rollout what needs no scores. Its time
    is booked as "ahead", and "reward" is the time that is then still spent waiting.

    Raises:
        ValueError: the environment's reward is no pool.
    """
    if not isinstance(envs.reward, RewardPool):
        raise ValueError(
            f"to score beside sampling takes a RewardPool, such as reward='pool', reward_kwargs={{'reward': "
            f"{envs.reward.name!r}}}; the environment has the reward {envs.reward.name!r}"
        )
    envs.reset(seed=seed)
    asked = envs.scenes  # kept, as a callback may use the environments in between
    found: list[tuple[Rollout, Future[RewardOutput]]] = []
    for scenes in np.array_split(np.arange(envs.num_envs), min(parts, envs.num_envs)):
        mine = [asked[i] for i in scenes]
        part = resized(envs, len(mine))
        found.append(collect_unscored(policy, part, group_size, decoding, scenes=mine, **more))
    drawn, answers = zip(*found, strict=True)
    seconds: dict[str, float] = {}
    with timed(seconds, "ahead"):
        rollout = while_scored(drawn[0] if len(drawn) == 1 else Rollout.concatenate(policy, drawn))
    with timed(rollout.seconds, "reward"):
        rollout = rollout.scored(join([answer.result() for answer in answers]))
    return replace(rollout, seconds=rollout.seconds | seconds)


@torch.no_grad()
def act(policy: Policy, observation: dict[str, Any], decoding: Decoding) -> np.ndarray:
    """The next grid on the canvas, int64 ``(H, W)`` for one observation, ``(N, H, W)`` for a batch at any scales.

    Where tokens have several codes there is a last axis of D.
    Computes all earlier scales again; to sample whole images, `unroll` is faster.
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
