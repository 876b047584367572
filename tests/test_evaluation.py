from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_envs, tiny_policy

from agents import GRPO, HeldOutEval, evaluation
from agents.common.pictures import caption, sample_sheet
from agents.evaluation import bootstrap_interval, evaluate, held_out_scenes
from agents.policies.var_text import VARTextPolicy
from agents.rollout import collect
from agents.sampling import Decoding
from rewards.base import Reward, RewardOutput
from rewards.combine import Combined
from rewards.pool import RewardPool
from rewards.text_metrics import normalized_edit_distance
from var_env import VARTextVectorEnv, World
from var_env.scenes import scene_from_prompt, split_of


@pytest.fixture
def policy(tokenizer):
    return tiny_policy(tokenizer)


class Shades(Reward):
    """Scores the mean brightness, or one of ``levels`` of it, and reads it as a word; notes how many it was given."""

    name = "shades"

    def __init__(self, levels=10**6):
        self.batches, self.levels = [], levels

    def score(self, images, scenes):
        self.batches.append(len(images))
        mean = np.floor(images.mean((1, 2, 3)) / 256 * self.levels) / self.levels
        return RewardOutput(mean, {"mean": mean}, [[f"{value:.6f}"] for value in mean])


class TestEvaluate:
    def test_arrays_follow_the_prompts(self, policy, parts):
        scenes = [scene_from_prompt(f'a sign that says "{word}"') for word in ("SEEN", "SEND", "OTHER")]
        result = evaluate(policy, tiny_envs(parts), scenes, batch_size=2)
        assert result.scenes == scenes and result.images.shape == (3, 64, 64, 3)
        assert result.word_accuracy.tolist() == [1, 0, 0]  # the toy reward always reads SEEN
        np.testing.assert_allclose(result.ned[:2], [1, 0.5], atol=1e-6)
        np.testing.assert_allclose(result.scores, result.images.mean((1, 2, 3)) / 255, atol=1e-6)
        assert result.nothing_read.tolist() == [0, 0, 0] and result.words_read == [["SEEN"]] * 3
        assert result.parts["mean"].shape == (3,)
        assert result.means()["word_accuracy"] == pytest.approx(1 / 3)

    def test_the_kl_to_a_reference(self, tokenizer, policy, parts):
        other = tiny_policy(tokenizer)
        other.load_state_dict({name: value + 0.05 for name, value in policy.state_dict().items()})
        result = evaluate(policy, tiny_envs(parts), 5, batch_size=2, keep_grids=5, reference=other)
        cond, steps = policy.encode_prompts([scene.prompt for scene in result.scenes]), range(len(policy.schedule))
        with torch.no_grad():
            first, second = (p(cond, result.grids, steps).log_softmax(-1) for p in (policy, other))  # (B, L, D, V)
        chosen = torch.cat(result.grids, 1)[..., None]  # (B, L, D, 1)
        naive = (first.gather(-1, chosen) - second.gather(-1, chosen)).flatten(1).sum(1)
        np.testing.assert_allclose(result.kl, naive, rtol=1e-3, atol=1e-3)
        assert abs(result.kl).min() > 0
        assert not evaluate(policy, tiny_envs(parts), 3, reference=policy).kl.any()
        assert evaluate(policy, tiny_envs(parts), 3).kl is None

    def test_deterministic_and_without_side_effects(self, policy, parts):
        envs = tiny_envs(parts)
        envs.reset(seed=0)
        policy.train()
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = evaluate(policy, envs, 5, Decoding(top_k=5), seed=3, batch_size=4)
        again = evaluate(policy, parts, 5, Decoding(top_k=5), seed=3, batch_size=4)
        other = evaluate(policy, envs, 5, Decoding(top_k=5), seed=4, batch_size=4)
        assert first.scenes == again.scenes and np.array_equal(first.images, again.images)
        assert not np.array_equal(first.images, other.images)
        assert policy.training and torch.equal(torch.get_rng_state(), state)
        assert envs.t == 0  # the caller's episode goes on

    def test_held_out_scenes(self):
        world = World(regions={2: 1.0})
        scenes = held_out_scenes(world, 6, seed=1)
        assert scenes[:3] == held_out_scenes(world, 3, seed=1) != held_out_scenes(world, 3, seed=2)
        assert all(split_of(word) == "test" for scene in scenes for word in scene.words)
        assert all(len(scene.words) == 2 for scene in scenes)

    def test_best_of_keeps_the_image_with_the_highest_reward(self, policy, parts):
        scenes = held_out_scenes(World(), 3)
        reward = Shades()
        result = evaluate(policy, parts | {"reward": reward}, scenes, seed=2, batch_size=7, best_of=3)
        assert reward.batches == [6, 3]  # two prompts at a time, so that no more than 7 images are drawn at once
        generator = torch.Generator().manual_seed(2)
        for start in (0, 2):
            envs = tiny_envs(parts | {"reward": reward}, len(scenes[start : start + 2]))
            drawn = collect(policy, envs, 3, Decoding(), generator, scenes=scenes[start : start + 2])
            for p, group in enumerate(drawn.scores.tolist()):
                best = 3 * p + max(range(3), key=group.__getitem__)
                assert result.scores[start + p] == np.float32(max(group)) > min(group)
                assert np.array_equal(result.images[start + p], drawn.images[best])
                assert result.words_read[start + p] == drawn.words_read[best]
                assert result.parts["mean"][start + p] == drawn.parts["mean"][best]
        read = zip(scenes, result.words_read, strict=True)
        assert result.ned.tolist() == [normalized_edit_distance(scene.words, words) for scene, words in read]
        assert result.scenes == scenes

    def test_best_of_one_draws_as_without_and_of_equals_the_first_is_kept(self, policy, parts):
        one, plain = (evaluate(policy, parts, 5, seed=2, batch_size=2, **more) for more in ({"best_of": 1}, {}))
        assert np.array_equal(one.images, plain.images) and np.array_equal(one.scores, plain.scores)
        generator, envs, scenes = torch.Generator().manual_seed(2), tiny_envs(parts), plain.scenes[:2]
        assert np.array_equal(collect(policy, envs, 1, Decoding(), generator, scenes=scenes).images, plain.images[:2])
        equal = evaluate(policy, parts | {"reward": Shades(levels=1)}, scenes, seed=2, best_of=4)
        drawn = collect(policy, envs, 4, Decoding(), torch.Generator().manual_seed(2), scenes=scenes)
        assert np.array_equal(equal.images, drawn.images[::4])

    @pytest.mark.parametrize("option", [{"best_of": 0}, {"batch_size": 0}])
    def test_bad_counts(self, policy, parts, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be a whole number of at least 1, got 0"):
            evaluate(policy, parts, 2, **option)

    def test_no_prompts(self, policy, parts):
        with pytest.raises(ValueError, match="at least one prompt"):
            evaluate(policy, parts, [])


class TestBootstrap:
    def test_matches_the_normal_interval(self):
        values = np.random.default_rng(0).normal(1.0, 2.0, 400)
        mean, low, high = bootstrap_interval(values)
        half = 1.96 * values.std() / 20
        assert mean == pytest.approx(values.mean())
        assert low == pytest.approx(mean - half, abs=0.03) and high == pytest.approx(mean + half, abs=0.03)

    def test_level_seed_and_constants(self):
        values = np.arange(30.0)
        assert bootstrap_interval(values) == bootstrap_interval(values)
        _, low, high = bootstrap_interval(values, level=0.5)
        assert bootstrap_interval(values)[1] < low < high < bootstrap_interval(values)[2]
        assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)

    @pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
    def test_bad_values(self, values):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_interval(values)

    def test_bad_level(self):
        with pytest.raises(ValueError, match="level"):
            bootstrap_interval([1.0], level=95)


class TestImages:
    def test_sheet_shows_every_image_and_its_caption(self):
        images = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (0, 90, 180)])
        sheet = sample_sheet(images, [caption(["RUN"], ["RUM"], 0.5), "", "a caption that is too long" * 9], columns=2)
        assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
        tile, height = 192, 192 + 2 * 15 + 4
        assert sheet.shape[:2] == (2 * height, 2 * (tile + 4))
        assert (sheet[:tile, :tile] == 0).all() and (sheet[:tile, tile + 4 : -4] == 90).all()
        assert (sheet[height : height + tile, :tile] == 180).all()
        strip = sheet[tile:height, : tile + 4]
        assert strip.min() < 100 and (sheet[tile:height, tile + 4 :] == 255).all()  # writing, and none
        assert (sheet[height:, tile + 4 :] == 255).all()  # long captions are cut at the tile

    def test_caption(self):
        assert caption(["KITE", "RUN"], ["K1TE"], 0.83) == "KITE RUN\n-> K1TE  +0.83"
        assert caption(["KITE"], [], -0.6) == "KITE\n-> (nothing)  -0.60"

    def test_captions_must_match(self):
        with pytest.raises(ValueError, match="one caption an image"):
            sample_sheet(np.zeros((2, 8, 8, 3), np.uint8), ["a"])


def test_who_reads_and_finds_nothing_is_not_asked_again(policy, parts, monkeypatch):
    """Neither by PP-OCR nor through a pool; a reward of regions alone does not read words."""

    class Blind(Reward):
        name = "blind"

        def score(self, images, scenes):
            return RewardOutput(images.mean((1, 2, 3)) / 255, words=[[] for _ in images])

    class Finds(Blind):
        def score(self, images, scenes):
            return RewardOutput(images.mean((1, 2, 3)) / 255, regions=[np.zeros((1, 4), np.float32)] * len(images))

    asked = []
    monkeypatch.setattr(evaluation, "OCRReward", lambda: lambda *given: asked.append(len(given[0])) or Blind()(*given))
    both = Combined({"finds": Finds(), "blind": Blind()}, {"finds": 1.0, "blind": 1.0})
    for reward in (Blind(), RewardPool(Blind(), mode="thread"), both):
        result = evaluate(policy, parts | {"reward": reward}, 3)
        assert result.words_read == [[], [], []] and result.nothing_read.tolist() == [1, 1, 1] and not asked
    evaluate(policy, parts | {"reward": RewardPool(Finds(), mode="thread")}, 3)
    assert asked == [3]


def test_a_reward_that_does_not_read_is_read_beside():
    class Mute(Reward):
        name = "mute"

        def score(self, images, scenes):
            return RewardOutput(images.mean((1, 2, 3)) / 255)

    policy = VARTextPolicy.load()
    parts = {"tokenizer": policy.tokenizer, "world": World(64)}
    mute, reading = (evaluate(policy, {**parts, "reward": reward}, 4) for reward in (Mute(), "ocr"))
    assert (mute.images == reading.images).all() and mute.words_read == reading.words_read
    assert mute.word_accuracy.tolist() == reading.word_accuracy.tolist() and mute.word_accuracy.any()
    assert mute.scores.tolist() != reading.scores.tolist()


class PlainWorld:
    """What docs/your-model.md asks for, and nothing else."""

    size, max_prompt_bytes = 64, 40

    def sample(self, rng):
        return scene_from_prompt(f'a sign that says "{"ABCDEF"[rng.integers(6)]}"', self.size)


def test_a_plain_object_is_a_world(parts):
    envs = VARTextVectorEnv(2, world=PlainWorld(), **parts)
    assert held_out_scenes(envs.world, 2, seed=3) == held_out_scenes(envs.world, 5, seed=3)[:2]
    policy = tiny_policy(parts["tokenizer"])
    agent = GRPO(policy, envs, group_size=2, prompts_per_update=2, seed=0, device="cpu")
    evaluation = HeldOutEval(every=1, prompts=2, reference=policy)
    agent.learn(12, evaluation)
    assert len(evaluation.history) == 2 and not evaluation.history[0][1].kl.any()
    assert evaluate(policy, envs, 2).scores.shape == (2,)


@pytest.mark.parametrize("world", [PlainWorld, object(), SimpleNamespace(size=64, max_prompt_bytes="x")])
def test_no_world(parts, world):
    with pytest.raises(ValueError, match=r"a world needs size, max_prompt_bytes, sample; .* has no"):
        VARTextVectorEnv(2, world=world, **parts)


@pytest.mark.parametrize("seed", [2**64, -1, 1.5, "1", True])
def test_seeds_out_of_range(parts, seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to .* got {seed!r}"):
        evaluate(tiny_policy(parts["tokenizer"]), parts, 1, seed=seed)
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to .* got {seed!r}"):
        GRPO(tiny_policy(parts["tokenizer"]), None, seed=seed)
