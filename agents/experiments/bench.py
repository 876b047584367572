"""Time the environment, the reward, sampling and updates, and compare with the targets for two cores.

    vartext bench                              # a minute or two on two cores
    vartext bench --json runs/bench.json
    vartext bench --device cuda --repeats 10

Every number is the median over --repeats, after one run to warm up. What is measured, for a batch of --images:

- **environment steps/s**: grids appended a second, one a row and step, with tokens given and a reward that is free;
  writing on the canvas and decoding the image count.
- **rollout images/s**: prompts drawn, sampled with the policy, decoded and read: an iteration without its update.
- **environment's own share**: of a rollout's time, what `reset`, `step` and `fork` of the batched environment take,
  less the tokenizer's `blank`, `write` and `decode` and less the reward.
- **update images/s**: images learned from a second, in a GRPO update with its KL term.
- **OCR ms/image**: reading rendered held-out scenes in one batch. **RapidOCR's defaults** read the same images one by
  one, right after, as `rapidocr.RapidOCR()(image)` does; the same text means the same words in the same order. Where
  the two differ, the words that were asked for tell who is right.
- **cached sampling**: all scales of a batch drawn with the cache, prompts encoded once a group as in a rollout, against
  the whole prefix, prompt and canvas included, run again at every scale. That both draw the same tokens from the same
  noise is checked first, in double precision, so that rounding cannot tip a draw. Left out for a raster, where it
  would take hundreds of passes.
- **time a token, 274, 530, 910 against 130 tokens**: in a teacher-forced forward and backward pass and in cached
  sampling, two groups of images, networks of the policy's size with random weights. A cost that grows with the square
  of the tokens shows here. The text costs a fixed time an image, so that the ratio may fall below 1.
- **share of the device's peak**: the floating-point operations of cached sampling, of a teacher-forced forward pass and
  of one with its backward pass, over what a large matrix product does in the same time and number format here.
  Operations are those of matrix products, convolutions and fused attention; that of the CPU is not counted.
- **overlapping OCR with sampling**: a rollout whose images are read by two processes, in 2 or 4 parts of which one is
  read while the next is drawn, against the same in one piece. On as many cores as sampling uses already there is
  nothing to gain; it is for a GPU that draws while CPUs read.
- **overlapping the whole loop**: GRPO iterations with their update, in 2 parts of which one is read while the next is
  drawn, the reference's log-probabilities being computed while the last one is; against drawing, reading and learning
  one after the other with the same pool. Once with the two processes, which share the cores with the rest, and once
  with a reward that reads nothing and waits 10 ms an image, as for a service on another machine: that tells what is
  hidden where reading costs no core of this one. **The reference while waiting**: in one part, nothing drawn beside.
- **VMR prefix iteration, against its token counts**: the time of one with K = 2, over what the GRPO iteration's phases
  predict: sampling by image tokens drawn, decoding and reward by images, the update by the tokens of its forward
  pass, prompt and image.

Drawing all scales from the cache costs 130 tokens an image, and without it 1 + 5 + 14 + 30 + 66 + 130 = 246 and
the prompt six times, which the cached path encodes once a group: about 2.8 times the arithmetic, a bound for that line.

Targets are for an idle machine of two cores; another device or load gives other numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import Parser, add_model_options, clear_errors
from agents.experiments.output import require_file


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext bench")
    add_model_options(parser)
    parser.add_argument("--images", type=int, default=64, help="in a batch (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="images for each prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    args = parser.parse_args(argv)
    if min(args.images, args.group_size, args.repeats) < 1 or args.images % args.group_size:
        parser.error("--images must be a multiple of --group-size, and both and --repeats at least 1")
    with clear_errors():
        require_file(args.json, "--json")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.benchmark import run  # not above: it takes torch with it, and --help answers without

    return run(args)
