"""Where ``serving/pool.py`` was; its names are still found here."""

from rewards.serving.pool import MODES, RewardPool, WorkerError, counted_from, join, rebuilt, take

__all__ = ["MODES", "RewardPool", "WorkerError", "counted_from", "join", "rebuilt", "take"]
