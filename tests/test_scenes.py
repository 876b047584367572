import copy
import pickle
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from var_env import ScaleSchedule, Tokenizer
from var_env.scenes import (
    CELL_HEIGHT,
    CELL_WIDTH,
    LATTICE,
    MAX_PROMPT_BYTES,
    PALETTE,
    SPLITS,
    TARGET_REGIONS,
    Scene,
    World,
    encode_prompt,
    glyph,
    quoted_words,
    render,
    scene_from_prompt,
    split_of,
    word_list,
)


def scenes(count=200, seed=0, **options):
    world, rng = World(**options), np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(count)]


class TestWorld:
    def test_same_seed_same_scenes(self):
        assert scenes(seed=4) == scenes(seed=4) != scenes(seed=5)

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_word_is_of_its_split_and_drawable(self, split):
        for scene in scenes(split=split):
            for word in scene.words:
                assert split_of(word) == split and 3 <= len(word) <= 4 and word.isalpha() and word.isupper()

    def test_splits_never_overlap(self):
        seen = {split: {w for s in scenes(500, split=split) for w in s.words} for split in SPLITS}
        listed = {split: set(word_list(split, 4)) for split in SPLITS}
        for words in (seen, listed):
            assert all(words.values())
            assert not words["train"] & words["val"] and not words["train"] & words["test"]
            assert not words["val"] & words["test"]

    def test_hash_splits_80_10_10(self):
        words = [word for split in SPLITS for word in word_list(split, 8)]
        shares = [sum(split_of(word) == split for word in words) / len(words) for split in SPLITS]
        np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)

    def test_listed_and_random_words_both_occur(self):
        listed = set(word_list("train", 4))
        share = np.mean([word in listed for scene in scenes(500) for word in scene.words])
        assert 0.4 < share < 0.65

    def test_prompt_names_the_words_in_order_and_the_colours(self):
        names = {rgb: name for shade in PALETTE.values() for name, rgb in shade.items()}
        for scene in scenes():
            assert quoted_words(scene.prompt) == scene.words
            assert names[scene.ink] in scene.prompt and names[scene.ground] in scene.prompt
            assert len(scene.prompt.encode()) <= MAX_PROMPT_BYTES

    def test_ink_and_ground_contrast(self):
        for scene in scenes():
            dark = scene.ground in PALETTE["dark"].values()
            assert (scene.ink in PALETTE["light"].values()) == dark

    def test_region_profile(self):
        profile = {1: 0.2, 2: 0.3, 3: 0.3, 5: 0.2}
        counts = [len(scene.words) for scene in scenes(2000, size=128, regions=profile)]
        for count in range(1, 6):
            assert np.mean(np.equal(counts, count)) == pytest.approx(profile.get(count, 0), abs=0.04)

    def test_the_target_profile_by_name(self):
        drawn = scenes(2000, size=128, regions="target")
        assert drawn == scenes(2000, size=128, regions=TARGET_REGIONS)
        for count, share in {1: 0, 2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}.items():  # appendix C
            assert np.mean([len(scene.words) == count for scene in drawn]) == pytest.approx(share, abs=0.04)
        assert max(len(scene.prompt.encode()) for scene in drawn) <= MAX_PROMPT_BYTES

    def test_the_target_profile_in_an_environment_made_from_json(self, tmp_path):
        schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4), (8, 8)], patch=16)
        Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).save(tmp_path / "tokenizer.safetensors")
        options = {"regions": "target", "size": 128, "tokenizer": str(tmp_path / "tokenizer.safetensors")}
        env = gym.make(EnvSpec.from_json(gym.make("VARText-v0", **options).spec.to_json()))
        assert env.unwrapped.world.regions == TARGET_REGIONS
        assert {len(env.reset(seed=seed)[1]["words"]) for seed in range(40)} == set(TARGET_REGIONS)

    @pytest.mark.parametrize("placement", ["even", "free"])
    @pytest.mark.parametrize(("size", "regions"), [(64, {1: 0.5, 2: 0.5}), (128, {1: 0.2, 3: 0.4, 5: 0.4})])
    def test_boxes_fit_the_words_on_the_lattice_without_overlap(self, placement, size, regions):
        for scene in scenes(size=size, regions=regions, placement=placement):
            bottom = 0
            for word, (x0, y0, x1, y1) in zip(scene.words, scene.boxes, strict=True):
                assert x0 % LATTICE == y0 % LATTICE == 0
                assert (x1 - x0, y1 - y0) == (len(word) * CELL_WIDTH, CELL_HEIGHT)
                assert x0 >= 0 and x1 <= size and y0 >= bottom and y1 <= size
                bottom = y1

    def test_even_lines_follow_from_the_prompt_and_free_ones_do_not(self):
        heights = {
            placement: {tuple(box[1] for box in scene.boxes) for scene in scenes(placement=placement)}
            for placement in ("even", "free")
        }
        assert heights["even"] == {(16,), (0, 40)}
        assert {len(h) for h in heights["free"]} == {1, 2} and len(heights["free"]) == 6 + 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "dev"}, "unknown split 'dev'"),
            ({"size": 60}, "multiple of 8 px and at least 48, got 60"),
            ({"size": 40}, "at least 48, got 40"),
            ({"regions": {3: 1.0}}, r"1\.\.2 at 64 px, got the counts \[3\]"),
            ({"regions": "target"}, r"1\.\.2 at 64 px, got the counts \[2, 3, 4, 5\]"),
            ({"regions": "uniform"}, "unknown region profile 'uniform': give 'target'"),
            ({"regions": {}}, r"sum to 1, got \{\}"),
            ({"regions": {1: 0.5, 2: 0.4}}, "sum to 1"),
            ({"regions": {1: 1.5, 2: -0.5}}, "sum to 1"),
            ({"placement": "random"}, "unknown placement 'random'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            World(**options)


class TestRender:
    def test_boxes_hold_all_the_ink_and_only_theirs(self):
        for scene in scenes(50):
            image = render(scene)
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
            ink = (image != np.array(scene.ground, np.uint8)).any(-1)
            covered = np.zeros_like(ink)
            for x0, y0, x1, y1 in scene.boxes:
                assert ink[y0:y1, x0:x1].any()
                covered[y0:y1, x0:x1] = True
            assert not (ink & ~covered).any()

    def test_full_coverage_is_the_ink_colour(self):
        scene = scenes(1)[0]
        assert (render(scene).reshape(-1, 3) == scene.ink).all(-1).any()

    def test_glyphs_differ(self):
        glyphs = [glyph(letter).tobytes() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        assert len(set(glyphs)) == 26

    def test_a_scene_without_layout_cannot_be_drawn(self):
        with pytest.raises(ValueError, match="no layout"):
            render(scene_from_prompt('A sign that says "RUN"'))


class TestPrompts:
    def test_text_in_quotes_is_split_at_spaces(self):
        assert quoted_words('"GO NOW" above "BIG"') == ("GO", "NOW", "BIG")

    def test_empty_quotes_are_no_word_and_do_not_shift_the_others(self):
        assert quoted_words('"" above "RUN" and " "') == ("RUN",)

    def test_scene_from_prompt(self):
        assert scene_from_prompt('"HI"', size=128) == Scene('"HI"', ("HI",), size=128)

    @pytest.mark.parametrize("prompt", ["", "a red sign", 'an "open quote', '""', '" "'])
    def test_no_quoted_words(self, prompt):
        with pytest.raises(ValueError, match="double quotes"):
            scene_from_prompt(prompt)

    def test_too_long(self):
        with pytest.raises(ValueError, match=f"has {MAX_PROMPT_BYTES + 1} bytes, at most {MAX_PROMPT_BYTES}"):
            encode_prompt("é" * (MAX_PROMPT_BYTES // 2) + "!")

    def test_bytes_are_padded_with_zeros(self):
        data = encode_prompt('"HÉ"')
        assert data.dtype == np.uint8 and data.shape == (MAX_PROMPT_BYTES,)
        assert data.tobytes().rstrip(b"\0").decode() == '"HÉ"'


class Shout(World):
    """A world with a sample and an option of its own."""

    def __init__(self, mark, **options):
        super().__init__(**options)
        self.mark = mark

    def sample(self, rng):
        return replace(super().sample(rng), prompt=f'{self.split} {self.mark} "RUN"')


class NoSplit(World):
    def __init__(self, mark):
        super().__init__(placement="even")
        self.mark = mark

    def sample(self, rng):
        return replace(super().sample(rng), prompt=f'{self.split} {self.mark} "RUN"')


class TestHeldOut:
    @pytest.mark.parametrize("world", [Shout("!", placement="even", size=128), Shout(mark="!"), NoSplit("!")])
    def test_comes_from_the_world_that_was_given(self, world):
        for twin in (world, pickle.loads(pickle.dumps(world)), copy.deepcopy(world)):
            other = twin.of_split("test")
            assert (type(other), other.mark, other.placement, other.size) == (
                type(world),
                "!",
                world.placement,
                world.size,
            )
            scenes = twin.held_out(3, seed=1)
            assert scenes == twin.held_out(5, seed=1)[:3]
            assert {scene.prompt for scene in scenes} == {'test ! "RUN"'}
            assert all(split_of(word) == "test" for scene in scenes for word in scene.words)

    def test_placement_is_kept(self):
        lone = [scene.boxes[0][1] for scene in World(placement="even").held_out(20) if len(scene.boxes) == 1]
        assert set(lone) == {16}  # in the middle

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="unknown split 'exam'"):
            World().held_out(1, split="exam")
