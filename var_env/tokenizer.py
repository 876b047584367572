"""Where the tokenizer was before ``var_env/tokenizers``; its names are still found here."""

from var_env.tokenizers.base import from_unit, to_unit
from var_env.tokenizers.registry import TOKENIZERS, load_tokenizer
from var_env.tokenizers.residual import DEFAULT_SCHEDULE, MAKER, MultiScaleTokenizer, Phi, ResidualBlock
from var_env.tokenizers.vq import Tokenizer

__all__ = [
    "DEFAULT_SCHEDULE",
    "MAKER",
    "TOKENIZERS",
    "MultiScaleTokenizer",
    "Phi",
    "ResidualBlock",
    "Tokenizer",
    "from_unit",
    "load_tokenizer",
    "to_unit",
]
