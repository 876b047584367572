"""What a command's options name: the policy, the environments."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import get_device

from agents import load, policies
from agents.policies.base import Policy
from agents.saving.folder import SUMS
from var_env import VARTextVectorEnv
from var_env.prompts import PromptWorld
from var_env.tokenizers import load_tokenizer
from var_env.worlds import SMALL, named_world


def load_policy(args: argparse.Namespace) -> Policy:
    """The policy that ``--policy``, ``--world``, ``--tokenizer`` and ``--device`` name, with its tokenizer.

    Raises:
        FileNotFoundError, ValueError: as in `policy_at`; a world that is unknown, without a shipped policy when none
            is given, or another one than the policy's.
    """
    path = args.policy
    if args.world is not None:
        name = named_world(args.world).policy
        if path is None and name not in policies.SHIPPED:
            raise ValueError(
                f"no policy is shipped for the world {args.world!r}: give one with --policy FILE, which `vartext "
                f"pretrain --world {args.world} policy` makes"
            )
        path = args.policy = Path(name) if path is None else path
    policy = policy_at(path, args.tokenizer, args.device)
    if args.world not in (None, own := policy.tokenizer.world or SMALL):
        raise ValueError(f"--world {args.world}: the policy {path} is of the world {own!r}: leave out --world")
    return policy


def policy_at(path: Path | None, tokenizer: Path | None = None, device: str = "auto") -> Policy:
    """A policy on its device with its tokenizer, in eval mode.

    Args:
        path: a shipped policy's name, a policy's file, an agent's zip, or the folder of a checkpoint. Reading a zip may
            run code that it holds; the others run none.
        tokenizer: the file of the tokenizer that the policy's file was trained on; the shipped one by default.
        device: as in Stable-Baselines3.

    Raises:
        FileNotFoundError, ValueError: as in `agents.load` and `policies.load_policy`; a GPU that is not there.
    """
    if "cuda" in device and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    place = get_device(device)
    if path is not None and (path.suffix == ".zip" or (path / SUMS).is_file()):
        if tokenizer is not None:
            raise ValueError(f"{path} holds its own tokenizer: leave out --tokenizer {tokenizer}")
        if not path.exists():
            raise FileNotFoundError(f"no agent at {path}: `vartext train` makes one")
        policy: Policy = load(path, device=place).best_policy
    else:
        policy = policies.load_policy(path, None if tokenizer is None else load_tokenizer(tokenizer))
    policy.tokenizer.to(place)
    return policy.to(place).eval()


def make_env(
    policy: Policy, num_envs: int = 1, split: str = "train", regions: dict[int, float] | None = None, **options: Any
) -> VARTextVectorEnv:
    """Environments of the policy's tokenizer, world and image size; ``options`` are theirs, as ``reward`` is."""
    tokenizer = policy.tokenizer
    if options.get("prompts") is None:
        options["world"] = tokenizer.world
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
