"""A learning rate that follows the KL of an update: the rule behind `kl_per_update`.

PPO's KL penalty adapts in this way (arXiv 1707.06347, section 4); applied to the learning rate it is the "adaptive"
schedule of PPO for robots (rsl_rl). It makes agents comparable at equal KL, whatever the length of their gradients.
"""

from __future__ import annotations

BAND = 2.0  # the KL may be the target times or divided by this
FACTOR = 1.5  # that one update changes the learning rate by
MOST = 100.0  # that all updates together do, upwards and downwards


def next_factor(factor: float, kl: float, target: float) -> float:
    """What the next update multiplies the learning rate with, 1 / MOST to MOST.

    Args:
        factor: what the last one did.
        kl: of the last one, mean over tokens; 0 is one that moved nothing, from which nothing follows.
        target: above 0.
    """
    if kl > BAND * target:
        factor /= FACTOR
    elif 0 < kl < target / BAND:
        factor *= FACTOR
    return min(max(factor, 1 / MOST), MOST)
