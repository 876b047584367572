"""Low-rank adapters (LoRA, arXiv 2106.09685) for a policy's linear layers, through the library peft.

A layer's weight W becomes ``W + lora_alpha / r * B A``. W is frozen and B starts at zero, so a policy with new adapters
is the policy. ``Agent(lora=...)`` adds them before training; files of the policy and of the agent keep them apart from
the weights, and `merge_lora` folds them in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from agents.policies.base import Policy
from var_env.seeding import as_seed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def add_lora(
    policy: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Give a policy, or any other module with linear layers, adapters to train in place of its weights.

    All parameters are frozen but the adapters and those that the policy's class names in ``always_trained``. A policy
    notes the options in its ``config``, and so in its files.

    Args:
        policy: changed in place.
        r: rank of the adapters.
        lora_alpha: divided by r, the factor of their output.
        target_modules: names of linear layers, or of the last parts of their paths. Default: ``lora_targets`` of the
            policy's class.
        seed: of the adapters' first values.
        options: more of ``peft.LoraConfig``, such as ``use_rslora=True``, as far as JSON can hold them.

    Raises:
        ImportError: peft is not installed.
        ValueError: the policy has adapters already, there is no linear layer of such a name, or an option is unknown
            or out of its range.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('adapters need the library peft: pip install "vartext[lora]"') from error

    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"lora: r must be a positive whole number, got {r!r}")
    if isinstance(target_modules, str):
        raise ValueError(f"lora: target_modules is a list of names, such as [{target_modules!r}]")
    if has_lora(policy):
        raise ValueError("this policy has adapters already: leave out lora=, or fold them in with merge_lora()")
    targets = list(getattr(policy, "lora_targets", ()) if target_modules is None else target_modules)
    linear = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear)]
    choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    if not targets:
        raise ValueError(f"name the layers that get adapters in target_modules: {type(policy).__name__} has {choices}")
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"target_modules has {target!r}, but {type(policy).__name__}'s linear layers are {choices}"
            )
    own = {"r": r, "lora_alpha": lora_alpha, "target_modules": targets, **options}
    seed = as_seed(seed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(**own), policy)  # freezes what it finds
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft takes no adapters with lora={own}: {error}; r and lora_alpha are numbers") from error
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # small steps would be lost in bfloat16, which the weights may have
    for name in getattr(policy, "always_trained", ()):
        policy.get_parameter(name).requires_grad_(True)
    if isinstance(policy, Policy):
        policy.config["lora"] = own


def lora_options(lora: Any) -> dict[str, Any]:
    """The options of `add_lora` that a setting holds. ``ValueError`` for another type, such as a number."""
    if not isinstance(lora, Mapping) or not all(isinstance(name, str) for name in lora):
        raise ValueError(f"lora must be a dict of options, such as {{'r': 8, 'lora_alpha': 16}}, got {lora!r}")
    return dict(lora)


def has_lora(policy: nn.Module) -> bool:
    """Whether `add_lora` was here."""
    return hasattr(policy, "peft_config")


def merge_lora(policy: ModuleT) -> ModuleT:
    """A copy with the adapters folded into the weights, all of them trainable, which saves like any other policy.

    Its logits are the same up to rounding. The tokenizer is shared; ``policy`` stays as it is.
    """
    if not has_lora(policy):
        raise ValueError("this policy has no adapters to merge: add them with lora= or add_lora()")
    tokenizer = getattr(policy, "tokenizer", None)
    plain = copy.deepcopy(policy, {id(tokenizer): tokenizer})
    for name, module in list(plain.named_modules()):
        if hasattr(module, "base_layer"):  # peft's layer around one of ours
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    del plain.peft_config
    if isinstance(plain, Policy):
        del plain.config["lora"]
    return plain.requires_grad_(True)
