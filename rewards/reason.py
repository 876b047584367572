"""What an exception says, for messages: libraries raise some that say nothing."""

from __future__ import annotations

import traceback


def reason(error: BaseException) -> str:
    """The text of an exception; where it has none, its class and the line that raised it. Never empty."""
    text = str(error).strip()
    if isinstance(error, KeyError) or not text:  # a KeyError's text is the key alone
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        text = f"{type(error).__name__}{f' {text}' if text else ''}{where}"
    return text
