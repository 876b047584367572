"""Where ``serving/wire.py`` was; its names are still found here."""

from rewards.serving.wire import (
    DTYPES,
    LARGEST,
    TooLarge,
    checksums,
    decode_answer,
    decode_request,
    describe,
    encode_answer,
    encode_request,
)

__all__ = [
    "DTYPES",
    "LARGEST",
    "TooLarge",
    "checksums",
    "decode_answer",
    "decode_request",
    "describe",
    "encode_answer",
    "encode_request",
]
