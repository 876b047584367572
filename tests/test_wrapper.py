import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

import agents
from agents import GRPO, PANW, VMR, MaskPropagation, Wrapper
from agents.callbacks import AgentCallback


class First(Wrapper):
    """Keeps the policy term of the first `scales` grids."""

    def __init__(self, agent, *, scales=1):
        super().__init__(agent)
        self.scales = scales

    def token_weights(self, rollout, steps):
        weights = self.agent.token_weights(rollout, steps)
        sizes = torch.tensor([self.policy.schedule.sizes[t] for t in steps])
        scale = torch.tensor(list(steps)).repeat_interleave(sizes)  # (n,)
        return weights._replace(policy=weights.policy * (scale < self.scales))


def chain(parts, **options):
    settings = {"split": 2, "learning_rate": 1e-3, "kl_coef": 0.1} | options
    return MaskPropagation(PANW(tiny_agent(parts, VMR, **settings), alpha=0.8), dilation=2)


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_str_shows_the_chain(parts):
    inside = "PANW(VMR(split=2, suffix_samples=2, eta=1.0), alpha=0.8)"
    assert str(chain(parts)) == f"MaskPropagation({inside}, boxes='read', soft=False, dilation=2, suffix_masks='union')"


def test_learns_and_predicts(parts):
    agent = chain(parts)
    before = weights_of(agent.policy)
    assert agent.learn(STEPS_A_ROLLOUT) is agent and agent.n_updates > 0
    assert not same(before, weights_of(agent.policy))
    observation, _ = tiny_envs(parts).reset(seed=0)
    action, state = agent.predict(observation, deterministic=True)
    assert action.shape == (2, 4, 4) and state is None


def test_attributes_are_the_wrapped_agent_s(parts):
    agent = chain(parts)
    core = agent.unwrapped
    assert agent.agent.agent is core and agent.num_timesteps == 0 and agent.policy is core.policy
    assert core.outermost is agent and [type(w) for w in core.wrappers] == [PANW, MaskPropagation]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = agent.nothing_like_it


class TestSetting:
    @pytest.mark.parametrize("name", ["learning_rate", "n_updates", "num_timesteps", "eta", "optimizer", "collect"])
    def test_what_the_agent_inside_has_is_refused(self, parts, name):
        agent = chain(parts)
        before = getattr(agent, name)
        with pytest.raises(AttributeError, match=rf"{name} belongs to VMR inside .*set it on \.unwrapped"):
            setattr(agent, name, 1)
        assert getattr(agent, name) == before and name not in vars(agent)

    def test_what_a_wrapper_inside_has_is_refused(self, parts):
        agent = chain(parts)
        with pytest.raises(AttributeError, match=r"alpha is an option of PANW inside .*set it on \.agent"):
            agent.alpha = 0.1
        agent.agent.alpha = 0.1
        assert agent.alpha == 0.1

    def test_its_own_options_and_names_that_nobody_has(self, parts):
        agent = PANW(PANW(tiny_agent(parts), alpha=0.2), alpha=0.4)
        agent.alpha, agent.note = 0.6, "mine"
        assert (agent.alpha, agent.agent.alpha, agent.note) == (0.6, 0.2, "mine")
        agent.unwrapped.learning_rate = 1e-5
        assert agent.learning_rate == 1e-5


def test_the_update_asks_the_outermost(parts):
    agent = First(tiny_agent(parts, kl_coef=0.0, learning_rate=1e-3), scales=1)
    before = weights_of(agent.policy)
    agent.learn(STEPS_A_ROLLOUT)
    moved = (weights_of(agent.policy)["position"] - before["position"]).abs().sum(1)
    assert moved[0] > 0  # (L, width): the first grid's token and no other
    assert moved[5:].max() == 0


@pytest.mark.parametrize("decide", [PANW, First, MaskPropagation])
def test_wrappers_that_multiply_commute(parts, decide):
    """Exactly, up to the rounding of a product."""
    others = [wrapper for wrapper in (PANW, First, MaskPropagation) if wrapper is not decide]
    inside = others[1](others[0](decide(tiny_agent(parts, kl_coef=0.1))))
    outside = decide(others[0](others[1](tiny_agent(parts, kl_coef=0.1))))
    rollout = inside.sample()
    for left, right in zip(
        inside.token_weights(rollout, range(3)), outside.token_weights(rollout, range(3)), strict=True
    ):
        torch.testing.assert_close(left, right)


class TestFiles:
    @pytest.fixture
    def saved(self, parts, tmp_path):
        agent = chain(parts).learn(STEPS_A_ROLLOUT)
        agent.save(tmp_path / "agent.zip")
        return agent, tmp_path / "agent.zip"

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, saved):
        whole = chain(parts).learn(STEPS_A_ROLLOUT)
        whole.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        resumed = MaskPropagation.load(saved[1], env=tiny_envs(parts), device="cpu")
        resumed.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        assert same(weights_of(resumed.policy), weights_of(whole.policy))
        assert str(resumed) == str(whole) and resumed.n_updates == whole.n_updates > 1

    def test_a_callback_that_saves_its_model_saves_the_chain(self, parts, tmp_path):
        class Save(AgentCallback):
            def _on_training_end(self):
                self.model.save(tmp_path / "by_callback.zip")

        agent = chain(parts).learn(1, Save())
        assert str(agents.load(tmp_path / "by_callback.zip", device="cpu")) == str(agent)

    def test_settings_of_any_link_can_be_replaced(self, saved):
        agent = agents.load(saved[1], device="cpu", alpha=0.3, learning_rate=1e-5, eta=2.0, split="m_16")
        assert (agent.alpha, agent.learning_rate, agent.eta, agent.split) == (0.3, 1e-5, 2.0, 1)
        with pytest.raises(ValueError, match=r"'alhpa'.*alpha.*dilation"):
            agents.load(saved[1], device="cpu", alhpa=0.3)
        with pytest.raises(ValueError, match="split=3 leaves no suffix"):
            agents.load(saved[1], device="cpu", split=3)

    @pytest.mark.parametrize("wrong", [GRPO, VMR, PANW, First])
    def test_another_class_does_not_drop_a_wrapper(self, saved, wrong):
        with pytest.raises(ValueError, match=rf"holds MaskPropagation.* no {wrong.__name__}.*agents\.load"):
            wrong.load(saved[1], device="cpu")

    def test_an_unwrapped_agent_loads_by_its_own_class(self, parts, tmp_path):
        tiny_agent(parts, VMR, split=3, suffix_samples=1).save(tmp_path / "vmr.zip")
        assert VMR.load(tmp_path / "vmr.zip", device="cpu").split == 3
        assert type(agents.load(tmp_path / "vmr.zip", device="cpu")) is VMR
        with pytest.raises(ValueError, match=r"holds VMR.* no PANW"):
            PANW.load(tmp_path / "vmr.zip", device="cpu")

    def test_prediction_survives(self, parts, saved):
        agent, path = saved
        observation, _ = tiny_envs(parts).reset(seed=3)
        loaded = agents.load(path, device="cpu")
        expected = agent.predict(observation, deterministic=True)[0]
        assert np.array_equal(loaded.predict(observation, deterministic=True)[0], expected)


def test_wrapping_twice_from_the_inside(parts):
    bare = tiny_agent(parts)
    outer = PANW(bare)
    with pytest.raises(ValueError, match=r"GRPO\(\) is already inside PANW\(GRPO\(\), alpha=0\.6\)"):
        First(bare)
    assert str(First(outer)) == "First(PANW(GRPO(), alpha=0.6), scales=1)"


def test_wraps_agents_only():
    with pytest.raises(TypeError, match="First wraps GRPO"):
        First("base")
