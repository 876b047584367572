"""The backbones. `load_policy` reads the file of any of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agents.policies.base import Policy
    from var_env.tokenizers.base import VisualTokenizer

MAKER = "vartext pretrain policy"
POLICIES = {  # class name to module; the first is what a file without a name holds
    "VARTextPolicy": "agents.policies.var_text",
    "VARPolicy": "agents.policies.var",
    "QwenPolicy": "agents.policies.qwen",
    "JanusPolicy": "agents.policies.janus",
    "InfinityPolicy": "agents.policies.infinity",
    "TablePolicy": "agents.policies.table",
}
SHIPPED = {  # name to the tokenizer's file in var_env/assets; agents/policies/assets/README.md has their cards
    "base": "tokenizer.safetensors",  # with planted faults, see docs/faults.md
    "plain": "tokenizer.safetensors",  # without
    "raster": "raster_tokenizer.safetensors",  # with planted faults, token by token
    "raster_plain": "raster_tokenizer.safetensors",
}


def load_policy(path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> Policy:
    """The policy in a file that some policy's ``save`` wrote, whatever its class.

    Args:
        path: of the file; or the name of a shipped policy, one of `SHIPPED`, which brings its tokenizer; ``None`` is
            "base".
        tokenizer: what it was trained on; by default the shipped tokenizer of its world.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no policy, one of a class that is not known here, or one of another tokenizer.
    """
    from agents.policies.base import Policy
    from agents.policies.var_text import VARTextPolicy
    from var_env.tokenizers import load_tokenizer
    from var_env.weights import check_form, read_metadata, saved_class
    from var_env.worlds import shipped_tokenizer

    name = "base" if path is None else str(path)
    if name in SHIPPED and not Path(name).is_file():
        if tokenizer is None:
            with resources.as_file(resources.files("var_env") / "assets" / SHIPPED[name]) as file:
                tokenizer = load_tokenizer(file)
        with resources.as_file(resources.files("agents.policies") / "assets" / f"{name}.safetensors") as file:
            return VARTextPolicy.load(file, tokenizer)
    assert path is not None
    policy = saved_class(path, Policy, POLICIES, MAKER)
    if tokenizer is None and (world := read_metadata(path, MAKER).get("world")):
        tokenizer = load_tokenizer(shipped_tokenizer(world))
    check_form(path, tokenizer or load_tokenizer(), MAKER)
    return policy.load(path, tokenizer)
