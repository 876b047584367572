"""The room: a larger world of several words, with its faults, its attributes and its pretraining."""

import json
import warnings
from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from tiny import tiny_policy
from toy_reward import Toy

from agents import policies
from agents.beside import applicable_shares, faults_of, measure_beside
from agents.experiments import loading, pretrain, pretraining
from agents.experiments import train as train_script
from rewards.base import Reward, RewardOutput
from var_env import Tokenizer, VARTextEnv, VARTextVectorEnv, World
from var_env.attributes import chances
from var_env.faults import DEFAULT_FAULTS, Faults
from var_env.prompts import PromptWorld
from var_env.quotes import quoted_words
from var_env.room import NAMED, PATTERNS, ROOM_FAULTS, ROOM_SCHEDULE, Room, RoomFaults, RoomScene, pattern_asked
from var_env.scenes import SPLITS, TARGET_REGIONS, render, scene_from_prompt, split_of
from var_env.unfamiliar import PromptWarning
from var_env.worlds import WORLDS, make_world, shipped_tokenizer

WHITE, BLACK, NAVY, MAROON = (244, 244, 240), (20, 20, 24), (16, 32, 96), (104, 16, 32)
SCENE = RoomScene(
    'A navy sign with a black disc that says "BAA" and "CAT" in white letters',
    ("BAA", "CAT"),
    ((0, 0, 24, 16), (32, 48, 56, 64)),
    96,
    WHITE,
    NAVY,
    "disc",
    BLACK,
)


class Nothing(Reward):
    """Reads nothing, at once."""

    name, score_range = "nothing", (0.0, 0.0)

    def score(self, images, scenes):
        return RewardOutput(np.zeros(len(images), np.float32))


def drawn(count, seed=0, **options):
    world, rng = Room(**options), np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def room_tokenizer():
    """Random weights."""
    torch.manual_seed(0)
    return Tokenizer(ROOM_SCHEDULE, vocab_size=8, channels=4, width=8, blocks=0, world="room").eval()


@pytest.fixture
def tokenizer_file(room_tokenizer, tmp_path):
    room_tokenizer.save(tmp_path / "tokenizer.safetensors")
    return tmp_path / "tokenizer.safetensors"


class TestWorld:
    def test_same_seed_same_scenes(self):
        assert drawn(20) == drawn(20) != drawn(20, seed=1)
        np.testing.assert_array_equal(render(drawn(1)[0]), render(drawn(1)[0]))

    def test_words_lie_in_the_image_and_apart(self):
        for scene in drawn(300):
            taken = np.zeros((96, 96), int)
            for word, (x0, y0, x1, y1) in zip(scene.words, scene.boxes, strict=True):
                assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
                assert (x1 - x0, y1 - y0) == (8 * len(word), 16) and x0 % 8 == y0 % 16 == 0
                taken[y0:y1, x0 : x1 + 8] += 1  # and the width of a cell to the next word of the row
            assert taken.max() == 1
            order = [(y0, x0) for x0, y0, _, _ in scene.boxes]
            assert order == sorted(order)  # as it is read

    def test_anywhere_in_both_directions(self):
        boxes = np.array([box for scene in drawn(300) for box in scene.boxes])
        assert set(boxes[:, 1]) == {*range(0, 96, 16)} and {*range(0, 73, 8)} <= set(boxes[:, 0])
        beside = [scene for scene in drawn(300) if len({box[1] for box in scene.boxes}) < len(scene.boxes)]
        assert beside  # two words in a row
        share = np.mean([sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in s.boxes) / 96**2 for s in drawn(300)])
        assert 0.25 < share < 0.32

    def test_profile(self):
        counts = Counter(len(scene.words) for scene in drawn(1000))
        for count, share in TARGET_REGIONS.items():
            assert counts[count] / 1000 == pytest.approx(share, abs=5 * (0.25 / 1000) ** 0.5)
        assert {len(scene.words) for scene in drawn(50, regions={"1": 0.5, "6": 0.5})} == {1, 6}

    def test_the_prompt_tells_all_but_the_places(self):
        found = set()
        for scene in drawn(300):
            assert quoted_words(scene.prompt) == scene.words and len(set(scene.words)) == len(scene.words)
            assert len(scene.prompt.encode()) <= Room.max_prompt_bytes
            plain = scene_from_prompt(scene.prompt, 96)
            assert pattern_asked(plain) == pattern_asked(scene)
            found.add(scene.pattern)
        assert found == set(NAMED)
        assert pattern_asked(World().sample(np.random.default_rng(0))) is None

    def test_splits_share_no_word(self):
        for split in SPLITS:
            assert {split_of(word) for scene in drawn(60, split=split) for word in scene.words} == {split}
        assert Room().held_out(3, split="val") == Room(split="val").held_out(3, split="val")

    def test_patterns_are_not_alike_and_the_ink_stands_out(self):
        blank = replace(SCENE, words=(), boxes=())
        images = {name: render(replace(blank, pattern=name)) for name in NAMED}
        assert len({image.tobytes() for image in images.values()}) == len(NAMED)
        for image in images.values():
            both = {(*pixel,) for pixel in image.reshape(-1, 3)[::7]}
            assert len(both) >= 2
        assert (render(SCENE) != render(blank)).any(-1)[0:16, 0:24].any()
        assert (render(SCENE) == render(blank)).all(-1)[64:].all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 100}, "size must be a multiple of 16 px and at least 64, got 100"),
            ({"size": 48}, "at least 64, got 48"),
            ({"split": "dev"}, "unknown split 'dev'"),
            ({"regions": {7: 1.0}}, r"regions must lie in 1\.\.6 at 96 px, got the counts \[7\]"),
            ({"regions": {2: 0.5}}, "sum to 1"),
            ({"regions": "paper"}, "unknown region profile 'paper'"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            Room(**options)
        with pytest.raises(ValueError, match=message):  # and through the environment, before anything is drawn
            VARTextEnv(world="room", reward=Nothing(), **options)


class TestFaults:
    def test_rates_are_those_of_the_table(self):
        asked, rng, seen = drawn(1500), np.random.default_rng(1), {}
        for scene in asked:
            shown = ROOM_FAULTS.shown(scene, Room(), rng)
            assert replace(shown, words=(), boxes=(), pattern="") == replace(scene, words=(), boxes=(), pattern="")
            assert len(shown.words) == len(shown.boxes) and set(shown.boxes) <= set(scene.boxes)
            dark = scene.ground in (BLACK, NAVY, MAROON, (8, 72, 40))
            seen.setdefault("dark" if dark else "light", Counter())[len(scene.words) - len(shown.words)] += 1
            seen.setdefault(scene.pattern, Counter())[shown.pattern] += 1
            for word, box in zip(shown.words, shown.boxes, strict=True):
                for letter, mark in zip(scene.words[scene.boxes.index(box)], word, strict=True):
                    seen.setdefault(letter, Counter())[mark] += 1
        pairs = dict(ROOM_FAULTS.letters) | dict(ROOM_FAULTS.patterns)
        rates = {first: {second: rate, first: 1 - rate} for first, (second, rate) in pairs.items()}
        rates |= {kind: {1: rate, 0: 1 - rate} for kind, rate in ROOM_FAULTS.missing.items()}
        for name, found in seen.items():
            expected = rates.get(name, {name: 1.0})
            assert found.keys() == expected.keys()
            for mark, rate in expected.items():  # within five standard errors
                assert abs(found[mark] / found.total() - rate) <= 5 * np.sqrt(0.25 / found.total())

    def test_any_of_the_words_is_left_out(self):
        always, rng = RoomFaults(missing={"dark": 1.0, "light": 1.0}), np.random.default_rng(0)
        scene = next(scene for scene in drawn(50) if len(scene.words) == 5)
        left = [set(scene.words) - set(always.shown(scene, Room(), rng).words) for _ in range(60)]
        assert all(len(words) == 1 for words in left) and set().union(*left) == set(scene.words)
        alone = drawn(1, regions={1: 1.0})[0]
        assert always.shown(alone, Room(), rng) == alone

    def test_rates_lie_about_one_half_and_partners_are_of_a_kind(self):
        for family in (ROOM_FAULTS.patterns, ROOM_FAULTS.letters):
            assert sorted({rate for _, rate in family.values()})[:: 1 if len(family) < 5 else 2] == [0.4, 0.6]
            assert np.mean([rate for _, rate in family.values()]) == pytest.approx(0.5)
        assert ROOM_FAULTS.letters == DEFAULT_FAULTS.letters
        for first, (second, _) in ROOM_FAULTS.patterns.items():
            assert any({first, second} <= kind.keys() for kind in PATTERNS.values())

    def test_files(self, tmp_path):
        path = tmp_path / "faults.json"
        path.write_text(json.dumps(ROOM_FAULTS.to_dict()))
        assert RoomFaults.load(path) == ROOM_FAULTS == RoomFaults.load("default")
        with pytest.raises(ValueError, match="expected an object with letters, missing, colours, got"):
            Faults.load(path)  # which knows no patterns

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"patterns": {"disc": ["bands", 0.4]}}, "'disc' and 'bands' are of two kinds"),
            ({"patterns": {"disc": ["star", 0.4]}}, "unknown 'star'"),
            ({"patterns": {"disc": ["square", 0.4], "square": ["ring", 0.4]}}, "'square', which is itself affected"),
            ({"patterns": {"disc": ["square", 2]}}, "patterns: disc: a rate lies between 0 and 1, got 2"),
            ({"grounds": {}}, "expected an object with letters, missing, colours, patterns"),
        ],
    )
    def test_bad_tables(self, tmp_path, table, message):
        path = tmp_path / "faults.json"
        path.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=message):
            RoomFaults.load(path)

    def test_of_another_world(self):
        ROOM_FAULTS.check_world(Room())
        with pytest.raises(ValueError, match="of the room, and not of a World"):
            ROOM_FAULTS.check_world(World())
        with pytest.raises(ValueError, match="missing leaves out one of several words"):
            ROOM_FAULTS.check_world(Room(regions={1: 1.0}))


class TestAttributes:
    def measured(self, shown, asked):
        images = np.stack([render(scene) for scene in shown])
        return measure_beside(images, asked, [list(scene.words) for scene in shown])

    @pytest.mark.parametrize("from_prompts", [False, True])
    def test_rendered_scenes_are_right(self, from_prompts):
        scenes = drawn(60)
        asked = [scene_from_prompt(scene.prompt, 96) for scene in scenes] if from_prompts else scenes
        assert faults_of(asked) is ROOM_FAULTS
        record = self.measured(scenes, asked)
        for name in ("ink_right", "ground_right", "second_right", "pattern_right", "pairs_affected"):
            assert (record[name] == 1).all(), name
        for name in ("affected_confused", "affected_other", "plain_other", "words_missing", "pattern_confused"):
            assert not record[name].any(), name
        rows = [len({box[1] for box in scene.boxes}) for scene in scenes]
        np.testing.assert_array_equal(record["lines_shown"], rows)
        assert all(values.shape == (60,) and values.dtype == np.float32 for values in record.values())
        assert {family: found[0].sum() > 0 for family, found in chances(record).items()} == dict.fromkeys(
            ("letter", "missing", "ground"), True
        )
        assert all((right == odds).all() for odds, right in chances(record).values())

    def test_exactly_the_planted_faults_are_counted(self):
        asked, rng = drawn(80), np.random.default_rng(2)
        shown = [ROOM_FAULTS.shown(scene, Room(), rng) for scene in asked]
        record = self.measured(shown, asked)
        other = np.array([a.pattern != s.pattern for a, s in zip(asked, shown, strict=True)])
        np.testing.assert_array_equal(record["pattern_confused"], other)
        np.testing.assert_array_equal(record["pattern_right"], ~other)
        missing = [len(a.words) - len(s.words) for a, s in zip(asked, shown, strict=True)]
        np.testing.assert_array_equal(record["words_missing"], missing)
        assert (record["ground_right"] == 1).all() and (record["ink_right"] == 1).all()
        found = applicable_shares(record)
        for family in ("letter_right", "missing_right", "ground_right", "pattern_right"):
            assert family in found and "colour_right" not in found

    def test_each_family_alone(self):
        def families(shown):
            odds = chances(self.measured([shown], [SCENE]))
            return {family for family, (n, right) in odds.items() if (right < n).any()}

        assert families(SCENE) == set()
        assert families(replace(SCENE, pattern="square")) == {"ground"}
        assert families(replace(SCENE, words=("BHA", "CAT"))) == {"letter"}
        assert families(replace(SCENE, words=SCENE.words[1:], boxes=SCENE.boxes[1:])) == {"missing"}

    def test_colours_that_are_wrong(self):
        def record(**changes):
            found = self.measured([replace(SCENE, **changes)], [SCENE])
            return [found[name].item() for name in ("ink_right", "ground_right", "second_right", "pattern_right")]

        assert record() == [1, 1, 1, 1]
        assert record(ink=(248, 216, 64)) == [0, 1, 1, 1]
        assert record(ground=MAROON) == [1, 0, 1, 1]
        assert record(second=MAROON) == [1, 1, 0, 1]

    def test_a_blank_image_and_a_reward_that_does_not_read(self):
        record = measure_beside(render(replace(SCENE, words=(), boxes=()))[None], [SCENE], None)
        assert record["lines_shown"] == 0 and record["ink_right"] == 0 and np.isnan(record["words_missing"])


class TestEnvironment:
    def test_check_env_and_the_spec_survives_json(self, tokenizer_file):
        env = gym.make("VARText-v0", world="room", tokenizer=str(tokenizer_file), reward="ocr", split="val")
        spec = EnvSpec.from_json(env.spec.to_json())
        assert spec == env.spec and spec.kwargs["world"] == "room"
        again = gym.make(spec)
        assert again.reset(seed=3)[1] == env.reset(seed=3)[1]
        assert isinstance(again.unwrapped.world, Room) and again.unwrapped.world.split == "val"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gym.make(spec, reward=Nothing()).unwrapped)

    def test_rows_of_the_vector_environment(self, room_tokenizer):
        parts = {"world": "room", "tokenizer": room_tokenizer, "reward": Toy()}
        env, envs = VARTextEnv(**parts), VARTextVectorEnv(2, **parts)
        _, infos = envs.reset(seed=5)
        assert [env.reset(seed=5 + row)[1]["prompt"] for row in range(2)] == list(infos["prompt"])
        with pytest.warns(PromptWarning, match="7 words, and the world's images at most 5"):
            env.reset(options={"prompt": " ".join(f'"ABC{letter}"' for letter in "DEFGHIJ")})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"world": "hall"}, "unknown world 'hall': choose one of small, room"),
            ({"world": "room", "size": 64}, r"regions must lie in 1\.\.4 at 64 px"),
            ({"world": "room", "size": 128}, "tokenizer draws images of 96 px and the world has 128 px"),
            ({"world": "room", "prompts": "x.txt"}, "give world or prompts, not both"),
        ],
    )
    def test_bad_input(self, room_tokenizer, options, message):
        with pytest.raises(ValueError, match=message):
            VARTextEnv(tokenizer=room_tokenizer, reward=Nothing(), **options)

    def test_without_a_shipped_tokenizer(self, monkeypatch):
        monkeypatch.setitem(WORLDS, "room", replace(WORLDS["room"], tokenizer="none.safetensors"))
        with pytest.raises(ValueError, match=r"no tokenizer is shipped for the world 'room'.*--world room tokenizer"):
            gym.make("VARText-v0", world="room")
        assert shipped_tokenizer("small").is_file()


class TestPolicy:
    def test_knows_its_world(self, room_tokenizer, tmp_path):
        policy = tiny_policy(room_tokenizer)
        assert isinstance(policy.trained_on(), Room)
        policy.save(tmp_path / "policy.safetensors")
        again = policies.load_policy(tmp_path / "policy.safetensors", room_tokenizer)
        assert isinstance(loading.make_env(again, reward=Nothing()).world, Room)
        wide = loading.make_env(again, regions={5: 1.0}, reward=Nothing())
        assert wide.world.regions == {5: 1.0}
        small = tiny_policy(Tokenizer(vocab_size=8, channels=4, width=8, blocks=0))
        assert type(small.trained_on()) is World and type(loading.make_env(small, reward=Nothing()).world) is World

    def test_prompt_files_as_everywhere(self, room_tokenizer, tmp_path):
        (tmp_path / "train.txt").write_text('A sign that says "RUN"\n')
        env = loading.make_env(tiny_policy(room_tokenizer), prompts=str(tmp_path / "train.txt"), reward=Nothing())
        assert isinstance(env.world, PromptWorld) and env.world.size == 96

    def test_the_option(self, room_tokenizer, tokenizer_file, tmp_path, monkeypatch):
        file = tmp_path / "policy.safetensors"
        tiny_policy(room_tokenizer).save(file)

        def load(*options):
            return loading.load_policy(train_script.parse([*options, "--out", str(tmp_path / "run")]))

        given = ["--policy", str(file), "--tokenizer", str(tokenizer_file)]
        assert isinstance(load(*given, "--world", "room").trained_on(), Room)
        with pytest.raises(ValueError, match=r"--world small: the policy .* is of the world 'room': leave out --world"):
            load(*given, "--world", "small")
        with pytest.raises(ValueError, match="unknown world 'hall'"):
            load("--world", "hall")
        monkeypatch.delitem(policies.SHIPPED, "room", raising=False)
        with pytest.raises(ValueError, match="no policy is shipped for the world 'room': give one with --policy FILE"):
            load("--world", "room")


class TestPretraining:
    SMALL = ("--batch", "2", "--log-every", "2", "--save-every", "2", "--device", "cpu", "--vocab-size", "16")
    SIZES = ("--tokenizer-steps", "6", "--policy-steps", "2", "--width", "32", "--layers", "1", "--heads", "2")

    def run(self, stage, out, *options):
        return pretrain.main([stage, "--out", str(out), *self.SMALL, *self.SIZES, *options])

    def test_both_stages(self, tmp_path, capsys):
        self.run("tokenizer", tmp_path, "--world", "room")
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.safetensors")
        assert tokenizer.schedule == ROOM_SCHEDULE and tokenizer.world == "room"
        self.run("policy", tmp_path, "--world", "room", "--faults")
        policy = policies.load_policy(tmp_path / "policy.safetensors", tokenizer)
        assert isinstance(policy.trained_on(), Room)
        capsys.readouterr()
        self.run("policy", tmp_path, "--world", "room", "--faults", "--policy-steps", "3")
        assert "going on from step 2" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"--world small: the tokenizer in .* is of the world 'room'"):
            self.run("policy", tmp_path)
        with pytest.raises(SystemExit, match="--world small, was room"):
            self.run("tokenizer", tmp_path)
        with pytest.raises(SystemExit, match="its width is 192, and that of the new policy 32"):
            self.run("policy", tmp_path, "--world", "room", "--blocks-of", "plain")

    def test_faults_are_those_of_the_world(self):
        args = pretrain.parse(["policy", "--world", "room", "--faults"])
        assert args.faults == ROOM_FAULTS
        assert pretrain.parse(["policy", "--faults"]).faults == DEFAULT_FAULTS
        stream = pretraining.SceneStream(2, 0, 0, ROOM_FAULTS, make_world("room"))
        scenes, images = next(iter(stream))
        assert images.shape == (2, 96, 96, 3) and all(isinstance(scene, RoomScene) for scene in scenes)
        image = torch.from_numpy(render(SCENE))[None]
        cells = pretraining.text_weight(image, [SCENE], 5.0, cells=True)[0, 0] == 5
        assert cells[0:16, 0:24].all() and cells[48:64, 32:56].all() and cells.sum() == 2 * 16 * 24
        flat = replace(SCENE, second=SCENE.ground)
        ink = pretraining.text_weight(torch.from_numpy(render(flat))[None], [flat], 5.0, cells=False)[0, 0] == 5
        assert ink.any() and not (ink & ~cells).any() and ink.sum() < cells.sum() / 2

    def test_blocks_of_another_policy(self, room_tokenizer, tmp_path):
        other = tiny_policy(Tokenizer(vocab_size=4, channels=2, width=8, blocks=0), seed=1)
        other.save(tmp_path / "other.safetensors")
        policy = tiny_policy(room_tokenizer)
        before = {name: weight.clone() for name, weight in policy.state_dict().items()}
        pretraining.take_blocks(policy, str(tmp_path / "other.safetensors"))
        after, theirs = policy.state_dict(), other.state_dict()
        for name in ("blocks.0.qkv.weight", "text.byte.weight", "norm.weight"):
            torch.testing.assert_close(after[name], theirs[name])
        for name in ("head.weight", "position", "embed_features.weight"):
            torch.testing.assert_close(after[name], before[name])
        with pytest.raises(ValueError, match="its width is 192, and that of the new policy 32"):
            pretraining.take_blocks(policy, "plain")

    def test_bad_input(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            pretrain.parse(["tokenizer", "--world", "hall"])
        assert "unknown world 'hall': choose one of small, room" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            pretrain.parse(["policy", "--blocks-of", "plain", "--start", "x"])
        assert "leave out --start" in capsys.readouterr().err
