"""The words that a prompt asks for: what stands in quotes.

Double quotes count, straight, typographic and East Asian; single ones only where a prompt has no double quote. They
pair up, or there is an error that shows the text: a stray quote, such as an inch mark, would turn the sentence inside
out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rewards.invisible import visible

DOUBLE = {  # what opens a quotation, and what may close it
    '"': '"',
    "\uff02": "\uff02",  # full width
    "\u201c": "\u201d",  # “ ”
    "\u201e": "\u201c\u201d",  # „ “, and „ ” in Polish
    "\u201f": "\u201d",
    "\u201d": "\u201d",  # ” ” in Swedish
    "\u00ab": "\u00bb",  # « »
    "\u00bb": "\u00ab\u00bb",  # » « in German, » » in Swedish
    "\u300c": "\u300d",  # 「 」
    "\u300e": "\u300f",  # 『 』
    "\uff62": "\uff63",  # the same in half width
    "\ufe41": "\ufe42",  # and upright
    "\ufe43": "\ufe44",
    "\u301d": "\u301e\u301f",  # 〝 〞
}
SINGLE = {"'": "'", "\u2018": "\u2019", "\u201a": "\u2018\u2019", "\u2039": "\u203a", "\u203a": "\u2039"}
_DOUBLES = set(DOUBLE).union(*DOUBLE.values())
EXAMPLE = 'such as A sign that says "RUN"'


def quoted_texts(prompt: str) -> list[str]:
    """What stands in double quotes, in order, or where there are none in single ones; blank quotes are left out.

    Raises:
        ValueError: a quote without its partner, or an inch mark that would be taken for one.
    """
    texts = double_quoted(prompt) if _DOUBLES & set(prompt) else single_quoted(prompt)
    return [text for text in texts if visible(text).strip()]


def quoted_words(prompt: str) -> tuple[str, ...]:
    """The words in quotes, in order; text in quotes is split at white space and has no invisible characters.

    Raises:
        ValueError: no words in quotes, quotes that do not pair up, or half of a surrogate pair.
    """
    check_text(prompt)
    words = tuple(word for text in quoted_texts(prompt) for word in visible(text).split())
    if not words:
        raise ValueError(f"the prompt names no word in double quotes, {EXAMPLE}: {prompt!r}")
    return words


def check_text(prompt: str) -> None:
    """``ValueError`` for half of a surrogate pair, which is no character and which no encoding can hold."""
    for i, letter in enumerate(prompt):
        if "\ud800" <= letter <= "\udfff":
            raise ValueError(
                f"character {i} of the prompt is {letter!r}, one half of a surrogate pair and no character: write the "
                f"character itself: {prompt!r}"
            )


def double_quoted(prompt: str) -> list[str]:
    """The texts in double quotes. Inside of them all but the closing quote is text."""
    texts, start, closing = [], 0, ""
    for i, letter in enumerate(prompt):
        if closing:
            if letter in closing:
                texts.append(prompt[start:i])
                closing = ""
            elif letter == prompt[start - 1]:
                raise unpaired(letter, prompt)
        elif letter in DOUBLE:
            if letter in '"\u201d' and prompt[:i][-1:].isdecimal():
                raise ValueError(
                    f"a {letter} right after a digit opens no quotation: for inches write 12-inch, and put a blank "
                    f"before a quoted text: {prompt!r}"
                )
            start, closing = i + 1, DOUBLE[letter]
        elif letter in _DOUBLES:
            raise unpaired(letter, prompt)
    if closing:
        raise unpaired(prompt[start - 1], prompt)
    return texts


def single_quoted(prompt: str, pairs: Mapping[str, str] = SINGLE) -> list[str]:
    """The texts in single quotes. An apostrophe opens nothing after a letter, and closes nothing before one."""
    texts, start, closing = [], 0, ""
    for i, letter in enumerate(prompt):
        opens = letter in pairs and not is_letter(prompt[:i][-1:]) and prompt[i + 1 : i + 2].strip() != ""
        if closing and letter in closing and i > start and not is_letter(prompt[i + 1 : i + 2]):
            texts.append(prompt[start:i])
            closing = ""
        elif closing and opens and letter == prompt[start - 1]:
            raise unpaired(letter, prompt)
        elif not closing and opens:
            start, closing = i + 1, pairs[letter]
    if closing and prompt[start - 1] != "'":  # which may be an apostrophe: 'tis
        raise unpaired(prompt[start - 1], prompt)
    return texts


def is_letter(text: str) -> bool:
    """Whether a character is one of a word."""
    return bool(re.fullmatch(r"\w", text))


def unpaired(quote: str, prompt: str) -> ValueError:
    return ValueError(
        f"a {quote} has no partner in this prompt: put each text in double quotes, {EXAMPLE}, and write 12-inch "
        f"for inches: {prompt!r}"
    )
