"""Watch an image grow scale by scale: in the terminal, as a PNG strip, as an animated GIF, or in a browser.

    vartext play                                                   # a held-out prompt, at random
    vartext play 'A navy sign that says "KITE" above "RUN" in white letters'
    vartext play --seed 3 --png runs/play.png --gif runs/play.gif --quiet
    vartext play --policy runs/compare-quick/grpo/seed0/policy.safetensors --temperature 0.7
    vartext play --web --policies runs/compare-quick/grpo/seed0/policy.safetensors

The words of a prompt stand in double quotes. The last lines tell what OCR read and the score.
The GIF shows the token grids beside the image. --web serves a page, a playground, which needs `pip install
'vartext[web]'`: one or two policies draw the same prompt; at each grid one sees what OCR reads and the parts of the
reward, and can redraw the image from there on, several times too, or draw the grid by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.experiments.options import Parser, add_decoding_options, add_model_options, clear_errors
from agents.experiments.output import require_file
from rewards.serving.address import port


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext play")
    parser.add_argument("prompt", nargs="?", help='such as: A sign that says "RUN" (default: a held-out one)')
    parser.add_argument("--seed", type=int, help="of the prompt and of the sampler (default: another one each time)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write all scales side by side")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="write an animation with the token grids")
    parser.add_argument("--quiet", action="store_true", help="no images in the terminal")
    parser.add_argument("--columns", type=int, default=64, help="width in the terminal (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.7, help="seconds between scales (default: %(default)s)")
    page = parser.add_argument_group("in a browser")
    page.add_argument("--web", action="store_true", help="serve a playground in place of drawing one image")
    page.add_argument(
        "--policies",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="more to choose from, as --policy; a zip may run code that it holds. The shipped ones are always there",
    )
    page.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: %(default)s, this machine's)"
    )
    page.add_argument("--port", type=port, default=7860, help="0 takes a free one (default: %(default)s)")
    add_model_options(parser)
    add_decoding_options(parser)
    args = parser.parse_args(argv)
    if args.columns < 1 or args.delay < 0:
        parser.error(f"--columns must be at least 1 and --delay at least 0, got {args.columns} and {args.delay}")
    if args.web and (args.png or args.gif):
        parser.error("--web writes no --png and no --gif: leave out one of them")
    if args.policies and not args.web:
        parser.error("--policies is for --web: give one policy as --policy")
    with clear_errors():
        require_file(args.png, "--png", ".png")
        require_file(args.gif, "--gif", ".gif")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # Not above: they take torch with them, and --help answers without.
    if args.web:
        from agents.experiments.playground_web import run
    else:
        from agents.experiments.showing import run
    return run(args)
