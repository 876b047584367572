"""Settings and states as JSON and tensors, without loss, and read back without running code that a file names.

JSON holds None, booleans, numbers, strings and lists. Whatever else occurs becomes an object with one key that says
what it is: ``{"tuple": [...]}``, ``{"dict": {...}}``, ``{"pairs": [[key, value], ...]}`` for keys that are no strings,
``{"tensor": name}`` for a tensor that stands elsewhere under that name, or the name of a class in `STORABLE` with its
attributes, ``{"Decoding": {...}}``. A class of yours joins with one decorator::

    @stored.storable
    @dataclass(frozen=True)
    class Staircase:  # a learning-rate schedule
        ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import Tensor

from agents.common.registry import Registry
from agents.common.schedules import WarmupCosine, WarmupLinear
from agents.sampling import Decoding
from agents.split_rule import SplitRule

ClassT = TypeVar("ClassT", bound=type)
STORABLE: Registry[type] = Registry("stored class")


def storable(cls: ClassT) -> ClassT:
    """A class decorator: objects of the class can be stored. Their attributes are all that they are."""
    return STORABLE.register(cls.__name__)(cls)


for own in (Decoding, WarmupLinear, WarmupCosine, SplitRule, ConstantSchedule, FloatSchedule, LinearSchedule):
    storable(own)


def encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value for JSON. Tensors in it go into ``tensors``, under names that begin with ``name``.

    Raises:
        TypeError: something in it can't be stored; the message says what and where.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"array": encode(torch.from_numpy(value.copy()), tensors, name)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [encode(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        pairs = [[encode(k, tensors, name), encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]
        return {"dict": dict(pairs)} if all(isinstance(k, str) for k in value) else {"pairs": pairs}
    cls = type(value)
    if cls.__name__ not in STORABLE or STORABLE[cls.__name__] is not cls:
        raise TypeError(
            f"{name} is {value!r}, which a checkpoint cannot hold, as it holds no code: give a number or one of "
            "agents/schedules.py, or mark the class with @agents.stored.storable"
        )
    return {cls.__name__: {k: encode(v, tensors, f"{name}.{k}") for k, v in vars(value).items()}}


def decode(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: a class that is not storable here, or a tensor that is missing.
    """
    if isinstance(content, list):
        return [decode(item, tensors) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, inside),) = content.items()
    if kind == "tensor":
        if inside not in tensors:
            raise ValueError(f"the tensor {inside!r} is missing")
        return tensors[inside]
    if kind == "array":
        return decode(inside, tensors).numpy()
    if kind == "tuple":
        return tuple(decode(inside, tensors))
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in inside.items()}
    if kind == "pairs":
        return {decode(key, tensors): decode(item, tensors) for key, item in inside}
    cls: Any = STORABLE[kind]
    found = cls.__new__(cls)
    found.__dict__.update({key: decode(item, tensors) for key, item in inside.items()})  # frozen ones, too
    return found
