"""Options that several commands share, how they are read, and the one line that wrong ones end with."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import REWARDS
from rewards.reason import reason

if TYPE_CHECKING:
    from agents.sampling import Decoding

INTERRUPTED = 130  # the exit status of a process that Ctrl-C, or another signal, ended in good order


def option_of(name: str) -> str:
    """``kl_coef`` to ``--kl-coef``."""
    return f"--{name.replace('_', '-')}"


def value_like(default: Any) -> Callable[[str], Any]:
    """How to read an option from the command line: numbers as what the default is, the rest as Python would."""
    if type(default) in (int, float):
        return type(default)

    def literal(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text

    return literal


class Parser(argparse.ArgumentParser):
    """Reads a command's options; ``--help`` shows what most people need, ``--help-all`` the rest, too.

    ``--help`` prints the first two paragraphs of the text, what the command does and examples, and no rare options. It
    is answered before anything slow is imported, so options that need an import to be known come by `add_later`.

    Args:
        doc: the text, line breaks kept.
        prog: what the command is called, such as "vartext compare"; the script's name by default.
    """

    def __init__(self, doc: str | None, prog: str | None = None) -> None:
        super().__init__(prog=prog, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.doc = (doc or "").strip()
        self.rare_groups: list[Any] = []
        self.later: list[Callable[[list[str]], None]] = []
        self.add_argument("-h", "--help", action="help", help="show the options that most people need, and exit")
        self.add_argument("--help-all", action="store_true", default=argparse.SUPPRESS, help="show all, and exit")

    def rare_group(self, title: str, about: str | None = None) -> Any:
        """A group of options that ``--help`` leaves out."""
        self.rare_groups.append(self.add_argument_group(title, about))
        return self.rare_groups[-1]

    @cached_property
    def rare(self) -> Any:
        """The group of the options that are rare and belong to no other."""
        return self.rare_group("more options")

    def add_later(self, add: Callable[[list[str]], None]) -> None:
        """Have ``add`` called with what was given, before that is read, and not for ``--help``."""
        self.later.append(add)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        brief = "-h" in given or "--help" in given
        if not brief:
            for add in self.later:
                add(given)
        if brief or "--help-all" in given:
            self.show(brief)
            self.exit()
        self.usage = f"{self.outline()}; --help tells them"  # of errors
        return super().parse_args(given)

    def outline(self) -> str:
        """The first line of the help."""
        words = [str(action.metavar or action.dest.upper()) for action in self._get_positional_actions()]
        return " ".join(["%(prog)s [options]", *(f"[{word}]" for word in words)])

    def show(self, brief: bool) -> None:
        """Print the help."""
        paragraphs = self.doc.split("\n\n")
        self.usage = self.outline()
        self.description = "\n\n".join(paragraphs[:2] if brief else paragraphs)
        if brief:
            hidden = {id(action) for group in self.rare_groups for action in group._group_actions}
            for action in self._actions:
                action.help = argparse.SUPPRESS if id(action) in hidden else action.help
            for group in self.rare_groups:
                group.description = None  # and no title without options
        self.print_help()


def add_track_option(parser: Parser) -> None:
    """``--track``, a format of `agents.logs.open_logger`."""
    parser.add_argument(
        "--track",
        choices=["wandb"],
        help="what TensorBoard gets goes there, too (vartext[wandb])",
    )


def add_model_options(parser: Parser) -> None:
    """``--policy``, ``--world``, ``--tokenizer`` and ``--device``, for `load_policy`."""
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="PATH_OR_NAME",
        help="the policy: a .safetensors file, an agent's .zip or checkpoint folder, or a shipped one: base, plain (no "
        "planted faults), raster, raster_plain (default: base)",
    )
    parser.rare.add_argument(
        "--world",
        metavar="NAME",
        help="the rendered world, small or room (default: that of the policy, which is made for one)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.rare.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the tokenizer that the policy was trained on, a .safetensors file (default: the shipped one; "
        "a .zip brings its own)",
    )


def add_decoding_options(parser: Parser) -> None:
    """How images are drawn, for `decoding_from`."""
    group = parser.add_argument_group("how images are drawn")
    group.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 1)")
    group.add_argument("--top-k", type=int, help="keep the k likeliest tokens; 0 keeps all (default: 0)")
    group.add_argument("--top-p", type=float, help="keep the fewest tokens of this probability (default: 1)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is off (default: 1)")


def decoding_from(args: argparse.Namespace, start: Decoding) -> Decoding:
    """``start`` with the options that were given."""
    names = ("temperature", "top_k", "top_p", "guidance")
    return replace(start, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def add_regions_option(parser: Parser) -> None:
    """``--regions``, the world's profile of the number of words an image."""
    parser.rare.add_argument(
        "--regions",
        type=parse_regions,
        metavar="COUNT:SHARE,...",
        help="share of images with each number of words, or target, the paper's profile of 2 to 5, which needs a "
        "policy of 128 px (default: 1:0.5,2:0.5; of prompt files, all that they hold)",
    )


def add_prompts_option(parser: Parser) -> None:
    """``--prompts-from``, for `make_env`."""
    parser.rare.add_argument(
        "--prompts-from",
        metavar="PATH_OR_NAME",
        help="scenes from prompt files in place of the rendered words: CVTG-2K, or a list with the texts in double "
        "quotes; a file, a folder, or a dataset of the Hugging Face hub, such as dnkdnk/CVTG-2K",
    )


def parse_regions(text: str) -> dict[int, float]:
    """``"1:0.5,2:0.5"`` to ``{1: 0.5, 2: 0.5}``; ``"target"`` is the profile of the paper's appendix C."""
    from var_env.scenes import TARGET_REGIONS  # not above: it takes torch with it

    if text == "target":
        return dict(TARGET_REGIONS)
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(count): float(share) for count, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither target nor like 1:0.5,2:0.5") from None


def add_reward_options(parser: Parser) -> None:
    """``--reward`` and ``--reward-kwargs``, for `make_env`."""
    parser.add_argument(
        "--reward",
        default="ocr",
        metavar="NAME",
        help=f"one of {', '.join(REWARDS)}, or the address of a reward service (default: ocr)",
    )
    parser.rare.add_argument(
        "--reward-kwargs",
        type=parse_json_object,
        default={},
        metavar="JSON",
        help="its options, such as '{\"penalty_weight\": 0.3}' (default: none)",
    )


def parse_json_object(text: str) -> dict[str, Any]:
    """``'{"a": 1}'`` to a dict."""
    try:
        value = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is no JSON object, such as {{"penalty_weight": 0.3}}""")
    return value


def require_at_least_one(**options: int) -> None:
    """``ValueError`` naming the first option below 1."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Wrong options and unreadable files end the program with one line in place of a traceback."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {reason(error)}")
