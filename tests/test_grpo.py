import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import STEPS_A_ROLLOUT, assert_same, csv_logger, gradients, nudge, tiny_agent, weights_of

from agents import GRPO, Decoding, logs
from agents.losses import group_advantages
from rewards.base import Reward, RewardOutput
from var_env import VARTextEnv

EVERYTHING = range(3)


@pytest.fixture
def logged(tmp_path):
    """A logger, and a function that gives the rows that were written."""
    logger = csv_logger(tmp_path)

    def rows():
        with open(tmp_path / "progress.csv") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    return logger, rows


class TestUpdate:
    def test_loss_and_gradient_match_a_naive_loop(self, parts):
        agent = tiny_agent(parts, kl_coef=0.3, epochs=2, ratio_level="token")
        rollout = agent.sample()
        old = agent.old_log_probs(rollout, EVERYTHING)
        nudge(agent)
        advantages = group_advantages(rollout.scores).flatten()
        weights = agent.token_weights(rollout, EVERYTHING)
        rows = torch.arange(8)
        loss, _ = agent.loss(rollout, rows, advantages, agent.aggregate(weights, EVERYTHING), old, EVERYTHING)
        loss.backward()
        fast = {name: p.grad.clone() for name, p in agent.policy.named_parameters() if p.grad is not None}
        agent.policy.zero_grad()

        total = torch.zeros(())
        for b in range(8):  # one sample, one token at a time
            cond = agent.policy.take(rollout.cond, torch.tensor([b]))
            grids = [grid[b : b + 1] for grid in rollout.grids]
            logp = agent.policy(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]  # (L, V)
            with torch.no_grad():
                ref_logp = agent.reference(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]
            for i, token in enumerate(torch.cat(grids, 1).flatten().tolist()):
                ratio = (logp[i, token] - old[b, i]).exp()
                a = advantages[b]
                policy_loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
                r = ref_logp[i, token] - logp[i, token]
                total = total + (policy_loss + 0.3 * (r.exp() - r - 1)) / 21 / 8
        assert loss.item() == pytest.approx(total.item(), rel=1e-4)
        total.backward()
        slow = {name: p.grad.clone() for name, p in agent.policy.named_parameters() if p.grad is not None}
        assert_same(fast, slow, atol=1e-6, rtol=1e-3)

    @pytest.mark.parametrize("micro_batch", [1, 3, 8])
    @pytest.mark.parametrize("options", [{}, {"minibatches": 2, "ratio_level": "grid"}], ids=str)
    def test_micro_batches_leave_the_gradient_unchanged(self, parts, micro_batch, options):
        found = []
        for cut in (None, micro_batch):
            agent = tiny_agent(parts, micro_batch=cut, kl_coef=0.1, **options)
            nudge(agent)
            rollout = agent.sample()
            found.append(gradients(agent, rollout, group_advantages(rollout.scores).flatten()))
        assert_same(*found, atol=1e-6, rtol=1e-3)

    def test_rows_without_advantage_are_skipped_for_nothing(self, parts):
        found = []
        for keep_all in (True, False):
            agent = tiny_agent(parts, kl_coef=0.0)
            if keep_all:
                agent.places_to_learn = lambda advantages: torch.arange(len(advantages))
            computed = []
            loss = agent.loss
            agent.loss = lambda rollout, rows, *rest, loss=loss, seen=computed: (
                seen.extend(rows.tolist()) or loss(rollout, rows, *rest)
            )
            rollout = agent.sample()
            rollout.scores[0] = 0.5
            found.append(gradients(agent, rollout, group_advantages(rollout.scores).flatten()))
            assert computed == ([*range(8)] if keep_all else [4, 5, 6, 7])
        assert_same(*found, atol=1e-7, rtol=1e-3)
        assert any(g.abs().max() > 0 for g in found[0].values())

    def test_nothing_to_learn_changes_nothing(self, parts):
        agent = tiny_agent(parts, kl_coef=0.0)
        rollout, before = agent.sample(), weights_of(agent.policy)
        agent.update(rollout, torch.zeros(8), EVERYTHING)
        assert_same(weights_of(agent.policy), before, atol=0, rtol=0)

    @pytest.mark.parametrize("steps", [range(2), range(1), range(1, 3)], ids=str)
    def test_gradients_reach_the_steps_and_no_other(self, parts, steps):
        agent = tiny_agent(parts, kl_coef=0.1)
        rollout = agent.sample()
        advantages = group_advantages(rollout.scores).flatten()
        asked = []
        forward = agent.policy.forward
        agent.policy.forward = lambda c, grids, steps: asked.append((len(grids), steps)) or forward(c, grids, steps)
        weights = agent.token_weights(rollout, steps)
        assert weights.policy.shape == (8, sum(agent.policy.schedule.sizes[t] for t in steps))
        torch.testing.assert_close(weights.policy.sum(1), torch.ones(8))
        nudge(agent)
        partial = gradients(agent, rollout, advantages, steps)
        assert all(length <= steps.stop and part == steps for length, part in asked)
        # A token after the steps has no influence, even when it is not there.
        rollout.draws = rollout.draws[: steps.stop]
        assert_same(gradients(agent, rollout, advantages, steps), partial, atol=0, rtol=0)

    def test_first_ratio_is_exactly_one_and_first_kl_exactly_zero(self, parts, logged):
        agent = tiny_agent(parts, kl_coef=0.1, precision="auto")
        agent.set_logger(logged[0])
        agent.learn(2 * STEPS_A_ROLLOUT)
        first, second = logged[1]()
        for name in ("mean", "min", "max"):
            assert first[f"train/ratio_{name}"] == 1 == second[f"train/ratio_{name}"]
        assert first["train/kl"] == 0 < second["train/kl"]
        assert first["train/clip_fraction"] == 0 == first["train/approx_kl"]

    def test_epochs_and_minibatches_move_the_ratio(self, parts, logged):
        agent = tiny_agent(parts, epochs=3, minibatches=2, micro_batch=3, learning_rate=1e-2)
        agent.set_logger(logged[0])
        agent.learn(STEPS_A_ROLLOUT)
        (row,) = logged[1]()
        assert row["train/ratio_min"] < 0.95 and row["train/ratio_max"] > 1.05 and row["train/clip_fraction"] > 0
        assert row["budget/updates"] == 1

    @pytest.mark.parametrize("kl", ["k1", "k2", "k3", "full"])
    @pytest.mark.parametrize("level", ["grid", "sequence"])
    def test_options_learn(self, parts, kl, level):
        agent = tiny_agent(parts, kl=kl, ratio_level=level, epochs=2, learning_rate=1e-3)
        before = weights_of(agent.policy)
        agent.learn(STEPS_A_ROLLOUT)
        after = weights_of(agent.policy)
        assert all(torch.isfinite(weight).all() for weight in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in after)
        assert_same(weights_of(agent.reference), before, atol=0, rtol=0)

    def test_full_kl_agrees_with_evaluate(self, parts):
        agent = tiny_agent(parts)
        rollout, rows = agent.sample(), torch.tensor([5, 0, 3])
        plain = agent.log_probs(agent.policy, rollout, rows, range(1, 3))
        agent.kl = "full"
        full = agent.log_probs(agent.policy, rollout, rows, range(1, 3))
        assert plain[2] is None and full[2].shape == (3, 20, 1, 32)
        for a, b in zip(plain[:2], full[:2], strict=True):
            torch.testing.assert_close(a, b)


class TestSamplersSupport:
    def test_renormalised_log_probs_close_the_behaviour_gap(self, parts, logged):
        agent = tiny_agent(parts, support="sampler", decoding=Decoding(top_k=3))
        agent.set_logger(logged[0])
        agent.learn(STEPS_A_ROLLOUT)
        (row,) = logged[1]()
        assert abs(row["rollout/behaviour_gap"]) < 1e-4 and row["rollout/tail_mass"] > 0.1

    def test_the_models_own_log_probs_leave_it_open(self, parts, logged):
        agent = tiny_agent(parts, decoding=Decoding(top_k=3))
        agent.set_logger(logged[0])
        agent.learn(STEPS_A_ROLLOUT)
        (row,) = logged[1]()
        assert row["rollout/behaviour_gap"] > 0.1

    def test_codes_outside_get_no_gradient(self, parts):
        agent = tiny_agent(parts, support="sampler", decoding=Decoding(top_k=3), kl_coef=0.0)
        rollout = agent.sample()
        seen = []
        forward = agent.policy.forward

        def spy(*args):
            seen.append(forward(*args))
            seen[-1].retain_grad()
            return seen[-1]

        agent.policy.forward = spy
        gradients(agent, rollout, group_advantages(rollout.scores).flatten())
        support = torch.cat([draw.support for draw in rollout.draws], 1)
        assert (seen[0].grad[~support] == 0).all() and seen[0].grad[support].abs().max() > 0

    def test_without_truncation_it_is_the_model(self, parts):
        agent = tiny_agent(parts, support="sampler")
        rollout, rows = agent.sample(), torch.arange(8)
        on_support = agent.log_probs(agent.policy, rollout, rows, EVERYTHING)
        agent.support = "model"
        torch.testing.assert_close(on_support[0], agent.log_probs(agent.policy, rollout, rows, EVERYTHING)[0])


class TestLearning:
    def test_raises_the_reward(self, parts, logged):
        agent = tiny_agent(parts, group_size=16, learning_rate=1e-2, kl_coef=0.0, precision="auto")
        agent.policy.sharpness.requires_grad_(False)  # made for a hundredth of this learning rate
        agent.set_logger(logged[0])
        agent.learn(10 * 2 * 16 * 3)
        first, *_, last = logged[1]()
        assert last["rollout/reward"] > first["rollout/reward"] + 2 * first["rollout/reward_std"]

    def test_kl_holds_it_back(self, parts, logged):
        kl = []
        for coef in (1e-3, 10.0):
            agent = tiny_agent(parts, learning_rate=1e-2, kl_coef=coef)
            agent.policy.sharpness.requires_grad_(False)
            agent.set_logger(logged[0])
            agent.learn(10 * STEPS_A_ROLLOUT)
            kl.append(logged[1]()[-1]["train/kl"])
        assert kl[1] < kl[0] / 2

    def test_same_seed_same_run_and_other_seed_another(self, parts):
        runs = [tiny_agent(parts, seed=seed, precision="auto").learn(2 * STEPS_A_ROLLOUT) for seed in (3, 3, 4)]
        first, again, other = (weights_of(agent.policy) for agent in runs)
        assert_same(first, again, atol=0, rtol=0)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_prompts_depend_on_the_seed_and_the_update_alone(self, parts):
        small, large = tiny_agent(parts, group_size=2), tiny_agent(parts, group_size=4, decoding=Decoding(top_k=2))
        for _ in range(2):
            assert small.sample().scenes[::2] == large.sample().scenes[::4]

    def test_what_is_logged(self, parts, logged):
        agent = tiny_agent(parts, kl_coef=0.1)
        agent.set_logger(logged[0])
        agent.learn(2 * STEPS_A_ROLLOUT)
        row = logged[1]()[-1]
        assert all(math.isfinite(value) for value in row.values())
        expected = {
            "rollout": "reward reward_std reward_std_in_group zero_variance_groups tail_mass behaviour_gap mean",
            "train": "loss policy_loss kl kl_loss approx_kl entropy clip_fraction ratio_mean ratio_min ratio_max "
            "grad_norm learning_rate n_updates",
            "scale": "kl_1_1x1 kl_3_4x4 entropy_2_2x2 loss_share_1_1x1 loss_share_2_2x2 loss_share_3_4x4",
            "budget": "images tokens updates seconds",
            "time": "sampling decode reward update fps iterations time_elapsed total_timesteps",
        }
        wanted = {f"{group}/{name}" for group, names in expected.items() for name in names.split()}
        assert wanted <= row.keys()
        assert row["budget/images"] == 16 and row["budget/tokens"] == 16 * 21 and row["budget/updates"] == 2
        assert row["time/total_timesteps"] == 2 * STEPS_A_ROLLOUT
        assert row["train/loss"] == pytest.approx(row["train/policy_loss"] + row["train/kl_loss"], abs=1e-6)
        shares = [row[f"scale/loss_share_{name}"] for name in ("1_1x1", "2_2x2", "3_4x4")]
        assert sum(shares) == pytest.approx(1)
        assert row["budget/seconds"] == pytest.approx(agent.seconds, rel=1e-3)

    def test_tensorboard_gets_scalars_images_and_text(self, parts, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tiny_agent(parts, tensorboard_log=str(tmp_path), image_interval=2).learn(3 * STEPS_A_ROLLOUT)
        events = EventAccumulator(str(tmp_path / "grpo_1"))
        events.Reload()
        assert "rollout/reward" in events.Tags()["scalars"]
        assert [event.step for event in events.Images("samples/images")] == [8, 24]  # images
        assert [event.step for event in events.Images("samples/components")] == [8, 24]
        assert any("samples/read" in tag for tag in events.Tags()["tensors"])

    def test_no_boxes_where_the_reward_has_no_placed_components(self, parts, monkeypatch):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        monkeypatch.setattr(logs, "shows_images", lambda logger: True)
        without_places = [[part._replace(boxes=None) for part in found] for found in rollout.components]
        for components in ([], without_places):
            logs.record_samples(agent.logger, replace(rollout, components=components))
            assert "samples/images" in agent.logger.name_to_value
            assert "samples/components" not in agent.logger.name_to_value


class Broken(Reward):
    """Gives NaN for one image of the second batch, past the checks of RewardOutput."""

    name = "broken"

    def __init__(self):
        self.calls = 0

    def score(self, images, scenes):
        output = RewardOutput(np.linspace(0, 1, len(images), dtype=np.float32))
        self.calls += 1
        if self.calls == 2:
            output.scores[1] = np.nan
        return output


class TestBadNumbers:
    def test_nan_reward_stops_with_the_weights_intact(self, parts):
        agent = tiny_agent(parts | {"reward": Broken()})
        agent.learn(STEPS_A_ROLLOUT)
        before = weights_of(agent.policy)
        with pytest.raises(RuntimeError, match=r"update 2 .*nan.*must be finite"):
            agent.learn(2 * STEPS_A_ROLLOUT)
        assert_same(weights_of(agent.policy), before, atol=0, rtol=0)

    @pytest.mark.parametrize("where", ["loss", "gradient norm"])
    def test_nan_loss_or_gradient_is_not_applied(self, parts, where):
        agent = tiny_agent(parts, kl_coef=0.0, max_skipped=0)
        before, real = weights_of(agent.policy), agent.policy.evaluate

        def spoiled(*args):
            logp, entropy = real(*args)
            if where == "loss":
                return logp * math.nan, entropy
            return logp + 0 * (logp - logp.detach()).sqrt(), entropy  # finite, with an infinite slope

        agent.policy.evaluate = spoiled
        with pytest.raises(RuntimeError, match=rf"{where} of update 1 is nan.*not applied.*lower learning_rate"):
            agent.learn(STEPS_A_ROLLOUT)
        assert_same(weights_of(agent.policy), before, atol=0, rtol=0)
        assert agent.n_updates == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kl": "k9"}, "k9.*k1, k2, k3, full"),
            ({"ratio_level": "image"}, "image.*token, grid, sequence"),
            ({"support": "both"}, "both.*model, sampler"),
            ({"group_size": 0}, "group_size .* at least 1, got 0"),
            ({"micro_batch": -1}, "micro_batch .* -1"),
            ({"kl_coef": -0.1}, "kl_coef"),
            ({"clip_range": math.nan}, "clip_range"),
        ],
    )
    def test_bad_options(self, parts, options, message):
        with pytest.raises(ValueError, match=message):
            tiny_agent(parts, **options)

    def test_unknown_option(self, parts):
        with pytest.raises(TypeError, match="temprature"):
            tiny_agent(parts, temprature=1)

    def test_another_tokenizer(self, parts, tokenizer):
        env = VARTextEnv(**parts)
        other = type(tokenizer)(tokenizer.schedule, vocab_size=16, channels=4, width=8, blocks=1)
        policy = tiny_agent(parts).policy
        object.__setattr__(policy, "tokenizer", other)
        with pytest.raises(ValueError, match="different tokenizers"):
            GRPO(policy, env, device="cpu")


class TestPredict:
    def test_one_observation_and_a_batch(self, parts):
        agent = tiny_agent(parts)
        env = VARTextEnv(**parts)
        observation, _ = env.reset(seed=0)
        action, state = agent.predict(observation)
        assert env.action_space.contains(action) and state is None
        batch, _ = agent.env.reset(seed=0)
        actions, _ = agent.predict(batch, deterministic=True)
        assert actions.shape == (2, 4, 4)
        assert np.array_equal(actions, agent.predict(batch, deterministic=True)[0])

    def test_does_not_disturb_training(self, parts):
        agent = tiny_agent(parts)
        state = agent.generator.get_state()
        agent.predict(VARTextEnv(**parts).reset(seed=0)[0])
        assert torch.equal(agent.generator.get_state(), state)

    def test_in_sb3s_evaluate_policy(self, parts):
        agent = tiny_agent(parts)
        envs = DummyVecEnv([lambda: VARTextEnv(**parts)] * 2)
        mean, _ = evaluate_policy(agent, envs, n_eval_episodes=4, warn=False)
        assert 0 < mean < 1
