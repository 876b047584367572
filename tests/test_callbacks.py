import csv
import json

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import STEPS_A_ROLLOUT, csv_logger, tiny_agent, tiny_envs, weights_of

from agents import GRPO, BestCheckpoint, HeldOutEval, StopAfter
from agents.evaluation import Evaluation
from agents.policies.var_text import VARTextPolicy
from rewards.base import Reward, RewardOutput
from var_env import VARTextEnv
from var_env.scenes import split_of

FOREVER = 10**9


class Recorder(BaseCallback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.events, self.stop_at = [], stop_at

    def _on_training_start(self):
        self.events.append("training start")

    def _on_rollout_start(self):
        self.events.append("rollout start")

    def _on_step(self):
        self.events.append(self.num_timesteps)
        return self.num_timesteps != self.stop_at

    def _on_rollout_end(self):
        self.events.append("rollout end")

    def _on_training_end(self):
        self.events.append("training end")


class TestContract:
    def test_order_of_events(self, parts):
        recorder = Recorder()
        agent = tiny_agent(parts).learn(STEPS_A_ROLLOUT + 1, recorder)
        first = ["rollout start", 8, 16, 24, "rollout end"]
        second = ["rollout start", 32, 40, 48, "rollout end"]
        assert recorder.events == ["training start", *first, *second, "training end"]
        assert agent.num_timesteps == 48 and agent.n_updates == 2

    def test_counting_steps_starts_again_or_not(self, parts):
        agent = tiny_agent(parts)
        agent.learn(STEPS_A_ROLLOUT).learn(STEPS_A_ROLLOUT)
        assert agent.num_timesteps == STEPS_A_ROLLOUT and agent.images_decoded == 16
        agent.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        assert agent.num_timesteps == 2 * STEPS_A_ROLLOUT and agent.n_updates == 3

    def test_stopping_within_a_rollout_drops_it(self, parts):
        agent = tiny_agent(parts)
        before = weights_of(agent.policy)
        agent.learn(FOREVER, Recorder(stop_at=16))
        assert agent.n_updates == 0 and agent.images_decoded == 0 and agent.num_timesteps == 16
        assert all((before[name] == weight).all() for name, weight in weights_of(agent.policy).items())

    def test_stopping_at_the_end_of_a_rollout_learns_from_it(self, parts):
        agent = tiny_agent(parts).learn(FOREVER, Recorder(stop_at=24))
        assert agent.n_updates == 1 and agent.num_timesteps == 24

    @pytest.mark.filterwarnings("ignore:rich is experimental")
    def test_functions_lists_and_a_progress_bar(self, parts):
        seen = []
        callbacks = [Recorder(), StopAfter(updates=1)]
        tiny_agent(parts).learn(FOREVER, callbacks, progress_bar=True)
        assert callbacks[0].events[-1] == "training end"
        tiny_agent(parts).learn(STEPS_A_ROLLOUT, lambda locals_, globals_: seen.append(locals_["envs"].t) or True)
        assert seen == [1, 2, 3]

    def test_sb3s_eval_callback(self, parts, tmp_path):
        envs = DummyVecEnv([lambda: VARTextEnv(**parts)])
        evaluation = EvalCallback(envs, eval_freq=3, n_eval_episodes=2, log_path=str(tmp_path), verbose=0, warn=False)
        with pytest.warns(UserWarning, match="not of the same type"):
            tiny_agent(parts).learn(2 * STEPS_A_ROLLOUT, evaluation)
        assert len(evaluation.evaluations_results) == 2 and 0 < evaluation.last_mean_reward < 1

    def test_log_interval(self, parts, tmp_path):
        agent = tiny_agent(parts)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(4 * STEPS_A_ROLLOUT, log_interval=2)
        with open(tmp_path / "progress.csv") as file:
            assert [row["time/iterations"] for row in csv.DictReader(file)] == ["2", "4"]


class TestStopAfter:
    @pytest.mark.parametrize(
        ("budget", "updates"), [({"images": 17}, 3), ({"images": 16}, 2), ({"updates": 2}, 2), ({"seconds": 0.0}, 1)]
    )
    def test_budgets(self, parts, budget, updates):
        agent = tiny_agent(parts).learn(FOREVER, StopAfter(**budget))
        assert agent.n_updates == updates and agent.images_decoded == 8 * updates

    def test_first_budget_wins_and_resuming_does_not_start_again(self, parts, tmp_path):
        agent = tiny_agent(parts).learn(FOREVER, StopAfter(images=1000, updates=1))
        agent.save(tmp_path / "agent")
        resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
        resumed.learn(FOREVER, StopAfter(updates=3), reset_num_timesteps=False)
        assert resumed.n_updates == 3

    def test_needs_a_budget(self):
        with pytest.raises(ValueError, match="images=, updates= or seconds="):
            StopAfter()


class TestHeldOutEval:
    def test_evaluates_before_during_and_after(self, parts, tmp_path):
        agent = tiny_agent(parts)
        agent.set_logger(csv_logger(tmp_path))
        evaluation = HeldOutEval(every=2, prompts=3)
        agent.learn(3 * STEPS_A_ROLLOUT, evaluation)
        assert [update for update, _ in evaluation.history] == [0, 2, 3]
        scenes = evaluation.history[0][1].scenes
        assert len(scenes) == 3 and scenes == evaluation.history[2][1].scenes
        assert all(split_of(word) == "val" for scene in scenes for word in scene.words)
        with open(tmp_path / "progress.csv") as file:
            rows = list(csv.DictReader(file))
        for name in ("reward", "word_accuracy", "ned", "nothing_read"):  # in rows of their own, between the updates'
            assert [bool(row[f"eval/{name}"]) for row in rows] == [True, False, False, True, False, True]
        assert [row["eval/images"] for row in rows if row["eval/images"]] == ["0", "16", "24"]

    def test_does_not_change_training(self, parts):
        plain = tiny_agent(parts).learn(2 * STEPS_A_ROLLOUT)
        watched = tiny_agent(parts).learn(2 * STEPS_A_ROLLOUT, HeldOutEval(every=1, prompts=3))
        other = weights_of(watched.policy)
        assert all((other[name] == weight).all() for name, weight in weights_of(plain.policy).items())
        assert plain.images_decoded == watched.images_decoded

    def test_bad_interval(self):
        with pytest.raises(ValueError, match="every"):
            HeldOutEval(every=0)

    def test_once_an_update_even_when_an_update_samples_several_rollouts(self, parts):
        evaluation = HeldOutEval(every=1, prompts=3)
        constant = FixedReward()
        agent = tiny_agent(parts | {"reward": constant}, dynamic_sampling="resample", max_batches=3)
        agent.learn(3 * STEPS_A_ROLLOUT, evaluation)
        assert agent.images_decoded == 3 * 8 and [update for update, _ in evaluation.history] == [0, 1]


class FixedReward(Reward):
    """The same for all images."""

    name = "fixed"

    def score(self, images, scenes):
        return RewardOutput(np.full(len(images), 0.5, np.float32))


class Scripted(BestCheckpoint):
    """With given values of the metric in place of the true ones."""

    def __init__(self, values, path, **options):
        super().__init__(path, every=1, prompts=2, **options)
        self.values = list(values)

    def evaluate(self):
        means = {self.metric: self.values[len(self.history)]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Evaluation, "means", lambda evaluation: means)
            super().evaluate()


class TestBestCheckpoint:
    OPTIONS = {"learning_rate": 1e-2, "kl_coef": 0.0}

    def best_update(self, parts, callback, updates=3, **options):
        """After how many updates the policy in the file was made."""
        agent, snapshots = tiny_agent(parts, **self.OPTIONS | options), []
        evaluate = callback.evaluate
        callback.evaluate = lambda: (snapshots.append(weights_of(agent.best_policy)), evaluate())
        agent.learn(updates * STEPS_A_ROLLOUT, callback)
        kept = weights_of(VARTextPolicy.load(callback.path, parts["tokenizer"]))
        same = [all((kept[name] == weight).all() for name, weight in shot.items()) for shot in snapshots]
        assert len(same) == updates + 1 and sum(same) == 1
        return same.index(True)

    @pytest.mark.parametrize(
        ("values", "metric", "best"),
        [
            ([0.1, 0.3, 0.2, 0.25], "word_accuracy", 1),
            ([0.1, 0.3, 0.2, 0.4], "ned", 3),
            ([0.2, 0.2, 0.1, 0.2], "word_accuracy", 0),  # ties keep the earlier one
            ([0.0, 0.0, 0.5, 0.5], "word_accuracy", 2),
            ([0.5, 0.4, 0.9, 0.4], "nothing_read", 1),  # lower is better
        ],
    )
    def test_keeps_the_best_and_the_earlier_of_equals(self, parts, tmp_path, values, metric, best):
        callback = Scripted(values, tmp_path / "made" / "best.safetensors", metric=metric)
        assert self.best_update(parts, callback) == best
        assert callback.best == values[best]
        assert sorted(file.name for file in callback.path.parent.iterdir()) == ["best.json", "best.safetensors"]

    def test_what_is_logged(self, parts, tmp_path):
        agent = tiny_agent(parts, **self.OPTIONS)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(3 * STEPS_A_ROLLOUT, Scripted([0.1, 0.3, 0.2, 0.25], tmp_path / "best.safetensors"))
        with open(tmp_path / "progress.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["eval/word_accuracy"]]
        assert [float(row["eval/best_word_accuracy"]) for row in rows] == [0.1, 0.3, 0.3, 0.3]
        assert [float(row["eval/word_accuracy"]) for row in rows] == [0.1, 0.3, 0.2, 0.25]

    def test_keeps_the_averaged_policy(self, parts, tmp_path):
        callback = Scripted([0.1, 0.3, 0.2, 0.25], tmp_path / "best.safetensors")
        assert self.best_update(parts, callback, ema_decay=0.5) == 1

    def test_true_metrics(self, parts, tmp_path):
        callback = BestCheckpoint(tmp_path / "best.safetensors", "reward", every=1, prompts=3)
        tiny_agent(parts, **self.OPTIONS).learn(3 * STEPS_A_ROLLOUT, callback)
        assert callback.best == max(result.means()["reward"] for _, result in callback.history)

    def test_going_on_from_an_earlier_best(self, parts, tmp_path):
        first = Scripted([0.1, 0.5, 0.3], tmp_path / "best.safetensors")
        first.go_on()
        tiny_agent(parts).learn(2 * STEPS_A_ROLLOUT, first)
        assert json.loads((tmp_path / "best.json").read_text())["value"] == first.best == 0.5
        kept = first.path.read_bytes()
        later = Scripted([0.2, 0.5], first.path)
        later.go_on()
        tiny_agent(parts, policy_seed=1).learn(STEPS_A_ROLLOUT, later)
        assert later.best == 0.5 and later.path.read_bytes() == kept
        other = BestCheckpoint(first.path, "ned", prompts=2)
        other.go_on()
        assert other.best is None  # that was another metric

    def test_a_failing_save_leaves_the_old_file(self, parts, tmp_path, monkeypatch):
        callback, agent = Scripted([0.1, 0.2], tmp_path / "best.safetensors"), tiny_agent(parts, **self.OPTIONS)
        save, calls = VARTextPolicy.save, []

        def fails_the_second_time(policy, path):
            calls.append(path)
            save(policy, path)
            assert len(calls) < 2, "disk full"

        monkeypatch.setattr(VARTextPolicy, "save", fails_the_second_time)
        before = weights_of(agent.policy)
        with pytest.raises(AssertionError, match="disk full"):
            agent.learn(STEPS_A_ROLLOUT, callback)
        kept = weights_of(VARTextPolicy.load(callback.path, parts["tokenizer"]))
        assert all((kept[name] == weight).all() for name, weight in before.items()) and callback.best == 0.1

    def test_an_unknown_metric(self, parts, tmp_path):
        callback = BestCheckpoint(tmp_path / "best.safetensors", "accuracy", prompts=2)
        with pytest.raises(ValueError, match="'accuracy': choose one of reward, word_accuracy, ned, nothing_read"):
            tiny_agent(parts).learn(STEPS_A_ROLLOUT, callback)
