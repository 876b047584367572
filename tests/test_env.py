import json
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from rewards.base import Reward, RewardOutput
from var_env import VARTextEnv, World
from var_env.scenes import MAX_PROMPT_BYTES, render

ROOT = Path(__file__).parent.parent


@pytest.fixture
def env(parts):
    return VARTextEnv(**parts)


def play(env, seed=0):
    """Random exact grids to the end: all that the steps returned."""
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(env.tokenizer.vocab_size, size=grid)) for grid in env.schedule.grids]


def snapshot(env):
    """Everything that an error must not change."""
    state = env._state
    return state and (state.t, state.tokens.tolist(), state.scenes), env.np_random.bit_generator.state


# The contract of Gymnasium --------------------------------------------------------------------------------------------


def test_gymnasium_check_env_without_a_warning(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("VARText-v0", **parts).unwrapped)


def test_make_by_name_without_and_with_the_import(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    path = str(tmp_path / "tokenizer.safetensors")
    code = (
        "import gymnasium as gym\n"
        f"print(gym.make('var_env:VARText-v0', tokenizer={path!r}))\n"
        "import var_env\n"
        f"print(gym.make('VARText-v0', tokenizer={path!r}))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.count("<VARTextEnv<VARText-v0>>") == 2, run.stderr


def test_importing_twice_registers_once():
    import importlib

    import var_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(var_env)


def test_the_spec_survives_json(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    tokenizer.save(path)
    options = {"split": "val", "regions": {"1": 0.25, "2": 0.75}, "tokenizer": str(path), "render_mode": "ansi"}
    env = gym.make("VARText-v0", reward_kwargs={"penalty_weight": 0.5}, **options)
    assert env.spec.max_episode_steps is None
    text = env.spec.to_json()
    spec = EnvSpec.from_json(text)
    assert spec == env.spec and json.loads(text)["kwargs"]["regions"] == {"1": 0.25, "2": 0.75}
    again = gym.make(spec)
    assert again.unwrapped.world.regions == {1: 0.25, 2: 0.75} and again.render_mode == "ansi"
    first, _ = env.reset(seed=3)
    second, _ = again.reset(seed=3)
    assert np.array_equal(first["prompt"], second["prompt"])


def test_spaces(env):
    assert env.action_space == gym.spaces.MultiDiscrete(np.full((4, 4), 32))
    assert env.observation_space["tokens"] == gym.spaces.Box(-1, 31, (21,), np.int64)
    assert env.observation_space["scale"] == gym.spaces.Discrete(4)
    assert env.observation_space["prompt"] == gym.spaces.Box(0, 255, (MAX_PROMPT_BYTES,), np.uint8)


# An episode -----------------------------------------------------------------------------------------------------------


def test_an_episode_from_reset_to_score(env):
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert observation["scale"] == 0 and (observation["tokens"] == -1).all()
    assert bytes(observation["prompt"]).rstrip(b"\0").decode() == info["prompt"] == env.scene.prompt
    assert info["words"] == list(env.scene.words)
    steps = play(env)
    assert len(steps) == 3
    for t, (observation, reward, terminated, truncated, info) in enumerate(steps):
        assert observation in env.observation_space
        assert observation["scale"] == t + 1 and (observation["tokens"] >= 0).sum() == sum(env.schedule.sizes[: t + 1])
        assert terminated is (t == 2) and truncated is False
        assert type(reward) is float and (reward == 0.0) is not terminated
        assert bool(info) is terminated
    found = {"words_read", "reads", "confidences", "regions", "components", "boxes"}
    assert set(info) == {"image", "score", "parts"} | found
    assert info["image"].shape == (64, 64, 3) and info["image"].dtype == np.uint8
    assert reward == info["score"] == info["parts"]["mean"] == pytest.approx(info["image"].mean() / 255)
    assert info["words_read"] == ["SEEN"] and len(info["boxes"]) == len(env.scene.words)


def test_the_canvas_and_the_exact_grid_are_the_same_action(parts):
    by_grid, by_canvas = VARTextEnv(**parts), VARTextEnv(**parts)
    for env in (by_grid, by_canvas):
        env.reset(seed=5)
    canvas = np.random.default_rng(0).integers(32, size=(4, 4))
    for h, w in by_grid.schedule.grids:
        a, b = by_grid.step(canvas[:h, :w])[0], by_canvas.step(canvas)[0]
        assert np.array_equal(a["tokens"], b["tokens"])


def test_observations_are_copies(env):
    first, _ = env.reset(seed=0)
    kept = {key: np.copy(value) for key, value in first.items()}
    second = env.step([[1]])[0]
    assert all(np.array_equal(first[key], kept[key]) for key in kept)
    second["tokens"][:] = 7
    second["prompt"][:] = 7
    third = env.step(np.zeros((2, 2), int))[0]
    assert third["tokens"][:6].tolist() == [1, 0, 0, 0, 0, -1]
    assert np.array_equal(third["prompt"], kept["prompt"])


def test_reset_options(env):
    _, info = env.reset(seed=0, options={"prompt": 'A green sign that says "KITE" above "RUN" in pink letters'})
    assert info["words"] == ["KITE", "RUN"]
    assert play(env)[-1][-1]["boxes"] == []
    scene = World(split="test").sample(np.random.default_rng(1))
    _, info = env.reset(options={"scene": scene})
    assert env.scene is scene and info["prompt"] == scene.prompt
    _, drawn = env.reset()  # the options drew no random number
    assert drawn["prompt"] == env.world.sample(np.random.default_rng(0)).prompt


def test_the_split_and_the_profile_reach_the_world(parts):
    env = VARTextEnv(split="test", regions={"2": 1.0}, **parts)
    assert [len(env.reset(seed=seed)[1]["words"]) for seed in range(5)] == [2] * 5
    assert env.world.split == "test"


def test_the_default_environment_scores_a_true_image_near_the_top():
    env = gym.make("VARText-v0", split="val")
    scores = []
    for seed in range(4):
        env.reset(seed=seed)
        scene, tokenizer = env.unwrapped.scene, env.unwrapped.tokenizer
        grids = tokenizer.encode(torch.from_numpy(render(scene))[None])
        for grid, shape in zip(grids, tokenizer.schedule.grids, strict=True):
            _, score, terminated, _, info = env.step(grid.reshape(shape).numpy())
        assert terminated and score == info["score"]
        scores.append(score)
    assert np.median(scores) > 1.5  # completeness and similarity are 1 each when all is read with full confidence


def test_real_ocr_reads_nothing_in_smears(tokenizer):
    env = VARTextEnv(tokenizer=tokenizer)
    env.reset(seed=0)
    *_, info = play(env)[-1]
    assert info["words_read"] == [] and info["score"] == pytest.approx(-0.6)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_steps_outside_an_episode(env):
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step([[0]])
    with pytest.raises(ResetNeeded, match="call reset"):
        env.scene  # noqa: B018
    env.reset(seed=0)
    play(env)
    with pytest.raises(ResetNeeded, match="ended after its 3 grids: call reset"):
        env.step(np.zeros((4, 4), int))
    env.reset()
    env.step([[0]])


def test_errors_leave_the_state_as_it_was(env):
    env.reset(seed=0)
    env.step([[3]])
    before = snapshot(env)
    for action in (np.zeros((3, 3), int), np.full((2, 2), 32), np.zeros((2, 2)), None):
        with pytest.raises(ValueError):
            env.step(action)
        assert snapshot(env) == before
    for options in ({"promt": "x"}, {"prompt": "no words"}, {"prompt": '"A" ' * 100}, {"prompt": 3}):
        with pytest.raises(ValueError):
            env.reset(seed=1, options=options)
        assert snapshot(env) == before
    env.step(np.zeros((2, 2), int))


class NotANumber(Reward):
    name = "not-a-number"

    def score(self, images, scenes):
        return RewardOutput(np.full(len(images), np.nan))


def test_a_reward_that_is_no_number_stops_before_the_end(tokenizer):
    env = VARTextEnv(tokenizer=tokenizer, reward=NotANumber())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="nan"):
        play(env)
    assert env._state.t == 2
    env.reward = type("Zero", (NotANumber,), {"score": lambda self, images, scenes: RewardOutput(np.zeros(1))})()
    assert env.step(np.zeros((4, 4), int))[2]


def test_unknown_arguments(parts):
    with pytest.raises(TypeError, match=r"VARTextEnv has no option spilt='val': choose from split, regions"):
        VARTextEnv(spilt="val", **parts)
    with pytest.raises(TypeError, match="no option spilt='val'"):
        gym.make("VARText-v0", spilt="val")
    with pytest.raises(ValueError, match="render_mode 'human': choose from rgb_array, ansi"):
        VARTextEnv(render_mode="human", **parts)


# Cloning and rendering ------------------------------------------------------------------------------------------------


def test_clone_and_restore_replay_the_rest_and_the_next_episode(env):
    env.reset(seed=0)
    env.step([[3]])
    clone = env.clone_state()

    def rest():
        ends = [env.step(np.full(grid, 2)) for grid in env.schedule.grids[1:]]
        return ends[-1][0]["tokens"].tolist(), ends[-1][1], env.reset()[1]["prompt"]

    first = rest()
    for _ in range(2):
        env.restore_state(clone)
        assert rest() == first
    assert env.np_random_seed == 0


def test_a_clone_moves_to_another_environment(parts, tokenizer):
    source, target = VARTextEnv(**parts), VARTextEnv(**parts)
    target.restore_state(source.clone_state())  # before any reset
    assert target.reset()[1] == source.reset()[1]
    source.step([[3]])
    target.restore_state(source.clone_state())
    assert np.array_equal(play_rest(target), play_rest(source))


def play_rest(env):
    return [env.step(np.ones(grid, int))[0]["tokens"] for grid in env.schedule.grids[1:]][-1]


def test_a_clone_of_another_schedule_is_refused(env, reward):
    from var_env import ScaleSchedule, Tokenizer

    other = VARTextEnv(tokenizer=Tokenizer(ScaleSchedule([(1, 1), (4, 4)], 16), 32, 4, 8, 1), reward=reward)
    other.reset(seed=0)
    with pytest.raises(ValueError, match=r"17 tokens.*has 21"):
        env.restore_state(other.clone_state())


def test_rgb_frames_show_the_image_and_the_grids(parts):
    env = VARTextEnv(render_mode="rgb_array", **parts)
    with pytest.raises(ResetNeeded):
        env.render()
    env.reset(seed=0)
    frames = [env.render()]
    for grid in env.schedule.grids:
        *_, info = env.step(np.full(grid, 9))
        frames.append(env.render())
    assert {frame.shape for frame in frames} == {(256, 256 + 256, 3)} and frames[0].dtype == np.uint8
    assert np.array_equal(frames[-1][::4, :256:4], info["image"])
    panels = [frame[:, 256:].astype(int) for frame in frames]
    for t, (top, left) in enumerate([(0, 0), (0, 128), (128, 0)]):  # the grids fill their cells in reading order
        changed = (panels[t + 1] != panels[t]).any(-1)
        assert changed[top : top + 128, left : left + 128].any()
        changed[top : top + 128, left : left + 128] = False
        assert not changed.any()


def test_text_frames_show_the_grids_and_at_the_end_the_score(parts):
    env = VARTextEnv(render_mode="ansi", **parts)
    env.reset(seed=0, options={"prompt": 'A "KITE"'})
    env.step([[3]])
    assert env.render().splitlines() == ['VARText  scale 1 of 3  A "KITE"', "    1x1  3", "    2x2  .", "    4x4  ."]
    env.step([[0, 1], [2, 31]])
    *_, info = env.step(np.full((4, 4), 7))
    lines = env.render().splitlines()
    assert lines[2] == "    2x2  0 1 2 31"
    assert lines[3] == "    4x4  " + "7 " * 12 + "... (16 tokens)"
    assert lines[4] == f'  score {info["score"]:.3f}  read "SEEN"'


def test_no_render_mode_renders_nothing(env):
    env.reset(seed=0)
    assert env.render() is None
