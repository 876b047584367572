"""Visual tokenizers: the interface in ``base.py``, one file a kind, and `load_tokenizer`, which reads any of them."""

from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.registry import load_tokenizer
from var_env.tokenizers.vq import Tokenizer

__all__ = ["Tokenizer", "VisualTokenizer", "load_tokenizer"]
