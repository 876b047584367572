"""The backbones. `load_policy` reads the file of any of them."""

from __future__ import annotations

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


def load_policy(path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> Policy:
    """The policy in a file that some policy's ``save`` wrote, whatever its class; without a path, the shipped one.

    Args:
        tokenizer: what it was trained on; the shipped tokenizer by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no policy, one of a class that is not known here, or one of another tokenizer.
    """
    from agents.policies.base import Policy
    from agents.policies.var_text import VARTextPolicy
    from var_env.tokenizers import load_tokenizer
    from var_env.weights import check_form, saved_class

    if path is None:
        return VARTextPolicy.load(None, tokenizer)
    policy = saved_class(path, Policy, POLICIES, MAKER)
    check_form(path, tokenizer or load_tokenizer(), MAKER)
    return policy.load(path, tokenizer)
