"""Where ``tokenizers/infinity_vae.py`` was; its names are still found here."""

from var_env.tokenizers.infinity_vae import (
    MULTIPLIERS,
    PATCH,
    REPOSITORY,
    RESOLUTIONS,
    SIDES,
    InfinityTokenizer,
    infinity_schedule,
    unwrapped,
)

__all__ = [
    "MULTIPLIERS",
    "PATCH",
    "REPOSITORY",
    "RESOLUTIONS",
    "SIDES",
    "InfinityTokenizer",
    "infinity_schedule",
    "unwrapped",
]
