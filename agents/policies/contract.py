"""The contract tests, whose home is ``agents/testing.py``."""

from agents.testing import BATCH, FixedPrompts, PolicyContract, TokenizerContract, TopHalf, cached_logits, random_grids

__all__ = ["BATCH", "FixedPrompts", "PolicyContract", "TokenizerContract", "TopHalf", "cached_logits", "random_grids"]
