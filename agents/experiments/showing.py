"""An image that grows scale by scale, for ``vartext play``: in the terminal, as a PNG strip, as a GIF."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from agents import Decoding, held_out_scenes
from agents.common.pictures import sample_sheet
from agents.experiments.loading import load_policy, make_env
from agents.experiments.options import clear_errors, decoding_from
from agents.rollout import Caches, unroll
from var_env import VARTextVectorEnv
from var_env.scenes import scene_from_prompt
from var_env.seeding import as_seed
from var_env.unfamiliar import warn_of_prompt

HOLD = 3  # the last image of a GIF stays this many times as long


def half_blocks(image: np.ndarray, columns: int) -> str:
    """An image ``(S, S, 3)`` as lines of text: each upper half block shows two pixels, in 24-bit ANSI colours."""
    pixels = np.asarray(Image.fromarray(image).resize((columns, (columns + 1) // 2 * 2), Image.Resampling.BOX))
    lines = []
    for top, bottom in zip(pixels[::2], pixels[1::2], strict=True):  # (columns, 3) each
        cells = [
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{x};{y};{z}m▀"
            for (r, g, b), (x, y, z) in zip(top.tolist(), bottom.tolist(), strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


class Show:
    """Called after each scale: keeps the images and prints them, each over the last one in a terminal."""

    def __init__(self, columns: int, delay: float, quiet: bool) -> None:
        self.columns, self.delay, self.quiet = columns, delay, quiet
        self.images: list[np.ndarray] = []  # (S, S, 3)
        self.frames: list[np.ndarray] = []  # with the token grids beside

    def __call__(self, envs: VARTextVectorEnv) -> None:
        self.images.append(envs.tokenizer.decode(envs.canvas)[0].cpu().numpy())
        frame = envs.render()
        assert frame is not None
        self.frames.append(frame[0])
        if self.quiet:
            return
        text = half_blocks(self.images[-1], self.columns)
        h, w = envs.schedule.grids[envs.t - 1]
        again = len(self.images) > 1 and sys.stdout.isatty()
        up = f"\x1b[{text.count(chr(10)) + 2}A" if again else ""  # over the last image
        print(f"{up}{text}\nscale {envs.t} of {len(envs.schedule)}, {h}x{w} tokens", flush=True)
        time.sleep(self.delay if sys.stdout.isatty() else 0)


def save_png(path: Path, show: Show, envs: VARTextVectorEnv) -> None:
    """The images of all scales in a row, titled with their grids."""
    titles = [f"{h}x{w}" for h, w in envs.schedule.grids]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample_sheet(np.stack(show.images), titles, len(titles))).save(path)


def save_gif(path: Path, show: Show, delay: float) -> None:
    """The frames one after the other, again and again."""
    frames = [Image.fromarray(frame) for frame in show.frames]
    milliseconds = max(20, round(1000 * delay))
    durations = [milliseconds] * (len(frames) - 1) + [HOLD * milliseconds]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def run(args: argparse.Namespace) -> int:
    seed = args.seed if args.seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
    with clear_errors():
        seed = as_seed(seed)
        policy = load_policy(args)
        envs = make_env(policy, render_mode="rgb_array")
        scene = (
            scene_from_prompt(args.prompt, envs.world.size)
            if args.prompt is not None
            else held_out_scenes(envs.world, 1, seed)[0]
        )
        if args.prompt is not None:
            warn_of_prompt(args.prompt, envs.world)
        decoding = decoding_from(args, Decoding())
    print(f"{scene.prompt}   (--seed {seed})")
    envs.reset(options={"scenes": [scene]})
    with torch.no_grad():
        caches = Caches(policy, policy.encode_prompts([scene.prompt]), decoding.guided)
    generator = torch.Generator(policy.device).manual_seed(seed)
    show = Show(args.columns, args.delay, args.quiet)
    trail = unroll(policy, envs, caches, range(len(envs.schedule)), decoding, generator, on_step=show)
    assert trail.answer is not None  # all grids were drawn
    found = trail.answer.result()
    read = " ".join(f'"{word}"' for word in found.words[0]) or "nothing"
    parts = ", ".join(f"{name} {values[0]:.2f}" for name, values in found.parts.items())
    print(f"OCR read {read}: score {found.scores[0]:+.3f} ({parts})")
    if args.png:
        save_png(args.png, show, envs)
    if args.gif:
        save_gif(args.gif, show, args.delay)
    return 0
