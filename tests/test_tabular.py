import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.logger import Logger

import agents
from agents.mask_propagation import boxes_to_mask, propagate_mask
from agents.policies.table import TablePolicy
from agents.rollout import make_envs
from agents.testing import PolicyContract, TokenizerContract
from var_env.schedule import ScaleSchedule
from var_env.tabular import (
    REWARDS,
    TableReward,
    TableTokenizer,
    VARTabularEnv,
    VARTabularVectorEnv,
    every_image,
    table_schedule,
)


def all_images(envs):
    """Every image drawn in one batch: its tokens, the rewards and the infos."""
    flat = every_image(envs.schedule, envs.tokenizer.vocab_size)
    envs.reset(seed=0)
    for part in envs.schedule.slices:
        _, rewards, *_, info = envs.step(flat[:, part])
    return flat, rewards, info


class TestEnvironment:
    def test_gymnasium_check_env_without_a_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gym.make("VARTabular-v0", render_mode="rgb_array").unwrapped)

    def test_the_spec_survives_json(self):
        options = {"grids": [[1, 1], [2, 2]], "vocab_size": 3, "reward": "random", "seed": 5}
        env = gym.make("VARTabular-v0", **options)
        again = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert again.spec == env.spec
        np.testing.assert_array_equal(again.unwrapped.reward.table, env.unwrapped.reward.table)

    @pytest.mark.parametrize("reward", REWARDS)
    @pytest.mark.parametrize(
        ("grids", "vocab_size"), [([[1, 1], [1, 2], [2, 2]], 2), ([[1, 1], [2, 2]], 3), ([[1, 1]], 5)]
    )
    def test_every_image_scores_as_its_table_says(self, reward, grids, vocab_size):
        count = vocab_size ** sum(h * w for h, w in grids)
        options = {"grids": grids, "vocab_size": vocab_size, "reward": reward, "seed": 3}
        envs = gym.make_vec("VARTabular-v0", num_envs=count, **options).unwrapped
        flat, rewards, info = all_images(envs)
        assert len(np.unique(flat, axis=0)) == count == len(envs.reward.table)
        np.testing.assert_allclose(rewards, envs.reward.table, atol=1e-7)
        assert envs.reward.table.min() >= 0 and envs.reward.table.max() <= 1
        assert info["words_read"][-1] == [str(vocab_size - 1) * (h * w) for h, w in grids]

    def test_the_single_environment_is_a_row_of_the_batch(self):
        single, batch = VARTabularEnv(reward="random"), VARTabularVectorEnv(2, reward="random")
        assert single.reset(seed=4)[1]["prompt"] == batch.reset(seed=3)[1]["prompt"][1]
        for h, w in single.schedule.grids:
            _, reward, *_ = single.step(np.ones((h, w), int))
            _, rewards, *_ = batch.step(np.ones((2, h, w), int))
        assert reward == rewards[1] == pytest.approx(single.reward.table[-1])

    def test_agents_take_it_by_name_and_come_back_from_a_file(self, tmp_path):
        policy = TablePolicy(TableTokenizer.load())
        agent = agents.make(
            "vmr+mp", "VARTabular-v0", policy, split=2, group_size=4, prompts_per_update=2, seed=0, device="cpu"
        )
        agent.set_logger(Logger(None, []))
        agent.learn(agent.timesteps(64))
        agent.save(tmp_path / "agent.zip")
        loaded = agents.load(tmp_path / "agent.zip", env="VARTabular-v0", device="cpu")
        for mine, other in zip(policy.sites(), loaded.policy.sites(), strict=True):
            assert torch.equal(mine, other) and mine.std() > 0
        envs = make_envs("VARTabular-v0", 3)
        envs.reset(seed=0)
        assert envs.fork(2).num_envs == 6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reward": "rough"}, "unknown reward 'rough': choose one of smooth"),
            ({"vocab_size": 1}, "vocab_size must be 2 to 128"),
            ({"grids": [[1, 1], [1, 2]]}, "the last grid must be square"),
            ({"grids": [[2, 2], [3, 3]]}, "sides of the others divide"),
            ({"grids": [[1, 1], [2, 2], [4, 4]]}, "2097152 images, more than the 65536"),
            ({"grids": []}, "at least one grid"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            VARTabularEnv(**options)

    def test_an_option_that_does_not_exist(self):
        for make in (VARTabularEnv, VARTabularVectorEnv):
            with pytest.raises(TypeError, match="has no option size=64: choose from"):
                make(size=64)


class TestRewards:
    """By naive loops over the tokens of every image; two codes, 1x1, 1x2 and 2x2."""

    def scores(self, name, seed=0):
        tokenizer = TableTokenizer.load()
        return every_image(tokenizer.schedule, 2), TableReward(tokenizer, name, seed).table

    def test_smooth_is_additive_and_has_one_best_image(self):
        flat, table = self.scores("smooth")
        best = flat[table.argmax()]
        assert [(row == best).mean() for row in flat] == pytest.approx(table.tolist())

    def test_copy(self):
        for (a, b, c, *last), score in zip(*self.scores("copy"), strict=True):
            right = [b == a, c == a, last[0] == b, last[1] == c, last[2] == b, last[3] == c]
            assert score == pytest.approx(np.mean(right))

    def test_sparse(self):
        flat, table = self.scores("sparse")
        assert table.sum() == 8 and len(np.unique(flat[table == 1][:, 3:], axis=0)) == 1

    def test_xor(self):
        for row, score in zip(*self.scores("xor"), strict=True):
            assert score == (row[3] != row[6])

    def test_trap(self):
        for row, score in zip(*self.scores("trap"), strict=True):
            assert score == pytest.approx(sum(row[3:]) % 2 if row[0] else 0.8 * np.mean(row[3:]))

    def test_the_seed_decides_what_is_drawn(self):
        for name in ("smooth", "sparse", "random"):
            tables = [self.scores(name, seed)[1] for seed in (0, 0, 1)]
            assert np.array_equal(tables[0], tables[1]) and not np.array_equal(tables[0], tables[2])

    @pytest.mark.parametrize("name", REWARDS)
    def test_regions_are_the_cells_that_can_change_the_score(self, name):
        flat, table = self.scores(name)
        score = {tuple(row): value for row, value in zip(flat.tolist(), table, strict=True)}
        matters = [
            any(score[tuple(row)] != score[(*row[:i], 1 - row[i], *row[i + 1 :])] for row in flat.tolist())
            for i in range(3, 7)
        ]
        reward = TableReward(TableTokenizer.load(), name)
        mask = boxes_to_mask(reward.boxes, reward.tokenizer.schedule)
        assert mask.flatten().tolist() == matters

    def test_the_propagated_mask_of_xor(self):
        reward = TableReward(TableTokenizer.load(), "xor")
        finest = boxes_to_mask(reward.boxes, reward.tokenizer.schedule)
        masks = propagate_mask(finest[None], reward.tokenizer.schedule)
        assert [mask.flatten().tolist() for mask in masks] == [[True], [True] * 2, [True, False, False, True]]


class TestTableTokenizer(TokenizerContract):
    def make_tokenizer(self):
        return TableTokenizer(table_schedule([(1, 1), (2, 2), (4, 4)]), vocab_size=7)

    def test_encode_reads_what_decode_shows(self):
        tokenizer = self.make_tokenizer()
        generator = torch.Generator().manual_seed(0)
        grids = [torch.randint(7, (16, n, 1), generator=generator) for n in tokenizer.schedule.sizes]
        canvas = tokenizer.blank(16)
        for t, grid in enumerate(grids):
            canvas = tokenizer.write(t, canvas, grid)
        for grid, shown in zip(grids, tokenizer.encode(tokenizer.decode(canvas)), strict=True):
            assert torch.equal(grid, shown)

    def test_more_stripes_than_pixels(self):
        with pytest.raises(ValueError, match="3 stripes do not fit into cells of 2 px"):
            TableTokenizer(ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=2))


class TestTablePolicy(PolicyContract):
    def make_policy(self):
        return TablePolicy(TableTokenizer(table_schedule([(1, 1), (2, 2)]), vocab_size=3), spread=1.0, seed=1).eval()

    def test_the_prompt_matters_and_padding_does_not(self):
        policy, _, grids = self.start()
        a, b = (policy(policy.encode_prompts([p] * 3), grids, range(2)) for p in self.prompts[:2])
        assert torch.equal(a, b)  # the one difference to other backbones: tables know no prompt

    test_null_cond_forgets_the_prompt = test_the_prompt_matters_and_padding_does_not

    def test_gradient_reaches_every_parameter(self):
        policy = self.make_policy()
        flat = torch.from_numpy(every_image(policy.schedule, 3))
        grids = [flat[:, part, None] for part in policy.schedule.slices]
        logp, _ = policy.evaluate(policy.encode_prompts([""] * len(flat)), grids, range(2))
        (logp.sum(1).exp() * torch.arange(len(flat))[:, None]).sum().backward()
        assert all((table.grad != 0).all() for table in policy.tables)

    def test_sites_are_the_family_of_definition_2(self):
        """Image by image against `evaluate`."""
        policy = self.make_policy()
        flat = torch.from_numpy(every_image(policy.schedule, 3))
        grids = [flat[:, part, None] for part in policy.schedule.slices]
        logp, _ = policy.evaluate(policy.encode_prompts([""] * len(flat)), grids, range(2))
        first, second = policy.sites()
        for row, found in zip(flat.tolist(), logp.squeeze(-1).tolist(), strict=True):
            expected = [first[0, 0, row[0]], *(second[row[0], i, row[1 + i]] for i in range(4))]
            assert found == pytest.approx([value.item() for value in expected], abs=1e-5)

    def test_takes_over_other_tables(self):
        sites = self.make_policy().sites()
        other = TablePolicy(self.make_policy().tokenizer).take_over(sites)
        for mine, theirs in zip(sites, other.sites(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)

    def test_the_critic_sees_every_state(self):
        policy, flat = self.make_policy(), torch.arange(3).view(3, 1, 1)
        hidden = policy.hidden(policy.encode_prompts([""] * 3), [flat], range(1, 2))  # (3, 4, V + states)
        assert hidden.shape == (3, 4, 3 + 1 + 3)
        assert torch.equal(hidden[:, 0, 3:], torch.eye(4)[1:])
        torch.testing.assert_close(policy.logits(hidden, range(1, 2)), policy.tables[1].unsqueeze(2))

    def test_too_large_a_table(self, tokenizer):
        with pytest.raises(ValueError, match="more than 1048576: take a policy with a network"):
            TablePolicy(tokenizer)

    def test_there_is_no_shipped_table(self):
        with pytest.raises(ValueError, match=r"TablePolicy\.load\(path, tokenizer\)"):
            TablePolicy.load()
