"""The gates that a base policy with planted faults must pass, for ``vartext evaluate --gates``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from agents import Decoding, evaluate
from agents.evaluation import Evaluation
from agents.experiments.output import table
from agents.policies.base import Policy
from agents.rollout import collect, resized
from rewards.text_metrics import normalize
from var_env import Scene, VARTextVectorEnv
from var_env.scenes import render

TOKENIZER_GATE = 0.97
ACCURACY_GATE = (0.30, 0.60)
SHARPER = (0.7, 0.5, 0.0)  # temperatures at which the word accuracy stays what it is at 1
SHARPER_GATE = 0.05
AFFECTED_GATE = (0.4, 0.6)
PLAIN_GATE = 0.95
NOTHING_GATE = 0.02
ENTROPY_GATE = 0.6  # nats a token
ENTROPY_PROMPTS = 128  # the first ones: 16,640 tokens of the shipped schedule
BATCH = 64


@dataclass(frozen=True)
class Gate:
    """A number and the range that it has to lie in; NaN, what could not be measured, lies in none."""

    name: str
    measured: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def met(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def target(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"

    @property
    def verdict(self) -> str:
        return "PASS" if self.met else "FAIL"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a number that could not be measured is ``None``."""
        measured = round(self.measured, 6) if math.isfinite(self.measured) else None
        return {"gate": self.name, "measured": measured, "target": self.target, "met": self.met}


def gate_table(title: str, gates: Sequence[Gate]) -> str:
    """A row for each gate: what was measured, the target, PASS or FAIL."""
    rows = [[gate.name, f"{gate.measured:.4f}", gate.target, gate.verdict] for gate in gates]
    return table([title, "Measured", "Target", ""], rows)


# Tokenizer -----------------------------------------------------------------------------------------------------------


def tokenizer_gate(env: VARTextVectorEnv, scenes: Sequence[Scene]) -> tuple[float, int]:
    """The share of readable words that stay readable after encode and decode, and how many words were readable."""
    readable = kept = 0
    for start in tqdm(range(0, len(scenes), BATCH), "reconstructions", unit="batch"):
        batch = scenes[start : start + BATCH]
        images = np.stack([render(scene) for scene in batch])  # (B, S, S, 3)
        originals = env.reward(images, batch).words
        copies = env.reward(reconstruct(env, images), batch).words
        for scene, original, copy in zip(batch, originals, copies, strict=True):
            wanted, before, after = (Counter(map(normalize, words)) for words in (scene.words, original, copy))
            readable += (wanted & before).total()
            kept += (wanted & before & after).total()
    return kept / max(readable, 1), readable


@torch.no_grad()
def reconstruct(env: VARTextVectorEnv, images: np.ndarray) -> np.ndarray:
    """Images ``(B, S, S, 3)`` through the tokenizer and back."""
    tokenizer = env.tokenizer
    canvas = tokenizer.blank(len(images))
    for t, grid in enumerate(tokenizer.encode(torch.from_numpy(images).to(tokenizer.device))):
        canvas = tokenizer.write(t, canvas, grid)
    return tokenizer.decode(canvas).cpu().numpy()


# Policy --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_entropy(policy: Policy, env: VARTextVectorEnv, scenes: Sequence[Scene], seed: int) -> float:
    """The policy's mean entropy at the tokens of its own samples, nats a token: one image for each scene."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    total = tokens = 0.0
    for start in range(0, len(scenes), BATCH):
        batch = list(scenes[start : start + BATCH])
        rollout = collect(policy, resized(env, len(batch)), 1, Decoding(), generator, scenes=batch)
        _, entropy = policy.evaluate(rollout.cond, rollout.grids, range(len(policy.schedule)))  # (B, L, D)
        total += entropy.double().sum().item()
        tokens += entropy[..., 0].numel()
    return total / tokens


def policy_gates(
    accuracy: Mapping[float, float], shares: Mapping[str, float], nothing_read: float, entropy: float
) -> list[Gate]:
    """The gates of a policy.

    Args:
        accuracy: word accuracy, 0 to 1, by temperature: 1 and those of `SHARPER`.
        shares: `Evaluation.shares` at temperature 1; without what could not be measured.
        nothing_read: share of the images in which no word was read, at temperature 1.
        entropy: nats a token on samples at temperature 1.
    """
    unknown = float("nan")
    names = {temperature: f"temperature {temperature:g}" if temperature else "greedy" for temperature in SHARPER}
    low, high = AFFECTED_GATE
    return [
        Gate("policy: word accuracy at temperature 1", accuracy[1.0], *ACCURACY_GATE),
        *(
            Gate(
                f"policy: {name}, word accuracy less that at 1",
                accuracy[at] - accuracy[1.0],
                -SHARPER_GATE,
                SHARPER_GATE,
            )
            for at, name in names.items()
        ),
        Gate("policy: affected letters right", shares.get("letter_right", unknown), low, high),
        Gate("policy: other letters right", shares.get("plain_right", unknown), low=PLAIN_GATE),
        Gate("policy: images in which nothing is read", nothing_read, high=NOTHING_GATE),
        Gate("policy: entropy, nats a token", entropy, high=ENTROPY_GATE),
    ]


def measure_gates(
    policy: Policy, env: VARTextVectorEnv, scenes: Sequence[Scene], seed: int
) -> tuple[list[Gate], Evaluation]:
    """All gates on held-out scenes, and the evaluation at temperature 1. The seed is that of the sampler."""
    share, readable = tokenizer_gate(env, scenes)
    found = {
        temperature: evaluate(policy, env, scenes, Decoding(temperature=temperature), seed, BATCH)
        for temperature in (1.0, *SHARPER)
    }
    accuracy = {temperature: evaluation.means()["word_accuracy"] for temperature, evaluation in found.items()}
    entropy = sample_entropy(policy, env, scenes[:ENTROPY_PROMPTS], seed)
    plain = found[1.0]
    gates = policy_gates(accuracy, plain.shares(), plain.means()["nothing_read"], entropy)
    return [Gate(f"tokenizer: share of {readable} readable words kept", share, low=TOKENIZER_GATE), *gates], plain
