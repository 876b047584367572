"""Characters that nobody sees and that no OCR reads: they are no part of a word."""

from __future__ import annotations

import unicodedata

# Of Unicode's Default_Ignorable_Code_Point, those that are letters or marks by category and still show nothing.
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"


def is_invisible(letter: str) -> bool:
    """Whether a character has no shape and takes no room: zero-width, soft hyphen, bidi mark, control, variation."""
    if letter.isspace():
        return False
    return unicodedata.category(letter) in ("Cf", "Cc") or letter in _BLANK or "\ufe00" <= letter <= "\ufe0f"


def visible(text: str) -> str:
    """The text without its invisible characters; white space stays."""
    return text if text.isascii() and text.isprintable() else "".join(c for c in text if not is_invisible(c))
