import csv
import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STEPS_A_ROLLOUT, csv_logger, nudge, tiny_agent, weights_of

from agents import GRPO, PANW, VMR, Decoding, MaskPropagation, Wrapper
from agents.conflict import Conflict, ConflictProbe, cosines, half_gradients, heat_map, measure, scale_gradients
from agents.losses import group_advantages
from rewards.base import Reward, RewardOutput
from var_env import ScaleSchedule, Tokenizer
from var_env.tokenizers.raster import RasterTokenizer

SIZES, T = (1, 4, 16), 3
SCALES = ("1_1x1", "2_2x2", "3_4x4")


class Halve(Wrapper):
    """Halves the policy term of the second grid, and says so to the logger."""

    def token_weights(self, rollout, steps):
        self.logger.record("halve/called", 1)
        weights = self.agent.token_weights(rollout, steps)
        halves = torch.ones(21)
        halves[1:5] = 0.5
        return weights._replace(policy=weights.policy * halves)


class Indifferent(Reward):
    name = "indifferent"

    def score(self, images, scenes):
        return RewardOutput(np.full(len(images), 0.5, np.float32))


def flat(loss, policy):
    found = torch.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def generators(agent):
    mine = [state.tolist() for state in (agent.generator.get_state(), torch.get_rng_state())]
    return [*mine, np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002


def probed(agent, every=1, **options):
    """A probe that has measured once."""
    probe = ConflictProbe(every, **options)
    probe.init_callback(agent.unwrapped)
    probe.measure()
    return probe


class TestScaleGradients:
    @pytest.mark.parametrize("term", ["policy", "kl"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ratio_level": "grid"},
            {"ratio_level": "sequence"},
            {"kl": "full"},
            {"micro_batch": 3},
            {"support": "sampler", "decoding": Decoding(top_k=3)},
        ],
        ids=str,
    )
    def test_add_up_to_the_gradient_of_the_loss(self, parts, term, options):
        agent = tiny_agent(parts, kl_coef=0.3, **options)
        nudge(agent)
        rollout, rows = agent.sample(), torch.arange(8)
        weights = agent.token_weights(rollout, range(T))
        other = {"kl": "policy", "policy": "kl"}[term]
        weights = weights._replace(**{other: torch.zeros(8, 21)})
        advantages = group_advantages(rollout.scores).flatten()
        loss, _ = agent.loss(rollout, rows, advantages, agent.aggregate(weights, range(T)), None, range(T))
        found = scale_gradients(agent, rollout, weights)
        assert found.shape[0] == T and (found.norm(dim=1) > 1e-4).all()
        torch.testing.assert_close(found.sum(0), flat(loss, agent.policy), atol=1e-5, rtol=1e-3)
        if term == "policy":
            assert torch.equal(scale_gradients(agent, rollout), found)  # the default

    def test_match_a_naive_loop_over_one_scales_tokens(self, parts):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        found, first = scale_gradients(agent, rollout), 0
        advantages = group_advantages(rollout.scores).flatten()
        for t, size in enumerate(SIZES):
            loss = torch.zeros(())
            for b in range(8):
                cond = agent.policy.take(rollout.cond, torch.tensor([b]))
                grids = [grid[b : b + 1] for grid in rollout.grids]
                logp = agent.policy(cond, grids, range(T)).log_softmax(-1)[0, first : first + size, 0]  # (n_t, V)
                for i, token in enumerate(grids[t].flatten().tolist()):
                    loss = loss - advantages[b] * logp[i, token] / 21 / 8
            torch.testing.assert_close(found[t], flat(loss, agent.policy), atol=1e-6, rtol=1e-3)
            first += size

    def test_parts_of_the_batch_add_up(self, parts):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        some, others = (scale_gradients(agent, rollout, rows=torch.tensor(r)) for r in ([6, 1, 2], [0, 3, 4, 5, 7]))
        torch.testing.assert_close(some + others, scale_gradients(agent, rollout), atol=1e-6, rtol=1e-3)

    def test_panw_scales_each_by_its_weight(self, parts):
        rollout = tiny_agent(parts).sample()
        plain = scale_gradients(tiny_agent(parts), rollout)
        weighted = scale_gradients(PANW(tiny_agent(parts), alpha=0.8), rollout)
        total = sum(n * n**-0.8 for n in SIZES)
        for t, n in enumerate(SIZES):
            torch.testing.assert_close(weighted[t], plain[t] * 21 * n**-0.8 / total, atol=1e-7, rtol=1e-4)

    def test_frozen_parameters_do_not_count(self, parts):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        before = scale_gradients(agent, rollout).shape[1]
        agent.policy.position.requires_grad_(False)
        assert scale_gradients(agent, rollout).shape[1] == before - 21 * 32

    def test_a_prefix_is_not_enough(self, parts):
        agent = tiny_agent(parts, VMR, split=2)
        with pytest.raises(ValueError, match="all 3 grids, got the first 2"):
            scale_gradients(agent, agent.sample())

    def test_of_a_prefix_alone(self, parts):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, suffix_samples=3))
        rollout, steps, rows = agent.sample(), range(2), torch.arange(8)
        judged = agent.judge(rollout, steps)
        weights = agent.aggregate(agent.token_weights(rollout, steps), steps)
        loss, _ = agent.loss(judged, rows, judged.advantages, weights._replace(kl=0 * weights.kl), None, steps)
        found = scale_gradients(agent, rollout, steps=steps)
        assert found.shape[0] == 2 and (found.norm(dim=1) > 1e-4).all()
        torch.testing.assert_close(found.sum(0), flat(loss, agent.policy), atol=1e-5, rtol=1e-3)
        first, second, kl = half_gradients(agent, rollout, steps)
        shared = found[:, (found != 0).all(0)]  # of two scales, what both move
        torch.testing.assert_close(first + second, shared, atol=1e-5, rtol=1e-3)
        assert kl.shape == first.shape and 0 < first.shape[1] < found.shape[1]

    def test_of_a_raster_are_those_of_its_rows(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            grid = Tokenizer(ScaleSchedule([(2, 2)], patch=32), 32, channels=4, width=8, blocks=1)
        tokenizer = RasterTokenizer(grid).eval().requires_grad_(False)
        agent = tiny_agent({"tokenizer": tokenizer, "reward": Indifferent()})
        rollout = agent.sample()
        rollout.scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        found = scale_gradients(agent, rollout)
        judged, weights = agent.judge(rollout, range(4)), agent.token_weights(rollout, range(4))
        zero = torch.zeros_like(weights.kl)
        weights = agent.aggregate(weights._replace(kl=zero), range(4))
        loss, _ = agent.loss(judged, torch.arange(8), judged.advantages, weights, None, range(4))
        assert len(found) == 2
        torch.testing.assert_close(found.sum(0), flat(loss, agent.policy), atol=1e-5, rtol=1e-3)
        assert [name for name, _ in tokenizer.schedule.bands] == ["row_1", "row_2"]
        assert probed(agent, prompts=2).history[0].norms.shape == (2,)


class TestCosines:
    def test_known_angles(self):
        angles = torch.tensor([0.0, 60.0, 180.0, 90.0]) * math.pi / 180
        lengths = torch.tensor([1.0, 1e-6, 1e6, 3.0])
        table = cosines(torch.stack([angles.cos(), angles.sin()], 1) * lengths[:, None])
        expected = [[1, 0.5, -1, 0], [0.5, 1, -0.5, 0.75**0.5], [-1, -0.5, 1, 0], [0, 0.75**0.5, 0, 1]]
        torch.testing.assert_close(table, torch.tensor(expected), atol=1e-6, rtol=0)
        assert table.abs().max() <= 1

    def test_a_zero_has_no_direction(self):
        table = cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
        assert table[1].isnan().all() and table[:, 1].isnan().all()
        assert table[0, 2].item() == pytest.approx(0.5**0.5)


class TestMeasure:
    def test_matches_the_gradients_of_the_weights_that_scales_share(self, parts):
        agent = tiny_agent(parts, kl_coef=0.3)
        nudge(agent)
        rollout = agent.sample()
        shared = {name: torch.ones_like(weight) for name, weight in agent.policy.named_parameters()}
        shared["sharpness"][:] = 0  # a scale's temperature is its own,
        shared["position"][5:] = 0  # and no later grid sees the positions of the last one
        shared = torch.cat([part.flatten() for part in shared.values()])
        first, second = (scale_gradients(agent, rollout, rows=rows) * shared for rows in torch.arange(8).split(4))
        both, weights = first + second, agent.token_weights(rollout, range(T))
        kl = scale_gradients(agent, rollout, weights._replace(policy=torch.zeros(8, 21))) * shared
        found = measure(agent, rollout)
        assert found.update == 0
        for a in range(T):
            assert found.norms[a].item() == pytest.approx(both[a].norm().item(), rel=1e-3)
            assert found.kl_norms[a].item() == pytest.approx(kl[a].norm().item(), rel=1e-3)
            halves = first[a] @ second[a] / first[a].norm() / second[a].norm()
            assert found.reliability[a].item() == pytest.approx(halves.item(), abs=1e-4)
            for b in range(T):
                cosine = both[a] @ both[b] / both[a].norm() / both[b].norm()
                assert found.cosines[a, b].item() == pytest.approx(cosine.item(), abs=1e-4)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_reliability_of_equal_and_of_opposite_halves(self, parts, sign):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        rollout.cond = agent.policy.take(rollout.cond, torch.arange(4).repeat(2))
        rollout.draws = [draw.take(torch.arange(4).repeat(2)) for draw in rollout.draws]
        rollout.scores = torch.stack([rollout.scores[0], sign * rollout.scores[0]])
        torch.testing.assert_close(measure(agent, rollout).reliability, torch.full((T,), float(sign)))

    def test_sees_the_wrappers_and_silences_them(self, parts, tmp_path):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        plain = measure(agent, rollout)
        agent.set_logger(csv_logger(tmp_path))
        wrapped = measure(Halve(agent), rollout)
        assert "halve/called" not in agent.logger.name_to_value
        torch.testing.assert_close(wrapped.norms, plain.norms * torch.tensor([1, 0.5, 1]))
        torch.testing.assert_close(wrapped.cosines, plain.cosines, atol=1e-4, rtol=0)
        assert torch.equal(wrapped.kl_norms, torch.zeros(T))  # the policy is still its reference

    def test_one_prompt_has_no_halves(self, parts):
        agent = tiny_agent(parts)
        rollout = agent.sample()
        rollout.scores = rollout.scores.view(1, 8)
        with pytest.raises(ValueError, match="at least 2 prompts"):
            measure(agent, rollout)

    def test_leaves_the_agent_untouched(self, parts):
        agent = MaskPropagation(tiny_agent(parts, VMR, split=2, kl_coef=0.1)).learn(STEPS_A_ROLLOUT).unwrapped
        logger, counters = agent.logger, (agent.num_timesteps, agent.images_decoded, agent.n_updates, agent._rollouts)
        weights, grads = weights_of(agent.policy), [p.grad.clone() for p in agent.policy.parameters()]
        moments = [state["exp_avg"].clone() for state in agent.optimizer.state.values()]
        noise = generators(agent)
        probed(agent, prompts=3)
        assert generators(agent) == noise
        assert all(torch.equal(weights[name], weight) for name, weight in weights_of(agent.policy).items())
        assert all(torch.equal(a, p.grad) for a, p in zip(grads, agent.policy.parameters(), strict=True))
        exp_avg = [state["exp_avg"] for state in agent.optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, exp_avg, strict=True))
        assert counters == (agent.num_timesteps, agent.images_decoded, agent.n_updates, agent._rollouts)
        assert agent.logger is logger


class TestProbe:
    def test_measures_before_during_and_after(self, parts, tmp_path):
        agent, probe = tiny_agent(parts, kl_coef=0.1, learning_rate=1e-3), ConflictProbe(every=2, prompts=2)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(3 * STEPS_A_ROLLOUT, probe)
        assert [found.update for found in probe.history] == [0, 2, 3]
        first, *_, last = probe.history
        assert not torch.equal(first.cosines, last.cosines)
        assert first.kl_norms.max() == 0 < last.kl_norms.min()
        with open(tmp_path / "progress.csv") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        assert ["conflict/cosine_mean" in row for row in rows] == [True, False, True, True]
        pairs = last.cosines[~torch.eye(T, dtype=torch.bool)]
        assert rows[-1]["conflict/cosine_mean"] == pytest.approx(pairs.mean().item(), abs=1e-6)
        assert rows[-1]["conflict/cosine_min"] == pytest.approx(pairs.min().item(), abs=1e-6)
        assert rows[-1]["conflict/negative_share"] == pytest.approx((pairs < 0).float().mean().item(), abs=1e-6)
        for t, name in enumerate(SCALES):
            assert rows[-1][f"conflict/grad_norm_{name}"] == pytest.approx(last.norms[t].item(), rel=1e-5)
            assert rows[-1][f"conflict/kl_grad_norm_{name}"] == pytest.approx(last.kl_norms[t].item(), rel=1e-5)
            assert rows[-1][f"conflict/reliability_{name}"] == pytest.approx(last.reliability[t].item(), abs=1e-6)
        assert sum(rows[-1][f"conflict/grad_share_{name}"] for name in SCALES) == pytest.approx(1)

    @pytest.mark.parametrize(
        "make",
        [
            lambda parts: tiny_agent(parts, GRPO, learning_rate=1e-3, precision="auto"),
            lambda parts: MaskPropagation(PANW(tiny_agent(parts, VMR, split=2, learning_rate=1e-3, micro_batch=3))),
        ],
        ids=["GRPO", "all three"],
    )
    def test_does_not_change_training(self, parts, make):
        plain = make(parts).learn(3 * STEPS_A_ROLLOUT)
        watched = make(parts).learn(3 * STEPS_A_ROLLOUT, ConflictProbe(every=1, prompts=2))
        other = weights_of(watched.policy)
        assert all(torch.equal(other[name], weight) for name, weight in weights_of(plain.policy).items())
        assert plain.images_decoded == watched.images_decoded and plain.n_updates == watched.n_updates > 1

    def test_same_batch_for_every_agent(self, parts):
        grpo = probed(tiny_agent(parts, GRPO)).history[0]
        vmr = probed(tiny_agent(parts, VMR, split=2, suffix_samples=3, seed=5)).history[0]
        assert all(torch.equal(a, b) for a, b in zip(grpo[1:], vmr[1:], strict=True))
        other = probed(tiny_agent(parts), seed=1).history[0]
        assert not torch.equal(grpo.cosines, other.cosines)

    def test_costs_reward_calls_outside_the_budget(self, parts, reward):
        agent = tiny_agent(parts)
        probed(agent)
        assert reward.calls == 1 and agent.images_decoded == agent.num_timesteps == 0

    def test_nothing_to_learn_is_nan_and_not_logged(self, parts, tmp_path):
        agent = tiny_agent(parts | {"reward": Indifferent()})
        agent.set_logger(csv_logger(tmp_path))
        found = probed(agent).history[0]
        assert found.cosines.isnan().all() and found.reliability.isnan().all() and found.norms.max() == 0
        logged = {key: value for key, value in agent.logger.name_to_value.items() if key.startswith("conflict/")}
        assert set(logged) == {f"conflict/{kind}_{name}" for kind in ("grad_norm", "kl_grad_norm") for name in SCALES}
        assert set(logged.values()) == {0.0}

    def test_image_in_tensorboard(self, parts, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        agent, probe = tiny_agent(parts, tensorboard_log=str(tmp_path)), ConflictProbe(every=2)
        agent.learn(2 * STEPS_A_ROLLOUT, probe)
        events = EventAccumulator(str(tmp_path / "grpo_1"))
        events.Reload()
        found = events.Images("conflict/cosine")
        assert [event.step for event in found] == [8, 16]  # images
        assert len(events.Scalars("conflict/cosine_mean")) == 2
        image = np.asarray(Image.open(io.BytesIO(found[0].encoded_image_string)))
        expected = heat_map(probe.history[0], agent.policy.schedule)
        assert np.array_equal(image, expected)

    @pytest.mark.parametrize(("options", "name"), [({"every": 0}, "every"), ({"prompts": 1}, "prompts")])
    def test_bad_options(self, options, name):
        with pytest.raises(ValueError, match=name):
            ConflictProbe(**options)


def test_heat_map_shows_signs_and_gaps(schedule):
    table = torch.tensor([[1.0, -1.0, math.nan], [-1.0, 1.0, 0.0], [math.nan, 0.0, 1.0]])
    zeros = torch.zeros(T)
    image = heat_map(Conflict(3, table, zeros, zeros, torch.tensor([1.0, 0.0, math.nan])), schedule)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    common = {tuple(colour) for colour in colours[np.argsort(counts)[-4:]].tolist()}
    assert any(r > 2 * b for r, _, b in common) and any(b > 2 * r for r, _, b in common)  # -1 is red and 1 is blue
