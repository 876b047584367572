"""At which grid faults are decided, on images of which it is known what stands in them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_envs, tiny_policy

from agents import Decoding, held_out_scenes
from agents.experiments import fault_shares as script
from agents.experiments.fault_shares import IMAGES, decided_share, letters_right
from var_env.faults import COLOURS, DEFAULT_FAULTS
from var_env.scenes import render, scene_from_prompt

SCENE = scene_from_prompt('A navy sign that says "CAT" above "SUN" in yellow letters')


class TestLettersRight:
    def test_a_row_for_each_affected_letter(self):
        """A, C and N are affected, T, S and U are not; a letter as its partner and one as any other are not right."""
        read = [["CAT", "SUN"], ["ZAT", "SUN"], ["CHT", "SUW"], ["COT", "SUM"]]
        assert letters_right(SCENE, read, DEFAULT_FAULTS).tolist() == [[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]

    def test_letters_of_a_word_that_one_image_does_not_show_are_left_out(self):
        read = [["CAT", "SUN"], ["CAT"], ["ZAT", "SUN"]]
        assert letters_right(SCENE, read, DEFAULT_FAULTS).tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_nothing_read(self):
        assert letters_right(SCENE, [[], []], DEFAULT_FAULTS).shape == (0, 2)


def by_prefix(*of_prefix):
    return np.repeat(np.array([of_prefix], np.float64), 4, 1)  # (1, 16)


def by_suffix(*of_suffix):
    return np.tile(np.array([of_suffix], np.float64), 4)


class TestDecidedShare:
    def test_prefix_decides_all(self):
        share, error = decided_share([by_prefix(1, 0, 1, 0), by_prefix(1, 1, 0, 0), np.zeros((0, IMAGES))])
        assert share == pytest.approx(1) and error == pytest.approx(0, abs=1e-9)

    def test_prefix_decides_nothing(self):
        share, _ = decided_share([by_suffix(1, 0, 1, 0), by_suffix(1, 1, 1, 0)])
        assert share == pytest.approx(-1 / 3)  # every prefix has the same mean, and within / K is taken off

    def test_nothing_varies(self):
        assert decided_share([np.ones((2, IMAGES))]) is None and decided_share([]) is None

    def test_one_prompt_alone_varies(self):
        share, error = decided_share([by_prefix(1, 0, 1, 0), np.ones((1, IMAGES))])
        assert share == pytest.approx(1) and math.isnan(error)

    def test_known_share_and_the_error_that_trials_show(self):
        """A prefix draws the chance of its suffixes, 0.1 or 0.9: of the variance 0.25 it decides 0.16."""
        found = []
        for trial in range(200):
            rng = np.random.default_rng(trial)
            chance = rng.choice([0.1, 0.9], size=(24, 2, 4, 1))
            chance[:, 1] = chance[:, 0]  # two letters of a prompt go together
            found.append(decided_share(list((rng.random((24, 2, 4, 4)) < chance).reshape(24, 2, 16).astype(float))))
        shares, errors = np.array(found).T
        assert shares.mean() == pytest.approx(0.64, abs=0.02)
        assert errors.mean() == pytest.approx(shares.std(), rel=0.2)


def test_values_of_images_whose_faults_are_known(parts):
    """Two words are asked for in an affected ink, which is right in even images; the first ten show the lower word."""
    world = tiny_envs(parts).world
    scene = next(
        found
        for found in held_out_scenes(world, 200)
        if len(found.words) == 2 and found.ink == COLOURS["yellow"] and "A" in found.words[0]
    )
    images = np.stack([render(replace(scene, ink=COLOURS["pink"]) if i % 2 else scene) for i in range(IMAGES)])
    policy = tiny_policy(parts["tokenizer"])
    rollout = script.collect(policy, tiny_envs(parts, 1), IMAGES, Decoding(), scenes=[scene])
    read = [list(scene.words) if i < 10 else list(scene.words[:1]) for i in range(IMAGES)]
    (found,) = script.values_by_prompt(replace(rollout, images=images, words_read=read), DEFAULT_FAULTS)
    assert found["colour"].tolist() == [[1, 0] * 8]
    assert found["missing"].tolist() == [[1] * 10 + [0] * 6]
    assert len(found["letter"]) >= 1 and found["letter"].all()


def test_every_split_on_all_prompts(parts, monkeypatch):
    envs = tiny_envs(parts)
    scenes, asked = held_out_scenes(envs.world, 6), []
    collect = script.collect

    def spy(policy, envs, group_size, decoding, generator, fork_at, scenes):
        asked.append((fork_at, [scene.prompt for scene in scenes]))
        return collect(policy, envs, group_size, decoding, generator, fork_at=fork_at, scenes=scenes)

    monkeypatch.setattr(script, "collect", spy)
    rows = script.fault_shares(tiny_policy(parts["tokenizer"]), envs, scenes, Decoding())
    assert [(row["m"], row["tokens"]) for row in rows] == [(1, 1), (2, 5)]
    prompts = [scene.prompt for scene in scenes]
    assert asked == [((m, 4), part) for m in (1, 2) for part in (prompts[:4], prompts[4:])]
