"""The animation at the top of README.md: the same held-out prompts grow grid by grid, before and after training.

    vartext compare --agents grpo --seeds 1 --out runs/growth
    python examples/growth_gif.py --trained runs/growth/grpo/seed1/policy.safetensors

The prompts are the first ones of the seed, and nothing is chosen among them; both policies get the same noise. The last
frame tells what OCR reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from var_env.agents_clash import check_agents

try:
    check_agents()
except ImportError as error:
    sys.exit(f"error: {error}")

import numpy as np
import torch
from PIL import Image

from agents import Decoding, held_out_scenes
from agents.common.pictures import caption, sample_sheet
from agents.experiments.loading import make_env
from agents.experiments.options import clear_errors, require_at_least_one
from agents.experiments.output import require_file
from agents.policies import load_policy
from agents.policies.base import Policy
from agents.rollout import Caches, unroll
from var_env import VARTextVectorEnv
from var_env.scenes import Scene

MILLISECONDS, HOLD = 700, 3000  # a frame, and the last one
COLOURS = 48  # of the file: images are flat, and fewer colours make it smaller


def grown(policy: Policy, prompts: int, seed: int) -> tuple[list[np.ndarray], list[str], list[Scene]]:
    """Images ``(N, S, S, 3)`` after each grid, and at the end a caption for each and the scenes."""
    envs = make_env(policy, prompts)
    scenes = list(held_out_scenes(envs.world, prompts, seed))
    envs.reset(options={"scenes": scenes})
    images: list[np.ndarray] = []

    def keep(envs: VARTextVectorEnv) -> None:
        images.append(envs.tokenizer.decode(envs.canvas).cpu().numpy())

    with torch.no_grad():
        caches = Caches(policy, policy.encode_prompts([scene.prompt for scene in scenes]), guided=False)
    generator = torch.Generator(policy.device).manual_seed(seed)
    trail = unroll(policy, envs, caches, range(len(envs.schedule)), Decoding(), generator, on_step=keep)
    assert trail.answer is not None  # all grids were drawn
    found = trail.answer.result()
    captions = [caption(s.words, read, score) for s, read, score in zip(scenes, found.words, found.scores, strict=True)]
    return images, captions, scenes


def frames(policies: dict[str, Policy], prompts: int, seed: int) -> list[np.ndarray]:
    """One sheet a grid, a row for each policy, and one with what was read."""
    rows = {name: grown(policy, prompts, seed) for name, policy in policies.items()}
    schedule = next(iter(policies.values())).tokenizer.schedule
    sheets = []
    for t, (h, w) in enumerate(schedule.grids):
        images = np.concatenate([images[t] for images, _, _ in rows.values()])  # (R * N, S, S, 3)
        texts = [f"{' '.join(s.words)}\n{name}, {h}x{w}" for name, (_, _, scenes) in rows.items() for s in scenes]
        sheets.append(sample_sheet(images, texts, prompts))
    sheets.append(sample_sheet(images, [text for _, captions, _ in rows.values() for text in captions], prompts))
    return sheets


def save(path: Path, sheets: list[np.ndarray]) -> None:
    """An animated GIF whose frames share one palette, that of the last."""
    palette = Image.fromarray(sheets[-1]).quantize(COLOURS, dither=Image.Dither.NONE)
    files = [Image.fromarray(s).quantize(palette=palette, dither=Image.Dither.NONE) for s in sheets]
    durations = [MILLISECONDS] * (len(files) - 1) + [HOLD]
    path.parent.mkdir(parents=True, exist_ok=True)
    files[0].save(path, save_all=True, append_images=files[1:], duration=durations, loop=0, optimize=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="base", help="name or file of the policy before (default: %(default)s)")
    parser.add_argument("--trained", required=True, metavar="FILE", help="of the policy after")
    parser.add_argument("--prompts", type=int, default=4, help="side by side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/growth.gif"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with clear_errors():
        require_file(args.out, "--out", ".gif")
        require_at_least_one(prompts=args.prompts)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    policies = {"before": load_policy(args.base).eval(), "after": load_policy(args.trained).eval()}
    save(args.out, frames(policies, args.prompts, args.seed))
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
