"""Options that several commands share, how they are read, and the one line that wrong ones end with."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import REWARDS
from var_env.scenes import TARGET_REGIONS

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


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, line breaks and examples kept."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--policy``, ``--tokenizer`` and ``--device``, for `load_policy`."""
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="PATH",
        help="the policy: a .safetensors file, or an agent's .zip (default: the shipped base policy)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the tokenizer that the policy was trained on, a .safetensors file (default: the shipped one; "
        "a .zip brings its own)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn, for `decoding_from`."""
    group = parser.add_argument_group("how pictures are drawn")
    group.add_argument("--temperature", type=float, help="0 takes the likeliest code (default: 1)")
    group.add_argument("--top-k", type=int, help="keep the k likeliest codes; 0 keeps all (default: 0)")
    group.add_argument("--top-p", type=float, help="keep the fewest codes of this probability (default: 1)")
    group.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is off (default: 1)")


def decoding_from(args: argparse.Namespace, start: Decoding) -> Decoding:
    """``start`` with the options that were given."""
    names = ("temperature", "top_k", "top_p", "guidance")
    return replace(start, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def add_regions_option(parser: argparse.ArgumentParser) -> None:
    """``--regions``, the world's profile of the number of words a picture."""
    parser.add_argument(
        "--regions",
        type=parse_regions,
        metavar="COUNT:SHARE,...",
        help="share of pictures with each number of words, or target, the paper's profile of 2 to 5, which needs a "
        "policy of 128 px (default: 1:0.5,2:0.5; of prompt files, all that they hold)",
    )


def add_prompts_option(parser: argparse.ArgumentParser) -> None:
    """``--prompts-from``, for `make_env`."""
    parser.add_argument(
        "--prompts-from",
        metavar="PATH_OR_NAME",
        help="scenes from prompt files in place of the rendered words: CVTG-2K, or a list with the texts in double "
        "quotes; a file, a folder, or a dataset of the Hugging Face hub, such as dnkdnk/CVTG-2K",
    )


def parse_regions(text: str) -> dict[int, float]:
    """``"1:0.5,2:0.5"`` to ``{1: 0.5, 2: 0.5}``; ``"target"`` is the profile of the paper's appendix C."""
    if text == "target":
        return dict(TARGET_REGIONS)
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(count): float(share) for count, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither target nor like 1:0.5,2:0.5") from None


def add_reward_options(parser: argparse.ArgumentParser) -> None:
    """``--reward`` and ``--reward-kwargs``, for `make_env`."""
    parser.add_argument(
        "--reward",
        default="ocr",
        metavar="NAME",
        help=f"one of {', '.join(REWARDS)}, or the address of a reward service (default: %(default)s)",
    )
    parser.add_argument(
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
    except json.JSONDecodeError as error:
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
        sys.exit(f"error: {error}")
