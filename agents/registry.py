"""Where the registry and the recipes were; they are in ``common/registry.py`` and ``recipes.py`` now."""

from agents.common.registry import AGENTS, Registry, register
from agents.recipes import (
    BUNDLES,
    HOMES,
    VARIANTS,
    Variant,
    is_wrapper,
    known,
    listing,
    make,
    options_in,
    options_of,
    parts_of,
    settings,
    summary_of,
)

__all__ = [
    "AGENTS",
    "BUNDLES",
    "HOMES",
    "VARIANTS",
    "Registry",
    "Variant",
    "is_wrapper",
    "known",
    "listing",
    "make",
    "options_in",
    "options_of",
    "parts_of",
    "register",
    "settings",
    "summary_of",
]
