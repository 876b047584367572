import copy

import pytest
import torch
from test_save_load import OPTIONS, same
from tiny import STEPS_A_ROLLOUT, assert_same, nudge, tiny_agent, tiny_envs, weights_of

from agents import GRPO, HeldOutEval, evaluate

EMA = OPTIONS | {"ema_decay": 0.7}


def after_every_step(agent):
    """A list that fills with the weights after every optimiser step."""
    trail, step = [], agent.optimizer.step
    agent.optimizer.step = lambda *args: (step(*args), trail.append(weights_of(agent.policy)))[0]
    return trail


def test_follows_the_recursion_after_every_optimiser_step(parts):
    agent = tiny_agent(parts, **EMA)
    expected, trail = weights_of(agent.policy), after_every_step(agent)
    agent.learn(2 * STEPS_A_ROLLOUT)
    assert len(trail) == 2 * 2 * 2  # updates, epochs, minibatches
    for weights in trail:
        expected = {name: 0.7 * expected[name] + 0.3 * weights[name] for name in expected}
    assert_same(weights_of(agent.ema), expected, atol=1e-6, rtol=1e-5)
    assert not same(weights_of(agent.ema), weights_of(agent.policy))


def test_a_decay_of_0_is_the_policy(parts):
    agent = tiny_agent(parts, **OPTIONS | {"ema_decay": 0.0}).learn(STEPS_A_ROLLOUT)
    assert_same(weights_of(agent.ema), weights_of(agent.policy), atol=1e-8, rtol=1e-6)


def test_keeps_no_graph_and_stays_frozen(parts):
    agent = tiny_agent(parts, **EMA).learn(STEPS_A_ROLLOUT)
    assert all(weight.grad_fn is None and not weight.requires_grad for weight in agent.ema.parameters())
    copy.deepcopy(agent.ema)


def test_has_weights_of_its_own_and_shares_the_tokenizer(parts):
    agent = tiny_agent(parts, **EMA)
    mine = {weight.data_ptr() for weight in agent.policy.parameters()}
    assert not mine & {weight.data_ptr() for weight in agent.ema.parameters()}
    assert agent.ema.tokenizer is agent.policy.tokenizer
    assert not list(agent.policy.buffers())  # which would not be averaged


def test_does_not_change_training(parts):
    plain = tiny_agent(parts, **OPTIONS).learn(2 * STEPS_A_ROLLOUT)
    averaged = tiny_agent(parts, **EMA).learn(2 * STEPS_A_ROLLOUT)
    assert same(weights_of(averaged.policy), weights_of(plain.policy))
    assert plain.ema is None and plain.best_policy is plain.policy


def test_is_what_is_evaluated(parts):
    agent = tiny_agent(parts, **EMA | {"ema_decay": 0.999})
    nudge(agent, 0.3)  # the average stays behind
    evaluation = HeldOutEval(every=1, prompts=4)
    agent.learn(STEPS_A_ROLLOUT, evaluation)
    assert agent.best_policy is agent.ema
    scores = evaluation.history[-1][1].scores
    mine, other = (
        evaluate(policy, agent.env, evaluation.scenes, agent.decoding).scores for policy in (agent.ema, agent.policy)
    )
    assert (scores == mine).all() and (scores != other).any()


def test_resume_is_bit_for_bit_the_uninterrupted_run(parts, tmp_path):
    whole = tiny_agent(parts, **EMA).learn(2 * STEPS_A_ROLLOUT)
    half = tiny_agent(parts, **EMA).learn(STEPS_A_ROLLOUT)
    half.save(tmp_path / "agent")
    resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
    assert same(weights_of(resumed.ema), weights_of(half.ema)) and resumed.ema.tokenizer is resumed.policy.tokenizer
    assert resumed.ema_decay == 0.7 and not any(weight.requires_grad for weight in resumed.ema.parameters())
    resumed.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
    assert same(weights_of(resumed.ema), weights_of(whole.ema))
    assert same(weights_of(resumed.policy), weights_of(whole.policy))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(parts, decay):
    with pytest.raises(ValueError, match=f"ema_decay .* below 1, got {decay}"):
        tiny_agent(parts, ema_decay=decay)


def test_a_step_that_is_not_taken_leaves_it(parts):
    agent = tiny_agent(parts, **EMA)
    before = weights_of(agent.ema)
    agent.policy.sharpness.grad = torch.full_like(agent.policy.sharpness, torch.nan)
    with pytest.warns(UserWarning, match="gradient norm of update 1 is nan"):
        agent.optimizer_step()
    assert same(weights_of(agent.ema), before)
