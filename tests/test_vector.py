import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from var_env import VARTextEnv, VARTextVectorEnv, World

N = 3


@pytest.fixture
def envs(parts):
    return VARTextVectorEnv(N, **parts)


def actions(envs, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(32, size=(envs.num_envs, *grid)) for grid in envs.schedule.grids]


def test_make_vec_gives_the_lockstep_environment(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec("VARText-v0", num_envs=4, split="val", **parts)
    assert type(envs) is VARTextVectorEnv and envs.num_envs == 4 and envs.world.split == "val"
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert envs.single_action_space == VARTextEnv(**parts).action_space
    assert envs.single_observation_space == VARTextEnv(**parts).observation_space
    assert envs.action_space.shape == (4, 4, 4)


def test_every_row_is_the_single_environment_of_its_seed(parts):
    envs = VARTextVectorEnv(N, **parts)
    singles = [VARTextEnv(**parts) for _ in range(N)]
    for episode, seed in enumerate((7, None, None, 8)):  # without a seed, the streams go on
        batch, batch_info = envs.reset(seed=seed)
        for row, env in enumerate(singles):
            observation, info = env.reset(seed=None if seed is None else seed + row)
            assert batch_info["prompt"][row] == info["prompt"] and batch_info["words"][row] == info["words"]
            assert_rows_equal(batch, row, observation)
        for action in actions(envs, episode):
            batch, rewards, terminations, truncations, batch_info = envs.step(action)
            assert rewards.dtype == np.float64 and rewards.shape == (N,)
            for row, env in enumerate(singles):
                observation, reward, terminated, truncated, info = env.step(action[row])
                assert_rows_equal(batch, row, observation)
                assert rewards[row] == pytest.approx(reward, abs=1e-3)
                assert (terminations[row], truncations[row]) == (terminated, truncated)
        assert set(batch_info) == set(info)
        for row, env in enumerate(singles):
            end = env._state.outcome
            assert np.abs(batch_info["image"][row].astype(int) - end["image"][0]).max() <= 1  # rounding
            assert batch_info["words_read"][row] == end["words_read"][0]
            assert np.array_equal(batch_info["boxes"][row], end["boxes"][0])


def assert_rows_equal(batch, row, observation):
    for key, value in observation.items():
        assert np.array_equal(batch[key][row], value) and batch[key].dtype == value.dtype, key


def test_observations_lie_in_the_space_and_are_copies(envs):
    observation, _ = envs.reset(seed=0)
    assert observation in envs.observation_space
    for action in actions(envs):
        observation["tokens"][:] = 7
        observation = envs.step(action)[0]
        assert observation in envs.observation_space
    assert np.array_equal(observation["tokens"][:, 0], actions(envs)[0][:, 0, 0])


def test_one_reward_call_an_episode(envs, reward):
    envs.reset(seed=0)
    for action in actions(envs):
        assert reward.calls == 0
        envs.step(action)
    assert reward.calls == 1


def test_what_agents_read(envs):
    with pytest.raises(ResetNeeded):
        envs.t  # noqa: B018
    envs.reset(seed=0)
    assert envs.t == 0 and envs.grids == [] and len(envs.scenes) == N and not envs.canvas.any()
    first, second, _ = actions(envs)
    envs.step(first)
    envs.step(torch.from_numpy(second).reshape(N, 4, 1))  # as a policy gives it
    assert envs.t == 2 and [tuple(grid.shape) for grid in envs.grids] == [(N, 1, 1), (N, 4, 1)]
    assert torch.equal(envs.grids[1], torch.from_numpy(second).reshape(N, 4, 1))
    assert envs.canvas.shape == (N, 4, 4, 4) and not envs.canvas.requires_grad
    assert [len(part) for part in (envs.np_random, envs.np_random_seed)] == [N, N]
    assert envs.np_random_seed == (0, 1, 2)


def test_reset_options(envs):
    prompts = ['A "ONE"', 'A "TWO" above "SIX"', 'A "TEN"']
    _, info = envs.reset(seed=0, options={"prompts": prompts})
    assert info == {"prompt": prompts, "words": [["ONE"], ["TWO", "SIX"], ["TEN"]]}
    scenes = [World().sample(np.random.default_rng(seed)) for seed in range(N)]
    envs.reset(options={"scenes": scenes, "reset_mask": np.ones(N, bool)})
    assert envs.scenes == scenes
    _, drawn = envs.reset()
    assert drawn["prompt"] == [scene.prompt for scene in scenes]


def test_a_seed_a_row(envs):
    _, info = envs.reset(seed=[5, 5, 6])
    assert info["prompt"][0] == info["prompt"][1] != info["prompt"][2]
    _, again = envs.reset(seed=[5, None, 5])
    assert again["prompt"][0] == again["prompt"][2] == info["prompt"][0]
    assert envs.np_random_seed == (5, 5, 5)


def test_bad_input_leaves_the_state_as_it_was(envs):
    with pytest.raises(ResetNeeded):
        envs.step(np.zeros((N, 1, 1), int))
    with pytest.raises(ResetNeeded):
        envs.fork(2)
    envs.reset(seed=0)
    envs.step(actions(envs)[0])

    def snapshot():
        state = envs._state
        return state.t, state.tokens.tolist(), state.scenes, [rng.bit_generator.state for rng in envs.np_random]

    before = snapshot()
    for action in (np.zeros((N + 1, 2, 2), int), np.zeros((2, 2), int), np.full((N, 4), 32), np.zeros((N, 2, 2))):
        with pytest.raises(ValueError, match="scale 1"):
            envs.step(action)
    for bad in (
        {"options": {"prompts": ['A "B"']}},
        {"options": {"prompt": 'A "B"'}},
        {"options": {"scenes": envs.scenes, "prompts": ['A "B"'] * N}},
        {"options": {"reset_mask": np.array([True, False, True])}},
        {"seed": [1, 2]},
    ):
        with pytest.raises(ValueError):
            envs.reset(**{"seed": 9, **bad})
    assert snapshot() == before


def test_bad_arguments(parts, envs):
    with pytest.raises(TypeError, match="VARTextVectorEnv has no option spilt='val': choose from num_envs, split"):
        gym.make_vec("VARText-v0", num_envs=2, spilt="val", **parts)
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        VARTextVectorEnv(0, **parts)
    envs.reset(seed=0)
    for k in (0, 1.5):
        with pytest.raises(ValueError, match=f"at least 1, got {k}"):
            envs.fork(k)
    with pytest.raises(ValueError, match="6 episodes, the environment has 3"):
        envs.restore_state(envs.fork(2).clone_state())


def test_clone_and_restore(envs):
    envs.reset(seed=0)
    first, *others = actions(envs)
    envs.step(first)
    clone = envs.clone_state()

    def rest():
        ends = [envs.step(action) for action in others]
        return ends[-1][0]["tokens"].tolist(), ends[-1][1].tolist(), envs.reset()[1]

    once = rest()
    envs.restore_state(clone)
    assert rest() == once


def test_render_gives_a_frame_a_row(parts):
    envs = VARTextVectorEnv(N, render_mode="rgb_array", **parts)
    single = VARTextEnv(render_mode="rgb_array", **parts)
    envs.reset(seed=0)
    single.reset(seed=1)
    for action in actions(envs):
        envs.step(action)
        single.step(action[1])
    frames = envs.render()
    assert len(frames) == N and np.abs(frames[1].astype(int) - single.render()).max() <= 1
    assert VARTextVectorEnv(N, **parts).render() is None


def test_gymnasiums_own_vector_environment_agrees(parts):
    ours = gym.make_vec("VARText-v0", num_envs=N, **parts)
    theirs = gym.make_vec("VARText-v0", num_envs=N, vectorization_mode="sync", **parts)
    assert_batches_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for action in actions(ours):
        observation, rewards, terminations, _, info = ours.step(action)
        expected, expected_rewards, expected_terminations, _, expected_info = theirs.step(action)
        assert_batches_equal(observation, expected)
        assert np.allclose(rewards, expected_rewards, atol=1e-3)
        assert np.array_equal(terminations, expected_terminations)
    for row in range(N):  # scenes of one and two words
        assert np.array_equal(info["boxes"][row], np.stack(expected_info["boxes"][row]))


def assert_batches_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for key in ours:
        assert np.array_equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key


def test_gymnasium_wrappers_accept_it(parts):
    envs = gym.wrappers.vector.RecordEpisodeStatistics(VARTextVectorEnv(N, **parts))
    for _ in range(2):
        envs.reset(seed=0, options={"reset_mask": np.ones(N, bool)})
        for action in actions(envs.unwrapped):
            *_, info = envs.step(action)
        assert info["episode"]["l"].tolist() == [3] * N
        assert np.allclose(info["episode"]["r"], info["score"])
