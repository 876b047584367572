"""Where ``tokenizers/janus_vq.py`` was; its names are still found here."""

from var_env.tokenizers.janus_vq import ROWS, JanusTokenizer, JanusVQ

__all__ = ["ROWS", "JanusTokenizer", "JanusVQ"]
