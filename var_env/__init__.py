"""VARText: text-to-image generation by next-scale prediction, as a Gymnasium environment.

Importing this package registers ``VARText-v0`` and, small enough to be solved exactly, ``VARTabular-v0``.
"""

import warnings

from var_env.agents_clash import find_clash
from var_env.prompts import PromptWorld
from var_env.scenes import Scene, World
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.registry import load_tokenizer
from var_env.tokenizers.vq import Tokenizer

__all__ = ["PromptWorld", "ScaleSchedule", "Scene", "Tokenizer", "VisualTokenizer", "World", "load_tokenizer"]

try:
    import gymnasium
except ModuleNotFoundError:  # pretraining needs the world and the tokenizer alone, and runs without Gymnasium
    pass
else:
    from var_env.env import VARTextEnv
    from var_env.vector import VARTextVectorEnv

    __all__ += ["VARTextEnv", "VARTextVectorEnv"]

    if "VARText-v0" not in gymnasium.registry:
        gymnasium.register(
            id="VARText-v0",
            entry_point="var_env.env:VARTextEnv",
            vector_entry_point="var_env.vector:VARTextVectorEnv",
        )
    if "VARTabular-v0" not in gymnasium.registry:
        gymnasium.register(
            id="VARTabular-v0",
            entry_point="var_env.tabular:VARTabularEnv",
            vector_entry_point="var_env.tabular:VARTabularVectorEnv",
        )

if clash := find_clash():  # the environment works all the same; importing VARText's agents would not
    warnings.warn(clash, stacklevel=2)
