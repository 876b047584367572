"""Stable-Baselines3's own PPO with our transformer, and the script that shows it."""

from importlib import import_module

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.utils import obs_as_tensor
from tiny import assert_same, tiny_envs, tiny_policy, weights_of
from token_world import OPTIMUM, new_policy, token_world

from agents.policies.base import Policy
from agents.sampling import Decoding, draw
from agents.sb3_policy import VARActorCriticPolicy
from var_env import VARTextVectorEnv
from var_env.sb3 import VARTextVecEnv

N, T, SIZES = 6, 3, (1, 4, 16)


def tiny_model(parts, policy=None, n_steps=T, **options):
    policy = policy or tiny_policy(parts["tokenizer"])
    ratio = {"ratio": options.pop("ratio", "product")}
    settings = {"batch_size": 9, "n_epochs": 2, "learning_rate": 1e-3, "seed": 0, "device": "cpu"} | options
    envs = VARTextVecEnv(VARTextVectorEnv(N, **parts))
    return PPO(VARActorCriticPolicy, envs, n_steps=n_steps, policy_kwargs={"policy": policy, **ratio}, **settings)


def collected(model):
    """The buffer after one rollout of the model's own."""
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


@pytest.fixture
def episode(parts):
    """A policy, and for each scale the observation of N rows, an action, and all grids."""
    model, observations, actions = tiny_model(parts), [], []
    observation = model.env.reset()
    generator = np.random.default_rng(0)
    for t in range(T):
        observations.append(observation)
        actions.append(generator.integers(32, size=(N, 16)))
        observation = model.env.step(actions[-1])[0] if t < T - 1 else None
    grids = []
    for t, (h, w) in enumerate(parts["tokenizer"].schedule.grids):
        grids.append(torch.from_numpy(actions[t].reshape(N, 4, 4)[:, :h, :w].reshape(N, h * w, 1)))
    return model.policy, observations, actions, grids


def prompts_of(observation):
    return [bytes(row).rstrip(b"\0").decode() for row in observation["prompt"]]


@pytest.mark.parametrize("ratio", ["product", "grid"])
def test_an_action_is_as_likely_as_its_tokens(episode, ratio):
    policy, observations, actions, grids = episode
    policy.ratio = ratio
    actor = policy.actor
    cond = actor.encode_prompts(prompts_of(observations[0]))
    for t in range(T):
        observation = obs_as_tensor(observations[t], "cpu")
        assert (observation["scale"] == t).all()
        values, logp, entropy = policy.evaluate_actions(observation, torch.from_numpy(actions[t]))
        expected = [part.sum((1, 2)) for part in actor.evaluate(cond, grids, range(t, t + 1))]
        if ratio == "grid":
            expected = [part / SIZES[t] for part in expected]
        torch.testing.assert_close(logp, expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(entropy, expected[1], atol=1e-4, rtol=1e-4)
        assert values.shape == (N, 1) and torch.equal(values, policy.predict_values(observation))


def test_rows_at_different_scales_do_not_disturb_each_other(episode):
    policy, observations, actions, _ = episode
    with torch.no_grad():
        policy.critic.outer.weight.normal_()
    pick = [(0, 2), (2, 1), (1, 5), (2, 0), (0, 0)]  # scale and row
    mixed = {
        name: torch.stack([torch.as_tensor(observations[t][name][row]) for t, row in pick]) for name in observations[0]
    }
    mixed["scale"] = mixed["scale"][:, None]  # as SB3's buffer gives it
    chosen = torch.stack([torch.from_numpy(actions[t][row]) for t, row in pick]).float()
    together = policy.evaluate_actions(mixed, chosen)
    for i, (t, row) in enumerate(pick):
        alone = {name: torch.as_tensor(values[row : row + 1]) for name, values in observations[t].items()}
        for a, b in zip(policy.evaluate_actions(alone, chosen[i : i + 1]), together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-4, rtol=1e-4)


def test_draws_the_grid_of_the_scale_as_our_sampler_does(episode):
    policy, observations, _, _ = episode
    actor = policy.actor
    for t, n in enumerate(SIZES):
        torch.manual_seed(3)
        actions, values, logp = policy(obs_as_tensor(observations[t], "cpu"))
        assert actions.shape == (N, 16) and actions.dtype == torch.int64 and values.shape == (N, 1)
        side = int(n**0.5)
        canvas = actions.view(N, 4, 4)
        assert not canvas[:, side:].any() and not canvas[:, :, side:].any()
        torch.manual_seed(3)
        flat = torch.from_numpy(observations[t]["tokens"])
        grids = [flat[:, part].unsqueeze(-1) for part in actor.schedule.slices[:t]]
        logits = actor(actor.encode_prompts(prompts_of(observations[t])), grids, range(t, t + 1))
        assert torch.equal(canvas[:, :side, :side].reshape(N, n), draw(logits, None, Decoding()).tokens[..., 0])
        likeliest, _ = policy.predict(observations[t], deterministic=True)
        assert np.array_equal(likeliest.reshape(N, 4, 4)[:, :side, :side].reshape(N, n), logits.argmax(-1)[..., 0])
        same, _, again = policy(obs_as_tensor(observations[t], "cpu"), deterministic=True)
        assert np.array_equal(same, likeliest) and not torch.equal(logp, again)


@pytest.mark.parametrize("ratio", ["product", "grid"])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_ratios_start_at_one(parts, ratio, precision):
    model = tiny_model(parts, tiny_policy(parts["tokenizer"], precision=precision), ratio=ratio, n_steps=2 * T)
    buffer = collected(model)
    for t in range(2 * T):  # the same batches as in collecting: exactly
        observation = {name: torch.as_tensor(values[t]) for name, values in buffer.observations.items()}
        _, logp, _ = model.policy.evaluate_actions(observation, torch.as_tensor(buffer.actions[t]).float())
        assert np.array_equal(logp.detach(), buffer.log_probs[t])
    for batch in buffer.get(9):  # in shuffled minibatches: up to rounding
        _, logp, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        tolerance = 1e-4 if precision == "fp32" else 0.3
        torch.testing.assert_close(logp, batch.old_log_prob, atol=tolerance, rtol=0)


def test_the_critic_sends_no_gradient_into_the_transformer(parts):
    model = tiny_model(parts)
    with torch.no_grad():
        model.policy.critic.outer.weight.normal_()
    model.policy.predict_values(obs_as_tensor(model.env.reset(), "cpu")).sum().backward()
    assert all(weight.grad is None for weight in model.policy.actor.parameters())
    assert all(weight.grad.any() for weight in model.policy.critic.inner.parameters())


def test_learns_saves_and_loads(parts, tmp_path):
    given = tiny_policy(parts["tokenizer"])
    before = weights_of(given)
    model = tiny_model(parts, given, n_steps=2 * T).learn(2 * 2 * T * N)
    after = weights_of(given)  # trained in place
    assert all(torch.isfinite(weight).all() for weight in weights_of(model.policy).values())
    assert all(not torch.equal(before[name], after[name]) for name in ("head.weight", "embed_features.weight"))
    assert model.policy.critic.outer.weight.any()
    model.save(tmp_path / "model.zip")
    model.policy.save(tmp_path / "policy.pth")
    loaded = PPO.load(tmp_path / "model.zip", env=model.env, device="cpu")
    assert_same(weights_of(loaded.policy), weights_of(model.policy), atol=0, rtol=0)
    alone = VARActorCriticPolicy.load(tmp_path / "policy.pth", device="cpu")
    observation = model.env.reset()
    expected, _ = model.predict(observation, deterministic=True)
    for other in (loaded, alone):
        assert np.array_equal(other.predict(observation, deterministic=True)[0], expected)
    loaded.learn(2 * T * N, reset_num_timesteps=False)
    assert not torch.equal(loaded.policy.actor.head.weight, given.head.weight)


def mean_reward(model, steps, episodes=8):
    found, observation = [], model.env.reset()
    for _ in range(episodes * steps):
        observation, rewards, dones, _ = model.env.step(model.predict(observation)[0])
        found += rewards.tolist() if dones.all() else []
    return np.mean(found)


def test_reaches_a_known_optimum():
    """The world of `test_known_optimum.py`, where uniform codes are worth 1/4."""
    world = token_world()
    model = tiny_model(
        world, new_policy(world["tokenizer"]), 16, batch_size=48, learning_rate=1e-2, gamma=1.0, ratio="grid"
    )
    before = mean_reward(model, 2)
    model.learn(8 * 16 * N)
    assert before < 0.5 and mean_reward(model, 2) > 0.9 * OPTIMUM


def test_bad_arguments(parts, monkeypatch):
    with pytest.raises(ValueError, match="'tokens'"):
        tiny_model(parts, ratio="tokens")
    envs = VARTextVecEnv(tiny_envs(parts))
    envs.action_space = spaces.MultiDiscrete([31] * 16)
    with pytest.raises(ValueError, match=r"tokenizer=policy\.tokenizer"):
        PPO(VARActorCriticPolicy, envs, policy_kwargs={"policy": tiny_policy(parts["tokenizer"])}, device="cpu")
    policy = tiny_model(parts).policy
    observation = {name: values[0] for name, values in tiny_envs(parts).reset(seed=0)[0].items()} | {"scale": 3}
    with pytest.raises(ValueError, match="episode is over"):
        policy.predict(observation)
    monkeypatch.setattr(type(policy.actor), "logits", Policy.logits)
    with pytest.raises(NotImplementedError, match="VARTextPolicy has no logits"):
        policy.predict(observation | {"scale": 0})


class TestScript:
    @pytest.fixture
    def main(self):
        return import_module("examples.sb3_ppo").main

    @pytest.fixture
    def weights(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path / "tokenizer.safetensors")
        tiny_policy(tokenizer).save(tmp_path / "policy.safetensors")
        files = {"--weights": "policy.safetensors", "--tokenizer": "tokenizer.safetensors"}
        return [part for option, file in files.items() for part in (option, str(tmp_path / file))]

    @pytest.mark.parametrize("policy", ["mlp", "transformer"])
    def test_prints_the_reward_before_and_after(self, main, weights, policy, capsys):
        options = ["--reward", "brightness", "--images", "8", "--num-envs", "4", "--prompts", "3", "--no-progress"]
        assert main(["--policy", policy, *options, *weights]) == 0
        lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert [line[0].strip() for line in lines[2:]] == ["before", "after 8 images"]
        assert {len(line) for line in lines} == {3 if policy == "transformer" else 2}
        assert all(0 < float(cell.split("±")[0]) < 1 for line in lines[2:] for cell in line[1:])

    def test_wrong_options_end_with_one_line(self, main):
        for options, message in (
            (["--images", "0"], "--images"),
            (["--tokenizer", "nowhere"], "no weights at nowhere"),
        ):
            with pytest.raises(SystemExit, match=message):
                main(options)
