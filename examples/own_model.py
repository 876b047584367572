"""A model of your own in one file: a convolutional next-scale policy, its contract tests, and its training.

    python examples/own_model.py                     # GRPO teaches it to paint bright images, a minute on two cores
    pytest examples/own_model.py                     # the contract, see docs/your-model.md
    python examples/compare.py --plugin examples/own_model.py --policy runs/own-model/policy.safetensors --agents grpo

A policy predicts a grid from the prompt and the canvas of the grids before it. This one has no attention: it runs
convolutions over the canvas, at the size of the grid to be predicted, with a bag of the prompt's bytes added at every
place. It starts from random weights and knows nothing of letters, so the reward is one that anything can learn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents import GRPO, evaluate
from agents.experiments.options import clear_errors
from agents.experiments.output import require_folder
from agents.policies.base import Policy
from agents.testing import PolicyContract, TopHalf
from var_env import ScaleSchedule, Tokenizer, VARTextVectorEnv, load_tokenizer
from var_env.tokenizers.base import VisualTokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module


class Cond(NamedTuple):
    """What is kept of prompts: inputs, and no activations."""

    bytes: Tensor  # (B, P) int64, 0 pads


class ConvPolicy(Policy):
    """Convolutions over the canvas; nothing is cached, since the canvas is all that it looks at."""

    def __init__(self, tokenizer: VisualTokenizer, width: int = 64, blocks: int = 2) -> None:
        super().__init__(tokenizer)
        self.config = {"width": width, "blocks": blocks}  # what load() needs
        self.byte = nn.Embedding(256, width, padding_idx=0)
        self.read = nn.Linear(tokenizer.channels, width)
        self.position = nn.Parameter(torch.randn(tokenizer.schedule.total_tokens, width) * 0.1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, tokenizer.depth * tokenizer.vocab_size)

    # Conditions

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        rows = [torch.tensor(list(prompt.encode())) for prompt in prompts]
        return Cond(nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device))

    def null_cond(self, cond: Cond) -> Cond:
        return Cond(torch.zeros_like(cond.bytes))

    # The cached path: the condition is the cache

    def begin(self, cond: Cond) -> Cond:
        return cond

    def fork(self, cache: Cond, index: Tensor) -> Cond:
        return self.take(cache, index)

    def step(self, cache: Cond, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cond]:
        return self.predict(cache, t, features), cache

    # The teacher-forced path: the same function, at every scale

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        features = self.tokenizer.read_all(grids, steps[-1], len(cond.bytes))
        return torch.cat([self.predict(cond, t, features[t]) for t in steps], 1)

    def predict(self, cond: Cond, t: int, features: Tensor) -> Tensor:
        """Logits of grid t, ``(B, n_t, D, V)``, from the canvas at its size, ``(B, n_t, C)``."""
        prompt = self.byte(cond.bytes).sum(1) / 8  # (B, width); a sum, so that padding adds nothing
        x = self.read(features) + self.position[self.schedule.slices[t]] + prompt[:, None]
        x = x.transpose(1, 2).unflatten(2, self.schedule.grids[t])  # (B, width, h_t, w_t)
        for conv, mix in zip(self.blocks, self.mix, strict=True):
            whole = mix(x.mean((2, 3)))  # what lies beyond the reach of a convolution
            x = x + F.gelu(conv(x) + whole[:, :, None, None])
        logits = self.head(x.flatten(2).transpose(1, 2))  # (B, n_t, D * V)
        return logits.float().unflatten(2, (self.tokenizer.depth, self.tokenizer.vocab_size))

    # Files

    def save(self, path: str | Path) -> None:
        save_module(self, path)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> ConvPolicy:
        config, weights = load_config_and_weights(path or "(none given)", "examples/own_model.py")
        policy = cls(tokenizer or load_tokenizer(), **config)
        load_weights(policy, weights, path or "")
        return policy


class TestConvPolicy(PolicyContract):
    """pytest runs the whole contract on a small one."""

    def make_policy(self) -> ConvPolicy:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)
            tokenizer = Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)
            return ConvPolicy(tokenizer, width=16).eval()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6400, help="how many to learn from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/own-model"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_errors():
        require_folder(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.manual_seed(args.seed)
    policy = ConvPolicy(load_tokenizer()).eval()
    envs: Any = VARTextVectorEnv(8, tokenizer=policy.tokenizer, reward=TopHalf())
    before = evaluate(policy, envs, 64).scores
    agent = GRPO(policy, envs, learning_rate=2e-3, kl_coef=0.0, seed=args.seed, tensorboard_log=str(args.out))
    agent.learn(agent.timesteps(args.images), progress_bar=True)
    after = evaluate(policy, envs, 64).scores
    print(f"brightness of the upper half, 64 held-out prompts: {np.mean(before):.3f} -> {np.mean(after):.3f}")
    policy.save(args.out / "policy.safetensors")
    agent.save(args.out / "agent")
    print(f"{args.out}: policy.safetensors, agent.zip, TensorBoard logs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
