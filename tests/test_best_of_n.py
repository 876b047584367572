import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from tiny import tiny_agent, weights_of

from agents import PANW, BestOfN, ConflictProbe, HeldOutEval, MaskPropagation, StopAfter, evaluate, load
from agents.registry import make
from var_env import VARTextEnv


class Recorder(BaseCallback):
    def __init__(self):
        super().__init__()
        self.events = []

    def _on_training_start(self):
        self.events.append("start")

    def _on_step(self):
        self.events.append("step")
        return True

    def _on_training_end(self):
        self.events.append("end")


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_learns_nothing_and_draws_nothing(parts):
    agent = tiny_agent(parts, BestOfN)
    before, recorder = weights_of(agent.policy), Recorder()
    assert agent.learn(10**9, [recorder, StopAfter(images=10**9)], progress_bar=True) is agent
    assert agent.learn(10**9, reset_num_timesteps=False) is agent
    assert recorder.events == ["start", "end"] and parts["reward"].calls == 0
    assert agent.n_updates == agent.images_decoded == agent.num_timesteps == 0
    assert all((before[name] == weight).all() for name, weight in weights_of(agent.policy).items())


def test_evaluations_keep_the_best_of_n(parts):
    scores = {}
    for n in (1, 6):
        evaluation = HeldOutEval(prompts=4, seed=3)
        agent = tiny_agent(parts, BestOfN, n=n)
        agent.learn(10**9, evaluation)
        ((update, result),) = evaluation.history  # once, at the end
        again = evaluate(agent.policy, agent.env, evaluation.scenes, seed=3, best_of=agent.best_of)
        assert update == 0 and np.array_equal(result.scores, again.scores) and result.images.shape[0] == 4
        scores[n] = result.scores
    plain = HeldOutEval(prompts=4, seed=3)
    tiny_agent(parts).learn(1, plain)
    assert np.array_equal(plain.history[0][1].scores, scores[1])  # other agents draw one
    assert scores[6].mean() > scores[1].mean()


def test_in_wrappers_and_with_a_probe(parts):
    probe, evaluation = ConflictProbe(prompts=2), HeldOutEval(prompts=2)
    agent = PANW(MaskPropagation(tiny_agent(parts, BestOfN, n=3)))
    assert agent.learn(10**9, [probe, evaluation]) is agent
    assert agent.best_of == 3 and agent.n_updates == 0
    assert len(probe.history) == len(evaluation.history) == 1


def test_acts_with_one_sample(parts):
    observation, _ = VARTextEnv(**parts).reset(seed=0)
    action, _ = tiny_agent(parts, BestOfN).predict(observation, deterministic=True)
    assert np.array_equal(action, tiny_agent(parts).predict(observation, deterministic=True)[0])


def test_by_name_saved_and_loaded(parts, tmp_path):
    one = tiny_agent(parts)
    agent = make("best_of_n", one.env, one.policy, n=5, device="cpu")
    agent.save(tmp_path / "agent")
    assert load(tmp_path / "agent.zip", device="cpu").best_of == 5
    assert load(tmp_path / "agent.zip", device="cpu", n=2).best_of == 2


@pytest.mark.parametrize("n", [0, 2.5])
def test_bad_n(parts, n):
    with pytest.raises(ValueError, match=f"n must be a whole number of at least 1, got {n}"):
        tiny_agent(parts, BestOfN, n=n)
