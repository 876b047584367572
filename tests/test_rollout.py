from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny import tiny_envs, tiny_policy

from agents.rollout import Caches, act, collect, make_envs, unroll
from agents.sampling import Decoding
from var_env import VARTextEnv


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy(tokenizer):
    return tiny_policy(tokenizer)


def begin(policy, envs, decoding, seed=0):
    envs.reset(seed=seed)
    cond = policy.encode_prompts([scene.prompt for scene in envs.scenes])
    return cond, Caches(policy, cond, decoding.guided)


class TestUnroll:
    @pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.7, guidance=3.0)], ids=["plain", "guided"])
    def test_cached_sampling_agrees_with_teacher_forcing(self, policy, parts, decoding):
        envs = tiny_envs(parts, 3)
        cond, caches = begin(policy, envs, decoding)
        trail = unroll(policy, envs, caches, range(3), decoding, seeded())
        logits = policy(cond, trail.grids, range(3))
        null = policy(policy.null_cond(cond), trail.grids, range(3))
        scores = (null + decoding.guidance * (logits - null)) / decoding.temperature
        tokens = torch.cat(trail.grids, 1).unsqueeze(-1)
        expected = scores.log_softmax(-1).gather(-1, tokens).squeeze(-1)
        torch.testing.assert_close(torch.cat([draw.logp for draw in trail.draws], 1), expected, atol=1e-4, rtol=1e-4)

    def test_in_two_parts_as_in_one(self, policy, parts):
        whole_envs, split_envs = tiny_envs(parts), tiny_envs(parts)
        _, whole_caches = begin(policy, whole_envs, Decoding())
        _, split_caches = begin(policy, split_envs, Decoding())
        whole = unroll(policy, whole_envs, whole_caches, range(3), Decoding(), seeded())
        generator = seeded()
        first = unroll(policy, split_envs, split_caches, range(2), Decoding(), generator)
        second = unroll(policy, split_envs, split_caches, range(2, 3), Decoding(), generator)
        assert first.images is None and first.answer is None
        for a, b in zip(whole.grids, first.grids + second.grids, strict=True):
            assert torch.equal(a, b)
        assert np.array_equal(whole.images, second.images)

    def test_forks_of_a_prefix_share_it(self, policy, parts):
        envs = tiny_envs(parts)
        _, caches = begin(policy, envs, Decoding())
        unroll(policy, envs, caches, range(1), Decoding(), seeded())
        index = torch.arange(2).repeat_interleave(3)
        forked = envs.fork(3)
        trail = unroll(policy, forked, caches.fork(index), range(1, 3), Decoding(), seeded(1))
        assert trail.grids[0].shape == (6, 4, 1) and trail.answer.result().scores.shape == (6,)
        assert torch.equal(forked.grids[0], envs.grids[0][index])
        # The parent's cache is not used up by its forks.
        again = unroll(policy, envs.fork(3), caches.fork(index), range(1, 3), Decoding(), seeded(1))
        assert all(torch.equal(a, b) for a, b in zip(trail.grids, again.grids, strict=True))

    def test_times_the_phases(self, policy, parts):
        envs = tiny_envs(parts)
        _, caches = begin(policy, envs, Decoding())
        trail = unroll(policy, envs, caches, range(3), Decoding(), seeded())
        assert set(trail.seconds) == {"sampling", "decode", "reward"} and min(trail.seconds.values()) > 0
        assert envs.reward.calls == 1


class TestForkAt:
    """P = 2 prompts, G = 3 prefixes, K = 2 suffixes, forked before grid 1."""

    @pytest.fixture
    def tree(self, policy, parts):
        return collect(policy, tiny_envs(parts), 3, Decoding(), seeded(), fork_at=(1, 2), seed=7)

    def test_images_of_a_prefix_share_it_and_differ_later(self, tree):
        assert tree.scores.shape == (2, 6) and [len(grid) for grid in tree.grids] == [12] * 3
        first, second = tree.grids[0].unflatten(0, (6, 2)).unbind(1)
        assert torch.equal(first, second)
        later, other = tree.grids[2].unflatten(0, (6, 2)).unbind(1)
        assert not torch.equal(later, other)
        assert len(torch.unique(tree.grids[0][:6])) > 1  # prefixes of one prompt differ

    @pytest.mark.parametrize("decoding", [Decoding(), Decoding(guidance=2.0, top_k=8)], ids=["plain", "guided"])
    def test_suffixes_from_the_shared_cache_are_those_from_scratch(self, policy, parts, decoding):
        envs = tiny_envs(parts)
        tree = collect(policy, envs, 3, decoding, seeded(), fork_at=(1, 2), seed=7)
        scratch = tiny_envs(parts, 12)
        scratch.reset(options={"scenes": tree.scenes})
        caches = Caches(policy, policy.encode_prompts([scene.prompt for scene in tree.scenes]), decoding.guided)
        caches.step(0, scratch.tokenizer.read(0, scratch.canvas), None)
        scratch.step(tree.grids[0])
        generator = seeded()
        torch.rand(6, 1, 1, generator=generator)  # the noise that drew the prefixes
        trail = unroll(policy, scratch, caches, range(1, 3), decoding, generator)
        for ours, theirs in zip(trail.grids, tree.grids[1:], strict=True):
            assert torch.equal(ours, theirs)
        assert np.array_equal(trail.images, tree.images)
        assert np.array_equal(trail.answer.result().scores, tree.scores.flatten().numpy())

    def test_every_row_counts_each_step_once(self, policy, parts):
        seen = []
        collect(
            policy, tiny_envs(parts), 3, Decoding(), fork_at=(2, 4), seed=7, on_step=lambda e: seen.append(e.num_envs)
        )
        assert seen == [6, 6, 24]

    def test_merge_makes_rows_of_prefixes(self, policy, tree):
        rows = tree.merge(policy, 2, 1, lambda returns: returns.sum(-1))
        assert rows.suffixes == 2 and rows.returns.shape == (2, 3, 2) and len(rows.scenes) == 6
        assert [grid.shape for grid in rows.grids] == [(6, 1, 1)] and len(rows.draws) == 1
        for p in range(2):
            for g in range(3):
                for k in range(2):
                    assert rows.returns[p, g, k] == tree.scores[p, 2 * g + k]
                assert rows.scores[p, g] == tree.scores[p, 2 * g] + tree.scores[p, 2 * g + 1]
                assert torch.equal(rows.grids[0][3 * p + g], tree.grids[0][6 * p + 2 * g])
                assert rows.scenes[3 * p + g] == tree.scenes[6 * p + 2 * g]
        for merged, part in zip(rows.cond, tree.cond, strict=True):
            assert torch.equal(merged, part[[0, 2, 4, 6, 8, 10]])
        assert rows.images is tree.images and rows.summary()["reward"] == pytest.approx(tree.scores.mean().item())

    @pytest.mark.parametrize("index", [[[4, 1], [0, 5]], [[2]], [[], []]], ids=str)
    def test_rows_take_their_images_with_them(self, policy, tree, index):
        merged = replace(tree.merge(policy, 2, 1, lambda returns: returns.sum(-1)), advantages=torch.arange(6.0))
        some = merged.rows(policy, torch.tensor(index, dtype=torch.int64))
        assert some.scores.shape == np.shape(index) and some.returns.shape == (*np.shape(index), 2)
        assert len(some.scenes) == len(some.grids[0]) == len(some.cond[0]) == np.size(index)
        assert len(some.images) == len(some.words_read) == len(some.regions) == 2 * np.size(index)
        for new, (place, row) in enumerate(np.ndenumerate(np.array(index, int))):
            assert some.scores[place] == merged.scores.flatten()[row] and some.advantages[new] == row
            assert torch.equal(some.returns[place], merged.returns.flatten(0, 1)[row])
            assert some.scenes[new] == merged.scenes[row] and torch.equal(some.grids[0][new], merged.grids[0][row])
            assert torch.equal(some.draws[0].logp[new], merged.draws[0].logp[row])
            assert all(torch.equal(a[new], b[row]) for a, b in zip(some.cond, merged.cond, strict=True))
            assert np.array_equal(some.images[2 * new : 2 * new + 2], merged.images[2 * row : 2 * row + 2])
            assert some.components[2 * new : 2 * new + 2] == merged.components[2 * row : 2 * row + 2]
            assert np.array_equal(
                some.parts["mean"][2 * new : 2 * new + 2], merged.parts["mean"][2 * row : 2 * row + 2]
            )

    @pytest.mark.parametrize("keep", [[True, False], [False, True], [True, True], [False, False]], ids=str)
    def test_groups_are_all_rows_of_some_prompts(self, policy, tree, keep):
        groups = tree.groups(policy, torch.tensor(keep))
        rows = [row for row in range(12) if keep[row // 6]]
        assert torch.equal(groups.scores, tree.scores[torch.tensor(keep)])  # (P', G), also when P' is 0
        assert groups.scenes == [tree.scenes[row] for row in rows]
        assert torch.equal(groups.grids[2], tree.grids[2][rows]) and np.array_equal(groups.images, tree.images[rows])

    @pytest.mark.parametrize("fork_at", [(0, 2), (3, 2), (1, 0)])
    def test_bad_forks(self, policy, parts, fork_at):
        with pytest.raises(ValueError, match="fork_at"):
            collect(policy, tiny_envs(parts), 2, Decoding(), fork_at=fork_at)


class TestCollect:
    def test_rows_are_groups_of_one_prompt(self, policy, parts):
        envs = tiny_envs(parts, 2)
        rollout = collect(policy, envs, 4, Decoding(), seeded(), seed=7)
        assert rollout.scores.shape == (2, 4) and rollout.scores.dtype == torch.float32
        assert [grid.shape for grid in rollout.grids] == [(8, 1, 1), (8, 4, 1), (8, 16, 1)]
        prompts = [scene.prompt for scene in rollout.scenes]
        assert prompts == [envs.scenes[0].prompt] * 4 + [envs.scenes[1].prompt] * 4 and len(set(prompts)) == 2
        assert rollout.images.shape == (8, 64, 64, 3) and len(rollout.words_read) == len(rollout.regions) == 8
        assert rollout.suffixes == 1 and torch.equal(rollout.returns[..., 0], rollout.scores)
        brightness = rollout.images.mean((1, 2, 3)) / 255
        np.testing.assert_allclose(rollout.scores.flatten(), brightness, atol=1e-6)
        np.testing.assert_allclose([sum(c.value for c in found) for found in rollout.components], brightness, atol=1e-6)
        assert len(np.unique(rollout.images, axis=0)) > 4  # a group is not one image many times

    def test_concatenated_rollouts_keep_their_components(self, policy, parts):
        first, second = (collect(policy, tiny_envs(parts), 2, Decoding(), seeded(), seed=seed) for seed in (1, 2))
        both = type(first).concatenate(policy, [first, second])
        assert both.components == first.components + second.components  # the same objects
        assert both.confidences == first.confidences + second.confidences == [[0.5]] * 8
        assert both.rows(policy, torch.tensor([[2], [7]])).confidences == [[0.5]] * 2

    def test_a_reward_without_components_gives_empty_lists(self, policy, parts):
        rollout = collect(policy, tiny_envs(parts), 2, Decoding(), seeded())
        bare = replace(rollout, components=[])
        assert bare.components == [[]] * 4 and bare.rows(policy, torch.tensor([[1]])).components == [[]]

    def test_repeats_with_its_seeds_and_takes_scenes(self, policy, parts):
        first = collect(policy, tiny_envs(parts), 3, Decoding(), seeded(), seed=1)
        again = collect(policy, tiny_envs(parts), 3, Decoding(), seeded(), scenes=first.scenes[::3])
        assert torch.equal(first.scores, again.scores)
        assert np.array_equal(first.images, again.images)

    def test_summary_matches_numpy(self, policy, parts):
        rollout = collect(policy, tiny_envs(parts), 4, Decoding(top_k=3), seeded())
        rollout.scores[0] = 0.25
        summary, scores = rollout.summary(), rollout.scores.double().numpy()
        assert summary["reward"] == pytest.approx(scores.mean())
        assert summary["reward_std"] == pytest.approx(scores.std())
        assert summary["reward_std_in_group"] == pytest.approx(scores.std(1).mean())
        assert summary["zero_variance_groups"] == 0.5
        assert 0 < summary["tail_mass"] < 1
        assert summary["mean"] == pytest.approx(rollout.parts["mean"].mean())  # the toy reward's only part

    def test_support_is_kept_on_request(self, policy, parts):
        kept = collect(policy, tiny_envs(parts), 2, Decoding(top_k=3), seeded(), keep_support=True)
        for grid, _, _, support in kept.draws:
            assert support.shape == (*grid.shape, 32) and support.gather(-1, grid.unsqueeze(-1)).all()
        plain = collect(policy, tiny_envs(parts), 2, Decoding(top_k=3), seeded())
        assert [draw.support for draw in plain.draws] == [None] * 3


class TestAct:
    def test_follows_greedy_unroll(self, policy, parts):
        greedy = Decoding(temperature=0)
        vector = tiny_envs(parts, 1)
        _, caches = begin(policy, vector, greedy, seed=3)
        trail = unroll(policy, vector, caches, range(3), greedy)
        env = VARTextEnv(**parts)
        observation, _ = env.reset(seed=3)
        for (h, w), grid in zip(env.schedule.grids, trail.grids, strict=True):
            action = act(policy, observation, greedy)
            assert action.shape == (4, 4) and env.action_space.contains(action)
            assert np.array_equal(action[:h, :w].ravel(), grid[0, :, 0].numpy())
            observation, *_ = env.step(action)
        with pytest.raises(ValueError, match="over"):
            act(policy, observation, greedy)

    def test_batches_may_mix_scales(self, policy, parts):
        env = VARTextEnv(**parts)
        observations = [env.reset(seed=0)[0]]
        observations.append(env.step(act(policy, observations[0], Decoding(temperature=0)))[0])
        batch = {key: np.stack([o[key] for o in observations]) for key in observations[0]}
        actions = act(policy, batch, Decoding(temperature=0))
        for action, observation in zip(actions, observations, strict=True):
            assert np.array_equal(action, act(policy, observation, Decoding(temperature=0)))


class TestMakeEnvs:
    def test_from_a_name_a_single_and_a_batched_environment(self, parts):
        batched = tiny_envs(parts, 2)
        assert make_envs(batched, 2) is batched
        for env in (batched, VARTextEnv(**parts), gym.make("VARText-v0", **parts)):
            made = make_envs(env, 5)
            assert made.num_envs == 5 and made.tokenizer is parts["tokenizer"] and made.reward is parts["reward"]

    def test_other_environments(self):
        with pytest.raises(ValueError, match="VARText"):
            make_envs(gym.make("CartPole-v1"), 2)
