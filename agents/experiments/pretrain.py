"""Train the tokenizer and the base policy of VARText by teacher forcing, from a seed.

    vartext pretrain tokenizer            # minutes on two cores
    vartext pretrain tokenizer --bits 16  # tokens of 16 bits in place of a codebook
    vartext pretrain policy               # hours on two cores, minutes on a GPU
    vartext pretrain policy --faults --start plain.safetensors  # goes on with planted faults
    vartext pretrain policy --policy qwen # a decoder of the transformers library in its place
    vartext pretrain export               # bf16 copies into the packages, with their cards
    vartext pretrain --world room tokenizer --out runs/room  # each stage for the larger world, see docs/room.md

Every stage checkpoints into ``--out`` and goes on from there when it is called again. Scenes are drawn from the seed
as they are needed and never stored. Only torch, numpy, pillow and safetensors are needed; with tensorboard installed
there are curves and sample images too. How well OCR reads the results: ``vartext evaluate --gates``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import Parser, clear_errors
from agents.experiments.output import require_folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext pretrain")
    parser.add_argument("stage", choices=("tokenizer", "policy", "export"), help="what to train, or to copy")
    parser.add_argument("--world", default="small", metavar="NAME", help="small, or room, the larger one (%(default)s)")
    parser.add_argument(
        "--schedule",
        choices=("scales", "raster"),
        default="scales",
        help="scales: coarse to fine, as VAR. raster: the finest scale alone, token by token, as plain autoregression",
    )
    parser.add_argument("--vocab-size", type=int, default=512, help="codes of the tokenizer (%(default)s)")
    parser.add_argument("--bits", type=int, help="bits of a token, in place of a codebook (var_env/tokenizers/bits.py)")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="checkpoints and logs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--batch", type=int, help="images a step (64 for the tokenizer, 32 for the policy)")
    parser.rare.add_argument("--workers", type=int, default=0, help="processes that draw scenes; a GPU wants 8 or more")
    parser.add_argument("--tokenizer-steps", type=int, default=1800, help="(%(default)s)")
    parser.rare.add_argument("--tokenizer-lr", type=float, default=1e-3, help="its learning rate (%(default)s)")
    parser.add_argument("--policy-steps", type=int, default=2235, help="(%(default)s)")
    parser.rare.add_argument("--policy-lr", type=float, default=1e-3, help="its learning rate (%(default)s)")
    parser.rare.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="of the policy. muon: for the matrices of its blocks; it needs fewer steps (default: %(default)s)",
    )
    parser.add_argument(
        "--policy",
        choices=("var_text", "qwen"),
        default="var_text",
        help="the backbone: ours, or a Qwen2 decoder that reads the prompt's bytes (default: %(default)s)",
    )
    parser.rare.add_argument("--width", type=int, default=192, help="of the policy (%(default)s)")
    parser.rare.add_argument("--layers", type=int, default=6, help="of the policy (%(default)s)")
    parser.rare.add_argument("--heads", type=int, default=3, help="of the policy (%(default)s)")
    parser.add_argument("--start", type=Path, help="a policy's weights to start from, in place of random ones")
    parser.rare.add_argument(
        "--blocks-of",
        metavar="PATH_OR_NAME",
        help="start from the text encoder and the blocks of a policy, a .safetensors file or a shipped one such as "
        "plain, whose tokenizer may be another; what belongs to the tokenizer is random",
    )
    parser.add_argument(
        "--faults",
        nargs="?",
        const="default",
        default="none",
        help="train the policy on scenes with planted faults: the default table, or a JSON file (var_env/faults.py)",
    )
    parser.rare.add_argument(
        "--decay",
        type=float,
        default=0.15,
        help="share of the policy's steps in which the learning rate falls (%(default)s)",
    )
    parser.rare.add_argument(
        "--swap",
        type=float,
        default=0.03,
        help="share of input codes swapped for a near one, which falls with the learning rate (%(default)s)",
    )
    parser.rare.add_argument(
        "--drop-prompt", type=float, default=0.1, help="share of samples trained without their prompt"
    )
    parser.rare.add_argument(
        "--temperature", type=float, default=1.0, help="of all grids, which export writes into the policy (%(default)s)"
    )
    parser.rare.add_argument("--compile", action="store_true", help="torch.compile the policy's forward pass")
    parser.rare.add_argument("--log-every", type=int, default=50, help="steps (%(default)s)")
    parser.rare.add_argument("--save-every", type=int, default=250, help="steps (%(default)s)")
    parser.rare.add_argument("--image-every", "--picture-every", type=int, default=500, help="steps (%(default)s)")
    args = parser.parse_args(argv)
    from var_env.worlds import named_world  # not above, as in `main`

    try:
        args.faults = named_world(args.world).faults.load(args.faults)
    except ValueError as error:
        parser.error(str(error))
    if args.blocks_of is not None and (args.start is not None or args.policy != "var_text"):
        parser.error("--blocks-of starts a new var_text: leave out --start and --policy")
    if not 0 < args.decay <= 1:
        parser.error(f"--decay is a share above 0 and at most 1, got {args.decay}")
    if not args.temperature > 0:
        parser.error(f"--temperature must be above 0, got {args.temperature}")
    if args.bits is not None and (args.bits < 1 or args.schedule == "raster"):
        parser.error(f"--bits takes a number of at least 1 and --schedule scales, got {args.bits}, {args.schedule}")
    with clear_errors():
        require_folder(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments.pretraining import run  # not above: it takes torch with it, and --help answers without

    return run(args)
