"""What people who know Stable-Baselines3 do with an agent; docs/agents.md has the table."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor
from tiny import STEPS_A_ROLLOUT, csv_logger, tiny_agent, weights_of
from toy_reward import Toy

from agents import PANW, VMR, TreeGRPO, load
from rewards.serving.pool import RewardPool
from var_env.sb3 import FlattenCanvas, VARTextVecEnv


def batch(parts, rows=1):
    return VARTextVecEnv(gym.make_vec("VARText-v0", num_envs=rows, **parts))


class Seen(BaseCallback):
    """Keeps what the steps told."""

    def __init__(self):
        super().__init__()
        self.steps, self.rollouts = [], []

    def _on_step(self):
        self.steps.append({name: self.locals[name] for name in ("rewards", "dones", "infos")})
        return True

    def _on_rollout_end(self):
        self.rollouts.append(self.locals["rollout"])


class TestEvaluatePolicy:
    @pytest.mark.parametrize(
        "env",
        [
            batch,
            lambda parts: batch(parts, 3),
            lambda parts: VecMonitor(batch(parts, 2)),
            lambda parts: gym.make("VARText-v0", **parts),
            lambda parts: FlattenCanvas(gym.make("VARText-v0", **parts)),
        ],
        ids=["one row", "three rows", "monitored", "single", "flat"],
    )
    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_on_environments(self, parts, env):
        agent = tiny_agent(parts)
        rewards, lengths = evaluate_policy(agent, env(parts), 4, return_episode_rewards=True)
        assert len(rewards) == 4 and set(lengths) == {3} and all(0 < reward < 1 for reward in rewards)

    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_on_its_own(self, parts):
        agent, other = tiny_agent(parts), tiny_agent(parts)
        env = PANW(agent).get_env()
        assert env.envs is agent.env and env.num_envs == 2
        evaluate_policy(agent, env, 2, deterministic=False)
        agent.learn(STEPS_A_ROLLOUT)
        PANW(other).learn(STEPS_A_ROLLOUT)  # which was not evaluated
        assert all((w == weights_of(other.policy)[name]).all() for name, w in weights_of(agent.policy).items())
        agent.set_env(env)
        assert agent.env is env.envs

    def test_without_one(self, parts, tmp_path):
        tiny_agent(parts).save(tmp_path / "agent.zip")
        agent = load(tmp_path / "agent.zip", device="cpu")
        assert agent.get_env() is None
        assert load(tmp_path / "agent.zip", env=tiny_agent(parts).get_env(), device="cpu").get_env().num_envs == 2


class TestCallbacks:
    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_eval_callback(self, parts, tmp_path):
        agent = tiny_agent(parts)
        agent.set_logger(csv_logger(tmp_path))
        callback = EvalCallback(
            batch(parts),
            n_eval_episodes=2,
            eval_freq=3,
            best_model_save_path=str(tmp_path),
            log_path=str(tmp_path),
            verbose=0,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Training and eval env are not of the same type")
            agent.learn(2 * STEPS_A_ROLLOUT, callback)
        assert callback.evaluations_timesteps == [STEPS_A_ROLLOUT, 2 * STEPS_A_ROLLOUT]
        assert "eval/mean_reward" in (tmp_path / "progress.csv").read_text()
        assert load(tmp_path / "best_model.zip", device="cpu").group_size == 4

    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_a_threshold_ends_training(self, parts):
        agent = tiny_agent(parts)
        stop = StopTrainingOnRewardThreshold(0.0)
        agent.learn(9 * STEPS_A_ROLLOUT, EvalCallback(batch(parts), stop, None, 1, eval_freq=3, verbose=0))
        assert agent.n_updates == 1

    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_evaluating_on_the_training_environment_in_the_middle_changes_nothing(self, parts):
        agent, other = tiny_agent(parts), tiny_agent(parts)
        agent.learn(STEPS_A_ROLLOUT, EvalCallback(agent.get_env(), n_eval_episodes=2, eval_freq=1, verbose=0))
        other.learn(STEPS_A_ROLLOUT)
        assert all((w == weights_of(other.policy)[name]).all() for name, w in weights_of(agent.policy).items())

    def test_max_episodes(self, parts):
        agent = tiny_agent(parts)  # 2 environments, 8 images a rollout
        agent.learn(9 * STEPS_A_ROLLOUT, StopTrainingOnMaxEpisodes(5))
        assert agent.images_decoded == 16 and agent.n_updates == 2

    def test_others_of_stable_baselines3(self, parts, tmp_path):
        agent, called = tiny_agent(parts), []
        agent.set_logger(csv_logger(tmp_path))
        every = EveryNTimesteps(STEPS_A_ROLLOUT, CheckpointCallback(1, str(tmp_path)))
        functions = [every, LogEveryNTimesteps(8)]
        functions.append(ConvertCallback(lambda at, _: called.append(at["dones"].any()) is None))
        agent.learn(2 * STEPS_A_ROLLOUT, functions)
        assert called == 2 * [False, False, True]
        assert len(list(tmp_path.glob("rl_model_*.zip"))) == 2

    @pytest.mark.parametrize("cls", [None, VMR, TreeGRPO])
    def test_locals(self, parts, cls):
        agent, seen = tiny_agent(parts, **({"cls": cls} if cls else {})), Seen()
        agent.learn(1, seen)
        for step in seen.steps:
            rows = len(step["dones"])
            assert step["rewards"].shape == (rows,) and step["rewards"].dtype == np.float32
            assert len(step["infos"]) == rows and step["dones"].all() == step["dones"].any()
            assert step["dones"].any() or not step["rewards"].any()
        last, rollout = seen.steps[-1], seen.rollouts[-1]
        assert last["dones"].all() and np.array_equal(last["rewards"], rollout.returns.flatten())
        assert [info["score"] for info in last["infos"]] == last["rewards"].tolist()
        assert last["infos"][0]["words_read"] == ["SEEN"] and not last["infos"][0]["TimeLimit.truncated"]

    @pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
    def test_locals_while_a_pool_scores(self, parts):
        with RewardPool(Toy(), workers=1, mode="thread") as pool:
            agent, seen = tiny_agent(parts | {"reward": pool}, overlap=2), Seen()
            agent.learn(1, [seen, EvalCallback(agent.get_env(), n_eval_episodes=1, eval_freq=3, verbose=0)])
        last = seen.steps[-1]
        assert last["dones"].all() and np.isnan(last["rewards"]).all() and "score" not in last["infos"][0]
        assert seen.rollouts[-1].returns.isfinite().all()


class TestLearn:
    @pytest.mark.parametrize("log_interval", [None, 0])
    def test_no_logs(self, parts, tmp_path, log_interval):
        agent = tiny_agent(parts)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(2 * STEPS_A_ROLLOUT, log_interval=log_interval)
        assert agent.n_updates == 2 and (tmp_path / "progress.csv").read_text() == ""

    @pytest.mark.parametrize("wrap", [lambda agent: agent, PANW], ids=["bare", "wrapped"])
    def test_nothing_to_do(self, parts, wrap):
        agent = wrap(tiny_agent(parts))
        assert agent.learn(0, callback=[], log_interval=None, progress_bar=False) is agent
        assert agent.n_updates == agent.num_timesteps == 0

    def test_budgets_may_be_floats_or_numpys(self, parts):
        agent = tiny_agent(parts)
        agent.learn(float(STEPS_A_ROLLOUT))
        agent.learn(np.int64(STEPS_A_ROLLOUT), reset_num_timesteps=False)
        assert agent.num_timesteps == 2 * STEPS_A_ROLLOUT and agent.n_updates == 2
        agent.learn(STEPS_A_ROLLOUT, reset_num_timesteps=True)
        assert agent.num_timesteps == STEPS_A_ROLLOUT

    @pytest.mark.parametrize(("name", "folder"), [(None, "grpo_1"), ("mine", "mine_1"), ("", "_1")])
    def test_names_of_logs(self, parts, tmp_path, name, folder):
        agent = tiny_agent(parts, tensorboard_log=str(tmp_path))
        agent.learn(0, tb_log_name=name)
        assert [path.name for path in tmp_path.iterdir()] == [folder]
        agent.logger.close()

    def test_names_reach_callbacks(self, parts):
        names = []
        PANW(tiny_agent(parts)).learn(1, lambda at, _: names.append(at["tb_log_name"]) is None)
        assert set(names) == {"grpo_panw"}
