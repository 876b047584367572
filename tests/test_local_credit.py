"""Local credit: by hand, against loops, and in the company of other agents. Its gradients are in test_theory_agents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, tiny_agent, tiny_envs, weights_of

from agents import GRPO, PANW, PPO, RAFT, RLOO, VMR, LocalCredit, SimilarityAdvantage, TreeGRPO, load
from agents.local_credit import tokens_of, values_of
from agents.mask_propagation import boxes_to_mask, propagate_mask
from agents.registry import make
from rewards.base import Reward, RewardOutput
from rewards.components import Component

EVERY = range(3)
LEFT, CORNER, WHOLE = [[0, 0, 32, 64]], [[50, 50, 60, 60]], [[0, 0, 64, 64]]


def part(kind, index, value, boxes=None):
    return Component(kind, (index,), value, None if boxes is None else np.array(boxes, np.float32))


def with_parts(agent, parts, scores=None, steps=EVERY):
    """A judged rollout with these components; the scores are their sums unless given."""
    rollout = agent.unwrapped.sample()
    if scores is None:
        scores = torch.tensor([sum(one.value for one in found) for found in parts])
        scores = scores.float().view_as(rollout.returns).mean(2)
    rollout = replace(rollout, components=parts, scores=scores)
    return replace(rollout, advantages=agent.unwrapped.advantages(rollout, steps))


def some_parts(count=8, seed=0):
    """Four letters: some without a place, some that an image lacks, all at random places."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        corners = rng.uniform(0, 50, (4, 2))
        sizes = rng.uniform(2, 30, (4, 2))
        boxes = np.concatenate([corners, corners + sizes], 1)
        letters = [part("letter", i, rng.random(), boxes[i : i + 1] if rng.random() < 0.7 else None) for i in range(4)]
        found.append([letter for letter in letters if rng.random() < 0.8] or letters)
    return found


def naive(agent, rollout, steps):
    """Token by token, in loops."""
    schedule, k, (prompts, group) = agent.unwrapped.policy.schedule, rollout.suffixes, rollout.scores.shape
    n = sum(schedule.sizes[t] for t in steps)
    found = torch.zeros(prompts * group, n, dtype=torch.float64)
    for p in range(prompts):
        images = rollout.components[p * group * k : (p + 1) * group * k]
        keys = sorted({(one.kind, one.indices) for parts in images for one in parts})
        table = [{(one.kind, one.indices): one for one in parts} for parts in images]
        value = {(i, key): table[i][key].value if key in table[i] else 0.0 for i in range(len(images)) for key in keys}
        mean = {key: sum(value[i, key] for i in range(len(images))) / len(images) for key in keys}
        squares = sum((value[i, key] - mean[key]) ** 2 for i in range(len(images)) for key in keys)
        left = []
        for g in range(group):
            sums = [sum(value[g * k + s, key] for key in keys) for s in range(k)]
            left.append(rollout.scores[p, g].double().item() - sum(sums) / k)
        mean_left = sum(left) / group
        spread = squares / (group * k - 1) + sum((x - mean_left) ** 2 for x in left) / (group - 1)
        for g in range(group):
            row = found[p * group + g]
            row += left[g] - mean_left
            for i in range(g * k, g * k + k):
                claimed = torch.zeros(schedule.canvas, dtype=torch.bool)
                for one in images[i]:
                    if one.boxes is not None:
                        claimed |= boxes_to_mask(one.boxes, schedule)
                for key in keys:
                    one = table[i].get(key)
                    if one is not None and one.boxes is not None:
                        finest = boxes_to_mask(one.boxes, schedule)
                    else:
                        finest = ~claimed if (~claimed).any() else ~claimed | True
                    masks = propagate_mask(finest[None], schedule)
                    flat = torch.cat([masks[t].flatten() for t in steps])
                    row += flat * (value[i, key] - mean[key]) / k
            row /= spread**0.5 + 1e-4
    return found.float()


class TestFunctions:
    def test_values_by_hand(self):
        images = [[part("letter", 0, 1.0), part("letter", 1, 0.5)], [part("letter", 1, 2.0), part("spurious", 0, -1.0)]]
        assert values_of(images).tolist() == [[1.0, 0.5, 0.0], [0.0, 2.0, -1.0]]

    def test_regions_by_hand(self, schedule):
        images = [[part("letter", 0, 1.0, LEFT), part("letter", 1, 1.0, CORNER), part("letter", 2, 0.0)]]
        left, corner, rest = tokens_of(images, schedule, EVERY)[0]
        assert left.split([1, 4, 16])[1].tolist() == [1, 0, 1, 0]
        assert left[5:].view(4, 4).tolist() == [[1, 1, 0, 0]] * 4
        assert corner[5:].nonzero().flatten().tolist() == [15] and corner[:5].tolist() == [1, 0, 0, 0, 1]
        assert rest[5:].view(4, 4).tolist() == [[0, 0, 1, 1]] * 3 + [[0, 0, 1, 0]]  # what the others leave
        assert rest[:5].tolist() == [1, 0, 1, 0, 1]

    def test_a_place_outside_the_image_is_none_and_all_that_is_claimed_is_shared(self, schedule):
        images = [[part("letter", 0, 1.0, WHOLE), part("letter", 1, 1.0, [[70, 0, 80, 9]])]]
        assert tokens_of(images, schedule, EVERY).all()
        assert tokens_of(images, schedule, range(1, 2)).shape == (1, 2, 4)


class TestAdvantages:
    @pytest.mark.parametrize("seed", range(3))
    def test_against_loops(self, parts, seed):
        agent = LocalCredit(tiny_agent(parts))
        rollout = with_parts(agent, some_parts(seed=seed), torch.rand(2, 4, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(agent.token_advantages(rollout, EVERY), naive(agent, rollout, EVERY))

    @pytest.mark.parametrize("steps", [range(2), range(2, 3)], ids=["prefix", "suffix"])
    def test_of_some_grids(self, parts, steps):
        agent = LocalCredit(tiny_agent(parts))
        rollout = with_parts(agent, some_parts())
        expected = agent.token_advantages(rollout, EVERY)
        ends = [0, 1, 5, 21]
        part_of = expected[:, ends[steps.start] : ends[steps.stop]]
        torch.testing.assert_close(agent.token_advantages(rollout, steps), part_of)

    def test_vmr_takes_the_mean_over_the_images_of_a_prefix(self, parts):
        agent = LocalCredit(tiny_agent(parts, VMR, split=2, suffix_samples=2))
        rollout = with_parts(agent, some_parts(16), torch.rand(2, 4), steps=range(2))
        assert rollout.suffixes == 2
        torch.testing.assert_close(agent.token_advantages(rollout, range(2)), naive(agent, rollout, range(2)))

    def test_one_part_all_over_is_grpo(self, parts):
        agent = LocalCredit(tiny_agent(parts))
        values = np.random.default_rng(0).random(8)
        rollout = with_parts(agent, [[part("all", 0, value, WHOLE)] for value in values])
        expected = agent.unwrapped.token_advantages(rollout, EVERY)
        torch.testing.assert_close(agent.token_advantages(rollout, EVERY), expected)

    def test_parts_that_explain_nothing_are_grpo(self, parts):
        agent = LocalCredit(tiny_agent(parts))
        rollout = with_parts(agent, [[part("letter", 0, 0.5, CORNER)]] * 8, torch.rand(2, 4))
        expected = agent.unwrapped.token_advantages(rollout, EVERY)
        torch.testing.assert_close(agent.token_advantages(rollout, EVERY), expected)

    def test_letters_that_cancel_out_teach(self, parts):
        """All images are worth the same, each has another letter right, and GRPO learns nothing."""
        agent = LocalCredit(tiny_agent(parts))
        found = [
            [part("letter", i, float(i == g % 2), [[32 * i, 0, 32 * i + 32, 64]]) for i in (0, 1)] for g in range(8)
        ]
        rollout = with_parts(agent, found)
        assert not agent.unwrapped.token_advantages(rollout, EVERY).any()
        advantages = agent.token_advantages(rollout, EVERY)
        assert not advantages[:, 0].any()  # over both letters
        assert advantages[0, 5:].view(4, 4).sign().tolist() == [[1, 1, -1, -1]] * 4
        assert advantages.abs().max() < 1.0

    def test_equal_parts_and_rounding_give_exactly_zero(self, parts):
        agent = LocalCredit(tiny_agent(parts))
        scores = torch.full((2, 4), 0.3) + torch.tensor([0.0, 1e-8, 3e-8, -3e-8])
        rollout = with_parts(agent, [[part("letter", 0, 0.1, LEFT), part("letter", 1, 0.2)]] * 8, scores)
        assert not agent.token_advantages(rollout, EVERY).any()

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    def test_scales(self, parts, scale):
        agent = LocalCredit(tiny_agent(parts, advantage_scale=scale))
        rollout = with_parts(agent, some_parts())
        plain = LocalCredit(tiny_agent(parts, advantage_scale="none")).token_advantages(rollout, EVERY)
        ratio = (agent.token_advantages(rollout, EVERY) / plain).nan_to_num(1.0).unflatten(0, (2, 4))
        for p in range(2):  # one factor a prompt
            torch.testing.assert_close(ratio[p], ratio[p, :1, :1].expand_as(ratio[p]), rtol=1e-3, atol=0)
        same = ratio[0, 0, 0].item() == pytest.approx(ratio[1, 0, 0].item(), rel=1e-4)
        assert same == (scale != "group")


class TestCompany:
    def test_learns_saves_and_loads(self, parts, tmp_path):
        agent = PANW(LocalCredit(tiny_agent(parts, learning_rate=1e-3)), alpha=0.8)
        before = weights_of(agent.policy)
        agent.learn(STEPS_A_ROLLOUT)
        assert any(not torch.equal(weight, before[name]) for name, weight in agent.policy.named_parameters())
        agent.save(tmp_path / "agent.zip")
        again = load(tmp_path / "agent.zip", tiny_envs(parts), "cpu")
        assert str(again) == str(agent) == "PANW(LocalCredit(GRPO()), alpha=0.8)"

    def test_panw_on_either_side(self, parts):
        found = []
        for wrap in (lambda agent: PANW(LocalCredit(agent)), lambda agent: LocalCredit(PANW(agent))):
            agent = wrap(tiny_agent(parts))
            rollout = agent.judge(agent.sample(), EVERY)
            found.append(gradients(agent.unwrapped, rollout, agent.token_advantages(rollout, EVERY)))
        assert_same(*found)

    def test_vmr_learns_both_stages(self, parts):
        agent = make(
            "vmr+local",
            tiny_envs(parts),
            tiny_agent(parts).policy,
            split=2,
            group_size=4,
            prompts_per_update=2,
            prefix_updates=1,
            device="cpu",
        )
        agent.learn(agent.timesteps(48))
        assert agent.n_updates == 4

    @pytest.mark.parametrize("cls", [PPO, RLOO, RAFT, TreeGRPO])
    def test_agents_with_advantages_of_their_own_are_refused(self, parts, cls):
        agent = tiny_agent(parts, cls)
        with pytest.raises(ValueError, match=rf"{cls.__name__} has its own: wrap an agent with GRPO's"):
            LocalCredit(agent)
        assert agent.outermost is agent  # as it was

    def test_wrappers_that_it_would_undo_are_refused(self, parts):
        with pytest.raises(ValueError, match=r"undo what SimilarityAdvantage .*'local\+similarity'"):
            LocalCredit(SimilarityAdvantage(tiny_agent(parts)))
        SimilarityAdvantage(LocalCredit(tiny_agent(parts))).learn(1)

    def test_not_an_agent(self):
        with pytest.raises(TypeError, match="wraps GRPO"):
            LocalCredit("grpo")

    def test_a_reward_without_components(self, parts):
        class Bare(Reward):
            name = "bare"

            def score(self, images, scenes):
                return RewardOutput(images.mean((1, 2, 3)) / 255)

        agent = LocalCredit(tiny_agent(parts | {"reward": Bare()}, GRPO))
        with pytest.raises(ValueError, match=r"no components for image 0, .*such as 'ocr'.* or train without 'local'"):
            agent.learn(1)

    def test_logs(self, parts):
        agent = LocalCredit(tiny_agent(parts))
        found = [[part("a", 0, i / 8, LEFT), part("b", 0, 0.0)] for i in range(8)]
        agent.token_advantages(with_parts(agent, found), EVERY)
        logged = agent.logger.name_to_value
        assert logged["local/placed"] == 0.5 and logged["local/left"] == 0.0
        agent.token_advantages(with_parts(agent, found, torch.arange(8.0).view(2, 4) / 4), EVERY)
        assert agent.logger.name_to_value["local/left"] == pytest.approx(0.5)
