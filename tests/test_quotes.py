"""The words that a prompt asks for."""

import pytest

from rewards.base import check_scenes
from rewards.text_metrics import normalize, normalize_targets, word_accuracy
from var_env.quotes import quoted_texts, quoted_words
from var_env.scenes import Scene, encode_prompt


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('"A" and "B C"', ["A", "B C"]),
        ('"a 7" and "B"', ["a 7", "B"]),
        ("a sign “GO” at Joe’s", ["GO"]),
        ("A ‘sign’ that says “IT’S ON”", ["IT’S ON"]),
        ("rock 'n' roll “HI”", ["HI"]),
        (
            "„JA“ «OUI» »JA« 「営業中」『中』 ＂GO＂ 〝A〟 ”JO” »JA»",
            ["JA", "OUI", "JA", "営業中", "中", "GO", "A", "JO", "JA"],
        ),
        ("Joe’s sign ‘GO’ and the dogs’ ‘DON’T’", ["GO", "DON’T"]),
        ("the dogs' sign 'GO' says 'Don't Walk'", ["GO", "Don't Walk"]),
        ("‚JA‘ ‹OUI›", ["JA", "OUI"]),
        ('写着"你好"', ["你好"]),
        ("“A 'B' \"C\"”", ["A 'B' \"C\""]),
        ("a 12-inch record", []),
        ("it's", []),
        ('"" " " "\u200b"', []),
    ],
)
def test_quoted_texts(prompt, texts):
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize(
    "prompt",
    [
        'A 12" record with the title "BLUE"',
        'a 12" by 8" sign "GO"',
        "A 12\" sign 'GO'",
        'a sign "GO',
        'a sign "GO”',
        "a sign “GO",
        "a sign GO”x",
        "“GO“",
        "「GO",
        "GO」",
        "‘GO",
        "'Tis the sign 'GO'",
    ],
)
def test_quotes_that_do_not_pair_up(prompt):
    with pytest.raises(ValueError, match="12-inch") as raised:
        quoted_words(prompt)
    assert repr(prompt) in str(raised.value)


INVISIBLE = ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u200e", "\u202e", "\u2066", "\x00", "\ufe0f", "\u3164"]


@pytest.mark.parametrize("letter", INVISIBLE)
def test_invisible_characters_are_no_part_of_a_word(letter):
    word = f"R{letter}UN{letter}"
    assert quoted_words(f'a "{word} {letter}"') == ("RUN",)
    assert normalize(word) == "run" and word_accuracy([word], ["RUN"]) == 1
    with pytest.raises(ValueError, match="names no word"):
        quoted_words(f'a "{letter}"')
    with pytest.raises(ValueError, match="show something"):
        normalize_targets([letter])
    with pytest.raises(ValueError, match="not a non-blank string"):
        check_scenes([Scene("", (letter,))], 1)


def test_half_a_surrogate_pair():
    for reads in (quoted_words, encode_prompt):
        with pytest.raises(ValueError, match=r"character 1 of the prompt is '\\ud83d', one half of a surrogate pair"):
            reads('"\ud83d"')
