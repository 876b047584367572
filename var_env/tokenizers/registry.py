"""Tokenizers by the name of their class, which files hold, and the one way to read any of them."""

from __future__ import annotations

from pathlib import Path

from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.residual import MAKER
from var_env.tokenizers.vq import Tokenizer
from var_env.weights import saved_class

TOKENIZERS = {  # class name to module, for `load_tokenizer`; the first is what a file without a name holds
    "Tokenizer": "var_env.tokenizers.vq",
    "RasterTokenizer": "var_env.tokenizers.raster",
    "VARTokenizer": "var_env.tokenizers.var_vqvae",
    "BitTokenizer": "var_env.tokenizers.bits",
    "InfinityTokenizer": "var_env.tokenizers.infinity_vae",
    "JanusTokenizer": "var_env.tokenizers.janus_vq",
    "TableTokenizer": "var_env.tabular",
}


def load_tokenizer(path: str | Path | None = None) -> VisualTokenizer:
    """The tokenizer in a file, whatever its class; without a path, the shipped one. Frozen, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no tokenizer, or one of a class that is not known here.
    """
    return Tokenizer.load() if path is None else saved_class(path, VisualTokenizer, TOKENIZERS, MAKER).load(path)
