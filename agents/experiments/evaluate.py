"""Measure a policy on held-out prompts: the paper's metrics with 95 % bootstrap intervals, and an image.

    vartext evaluate                                              # the shipped base policy
    vartext evaluate --policy runs/compare-quick/grpo/seed0/policy.safetensors
    vartext evaluate --policy runs/train/agent.zip --prompts 1024 --temperature 0.8
    vartext evaluate --best-of 8                                  # the best by reward of 8 images a prompt
    vartext evaluate --clip openai/clip-vit-base-patch32          # with CLIPScore, the paper's third metric
    vartext evaluate --temperatures-of runs/compare-quick/grpo/seed0/policy.safetensors
    vartext evaluate --prompts-from dnkdnk/CVTG-2K --prompts 2000 --clip openai/clip-vit-large-patch14
    vartext evaluate --prompts-from flow_grpo/dataset/ocr --prompts 1018
    vartext evaluate --gates                                      # do the shipped weights meet their gates?

A second table tells the results apart by the number of words that a prompt asks for. In --out: evaluation.json with
every prompt's numbers, and samples.png.

With --prompts-from and CVTG-2K the second table has the benchmark's own metrics, by the number of text regions and on
average: its word accuracy and NED are means over words, where the first table's are means over prompts, and --clip
compares with "A photo depicts " before the prompt in both. With a list it is OCR accuracy that is added, Flow-GRPO's.

--gates prints a table of gates, with PASS or FAIL, writes it into evaluation.json, and exits with status 1 when one is
missed. They say that a base policy is a finished renderer with planted faults (docs/faults.md), on 512 prompts:
  1. tokenizer: of the words that OCR reads in the original images it reads at least 0.97 after encode and decode;
  2. word accuracy, drawn with the default sampler, lies in 0.30 to 0.60;
  3. at temperature 0.7, 0.5 and greedy it differs by at most 0.05 from that: no temperature repairs the faults;
  4. of the letters that the table of faults affects, 0.4 to 0.6 are right, and of the others at least 0.95;
  5. nothing is read in at most 2 % of the images;
  6. the policy's entropy is at most 0.6 nats a token on average, on its own samples of the first 128 prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import (
    Parser,
    add_decoding_options,
    add_model_options,
    add_prompts_option,
    add_regions_option,
    add_reward_options,
    clear_errors,
    option_of,
    require_at_least_one,
)
from agents.experiments.output import require_folder

PROMPTS, GATE_PROMPTS = 256, 512
FIXED_BY_GATES = ("reward", "reward_kwargs", "best_of", "clip", "temperature", "top_k", "top_p", "guidance")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext evaluate")
    add_model_options(parser)
    parser.add_argument("--gates", action="store_true", help="check the gates of a base policy with planted faults")
    parser.add_argument(
        "--prompts", type=int, help=f"held-out prompts (default: {PROMPTS}; {GATE_PROMPTS} for --gates)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="draw N images for each prompt and keep the one with the highest reward (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the sampler (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="(default: %(default)s)")
    parser.add_argument(
        "--clip",
        metavar="NAME_OR_PATH",
        help="also measure CLIPScore with this CLIP model, from the Hugging Face hub or a folder (default: left out)",
    )
    parser.add_argument(
        "--temperatures-of",
        metavar="PATH",
        help="draw with the learned temperatures of another policy, a .safetensors file or base: what part of a gain "
        "they are, and what part the other weights (default: the policy's own)",
    )
    add_reward_options(parser)
    add_regions_option(parser)
    add_prompts_option(parser)
    add_decoding_options(parser)
    args = parser.parse_args(argv)
    if args.prompts is None:
        args.prompts = GATE_PROMPTS if args.gates else PROMPTS
    with clear_errors():
        require_at_least_one(prompts=args.prompts, best_of=args.best_of)
        require_folder(args.out)
        if args.gates and args.prompts_from:
            raise ValueError("--gates draws the original images of rendered words: leave out --prompts-from")
        for name in FIXED_BY_GATES if args.gates else ():
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--gates has targets for its own sampler and OCR reward: leave out {option_of(name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.measuring import run  # not above: it takes torch with it, and --help answers without

    return run(args)
