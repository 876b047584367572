"""Options of a command for the settings of the agents that are registered, and plugins that register more."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

from agents import recipes
from agents.experiments.options import Parser, clear_errors, option_of, value_like

OF_SCRIPTS = ("decoding", "device", "seed", "tensorboard_log", "verbose")  # what scripts have options of their own for


def add_plugin_option(parser: Parser) -> None:
    """``--plugin``, whose files and modules are imported before the agents' options are listed."""
    option: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE"}
    parser.add_argument(
        "--plugin",
        help="a Python file, or a module's name, that registers agents or wrappers of your own with "
        "@agents.register; may be given several times",
        **option,
    )

    def load(given: Sequence[str]) -> None:
        alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        alone.add_argument("--plugin", **option)
        with clear_errors():
            import_plugins(alone.parse_known_args(given)[0].plugin)

    parser.add_later(load)


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
    from agents.base import Agent
    from agents.grpo import GRPO

    general = {} if recipes.is_wrapper(part) else recipes.options_of(GRPO if issubclass(part, GRPO) else Agent)
    if part is GRPO:
        return {}
    return {name: value for name, value in recipes.options_of(part).items() if name not in general}


def help_of(part: type) -> dict[str, str]:
    """What the constructors of a class and its bases say of each option: the text of its ``Annotated[type, text]``."""
    found: dict[str, str] = {}
    for cls in part.__mro__[::-1]:
        if "__init__" not in vars(cls):
            continue
        try:
            parameters = inspect.signature(vars(cls)["__init__"], eval_str=True).parameters.values()
        except NameError:  # a plugin's, with types that it imports for checking alone
            continue
        found |= {p.name: p.annotation.__metadata__[0] for p in parameters if get_origin(p.annotation) is Annotated}
    return found


def agent_options() -> tuple[dict[str, tuple[Any, str]], dict[str, tuple[Any, str]]]:
    """The options that every agent has, and those that some have: name to default and help."""
    known = recipes.known()
    texts = help_of(known["grpo"])
    general = {name: (value, texts.get(name, "")) for name, value in recipes.options_of(known["grpo"]).items()}
    special: dict[str, tuple[Any, str]] = {}
    for name, part in known.items():
        texts = help_of(part)
        for option, default in own_options(part).items():
            special.setdefault(option, (default, f"{name}: {texts.get(option, '')}"))
    return {name: entry for name, entry in general.items() if name not in OF_SCRIPTS}, special


def add_agent_options(parser: Parser, without: Collection[str] = ()) -> None:
    """An option for each setting of the agents that are registered by now, for `agent_settings`."""
    for title, options in zip(("every agent", "agents that have it"), agent_options(), strict=True):
        group = parser.rare_group(f"settings of {title}")
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
    available = recipes.options_in(recipe)
    own = {name for part in recipes.parts_of(recipe) for name in own_options(part)}
    variant = recipes.VARIANTS.get(recipe.split("+")[0])
    own |= set() if variant is None else set(variant.options)
    return {name: given.get(name, default) for name, default in available.items() if name in own or name in given}
