"""A warning for prompts that ask for what the rendered world never draws, and so a policy trained on it never saw."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

from var_env.quotes import quoted_words
from var_env.room import Room
from var_env.scenes import World

SHORTEST = 3  # letters of the world's words


class PromptWarning(Warning):
    """A prompt asks for what the world does not draw."""


def warn_of_prompt(prompt: str, world: Any) -> None:
    """Warn once of a prompt unlike the world's, whose own prompts and those of prompt files are never unlike it.

    Args:
        prompt: with words in quotes.
        world: the environment's. Only the rendered worlds know what they never draw; nothing is said of others.
    """
    if getattr(type(world), "sample", None) in (World.sample, Room.sample):
        _warn(prompt, world.size, world.max_letters, max(world.regions))


@functools.lru_cache(maxsize=4096)
def _warn(prompt: str, size: int, longest: int, most: int) -> None:
    complaints = unfamiliar(prompt, size, longest, most)
    if complaints:
        warnings.warn(
            f"the prompt {prompt!r} asks for what the rendered world never draws, and a policy trained on it can "
            f"hardly write: {'; '.join(complaints)}",
            PromptWarning,
            stacklevel=4,  # whoever called what warns
        )


def unfamiliar(prompt: str, size: int, longest: int, most: int) -> list[str]:
    """What a prompt asks for beyond the rendered world.

    Args:
        prompt: with words in quotes.
        size: the image's height and width in pixels.
        longest: letters of the longest word that fits.
        most: words of an image at most.
    """
    words, found = quoted_words(prompt), []
    for word in dict.fromkeys(words):
        if not re.fullmatch("[A-Z]+", word):
            capitals = f": write {word.upper()}" if re.fullmatch("[A-Za-z]+", word) else ""
            found.append(f'"{word}" has other characters than the capitals A to Z{capitals}')
        if len(word) > longest:
            found.append(f'"{word}" has {len(word)} letters, and at most {longest} fit in {size} px')
        if len(word) < SHORTEST:
            found.append(f'"{word}" has {len(word)} letters, and the world\'s words have at least {SHORTEST}')
    if len(words) > most:
        found.append(f"it has {len(words)} words, and the world's images at most {most}")
    if '"' not in prompt:
        found.append('its words do not stand between straight double quotes, "')
    return found
