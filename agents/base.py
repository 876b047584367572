"""`Agent`, the base class of all algorithms: environment, sampling, the learning loop, the budget, prediction.

It keeps Stable-Baselines3's interface. An algorithm subclasses `Agent` and writes `iterate`, one round of sampling and
learning; see ``grpo.py``. `Agent` itself stands on ``trainable.py``, the weights and their optimiser, and on
``restorable.py``, what is saved.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule

from agents import logs
from agents.common import processes
from agents.common.checks import require_at_least, require_groups
from agents.policies import load_policy
from agents.policies.base import Policy
from agents.policies.lora import add_lora, lora_options
from agents.progress import SampleProgressBar
from agents.rollout import Forks, Rollout, act, collect, collect_in_parts, make_envs, prompts_of
from agents.sampling import Decoding, SharedNoise
from agents.step_locals import step_locals
from agents.trainable import Trainable
from agents.trainable import frozen_copy as frozen_copy
from rewards.serving.pool import RewardPool
from var_env.sb3 import VARTextVecEnv
from var_env.seeding import as_seed
from var_env.tokenizers.base import VisualTokenizer
from var_env.unfamiliar import warn_of_prompt
from var_env.vector import VARTextVectorEnv

AgentT = TypeVar("AgentT", bound="Agent")


class StopLearning(Exception):
    """A callback ended the training in the middle of a rollout. That rollout is dropped."""


class Agent(Trainable):
    """An agent that learns on ``VARText-v0`` by sampling groups of images.

    Args:
        policy: trained in place. "base" is the shipped policy, ``policies.SHIPPED`` has more; a path loads a file of
            its ``save``.
        env: an id, a single environment or a batched one, or ``None`` to only predict.

    The constructor says of each option what it does, beside its type and default. Subclasses do the same.

    Attributes:
        min_group_size: of the class: 2 where an algorithm compares the images of a prompt with each other.
        num_timesteps: environment steps, one for each grid of each row. ``learn(reset_num_timesteps=True)`` starts
            this count again. The other counters are never reset, and saved files keep them.
        images_decoded, tokens_sampled, n_updates: reward calls, tokens, calls of ``update``, over all processes.
        lr_factor: what the learning rates are multiplied with; 1 unless an algorithm adapts it.
        skipped_steps: optimiser steps that were skipped, see ``max_skipped``.
        seconds: time in sampling, decoding, reward and update; callbacks do not count.
        reference: the frozen policy that the KL term holds on to, if the algorithm has one.
        ema: the averaged policy, if there is one.
        processes: those that train this agent together, see ``agents/common/processes.py``.
    """

    min_group_size = 1

    def __init__(
        self,
        policy: Policy | str | Path,
        env: str | gym.Env | gym.vector.VectorEnv | None,
        *,
        group_size: Annotated[int, "G, images for each prompt; at least ``min_group_size``."] = 8,
        prompts_per_update: Annotated[
            int,
            "P, of all processes together. The prompts of update u depend on the seed and on u alone, whatever "
            "the agent and the processes.",
        ] = 8,
        learning_rate: Annotated[
            float | Schedule,
            "AdamW's, a number or a function of the remaining progress, 1 to 0, such as those of "
            "``agents/common/schedules.py``.",
        ] = 5e-5,
        temperature_lr: Annotated[
            float | Schedule | None,
            "the learning rate of the policy's learned temperatures, as ``learning_rate``; 0 freezes them, so that a "
            "gain is in what is drawn and not in how sharply. Their gradient is clipped apart from that of the "
            "weights. ``None``: they are learned and clipped with the weights.",
        ] = 0.0,
        weight_decay: Annotated[
            float, "AdamW's, at least 0: each step takes this share, times the learning rate, off all weights."
        ] = 0.0,
        max_grad_norm: Annotated[float, "the gradient is scaled down to this norm."] = 1.0,
        max_skipped: Annotated[
            int,
            "so many optimiser steps in a row may be skipped because their loss or gradient is not finite, before "
            "training ends with an error; 0 ends it at once. A run that goes on from a checkpoint meets the "
            "same numbers again, so without this one bad batch would be its end.",
        ] = 3,
        ema_decay: Annotated[
            float | None,
            "keeps an exponential moving average of the weights, ``ema = decay ema + (1 - decay) policy`` after "
            "every optimiser step, which is then what is evaluated. ``None``: without.",
        ] = None,
        lora: Annotated[
            Mapping[str, Any] | None,
            'options of ``policies.lora.add_lora``, such as ``{"r": 8}``: trains low-rank adapters and leaves '
            'the weights as they are. Needs the extra "lora". ``None``: trains all weights, or the adapters '
            "that the policy has already.",
        ] = None,
        overlap: Annotated[
            int,
            "parts in which a rollout is drawn, so that a `RewardPool` scores one while the next is drawn; 1 is "
            "in one piece, and needs no pool. With a pool, `while_scored` fills the wait after the last part.",
        ] = 1,
        decoding: Annotated[Decoding, "how training samples are drawn."] = Decoding(),  # noqa: B008 (frozen)
        image_interval: Annotated[
            int,
            "updates between two images of samples in TensorBoard; 0 for none.",
        ] = 10,
        seed: Annotated[int | None, "0 to 2**64 - 1; ``None`` draws one."] = None,
        tensorboard_log: Annotated[str | None, "as in Stable-Baselines3."] = None,
        device: Annotated[torch.device | str, "as in Stable-Baselines3."] = "auto",
        verbose: Annotated[int, "as in Stable-Baselines3."] = 0,
        _init_setup_model: bool = True,
    ) -> None:
        seed = None if seed is None else as_seed(seed)
        if not isinstance(policy, Policy):
            policy = load_policy(policy)
        super().__init__(
            type(policy),  # type: ignore[arg-type]
            None,  # SB3 would wrap the environment
            learning_rate=learning_rate,
            tensorboard_log=tensorboard_log,
            device=device,
            verbose=verbose,
            seed=seed,
        )
        require_at_least(1, group_size=group_size, prompts_per_update=prompts_per_update, overlap=overlap)
        require_at_least(0, max_skipped=max_skipped)
        require_groups(type(self), group_size)
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        if not (temperature_lr is None or callable(temperature_lr) or is_rate(temperature_lr)):
            raise ValueError(f"temperature_lr must be a finite number of at least 0, got {temperature_lr!r}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {ema_decay}")
        self.processes = processes.current()
        # Sharded weights come to their devices in learn(): a whole copy may not fit there.
        self.policy = policy if self.processes.shards else policy.to(self.device)
        self.policy.tokenizer.to(self.device)
        if lora is not None and _init_setup_model:  # one from a checkpoint has its adapters
            add_lora(self.policy, **{"seed": seed or 0, **lora_options(lora)})
        self.reference: Policy | None = None
        self.ema: Policy | None = None
        self.temperature_lr, self.lr_factor = temperature_lr, 1.0
        self.weight_decay = weight_decay
        self.max_grad_norm, self.max_skipped, self.ema_decay = max_grad_norm, max_skipped, ema_decay
        self.skipped_steps = self._skipped_in_a_row = self._steps = self._steps_that_moved = 0
        self.group_size, self.prompts_per_update = group_size, prompts_per_update
        self.decoding, self.image_interval, self.overlap = decoding, image_interval, overlap
        self.images_decoded = self.tokens_sampled = self._rollouts = 0
        self.seconds = 0.0
        self._logger = Logger(None, [])  # learn() sets the real ones
        self.callback = self._init_callback(None)
        self._stop = False
        if env is not None:
            self._bind(env)
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.generator = torch.Generator(self.device)
        self.set_random_seed(self.seed)

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed the sampler, the prompts to come, and Python's, numpy's and torch's own generators.

        ``ValueError`` for a seed outside of 0 to 2**64 - 1.
        """
        if seed is None:
            drawn = int(np.random.SeedSequence().generate_state(1)[0])  # saved, so that a resumed run goes on
            self.seed = self.processes.broadcast(drawn)
        else:
            self.seed = as_seed(seed)
            utils.set_random_seed(self.seed % 2**32, using_cuda=self.device.type == "cuda")  # numpy's takes no more
        self._rollouts = 0
        self.generator.manual_seed(self.seed)

    @property
    def name(self) -> str:
        """For log folders."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def unwrapped(self: AgentT) -> AgentT:
        """This agent; of a wrapper, the agent inside."""
        return self

    @property
    def best_of(self) -> int:
        """Evaluations draw this many images for each prompt and keep the best rewarded. 1, except for `BestOfN`."""
        return 1

    def timesteps(self, images: int) -> int:
        """How many environment steps this agent takes to decode about ``images``, for ``learn(total_timesteps)``."""
        return images * len(self.policy.schedule)

    @property
    def steps_left(self) -> int:
        """Environment steps that the last ``learn()`` had still to do when it was stopped, or when it was saved."""
        return max(self._total_timesteps - self.num_timesteps, 0)

    # The environment -------------------------------------------------------------------------------------------------

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Learn on another environment with the same spaces."""
        self._bind(env)

    def get_env(self) -> VARTextVecEnv | None:
        """The environment as Stable-Baselines3's functions take it, P rows; ``env`` is Gymnasium's."""
        return None if self.env is None else VARTextVecEnv(self.env)

    def _bind(self, env: Any) -> None:
        envs = make_envs(env, self.processes.share(self.prompts_per_update, "prompts_per_update"))
        if not same_tokenizer(self.policy.tokenizer, envs.tokenizer):
            raise ValueError(
                "the policy and the environment use different tokenizers: make the environment with "
                "tokenizer=policy.tokenizer, or with the path of its weights"
            )
        self.env, self.n_envs = envs, envs.num_envs
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space

    # Learning --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def iterate(self) -> None:
        """One round: sample, learn, log."""

    def learn(
        self: AgentT,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> AgentT:
        """Iterate until ``total_timesteps`` environment steps (grids) are done; the last iteration is finished.

        ``callback`` may end it earlier. When it does so after the last step of a rollout, that rollout is still
        learned from; before, the rollout is dropped. ``log_interval`` counts iterations; ``None`` or 0 logs none.

        When no update had a gradient to follow, a `UserWarning` says so at the end.
        """
        if self.env is None:
            raise ValueError("this agent has no environment to learn on: pass env= to load(), or call set_env()")
        for part in (self, *self.wrappers):  # once more, because load() and others may set another size
            require_groups(type(part), self.group_size)
        if not self.processes.is_first:
            self.set_logger(Logger(None, []))
            progress_bar = False
        self._shard()
        self._steps = self._steps_that_moved = 0
        tb_log_name = self.name if tb_log_name is None else tb_log_name
        total_timesteps, self.callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self.callback.on_training_start(locals(), globals())
        self._stop, iteration = False, 0
        while self.num_timesteps < total_timesteps and not self._stop:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            try:
                self.iterate()
            except StopLearning:
                break
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise RuntimeError(self._out_of_memory(error)) from error
                raise
            self.seconds = self.processes.reduce([self.seconds], "max")[0]  # budgets end for all at once
            iteration += 1
            if log_interval and iteration % log_interval == 0:
                self.dump_logs(iteration)
        self.callback.on_training_end()
        self.callback = self._init_callback(None)
        self._warn_when_nothing_moved()
        return self

    def _warn_when_nothing_moved(self) -> None:
        if self._steps and not self._steps_that_moved and self.processes.is_first:
            name = self.wrappers[-1].name if self.wrappers else self.name
            warnings.warn(
                f"{name} with seed {self.seed} learned nothing: all {self._steps} optimiser steps had a gradient "
                "or a learning rate of zero. Look at rollout/zero_variance_groups, the share of prompts whose images "
                "were all rewarded alike, and at learning_rate",
                stacklevel=3,
            )

    def _out_of_memory(self, error: BaseException) -> str:
        return (
            f"out of memory in update {self.n_updates + 1}: give a smaller micro_batch, which leaves the update as it "
            f"is, or see docs/scaling.md ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callbacks = super()._init_callback(callback)
        if progress_bar:
            callbacks = CallbackList([callbacks, SampleProgressBar()])
            callbacks.init_callback(self)
        return callbacks

    def sample(self) -> Rollout:
        """`collect` images for new prompts. Tells the callback, checks the rewards, keeps the time and logs."""
        self.callback.on_rollout_start()
        try:
            rollout = self.collect(self.next_prompt_seed())
            rollout.require_finite()
        except ValueError as error:
            raise RuntimeError(f"sampling for update {self.n_updates + 1} failed, weights intact: {error}") from error
        self.callback.update_locals({"rollout": rollout})
        self.callback.on_rollout_end()
        self.seconds += sum(rollout.seconds.values())
        logs.record_rollout(self.logger, rollout, self.processes)
        if self.image_interval and self.n_updates % self.image_interval == 0:
            logs.record_samples(self.logger, rollout)
        return rollout

    def collect(self, seed: int) -> Rollout:
        """Draw G images for each of the P prompts of ``seed``. Override this for another way of sampling."""
        return self.draw(seed, self.group_size)

    def draw(self, seed: int, group_size: int, fork_at: tuple[int, int] | Forks | None = None) -> Rollout:
        """`rollout.collect` with this agent's policy, environment, decoding and noise, its steps counted."""
        if self.env is None:
            raise ValueError("this agent has no environment: pass env= to load(), or call set_env()")
        seed += self.processes.rank * self.env.num_envs  # row i of all processes has the seed + i
        how: dict[str, Any] = {
            "generator": self._noise,
            "fork_at": fork_at,
            "keep_support": self.keeps_support,
            "on_step": self.on_env_step,
        }
        if self.overlap > 1 or isinstance(self.env.reward, RewardPool):
            how["while_scored"] = self.while_scored
            return collect_in_parts(self.policy, self.env, group_size, self.decoding, self.overlap, seed, **how)
        return collect(self.policy, self.env, group_size, self.decoding, seed=seed, **how)

    def while_scored(self, rollout: Rollout) -> Rollout:
        """Called while a `RewardPool` scores a rollout. Override it to compute what the update needs besides scores."""
        return rollout

    @property
    def _noise(self) -> torch.Generator | SharedNoise:
        """The random generator of a rollout's samples."""
        if self.processes.count == 1:
            return self.generator
        return SharedNoise(self.generator, self.processes.rank, self.processes.count)

    @property
    def keeps_support(self) -> bool:
        """Whether rollouts keep the tokens that a truncated sampler could draw."""
        return False

    def next_prompt_seed(self) -> int:
        """A new seed for the environments: a function of the agent's seed and the number of rollouts so far."""
        self._rollouts += 1
        return int(np.random.SeedSequence([self.seed or 0, self._rollouts]).generate_state(1)[0])

    def on_env_step(self, envs: VARTextVectorEnv) -> None:
        """Count a step of the sampling environments and tell the callback; ``StopLearning`` if it wants no more."""
        complete, rows = envs.t == len(envs.schedule), envs.num_envs * self.processes.count
        self.num_timesteps += rows
        self.tokens_sampled += rows * envs.schedule.sizes[envs.t - 1]
        self.images_decoded += rows if complete else 0
        self.callback.update_locals(step_locals(envs))
        if self.processes.any(not self.callback.on_step()):
            self._stop = True
            if not complete:
                raise StopLearning

    def dump_logs(self, iteration: int = 0) -> None:
        """Write what was recorded, with the budget spent so far, at step ``images_decoded``, an axis for all agents."""
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        values = {
            "budget/images": self.images_decoded,
            "budget/tokens": self.tokens_sampled,
            "budget/updates": self.n_updates,
            "budget/seconds": self.seconds,
            "time/iterations": iteration,
            "time/fps": int((self.num_timesteps - self._num_timesteps_at_start) / elapsed),
            "time/time_elapsed": int(elapsed),
            "time/total_timesteps": self.num_timesteps,
        }
        if not self.processes.shards:
            values |= {f"policy/{name}": value for name, value in self.policy.diagnostics().items()}
        if self.skipped_steps:
            values["train/skipped_steps"] = self.skipped_steps
        for name, value in values.items():
            self.logger.record(name, value)
        self.logger.dump(self.images_decoded)

    # Acting ----------------------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The next grid on the canvas, ``(H, W)`` for one observation and ``(N, H, W)`` for a batch.

        Decodes as in training, or takes the likeliest tokens. Draws from torch's global generator, so predicting does
        not change a training run. Nothing is remembered between calls, and ``state`` comes back as it is. A prompt
        unlike those of the world is warned of once, see ``var_env/unfamiliar.py``.
        """
        self._warn_of_prompts(observation)
        decoding = Decoding(temperature=0.0, guidance=self.decoding.guidance) if deterministic else self.decoding
        return act(self.policy, observation, decoding), state

    def _warn_of_prompts(self, observation: Mapping[str, Any]) -> None:
        """Warn of prompts unlike those of the world that the agent learns in, or else the policy's, once each."""
        world = self.policy.trained_on() if self.env is None else self.env.world
        if world is not None:
            for prompt in prompts_of(observation, scale=0):
                warn_of_prompt(prompt, world)


def is_rate(value: Any) -> bool:
    """Whether it is a number that a learning rate can be."""
    return isinstance(value, float | int) and 0 <= value < math.inf


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out. Torch has a class for that on GPUs, and not on CPUs."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def same_tokenizer(one: VisualTokenizer, other: VisualTokenizer) -> bool:
    """Whether two tokenizers have the same grids, vocabulary and weights."""
    if one is other:
        return True
    alike = [(t.schedule, t.vocab_size, t.depth, *t.state_dict()) for t in (one, other)]
    weights = other.state_dict()
    return alike[0] == alike[1] and all(torch.equal(w, weights[k].to(w.device)) for k, w in one.state_dict().items())
