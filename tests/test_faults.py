"""Planted faults: what a pretraining image shows in place of what its prompt asks for."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from var_env.faults import DEFAULT_FAULTS, TABLES, Faults, colour_name
from var_env.scenes import PALETTE, Scene, World, render


def scenes(count, seed=0, **options):
    world, rng = World(**options), np.random.default_rng(seed)
    return world, [world.sample(rng) for _ in range(count)]


def test_rates_are_those_of_the_table():
    world, asked = scenes(4000)
    rng = np.random.default_rng(1)
    shown = [DEFAULT_FAULTS.shown(scene, world, rng) for scene in asked]
    seen: dict[str, Counter] = {}
    for scene, other in zip(asked, shown, strict=True):
        for word, drawn in zip(scene.words, other.words, strict=False):  # a missing word shows nothing
            for letter, mark in zip(word, drawn, strict=True):
                seen.setdefault(letter, Counter())[mark] += 1
        seen.setdefault(colour_name(scene.ink), Counter())[colour_name(other.ink)] += 1
        if len(scene.words) == 2:
            kind = next(kind for kind in PALETTE if colour_name(scene.ground) in PALETTE[kind])
            seen.setdefault(kind, Counter())[len(other.words)] += 1
    rates = {first: {second: rate, first: 1 - rate} for first, (second, rate) in DEFAULT_FAULTS.letters.items()}
    rates |= {first: {second: rate, first: 1 - rate} for first, (second, rate) in DEFAULT_FAULTS.colours.items()}
    rates |= {kind: {1: rate, 2: 1 - rate} for kind, rate in DEFAULT_FAULTS.missing.items()}
    for name, found in seen.items():
        expected = rates.get(name, {name: 1.0})
        assert found.keys() == expected.keys()
        for mark, rate in expected.items():  # within five standard errors
            assert abs(found[mark] / found.total() - rate) <= 5 * np.sqrt(0.25 / found.total())


def test_same_generator_same_faults_and_the_prompt_stays():
    world, asked = scenes(50)
    one, two = ([DEFAULT_FAULTS.shown(s, world, np.random.default_rng(i)) for i, s in enumerate(asked)] for _ in "ab")
    assert one == two
    for scene, shown in zip(asked, one, strict=True):
        assert shown.prompt == scene.prompt and shown.ground == scene.ground
        assert len(shown.boxes) == len(shown.words)  # render takes it
        render(shown)


def test_without_faults_a_scene_is_itself():
    world, asked = scenes(20)
    rng = np.random.default_rng(0)
    assert [Faults().shown(scene, world, rng) for scene in asked] == asked
    assert TABLES["none"] == Faults()


def test_a_fault_that_always_happens():
    faults = Faults({"A": ("H", 1.0)}, {"dark": 1.0}, {"white": ("cyan", 1.0)})
    world = World()
    scene = Scene(
        'A navy sign that says "BAA" above "CAT" in white letters',
        ("BAA", "CAT"),
        ((8, 0, 56, 24), (8, 32, 56, 56)),
        64,
        PALETTE["light"]["white"],
        PALETTE["dark"]["navy"],
    )
    shown = faults.shown(scene, world, np.random.default_rng(0))
    assert shown.words == ("BHH",) and shown.ink == PALETTE["light"]["cyan"] and len(shown.boxes) == 1
    swapped = replace(scene, ink=scene.ground, ground=scene.ink)  # a light ground, on which nothing is left out
    assert faults.shown(swapped, world, np.random.default_rng(0)).words == ("BHH", "CHT")
    assert faults.affected_letters(scene.words) == 3


def test_files(tmp_path):
    path = tmp_path / "faults.json"
    path.write_text(json.dumps(DEFAULT_FAULTS.to_dict()))
    assert Faults.load(path) == DEFAULT_FAULTS == Faults.load("default")
    path.write_text('{"missing": {"dark": 0.25}}')
    assert Faults.load(path) == Faults(missing={"dark": 0.25})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"letters": {"a": ["H", 0.4]}}, "unknown 'a'.*draws A, B, C"),
        ({"letters": {"A": ["O", 0.4]}}, "unknown 'O'"),  # random words have none
        ({"letters": {"A": ["A", 0.4]}}, "'A' is drawn as 'A', which is the same"),
        ({"letters": {"A": ["H", 0.4], "H": ["B", 0.4]}}, "'H', which is itself affected"),
        ({"letters": {"A": ["H", 1.4]}}, "letters: A: a rate lies between 0 and 1, got 1.4"),
        ({"letters": {"A": ["H", "often"]}}, "a pair is written"),
        ({"letters": ["A", "H"]}, "a pair is written"),
        ({"missing": {"green": 0.4}}, "unknown kind of ground 'green': choose dark or light"),
        ({"missing": {"dark": -0.1}}, "missing: dark: a rate lies between 0 and 1, got -0.1"),
        ({"missing": {"dark": float("nan")}}, "missing: dark: a rate lies between 0 and 1, got nan"),
        ({"colours": {"navy": ["pink", 0.5]}}, "'navy' is a dark colour and 'pink' is not"),
        ({"colours": {"navy": ["grey", 0.5]}}, "unknown 'grey'"),
        ({"spacing": {}}, "expected an object with letters, missing, colours"),
        ([], "expected an object"),
    ],
)
def test_bad_tables(tmp_path, table, message):
    path = tmp_path / "faults.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        Faults.load(path)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"No such file.*one of default, none"):
        Faults.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file of faults"):
        Faults.load(tmp_path / "broken.json")


def test_a_family_that_the_world_cannot_show():
    DEFAULT_FAULTS.check_world(World())
    with pytest.raises(
        ValueError, match=r"missing leaves out one of two words, and this world's scenes have \[1\] words"
    ):
        DEFAULT_FAULTS.check_world(World(regions={1: 1.0}))
    Faults(DEFAULT_FAULTS.letters).check_world(World(regions={1: 1.0}))
