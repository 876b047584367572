"""What an agent lets wrappers change, and all that it knows of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from agents.losses import TokenWeights
from agents.rollout import Rollout


class Hooks(Protocol):
    """An agent that learns from rollouts, or a wrapper around one. Each method is called once for a rollout."""

    def scores(self, rollout: Rollout, steps: range) -> Tensor:
        """What each row is worth, ``(P, G)``."""

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """The advantage of each token of ``steps``, ``(B, n)``."""

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        """How much each token of ``steps`` counts against the others, ``(B, n)`` each."""
