"""What a command's options name: the policy, the environments."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import get_device

from agents import load, policies
from agents.policies.base import Policy
from var_env import VARTextVectorEnv
from var_env.prompts import PromptWorld
from var_env.tokenizers import load_tokenizer


def load_policy(args: argparse.Namespace) -> Policy:
    """The policy that ``--policy``, ``--tokenizer`` and ``--device`` name, on its device with its tokenizer."""
    if "cuda" in args.device and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU here; use --device cpu")
    device = get_device(args.device)
    if args.policy is not None and args.policy.suffix == ".zip":
        if args.tokenizer is not None:
            raise ValueError(f"{args.policy} holds its own tokenizer: leave out --tokenizer {args.tokenizer}")
        if not args.policy.is_file():
            raise FileNotFoundError(f"no agent at {args.policy}: `vartext train` makes one")
        policy: Policy = load(args.policy, device=device).best_policy
    else:
        policy = policies.load_policy(args.policy, None if args.tokenizer is None else load_tokenizer(args.tokenizer))
    policy.tokenizer.to(device)
    return policy.to(device).eval()


def make_env(
    policy: Policy, num_envs: int = 1, split: str = "train", regions: dict[int, float] | None = None, **options: Any
) -> VARTextVectorEnv:
    """Environments of the policy's tokenizer and image size; ``options`` are the environment's, as ``reward`` is."""
    tokenizer = policy.tokenizer
    envs = VARTextVectorEnv(
        num_envs, split=split, regions=regions, size=tokenizer.image_size, tokenizer=tokenizer, **options
    )
    if isinstance(envs.world, PromptWorld):
        policy.encode_prompts([envs.world.longest])  # a prompt that is too long for the policy shows now
    if "reward" in options:  # weights that are missing show now, and so do scenes that it cannot judge
        blank = np.zeros((1, envs.world.size, envs.world.size, 3), np.uint8)
        envs.reward(blank, [envs.world.sample(np.random.default_rng(0))])
    return envs


def copy_of(policy: Policy) -> Policy:
    """Weights of its own, the tokenizer shared."""
    return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
