"""What the example scripts share: agents by name, options, loading, the progress bar, evaluation, and Ctrl-C."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from var_env.agents_clash import check_agents

try:
    check_agents()
except ImportError as error:
    sys.exit(f"error: {error}")

import torch
from stable_baselines3.common.utils import get_device
from tqdm import tqdm

from agents import load
from agents.base import Agent
from agents.callbacks import AgentCallback, HeldOutEval
from agents.grpo import GRPO
from agents.mask_propagation import SOURCES, MaskPropagation
from agents.panw import PANW
from agents.policies.base import Policy
from agents.policies.var_text import VARTextPolicy
from agents.sampling import Decoding
from agents.vmr import ALTERNATIONS, VMR
from agents.wrapper import Wrapper
from var_env import Tokenizer, VARTextVectorEnv
from var_env.scenes import TARGET_REGIONS

ALGORITHMS: dict[str, type[GRPO]] = {"grpo": GRPO, "vmr": VMR}
WRAPPERS: dict[str, type[Wrapper]] = {"panw": PANW, "mp": MaskPropagation}
AGENTS = ("grpo", "vmr", "vmr+panw", "vmr+panw+mp")  # the paper's method, step by step
SPLIT = "m_32"  # the middle step of VMR, for pictures of 64 pixels
INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended


# Agents --------------------------------------------------------------------------------------------------------------


def parts_of(recipe: str) -> tuple[type[GRPO], list[type[Wrapper]]]:
    """The algorithm and the wrappers, from the inside out, that a recipe such as ``"vmr+panw+mp"`` names.

    Raises:
        ValueError: it names something else.
    """
    algorithm, *wrappers = recipe.split("+")
    if algorithm not in ALGORITHMS or not set(wrappers) <= WRAPPERS.keys():
        raise ValueError(
            f"unknown agent {recipe!r}: give {' or '.join(ALGORITHMS)}, followed by +{', +'.join(WRAPPERS)} or several "
            f"of them, such as {AGENTS[-1]}"
        )
    return ALGORITHMS[algorithm], [WRAPPERS[name] for name in wrappers]


def own_options(part: type) -> dict[str, Any]:
    """The options that VMR or a wrapper adds, with their defaults; none for GRPO, whose options all agents have."""
    if part is GRPO:
        return {}
    parameters = inspect.signature(part.__init__).parameters.values()  # type: ignore[misc]
    return {p.name: SPLIT if p.name == "split" else p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def method_of(recipe: str, method: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of the method that a recipe uses."""
    algorithm, wrappers = parts_of(recipe)
    return {name: method[name] for part in (algorithm, *wrappers) for name in own_options(part)}


def make_agent(recipe: str, policy: Policy, env: Any, method: Mapping[str, Any], **common: Any) -> GRPO | Wrapper:
    """A new agent by its recipe, see `parts_of`.

    Args:
        method: the settings of VMR and the wrappers, see `METHOD`; those that the recipe does not use are ignored.
        common: keywords of `GRPO`, which all agents have.
    """
    algorithm, wrappers = parts_of(recipe)
    agent: GRPO | Wrapper = algorithm(policy, env, **{name: method[name] for name in own_options(algorithm)}, **common)
    for wrapper in wrappers:
        agent = wrapper(agent, **{name: method[name] for name in own_options(wrapper)})
    return agent


METHOD: dict[str, Any] = own_options(VMR) | own_options(PANW) | own_options(MaskPropagation)  # all settings, by default
METHOD_HELP = {
    "split": "VMR's m, the grids of the prefix: their number, or the resolution in pixels at which it ends, as in m_32",
    "suffix_samples": "VMR's K, suffixes that estimate the value of a prefix; each is a picture of the budget",
    "eta": "temperature of VMR's soft value of a prefix, in units of the reward",
    "prefix_updates": "VMR learns prefixes so many times ...",
    "suffix_updates": "... and then suffixes so many times",
    "alternation": "VMR takes turns as above, or learns all prefixes and then all suffixes, in the same proportion",
    "alpha": "PANW's exponent: 0 weighs all tokens the same, 1 all grids",
    "boxes": "MP's boxes: what was read in the picture, or the scene's layout",
    "soft": "MP's mask holds the share of a cell that is covered, not whether it is",
    "dilation": "pixels by which MP's boxes grow on every side",
}
METHOD_CHOICES = {"alternation": ALTERNATIONS, "boxes": SOURCES}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The settings of VMR and the wrappers, for `method_from`."""
    group = parser.add_argument_group("VMR and its wrappers, where the agent has them")
    for name, default in METHOD.items():
        kind: dict[str, Any] = {"type": parse_split if name == "split" else type(default), "metavar": "N"}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif name in METHOD_CHOICES:
            kind = {"choices": METHOD_CHOICES[name]}
        group.add_argument(
            f"--{name.replace('_', '-')}", default=None, help=f"{METHOD_HELP[name]} (default: {default})", **kind
        )


def method_from(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_method_options` that were given."""
    return {name: getattr(args, name) for name in METHOD if getattr(args, name) is not None}


def parse_split(text: str) -> int | str:
    """``"4"`` to 4; ``"m_32"`` stays."""
    return int(text) if text.isdigit() else text


# Options -------------------------------------------------------------------------------------------------------------


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
        "policy of 128 px (default: 1:0.5,2:0.5)",
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


# Parts ---------------------------------------------------------------------------------------------------------------


def load_policy(args: argparse.Namespace) -> Policy:
    """The policy that ``--policy``, ``--tokenizer`` and ``--device`` name, on its device with its tokenizer."""
    if "cuda" in args.device and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU here; use --device cpu")
    device = get_device(args.device)
    if args.policy is not None and args.policy.suffix == ".zip":
        if args.tokenizer is not None:
            raise ValueError(f"{args.policy} holds its own tokenizer: leave out --tokenizer {args.tokenizer}")
        if not args.policy.is_file():
            raise FileNotFoundError(f"no agent at {args.policy}: examples/train.py makes one")
        policy: Policy = load(args.policy, device=device).policy
    else:
        policy = VARTextPolicy.load(args.policy, Tokenizer.load(args.tokenizer))
    policy.tokenizer.to(device)
    return policy.to(device).eval()


def make_env(
    policy: Policy, num_envs: int = 1, split: str = "train", regions: dict[int, float] | None = None, **options: Any
) -> VARTextVectorEnv:
    """Environments of the policy's tokenizer and picture size, with the OCR reward."""
    tokenizer = policy.tokenizer
    return VARTextVectorEnv(
        num_envs, split=split, regions=regions, size=tokenizer.image_size, tokenizer=tokenizer, **options
    )


def copy_of(policy: Policy) -> Policy:
    """Weights of its own, the tokenizer shared."""
    return copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})


# While training ------------------------------------------------------------------------------------------------------


def budget(agent: Agent | Wrapper) -> dict[str, float]:
    """What the agent has spent so far: the four axes of a learning curve."""
    return {
        "images": agent.images_decoded,
        "tokens": agent.tokens_sampled,
        "updates": agent.n_updates,
        "seconds": agent.seconds,
    }


class CurveEval(HeldOutEval):
    """Held-out evaluation that also logs what had been spent by then, as ``eval/images`` and so on, and prints a line.

    In TensorBoard an evaluation stands at the step of the next update; the curves want its own place.
    """

    def evaluate(self) -> None:
        super().evaluate()
        spent = budget(self.model)
        for axis, value in spent.items():
            self.logger.record(f"eval/{axis}", value)
        means = self.history[-1][1].means()
        tqdm.write(
            f"  {spent['images']:>7} images: {self.split} reward {means['reward']:.3f}, word accuracy "
            f"{means['word_accuracy']:.3f}, NED {means['ned']:.3f}, nothing read {means['nothing_read']:.1%}",
            file=sys.stderr,
        )


class ImageBar(AgentCallback):
    """A progress bar over the pictures of the budget."""

    def __init__(self, images: int, label: str) -> None:
        super().__init__()
        self.images, self.label = images, label

    def _on_training_start(self) -> None:
        self.bar = tqdm(
            total=self.images, initial=self.model.images_decoded, unit="image", desc=self.label, dynamic_ncols=True
        )

    def _on_step(self) -> bool:
        self.bar.update(self.model.images_decoded - self.bar.n)
        return True

    def _on_training_end(self) -> None:
        self.bar.close()


class Interrupt:
    """Ctrl-C inside the ``with`` block: the first asks for a stop in good order, the next raises KeyboardInterrupt."""

    def __init__(self, notice: str) -> None:
        self.notice, self.requested = notice, False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write(f"\n{self.notice}", file=sys.stderr)


class StopOnInterrupt(AgentCallback):
    """Ends training after the update that Ctrl-C fell into, so that a resumed run continues exactly."""

    def __init__(self, interrupt: Interrupt) -> None:
        super().__init__()
        self.interrupt = interrupt

    def _on_step(self) -> bool:
        envs = self.locals["envs"]
        return not self.interrupt.requested or envs.t < len(envs.schedule)


# Results -------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another path to write to, which then takes the place of ``path``: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")  # processes that write the same file do not meet
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, or leave the old one."""
    with replacing(path) as part:
        part.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole, or leave the old one."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
