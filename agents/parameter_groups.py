"""The optimiser's groups of parameters: one of all, or the learned temperatures apart from the weights.

A temperature rules all tokens of a scale, so its gradient is the sum of theirs. The gradient of the shipped policy's
six temperatures is longer than that of its millions of weights, and a clip of both together would leave the weights
what the temperatures do not use up.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from agents.policies.base import Policy


def group_names(policy: Policy, temperature_lr: Any) -> list[list[str]]:
    """The names of the policy's trainable parameters by group.

    Args:
        policy: names its learned temperatures in ``temperature_parameters``.
        temperature_lr: as `Agent` has it. ``None`` makes one group; otherwise there are two, the weights and the
            temperatures, each in the policy's order. A policy without temperatures has one.

    Raises:
        ValueError: a rate that is not 0, and the policy trains no temperatures.
    """
    names = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    temperatures = [name for name in names if name in policy.temperature_parameters]
    if temperature_lr is None or not (temperatures or temperature_lr):
        return [names]
    if not temperatures:
        raise ValueError(
            f"temperature_lr is for learned temperatures, and {type(policy).__name__} trains none "
            "(temperature_parameters): leave it out"
        )
    return [[name for name in names if name not in temperatures], temperatures]


def regrouped(state: dict[str, Any], optimizer: torch.optim.Optimizer, policy: Policy) -> dict[str, Any]:
    """The saved state of an optimiser of the policy's parameters for one that may have them in other groups.

    The number of a parameter in a state is its place in the groups, one after the other.
    """
    now = optimizer.state_dict()["param_groups"]
    if len(now) == len(state["param_groups"]):
        return state
    before, after = (
        list(chain.from_iterable(group_names(policy, 0.0 if len(groups) > 1 else None)))
        for groups in (state["param_groups"], now)
    )
    values = {name: state["state"][i] for i, name in enumerate(before) if i in state["state"]}
    return {
        "state": {i: values[name] for i, name in enumerate(after) if name in values},
        "param_groups": [{**state["param_groups"][0], "params": group["params"]} for group in now],
    }
