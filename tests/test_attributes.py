"""What is measured beside the reward, on images whose faults are known because they were planted."""

from dataclasses import replace

import numpy as np
import pytest

from var_env.attributes import (
    attributes,
    chances,
    colour_attributes,
    colours_asked,
    contrast_ratio,
    letter_fates,
    shares,
    text_attributes,
)
from var_env.faults import COLOURS, DEFAULT_FAULTS, Faults
from var_env.scenes import World, render, scene_from_prompt


def scenes_of(count=60, seed=0, **options):
    world, rng = World(**options), np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(count)]


def rendered(shown, asked=None, faults=DEFAULT_FAULTS):
    """The attributes of images of `shown`, read without error, where `asked` is asked for."""
    images = np.stack([render(scene) for scene in shown])
    return attributes(images, asked or shown, [list(scene.words) for scene in shown], faults)


class TestRendered:
    @pytest.mark.parametrize("size", [64, 128])
    def test_right(self, size):
        scenes = scenes_of(size=size)
        record = rendered(scenes)
        for name in ("affected_confused", "affected_other", "plain_other", "words_missing", "ink_confused"):
            assert not record[name].any(), name
        for name in ("ink_right", "ground_right"):
            assert (record[name] == 1).all(), name
        words = [len(scene.words) for scene in scenes]
        for name in ("words_asked", "words_shown", "lines_shown"):
            np.testing.assert_array_equal(record[name], words)
        letters = [sum(map(len, scene.words)) for scene in scenes]
        np.testing.assert_array_equal(record["affected_right"] + record["plain_right"], letters)
        assert all(values.shape == (60,) and values.dtype == np.float32 for values in record.values())

    def test_exactly_the_planted_faults_are_counted(self):
        asked, rng = scenes_of(300), np.random.default_rng(1)
        shown = [DEFAULT_FAULTS.shown(scene, World(), rng) for scene in asked]
        record = rendered(shown, asked)
        left = [list(zip(a.words, s.words, strict=False)) for a, s in zip(asked, shown, strict=True)]
        confused = [sum(x != y for pair in pairs for x, y in zip(*pair, strict=True)) for pairs in left]
        np.testing.assert_array_equal(record["affected_confused"], confused)
        assert not record["affected_other"].any() and not record["plain_other"].any()
        missing = [len(a.words) - len(s.words) for a, s in zip(asked, shown, strict=True)]
        np.testing.assert_array_equal(record["words_missing"], missing)
        np.testing.assert_array_equal(record["lines_shown"], [len(scene.words) for scene in shown])
        recoloured = np.array([a.ink != s.ink for a, s in zip(asked, shown, strict=True)])
        np.testing.assert_array_equal(record["ink_confused"], recoloured)
        np.testing.assert_array_equal(record["ink_right"], ~recoloured)
        assert (record["ground_right"] == 1).all()
        assert min(record[name].sum() for name in ("affected_confused", "words_missing", "ink_confused")) > 20

    def test_black_on_white_has_the_wrong_colours_and_no_other_fault(self):
        asked = [s for s in scenes_of(200) if s.ground != COLOURS["white"] and s.ink != COLOURS["black"]]
        record = rendered([replace(s, ink=COLOURS["black"], ground=COLOURS["white"]) for s in asked], asked)
        right = rendered(asked)
        for name in record:
            if name in ("ink_right", "ground_right"):
                assert not record[name].any(), name
            elif name not in ("contrast", "ink_confused"):  # navy is drawn as black in the table
                np.testing.assert_array_equal(record[name], right[name], name)

    def test_texture_does_not_change_the_colours(self):
        scenes, rng = scenes_of(), np.random.default_rng(2)
        images = np.stack([render(scene) for scene in scenes])
        noisy = np.clip(images + rng.normal(0, 12, images.shape), 0, 255).astype(np.uint8)
        record = colour_attributes(noisy, scenes, DEFAULT_FAULTS)
        assert (record["ink_right"] == 1).all() and (record["ground_right"] == 1).all()


class TestNothingToSee:
    @pytest.mark.parametrize("colour", COLOURS)
    def test_blank(self, colour):
        scenes = scenes_of()
        images = np.full((60, 64, 64, 3), COLOURS[colour], np.uint8)
        record = attributes(images, scenes, [[]] * 60, DEFAULT_FAULTS)
        np.testing.assert_array_equal(record["words_missing"], record["words_asked"])
        for name in ("letters_affected", "letters_plain", "lines_shown", "ink_right", "ink_confused"):
            assert not record[name].any(), name
        assert (record["contrast"] == 1).all()
        np.testing.assert_array_equal(record["ground_right"], [s.ground == COLOURS[colour] for s in scenes])
        measured = shares(record)
        assert measured["words_missing"] == 1 and measured["missing_right"] == measured["colour_right"] == 0
        assert np.isnan(measured["letter_right"])

    def test_noise_is_measured_without_a_warning(self, recwarn):
        images = np.random.default_rng(0).integers(256, size=(60, 64, 64, 3), dtype=np.uint8)
        record = attributes(images, scenes_of(), [[]] * 60, DEFAULT_FAULTS)
        assert all(np.isfinite(values).all() for values in record.values()) and not recwarn

    def test_words_beyond_those_asked_for(self):
        """A second word where one was asked for is one too many; one in place of the other is not."""
        one, two = scene_from_prompt('the word "RUN"'), scene_from_prompt('"RUN" and "ELK"')
        images = np.zeros((5, 64, 64, 3), np.uint8)
        read = [["run"], ["run", "elk"], ["run"], ["run", "elk"], ["run", "elk", "ox"]]
        measured = shares(attributes(images, [one, one, two, two, two], read, DEFAULT_FAULTS))
        assert measured["words_extra"] == pytest.approx(2 / 5) and measured["words_missing"] == pytest.approx(1 / 8)

    def test_a_reward_that_does_not_read(self):
        scenes = scenes_of()
        record = attributes(np.stack([render(s) for s in scenes]), scenes, None, DEFAULT_FAULTS)
        assert all(np.isnan(record[name]).all() for name in ("affected_right", "plain_right", "words_missing"))
        assert (record["ink_right"] == 1).all()
        assert np.isnan(shares(record)["letter_right"]) and np.isnan(shares(record)["words_extra"])

    def test_no_faults(self):
        record = rendered(scenes_of(), faults=Faults())
        assert not any(n.any() for n, _ in chances(record).values())
        assert all(np.isnan(shares(record)[f"{family}_right"]) for family in ("letter", "missing", "colour"))


class TestColoursAsked:
    @pytest.mark.parametrize("scene", scenes_of(20, seed=3))
    def test_a_prompt_says_what_the_scene_knows(self, scene):
        assert colours_asked(scene_from_prompt(scene.prompt)) == colours_asked(scene)

    def test_a_prompt_that_names_none(self):
        scene = scene_from_prompt('A "RED" cup in navy light')
        assert colours_asked(scene) == (None, None)
        record = rendered(scenes_of(1), [scene])
        assert np.isnan(record["ink_right"]).all() and np.isnan(record["ground_right"]).all()

    def test_a_colour_off_the_palette(self):
        assert colours_asked(scene_from_prompt('"RUN" in orange on a navy wall')) == (None, "navy")


class TestLetters:
    def test_by_hand(self):
        partners = {"a": "h", "e": "f"}
        assert letter_fates("cafe", "chfe", partners) == ["right", "confused", "right", "right"]
        assert letter_fates("cafe", "cxf", partners) == ["right", "other", "right", "other"]
        assert letter_fates("cafe", "cafes", partners) == ["right"] * 4

    def test_case_and_blanks_in_a_target(self):
        scene = replace(scene_from_prompt('"ELK RUN"'), words=("ELK RUN",))
        record = text_attributes([scene], [["elk"]], DEFAULT_FAULTS)
        assert record["words_asked"] == 2 and record["words_missing"] == 1
        assert record["letters_affected"] == record["affected_right"] == 3  # E, L, K


def test_contrast():
    black, white = np.zeros((1, 3), np.float32), np.full((1, 3), 255, np.float32)
    assert contrast_ratio(black, white) == pytest.approx([21.0])
    assert contrast_ratio(white, white) == pytest.approx([1.0])
    grey = np.full(
        (1, 3), 119, np.float32
    )  # the lightest grey with 4.5 to 1, the threshold of WCAG's level AA, is #767676
    assert 4.4 < contrast_ratio(grey, white)[0] < 4.5 == pytest.approx(contrast_ratio(grey - 1, white)[0], abs=0.05)


class TestBadInput:
    def test_counts_that_differ(self):
        scenes = scenes_of(2)
        images = np.stack([render(scene) for scene in scenes])
        with pytest.raises(ValueError, match="2 images, 1 scenes and words read of 2 images"):
            attributes(images, scenes[:1], [[], []], DEFAULT_FAULTS)
        with pytest.raises(ValueError, match="words read of 3 images"):
            attributes(images, scenes, [[]] * 3, DEFAULT_FAULTS)

    def test_images_of_another_type(self):
        with pytest.raises(ValueError, match="uint8"):
            attributes(np.zeros((1, 64, 64, 3)), scenes_of(1), [[]], DEFAULT_FAULTS)
