"""Settings and states as JSON: an earlier name of ``agents/saving/stored.py``, and where `storable` is found."""

from agents.saving.stored import STORABLE, decode, encode, storable

__all__ = ["STORABLE", "decode", "encode", "storable"]
