"""Where ``serving/client.py`` was; its names are still found here."""

from rewards.serving.client import BUSY, FIRST_WAIT, TOKEN_VARIABLE, RewardClient, ServiceError

__all__ = ["BUSY", "FIRST_WAIT", "TOKEN_VARIABLE", "RewardClient", "ServiceError"]
