"""Where ``tokenizers/base.py`` was; its interface is still found here."""

from var_env.tokenizers.base import VisualTokenizer

__all__ = ["VisualTokenizer"]
