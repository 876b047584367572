import math

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent, weights_of

from agents import PANW, RAFT, MaskPropagation, Wrapper, load
from agents.panw import panw_weights
from rewards.base import Reward, RewardOutput

EVERYTHING = range(3)


class Quadrants(Reward):
    """Scores brightness; finds the text in another quadrant of every image."""

    name = "quadrants"

    def score(self, images, scenes):
        corners = [(x, y) for x in (0, 32) for y in (0, 32)]
        boxes = [np.array([[x, y, x + 32, y + 32]], np.float32) for x, y in corners]
        return RewardOutput(images.mean((1, 2, 3)) / 255, regions=[boxes[i % 4] for i in range(len(images))])


def with_scores(rollout, scores):
    rollout.scores = torch.tensor(scores)
    rollout.returns = rollout.scores.unsqueeze(2)
    return rollout


def update_of(agent, rollout):
    """The gradient of an update as the agent makes it."""
    core = agent.unwrapped
    rollout = core.judge(rollout, EVERYTHING)
    return gradients(core, rollout, core.outermost.token_advantages(rollout, EVERYTHING))


def naive(agent, rollout, rows, weights, kl_coef):
    """Gradient of the mean over some rows of ``sum_i w_i (-log p_i + kl_coef k3_i)``, token by token."""
    agent.policy.zero_grad()
    total = torch.zeros(())
    for b in rows:
        cond = agent.policy.take(rollout.cond, torch.tensor([b]))
        grids = [grid[b : b + 1] for grid in rollout.grids]
        logp = agent.policy(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]  # (L, V)
        with torch.no_grad():
            ref_logp = agent.reference(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]
        for i, token in enumerate(torch.cat(grids, 1).flatten().tolist()):
            r = ref_logp[i, token] - logp[i, token]
            policy_weight, kl_weight = weights(b, i)
            total = total + (kl_weight * kl_coef * (r.exp() - r - 1) - policy_weight * logp[i, token]) / len(rows)
    total.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in agent.policy.named_parameters()}


class TestKept:
    @pytest.mark.parametrize(
        ("keep", "scores", "rows"),
        [
            (1, [[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.0, 0.0]], [[1], [4]]),
            (2, [[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.0, 0.0]], [[1, 3], [4, 5]]),  # of equals, the first drawn
            (1, [[0.1, 0.4, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5]], [[1]]),  # no best one
            (3, [[0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, -1.0]], [[6, 5, 4]]),
        ],
    )
    def test_the_best_of_each_prompt(self, parts, keep, scores, rows):
        agent = tiny_agent(parts, RAFT, keep=keep)
        rollout = agent.judge(with_scores(agent.sample(), scores), EVERYTHING)
        assert agent.kept(rollout).tolist() == rows
        assert rollout.advantages.nonzero().flatten().tolist() == sorted(sum(rows, []))  # noqa: RUF017
        assert set(rollout.advantages.tolist()) == {0.0, 1.0}

    @pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 4}, {"keep": 1, "group_size": 1}], ids=str)
    def test_bad_keep(self, parts, options):
        with pytest.raises(ValueError, match=r"keep must be"):
            tiny_agent(parts, RAFT, **options)

    def test_saved_and_loaded(self, parts, tmp_path):
        agent = tiny_agent(parts, RAFT, group_size=16, keep=10, clip_range=0.1)
        agent.save(tmp_path / "agent")
        again = load(tmp_path / "agent.zip", device="cpu")
        assert type(again) is RAFT and (again.keep, again.group_size, again.clip_range) == (10, 16, 0.1)
        with pytest.raises(ValueError, match="keep must be below group_size, 4, got 10"):
            load(tmp_path / "agent.zip", device="cpu", group_size=4)


class TestUpdate:
    @pytest.mark.parametrize("keep", [1, 2])
    def test_gradient_matches_a_naive_loop_over_the_best(self, parts, keep):
        agent = tiny_agent(parts, RAFT, keep=keep, kl_coef=0.3)
        nudge(agent)
        rollout = agent.sample()
        fast = update_of(agent, rollout)
        order = rollout.scores.argsort(1, descending=True)[:, :keep] + torch.tensor([[0], [4]])
        slow = naive(agent, rollout, order.flatten().tolist(), lambda b, i: (1 / 21, 1 / 21), 0.3)
        assert_same(fast, slow, atol=1e-6, rtol=1e-3)

    def test_wrappers_weigh_the_tokens_of_the_best(self, parts):
        agent = PANW(MaskPropagation(tiny_agent(parts | {"reward": Quadrants()}, RAFT, kl_coef=0.3)), alpha=0.8)
        nudge(agent.unwrapped)
        rollout = agent.sample()
        fast = update_of(agent, rollout)
        rows = agent.kept(rollout).flatten().tolist()
        assert rows[0] % 4 != 0 or rows[1] % 4 != 0  # so that the mask of the first row of each prompt is a wrong one
        k = panw_weights(agent.policy.schedule, 0.8)
        mask = torch.cat([part.flatten(1) for part in agent.agent.masks(rollout)], 1).float()  # (B, L)
        slow = naive(agent.unwrapped, rollout, rows, lambda b, i: (k[i] * mask[b, i], k[i]), 0.3)
        assert_same(fast, slow, atol=1e-6, rtol=1e-3)

    def test_advantages_of_wrappers_count(self, parts):
        class Halved(Wrapper):
            def token_advantages(self, rollout, steps):
                return 0.5 * self.agent.token_advantages(rollout, steps)

        found = []
        for wrap in (lambda agent: agent, Halved):
            agent = wrap(tiny_agent(parts, RAFT, kl_coef=0.0))
            found.append(update_of(agent, agent.sample()))
        assert_same({name: 0.5 * g for name, g in found[0].items()}, found[1], atol=1e-8, rtol=1e-3)

    @pytest.mark.parametrize("options", [{}, {"epochs": 2, "minibatches": 2}, {"micro_batch": 1}], ids=str)
    def test_only_the_best_are_computed(self, parts, options):
        agent = tiny_agent(parts, RAFT, kl_coef=0.1, **options)
        rows, evaluate = [], agent.policy.evaluate
        agent.policy.evaluate = lambda cond, *rest: rows.append(len(cond[0])) or evaluate(cond, *rest)
        agent.learn(STEPS_A_ROLLOUT)
        epochs = options.get("epochs", 1)
        assert sum(rows) == 2 * (epochs + (epochs > 1))  # P * keep, and once more for the old log-probabilities

    def test_without_a_best_image_only_the_kl_is_learned(self, parts):
        equal = [[0.5] * 4, [0.7] * 4]
        agent = tiny_agent(parts, RAFT, kl_coef=0.3)
        nudge(agent)
        rollout = with_scores(agent.sample(), equal)
        fast = update_of(agent, rollout)
        slow = naive(agent, rollout, range(8), lambda b, i: (0.0, 1 / 21), 0.3)
        assert_same(fast, slow, atol=1e-6, rtol=1e-3)
        free = tiny_agent(parts, RAFT, kl_coef=0.0)
        before = weights_of(free.policy)
        free.learn_from(with_scores(free.sample(), equal), EVERYTHING)
        assert free.n_updates == 1
        assert_same(weights_of(free.policy), before, atol=0, rtol=0)

    def test_epochs_make_the_best_likelier_until_the_kl_is_reached(self, parts):
        gain = []
        for options in ({"epochs": 1}, {"epochs": 8}, {"epochs": 8, "target_kl": 1e-4}):
            agent = tiny_agent(parts, RAFT, kl_coef=0.0, learning_rate=1e-3, **options)
            rollout = agent.sample()
            rows = agent.kept(rollout).flatten()
            before = agent.old_log_probs(rollout, EVERYTHING)[rows]
            agent.learn_from(rollout, EVERYTHING)
            gain.append((agent.old_log_probs(rollout, EVERYTHING)[rows] - before).mean().item())
        # The KL may be reached in one step. Then gain[2] is gain[0] but for the last digits, since with more epochs to
        # come the log-probabilities are computed once more, in batches of another size.
        assert 0 < gain[0] <= gain[2] * (1 + 1e-5) and gain[2] < gain[1] < math.inf
