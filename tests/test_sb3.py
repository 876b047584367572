import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from var_env import VARTextVectorEnv
from var_env.sb3 import FlattenCanvas, VARTextVecEnv

N = 3


@pytest.fixture
def single(parts):
    return FlattenCanvas(gym.make("VARText-v0", **parts))


@pytest.fixture
def batch(parts):
    return VARTextVecEnv(VARTextVectorEnv(N, **parts))


def test_sb3_check_env_without_a_warning(single):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(single)


def test_flat_actions_are_canvases(single, parts):
    env = gym.make("VARText-v0", **parts)
    assert single.action_space == gym.spaces.MultiDiscrete([32] * 16)
    for wrapped in (env, single):
        wrapped.reset(seed=0)
    flat = np.arange(16)
    for _ in range(3):
        a, b = env.step(flat.reshape(4, 4)), single.step(flat)
        assert np.array_equal(a[0]["tokens"], b[0]["tokens"]) and a[1] == b[1]
    assert single.reset()[0]["scale"] == 0 and single.step(flat.reshape(4, 4))[0]["scale"] == 1
    with pytest.raises(ValueError, match=r"\(16,\), or \(4, 4\); got \(4,\)"):
        single.step(np.zeros(4, int))


def test_the_wrapped_spec_survives_json(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    env = FlattenCanvas(gym.make("VARText-v0", tokenizer=str(tmp_path / "tokenizer.safetensors")))
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()) == env.spec


def test_the_adapter_behaves_as_sb3s_own_over_single_environments(parts, batch):
    reference = DummyVecEnv([lambda: FlattenCanvas(gym.make("VARText-v0", **parts))] * N)
    for vec in (reference, batch):
        vec.seed(3)
    ours, theirs = batch.reset(), reference.reset()
    rng = np.random.default_rng(0)
    for step in range(7):  # two episodes of three grids and one step more
        assert_same(ours, theirs)
        assert [info["prompt"] for info in batch.reset_infos] == [info["prompt"] for info in reference.reset_infos]
        action = rng.integers(32, size=(N, 16))
        ours, rewards, dones, infos = batch.step(action)
        theirs, expected_rewards, expected_dones, expected_infos = reference.step(action)
        assert rewards.dtype == np.float32 and np.allclose(rewards, expected_rewards, atol=1e-3)
        assert np.array_equal(dones, expected_dones) and dones.all() == (step % 3 == 2)
        for info, expected in zip(infos, expected_infos, strict=True):
            assert set(info) == set(expected) and info["TimeLimit.truncated"] is False
            if dones.all():
                assert_same(info["terminal_observation"], expected["terminal_observation"])
                assert info["terminal_observation"]["scale"] == 3 and info["words_read"] == ["SEEN"]
    assert_same(ours, theirs)


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key in ours:
        assert np.array_equal(ours[key], theirs[key]), key


def test_options_and_seeds_last_for_one_reset(batch):
    batch.set_options({"prompt": 'A "KITE"'})
    batch.reset()
    assert [info["words"] for info in batch.reset_infos] == [["KITE"]] * N
    batch.set_options([{"prompt": f'A "{word}"'} for word in ("ONE", "TWO", "SIX")])
    batch.reset()
    assert [info["words"] for info in batch.reset_infos] == [["ONE"], ["TWO"], ["SIX"]]
    batch.reset()
    assert batch.reset_infos[0]["words"] != ["ONE"]
    batch.set_options([{"prompt": 'A "ONE"'}, {}, {}])
    with pytest.raises(ValueError, match="same options"):
        batch.reset()


def test_attributes_are_the_batchs(batch, parts):
    assert batch.get_attr("render_mode") == [None] * N and batch.render_mode is None
    assert batch.get_attr("num_envs", indices=0) == [N]
    assert not batch.has_attr("nonsense") and batch.env_is_wrapped(gym.Wrapper) == [False] * N
    with pytest.raises(NotImplementedError, match=r"\.envs"):
        batch.env_method("clone_state")
    with pytest.raises(ValueError, match="all rows"):
        batch.set_attr("reward", None, indices=[0])
    batch.set_attr("reward", parts["reward"])
    with pytest.raises(ValueError, match=r"\(3, 16\), or \(3, 4, 4\); got \(4, 4\)"):
        batch.step(np.zeros((4, 4), int))
    frames = VARTextVecEnv(VARTextVectorEnv(N, render_mode="rgb_array", **parts))
    frames.reset()
    assert frames.render().ndim == 3


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_ppo_learns_saves_and_evaluates(kind, request, tmp_path):
    env = request.getfixturevalue(kind)
    env = VecMonitor(env) if kind == "batch" else env
    model = PPO("MultiInputPolicy", env, n_steps=6, batch_size=6, n_epochs=1, seed=0, device="cpu")
    model.learn(36)
    assert model.num_timesteps >= 36 and len(model.ep_info_buffer) > 0
    assert {episode["l"] for episode in model.ep_info_buffer} == {3}
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=env, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SB3 asks for a Monitor around the single environment
        mean, _ = evaluate_policy(loaded, env, n_eval_episodes=3)
    assert 0 < mean < 1
