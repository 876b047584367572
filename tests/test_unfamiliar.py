"""Prompts that ask for what the rendered world never draws."""

import warnings

import numpy as np
import pytest
from tiny import tiny_agent

from var_env import VARTextEnv, VARTextVectorEnv, World
from var_env.unfamiliar import PromptWarning, _warn, unfamiliar


@pytest.fixture(autouse=True)
def unseen():
    _warn.cache_clear()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('a "HELLO"', '"HELLO" has 5 letters, and at most 4 fit in 64 px'),
        ('a "Run"', "other characters than the capitals A to Z: write RUN"),
        ('a "R2D"', "other characters than the capitals A to Z"),
        ('a "GO"', "2 letters, and the world's words have at least 3"),
        ('a "ONE TWO RUN"', "3 words, and the world's images at most 2"),
        ("a “RUN”", "do not stand between straight double quotes"),
    ],
)
def test_warned_of_once(parts, prompt, message):
    singles = VARTextEnv(**parts), {"prompt": prompt}
    for env, options in (singles, (VARTextVectorEnv(2, **parts), {"prompts": [prompt] * 2})):
        _warn.cache_clear()
        with pytest.warns(PromptWarning, match=message) as caught:
            env.reset(options=options)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            env.reset(options=options)


def test_the_worlds_own_are_familiar():
    for size in (64, 128):
        world, rng = World(size), np.random.default_rng(0)
        for _ in range(50):
            assert not unfamiliar(world.sample(rng).prompt, size, world.max_letters, max(world.regions))


def test_predict(parts):
    agent = tiny_agent(parts)
    env = VARTextEnv(world=OneWord(), **parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observation, _ = env.reset(seed=0)  # a world of one's own, of which nothing is known
        with pytest.raises(PromptWarning, match="HELLO"):
            agent.predict(observation)
        observation, *_ = env.step(np.zeros((4, 4), int))
        agent.predict(observation)


class OneWord(World):
    def sample(self, rng):
        from var_env.scenes import scene_from_prompt

        return scene_from_prompt('a "HELLO"', self.size)
