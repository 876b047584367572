"""Where ``tokenizers/bits.py`` was; its names are still found here."""

from var_env.tokenizers.bits import BitTokenizer, bit_entropies

__all__ = ["BitTokenizer", "bit_entropies"]
