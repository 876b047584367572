"""Stable-Baselines3's own PPO, unchanged, on VARText: with its stock MLP, and with this project's transformer.

    python examples/sb3_ppo.py                           # the shipped transformer, the OCR reward; 2 or 3 minutes
    python examples/sb3_ppo.py --policy mlp              # SB3's MultiInputPolicy from scratch, a reward it can learn
    python examples/sb3_ppo.py --reward brightness --learning-rate 5e-5     # the transformer on that reward

Two lines make the environment one for SB3: ``VARTextVectorEnv`` runs the episodes in lockstep, and ``VARTextVecEnv``
shows them as SB3's VecEnv, with the canvas as a flat MultiDiscrete action. An MLP is then SB3's "MultiInputPolicy", and
the transformer is `VARActorCriticPolicy`.

The MLP reads the prompt as 8-bit numbers and draws all cells of a grid independently of each other. No budget that fits
an afternoon makes it write a letter, and a reward that is always 0 teaches nothing. So its reward is how bright the
image is, with one fixed prompt: a task that tells whether the plumbing works, and no more. Such a reward is a class
of five lines, `Brightness` below.

The transformer learns brightness fast: from 0.48 to 0.71 in 640 images. On the OCR reward the default budget is too
small to see a gain, and the table should say that nothing broke. SB3's PPO takes several optimiser steps for each
rollout, so its learning rate is below that of our agents, which take one: at 5e-5 and with ``gae_lambda=0.95``, 1280
images took the held-out reward from 1.31 to 0.97 (one seed).

What can be compared: rewards at the same number of images, between transformers: SB3's PPO here, ``agents.PPO``, GRPO
and the others of compare.py. What cannot: the MLP with any of them (no pretraining, another task), and seconds (SB3
computes every grid from the start, our sampler keeps a cache). In SB3's PPO the ratio is that of a whole grid. As a
product over 64 tokens it would leave the clip range after every step, so this script takes the geometric mean,
``ratio="grid"``. There is no KL to the pretrained policy either, which shows in long runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from agents.experiments.options import Parser, clear_errors, require_at_least_one
from agents.experiments.output import table
from agents.policies import load_policy
from agents.sb3_policy import VARActorCriticPolicy
from rewards.base import HasWords, Reward, RewardOutput
from var_env import VARTextVectorEnv
from var_env.sb3 import VARTextVecEnv
from var_env.scenes import Scene, World, scene_from_prompt
from var_env.tokenizers import load_tokenizer
from var_env.tokenizers.base import VisualTokenizer

DEFAULTS = {
    "transformer": {"reward": "ocr", "images": 960, "epochs": 2, "learning_rate": 1e-5},
    "mlp": {"reward": "brightness", "images": 2560, "epochs": 4, "learning_rate": 3e-3},
}


class Brightness(Reward):
    """The mean brightness of the image, 0 to 1: nothing to do with the prompt, but any policy can learn it."""

    name = "brightness"

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        return RewardOutput(images.mean((1, 2, 3)) / 255)


class OnePrompt(World):
    """A world of one prompt."""

    def sample(self, rng: np.random.Generator) -> Scene:
        return scene_from_prompt('A white sign that says "HI"', self.size)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--policy", choices=("transformer", "mlp"), default="transformer", help="(default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, help="of the transformer, a .safetensors file (default: the shipped)")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer of both, a .safetensors file")
    parser.add_argument("--num-envs", type=int, default=64, help="images an update (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=128, help="images of each measurement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    transformer, mlp = DEFAULTS.values()
    for name, text in (
        ("reward", "ocr or brightness"),
        ("images", "budget in images"),
        ("epochs", "passes over a rollout"),
        ("learning_rate", "Adam's, of actor and critic"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(mlp[name]),
            choices=("ocr", "brightness") if name == "reward" else None,
            help=f"{text} (default: {transformer[name]} for the transformer, {mlp[name]} for the MLP)",
        )
    args = parser.parse_args(argv)
    for name, default in DEFAULTS[args.policy].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def make_env(args: argparse.Namespace, tokenizer: VisualTokenizer, split: str) -> VecMonitor:
    world = (World if args.policy == "transformer" else OnePrompt)(tokenizer.image_size, split)
    reward = Brightness() if args.reward == "brightness" else args.reward
    return VecMonitor(VARTextVecEnv(VARTextVectorEnv(args.num_envs, world=world, tokenizer=tokenizer, reward=reward)))


def make_model(args: argparse.Namespace, tokenizer: VisualTokenizer) -> PPO:
    env, grids = make_env(args, tokenizer, "train"), len(tokenizer.schedule)
    common: dict[str, Any] = {
        "n_steps": grids,  # whole episodes: one image of each environment
        "batch_size": max(2, args.num_envs * grids // 4),
        "n_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "gamma": 1.0,
        "seed": args.seed,
    }
    if args.policy == "mlp":
        return PPO("MultiInputPolicy", env, device="cpu", **common)
    transformer = {"policy": load_policy(args.weights, tokenizer), "ratio": "grid"}
    # Whole returns (lambda 1): the critic has the policy's learning rate and is of little help at first.
    return PPO(VARActorCriticPolicy, env, policy_kwargs=transformer, gae_lambda=1.0, **common)


def measure(model: PPO, env: VecMonitor, prompts: int) -> str:
    """The mean reward of samples, on the same prompts at every call."""
    env.seed(0)
    rewards, _ = evaluate_policy(model, env, prompts, deterministic=False, return_episode_rewards=True)
    found = np.array(rewards)
    return f"{found.mean():.3f} ± {found.std() / len(found) ** 0.5:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors():
        require_at_least_one(images=args.images, num_envs=args.num_envs, epochs=args.epochs, prompts=args.prompts)
        tokenizer = load_tokenizer(args.tokenizer)
        model = make_model(args, tokenizer)
    splits = ("train", "test") if args.policy == "transformer" else ("train",)  # one prompt has no other to hold out
    worlds = [make_env(args, tokenizer, split) for split in splits]
    rows = [["before", *(measure(model, env, args.prompts) for env in worlds)]]
    model.learn(args.images * len(tokenizer.schedule), progress_bar=not args.no_progress)
    images = model.num_timesteps // len(tokenizer.schedule)
    rows.append([f"after {images} images", *(measure(model, env, args.prompts) for env in worlds)])
    print(table([f"{args.reward} reward", *(f"{split} prompts" for split in splits)], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
