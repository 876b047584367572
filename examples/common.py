"""What the example scripts share: agents by name, options, loading, the progress bar, and evaluation."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from var_env.agents_clash import check_agents

try:
    check_agents()
except ImportError as error:
    sys.exit(f"error: {error}")

import numpy as np
import torch
from stable_baselines3.common.utils import get_device
from tqdm import tqdm

from agents import load, policies, registry
from agents.base import Agent
from agents.callbacks import AgentCallback, HeldOutEval
from agents.files import replacing
from agents.grpo import GRPO
from agents.policies.base import Policy
from agents.sampling import Decoding
from agents.wrapper import Wrapper
from rewards import REWARDS
from rewards.reason import reason
from var_env import VARTextVectorEnv
from var_env.prompts import PromptWorld
from var_env.scenes import TARGET_REGIONS
from var_env.tokenizer import load_tokenizer

AGENTS = ("grpo", "vmr", "vmr+panw", "vmr+panw+mp")  # the paper's method, step by step
SPLIT = "m_32"  # the middle step of VMR, for pictures of 64 pixels
INTERRUPTED = 130  # the exit status of a process that Ctrl-C, or another signal, ended in good order


# Agents --------------------------------------------------------------------------------------------------------------

OF_SCRIPTS = ("decoding", "device", "seed", "tensorboard_log", "verbose")  # what scripts have options of their own for


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """``--plugin``, for `load_plugins`."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file, or a module's name, that registers agents or wrappers of your own with "
        "@agents.register; may be given several times",
    )


def load_plugins(argv: Sequence[str] | None) -> None:
    """Import what ``--plugin`` names, before the parser that lists the agents' options is made."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_option(parser)
    with clear_errors():
        import_plugins(parser.parse_known_args(argv)[0].plugin)


def import_plugins(plugins: Sequence[str]) -> None:
    """Import files, and modules by name, unless that was done before."""
    for plugin in plugins:
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            continue
        name = Path(plugin).stem
        spec = importlib.util.spec_from_file_location(name, plugin)
        assert spec is not None and spec.loader is not None
        if name not in sys.modules:  # such as a script that runs this one
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


def own_options(part: type) -> dict[str, Any]:
    """The options, with their defaults, that an algorithm or a wrapper has beyond those of every agent."""
    general = {} if registry.is_wrapper(part) else registry.options_of(GRPO if issubclass(part, GRPO) else Agent)
    if part is GRPO:
        return {}
    return {name: value for name, value in registry.options_of(part).items() if name not in general}


def documented(part: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each option, under "Args:"."""
    found: dict[str, str] = {}
    for cls in part.__mro__[::-1]:
        _, _, arguments = (inspect.getdoc(cls) or "").partition("Args:\n")
        entries = re.findall(r"^    ([a-z][\w, ]*): (.*(?:\n {6,}.*)*)", arguments, re.MULTILINE)
        found |= {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    return found


def agent_options() -> tuple[dict[str, tuple[Any, str]], dict[str, tuple[Any, str]]]:
    """The options that every agent has, and those that some have: name to default and help."""
    texts = documented(GRPO)
    general = {name: (value, texts.get(name, "")) for name, value in registry.options_of(GRPO).items()}
    special: dict[str, tuple[Any, str]] = {}
    for name, part in registry.known().items():
        texts = documented(part)
        for option, default in own_options(part).items():
            special.setdefault(option, (default, f"{name}: {texts.get(option, '')}"))
    return {name: entry for name, entry in general.items() if name not in OF_SCRIPTS}, special


def add_agent_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """An option for each setting of the agents that are registered by now, for `agent_settings`."""
    for title, options in zip(("every agent", "agents that have it"), agent_options(), strict=True):
        group = parser.add_argument_group(f"settings of {title}")
        for name, (default, text) in options.items():
            if name in without:
                continue
            kind: dict[str, Any] = {"type": value_like(default), "metavar": "X"}
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            help_text = f"{text} (default: {default})".replace("%", "%%").replace("``", "")
            group.add_argument(option_of(name), dest=name, default=None, help=help_text, **kind)


def agent_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_agent_options` that were given."""
    names = {name for options in agent_options() for name in options}
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def settings_of(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make an agent what it is: those of its own parts, given or by default, and what was given."""
    available = registry.options_in(recipe)
    own = {name for part in registry.parts_of(recipe) for name in own_options(part)}
    variant = registry.VARIANTS.get(recipe.split("+")[0])
    own |= set() if variant is None else set(variant.options)
    return {name: given.get(name, default) for name, default in available.items() if name in own or name in given}


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
        sys.exit(f"error: {reason(error)}")


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
        policy: Policy = load(args.policy, device=device).best_policy
    else:
        policy = policies.load_policy(args.policy, load_tokenizer(args.tokenizer))
    policy.tokenizer.to(device)
    return policy.to(device).eval()


def make_env(
    policy: Policy, num_envs: int = 1, split: str = "train", regions: dict[int, float] | None = None, **options: Any
) -> VARTextVectorEnv:
    """Environments of the policy's tokenizer and picture size; ``options`` are the environment's, as ``reward`` is."""
    tokenizer = policy.tokenizer
    envs = VARTextVectorEnv(
        num_envs, split=split, regions=regions, size=tokenizer.image_size, tokenizer=tokenizer, **options
    )
    if isinstance(envs.world, PromptWorld):
        policy.encode_prompts([envs.world.longest])  # a prompt that is too long for the policy shows now
    if "reward" in options:  # weights that are missing show now, and so do scenes that it cannot judge
        blank = np.zeros((1, envs.world.size, envs.world.size, 3), np.uint8)
        envs.reward(blank, [envs.world.sample(np.random.default_rng(0))])
    return envs


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
        if not self.model.processes.is_first:
            return
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
            total=self.images,
            initial=self.model.images_decoded,
            unit="image",
            desc=self.label,
            dynamic_ncols=True,
            disable=not self.model.processes.is_first,
        )

    def _on_step(self) -> bool:
        self.bar.update(self.model.images_decoded - self.bar.n)
        return True

    def _on_training_end(self) -> None:
        self.bar.close()


# Results -------------------------------------------------------------------------------------------------------------


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
