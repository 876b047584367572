import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent, tiny_envs, tiny_policy, weights_of

import agents
from agents import GRPO, PANW, VMR, Decoding, MaskPropagation, TreeGRPO
from agents.conflict import measure
from agents.losses import group_advantages
from agents.mask_propagation import boxes_to_mask, propagate_mask
from agents.rollout import collect
from agents.tree import centred_values, node_values, sibling_weight
from agents.vmr import middle_return

MEAN = 1e9  # an eta at which the soft value is the mean


def nested(leaves, branching):
    """One prompt's leaves as a tree of lists."""
    if len(branching) == 1:
        return list(leaves)
    size = len(leaves) // branching[0]
    return [nested(leaves[i * size : (i + 1) * size], branching[1:]) for i in range(branching[0])]


def value(node, eta):
    """By recursion, eq. 10 at every fork."""
    if not isinstance(node, list):
        return node
    return eta * math.log(sum(math.exp(value(child, eta) / eta) for child in node) / len(node))


def level(nodes, depth):
    """The nodes of a level in order, 0 being the children of the prompt."""
    return nodes if depth == 0 else [child for node in nodes for child in level(node, depth - 1)]


def random_scores(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestNodeValues:
    @pytest.mark.parametrize("branching", [(8,), (4, 2), (2, 2, 2), (1, 8), (8, 1), (2, 3, 2)], ids=str)
    def test_by_recursion(self, branching):
        scores = random_scores(3, math.prod(branching))
        values = node_values(scores, branching, 0.5)
        assert len(values) == len(branching) and torch.equal(values[-1], scores)
        for p in range(3):
            tree = nested(scores[p].tolist(), branching)
            for depth, found in enumerate(values):
                expected = [value(node, 0.5) for node in level(tree, depth)]
                torch.testing.assert_close(found[p], torch.tensor(expected, dtype=torch.float64))

    def test_level_by_level_is_eq_10_over_all_leaves(self):
        scores = random_scores(3, 12)
        top = node_values(scores, (2, 3, 2), 0.3)[0]
        torch.testing.assert_close(top, middle_return(scores.view(3, 2, 6), 0.3))

    def test_the_bias_vanishes_with_many_leaves(self):
        """A leaf is worth 1 with probability 0.3, else 0. The expectation over all outcomes, in closed form."""
        eta, p = 0.25, 0.3
        exact = eta * math.log(p * math.exp(1 / eta) + 1 - p)  # eq. 4
        gaps = []
        for k in (1, 2, 4, 8, 64, 512):
            leaves = torch.tril(torch.ones(k + 1, k, dtype=torch.float64), -1)  # row i has i ones
            values = node_values(leaves, (1, k), eta)[0].flatten()
            chances = torch.distributions.Binomial(k, torch.tensor(p, dtype=torch.float64))
            gaps.append(exact - (chances.log_prob(torch.arange(k + 1.0)).exp() * values).sum().item())
        assert all(a > b > 0 for a, b in itertools.pairwise(gaps)) and gaps[-1] < 1e-2 * gaps[0]


class TestCentredValues:
    @pytest.mark.parametrize("branching", [(8,), (4, 2), (2, 2, 2), (2, 3, 2)], ids=str)
    def test_siblings(self, branching):
        scores = random_scores(2, math.prod(branching))
        values = node_values(scores, branching, 0.5)
        centred = centred_values(values, branching, "siblings")
        for found, level_values, k in zip(centred, values, branching, strict=True):
            for p, row in enumerate(level_values.tolist()):
                for i, mine in enumerate(row):
                    others = [row[j] for j in range(i // k * k, i // k * k + k) if j != i]
                    assert found[p, i].item() == pytest.approx(mine - sum(others) / (k - 1))

    def test_shrunk(self):
        """4 prefixes of 2: the leaf's baseline lies between its sibling and the mean of the other prefixes."""
        scores = random_scores(3, 8) + 2 * random_scores(3, 4).repeat_interleave(2, 1)
        values = node_values(scores, (4, 2), MEAN)
        centred = centred_values(values, (4, 2))
        others = (values[0].sum(1, keepdim=True) - values[0]) / 3  # (P, 4)
        sibling = scores.view(3, 4, 2).flip(2)
        noise = [(scores.view(3, 4, 2)[p, :, 0] - scores.view(3, 4, 2)[p, :, 1]).square().mean() / 2 for p in range(3)]
        distance = [(sibling[p] - others[p][:, None]).square().mean() for p in range(3)]
        for p in range(3):
            rest = [q for q in range(3) if q != p]
            weight = 1 - sum(noise[q] for q in rest) / sum(distance[q] for q in rest)
            assert 0 < weight < 1  # neither end is tried here
            for i, j in itertools.product(range(4), range(2)):
                baseline = weight * sibling[p, i, j] + (1 - weight) * others[p, i]
                torch.testing.assert_close(centred[1][p, 2 * i + j], scores[p, 2 * i + j] - baseline)

    @pytest.mark.parametrize("baseline", ["shrunk", "siblings"])
    def test_an_only_child_has_its_parent_s_baseline(self, baseline):
        scores = random_scores(3, 8)
        above, leaves = centred_values(node_values(scores, (8, 1), 0.5), (8, 1), baseline)
        torch.testing.assert_close(leaves, (scores - scores.mean(1, keepdim=True)) * 8 / 7)
        assert torch.equal(above, leaves)

    @pytest.mark.parametrize("baseline", ["shrunk", "siblings"])
    def test_without_anyone_to_compare_with(self, baseline):
        scores = random_scores(3, 4)
        above, leaves = centred_values(node_values(scores, (1, 4), 0.5), (1, 4), baseline)
        assert above.shape == (3, 1) and not above.any()
        torch.testing.assert_close(leaves, (scores - scores.mean(1, keepdim=True)) * 4 / 3)


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_noise_of_pairs(rho):
    """Against images that share nothing, with many prefixes: as the module says."""
    prefix = rho**0.5 * random_scores(20, 2000)
    scores = prefix.repeat_interleave(2, 1) + (1 - rho) ** 0.5 * random_scores(20, 8000)[:, 4000:]
    values = node_values(scores, (2000, 2), MEAN)
    before, after = (part.square().mean().item() for part in centred_values(values, (2000, 2)))
    assert 2 * before == pytest.approx(1 + rho, rel=0.03)  # half as many prefixes
    assert after == pytest.approx(1 - rho**2, rel=0.03)
    siblings = centred_values(values, (2000, 2), "siblings")[1].square().mean().item()
    assert siblings == pytest.approx(2 - 2 * rho, rel=0.03)


class TestSiblingWeight:
    def weight(self, between, within):
        """Of 1000 prompts, 4 prefixes of 2; the spread of prefixes and of the suffixes of one."""
        noise = torch.Generator().manual_seed(0)
        prefix = between * torch.randn(1000, 4, 1, generator=noise, dtype=torch.float64)
        siblings = prefix + within * torch.randn(1000, 4, 2, generator=noise, dtype=torch.float64)
        means = siblings.mean(2)
        above = ((means.sum(1, keepdim=True) - means) / 3).unsqueeze(2)
        return sibling_weight(siblings, siblings.flip(2), above)

    @pytest.mark.parametrize(("between", "within"), [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0)])
    def test_is_the_least_error(self, between, within):
        error = between**2 * 4 / 3 + within**2 / 6  # of the mean of 3 other prefixes of 2, for this one's value
        found = self.weight(between, within)
        assert found.shape == (1000,)
        torch.testing.assert_close(found.mean().item(), error / (error + within**2), atol=0.03, rtol=0)

    def test_ends(self):
        assert torch.equal(self.weight(1.0, 0.0), torch.ones(1000, dtype=torch.float64))
        alone = random_scores(1, 2, 2)
        assert sibling_weight(alone, alone.flip(2), alone.mean((1, 2), keepdim=True).expand(1, 2, 1)).item() == 1
        equal = torch.full((3, 2, 2), 0.7)
        assert torch.equal(sibling_weight(equal, equal, equal[..., :1]), torch.ones(3))
        far = random_scores(5, 4, 2)  # the mean of the others is exact, and siblings are noise
        far = far - far.mean(2, keepdim=True)
        assert sibling_weight(far, far.flip(2), torch.zeros(5, 4, 1)).max() < 0.5

    def test_of_a_prompt_does_not_depend_on_its_own_images(self):
        siblings = random_scores(4, 3, 2)
        above = random_scores(4, 3, 1)
        changed = siblings.clone()
        changed[1] *= 10
        before, after = (sibling_weight(s, s.flip(2), above) for s in (siblings, changed))
        assert before[1] == after[1] and (before != after).sum() == 3


class TestUnbiased:
    """Every tree there is, weighed by its probability: the mean of advantage times score function, all levels.

    Codes of the levels are drawn from softmax tables, each given all before it.
    """

    def exact(self, tables, rewards):
        total, chance = rewards, torch.ones((), dtype=torch.float64)
        for table in tables:
            chance = chance.unsqueeze(-1) * table.softmax(-1)
        return torch.autograd.grad((chance * total).sum(), tables)

    def trees(self, tables, branching):
        """The codes of all leaves, ``(N, G, levels)``, of all N trees, and their probabilities."""

        def grow(depth, path):
            """All ways in which a node can go on: (codes of its leaves, probability)."""
            if depth == len(branching):
                return [([path], 1.0)]
            chances = tables[depth].softmax(-1)[tuple(path)].tolist()
            ways = [([*rows], p * q) for code, p in enumerate(chances) for rows, q in grow(depth + 1, [*path, code])]
            found = [([], 1.0)]
            for _ in range(branching[depth]):
                found = [(rows + more, p * q) for rows, p in found for more, q in ways]
            return found

        codes, chances = zip(*grow(0, []), strict=True)
        return torch.tensor(codes), torch.tensor(chances, dtype=torch.float64)

    def expected(self, tables, codes, chances, centred):
        """Of the loss that an update has: the mean over the leaves, shared codes in each of them."""
        loss = 0.0
        for depth, part in enumerate(centred):
            leaves = part.repeat_interleave(codes.shape[1] // part.shape[1], 1)  # (N, G)
            logp = tables[depth].log_softmax(-1)[tuple(codes[..., : depth + 1].unbind(-1))]  # (N, G)
            loss = loss + (chances[:, None] * leaves * logp).mean(1).sum()
        return torch.autograd.grad(loss, tables)

    def world(self, levels, codes):
        noise = torch.Generator().manual_seed(1)
        shapes = [(codes,) * (i + 1) for i in range(levels)]
        tables = [torch.randn(s, generator=noise, dtype=torch.float64).requires_grad_() for s in shapes]
        return tables, torch.randn(shapes[-1], generator=noise, dtype=torch.float64)

    @pytest.mark.parametrize("branching", [(3, 2), (2, 3), (2, 2, 2)], ids=str)
    def test_siblings(self, branching):
        tables, rewards = self.world(len(branching), 2)
        codes, chances = self.trees(tables, branching)
        assert chances.sum().item() == pytest.approx(1)
        values = node_values(rewards[tuple(codes.unbind(-1))], branching, MEAN)
        found = self.expected(tables, codes, chances, centred_values(values, branching, "siblings"))
        for ours, exact in zip(found, self.exact(tables, rewards), strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-7, rtol=0)

    def test_shrunk(self):
        """With two prompts of the same kind, and so all pairs of trees: each sets the other's weight."""
        tables, rewards = self.world(2, 2)
        codes, chances = self.trees(tables, (2, 2))  # N = 2^2 4^2
        count = len(codes)
        scores = rewards[tuple(codes.unbind(-1))]  # (N, 4)
        found = torch.zeros_like(scores), torch.zeros_like(scores)
        for other in range(count):  # the tree that is the other prompt's
            for mine in range(count):
                values = node_values(scores[[mine, other]], (2, 2), MEAN)
                for total, part in zip(found, centred_values(values, (2, 2)), strict=True):
                    total[mine] += chances[other] * part[0].repeat_interleave(4 // part.shape[1])
        shrunk = self.expected(tables, codes, chances, found)
        for ours, exact in zip(shrunk, self.exact(tables, rewards), strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-7, rtol=0)
        siblings = centred_values(node_values(scores, (2, 2), MEAN), (2, 2), "siblings")[1]
        assert (found[1] - siblings).abs().max() > 0.1  # the weight was not 1 throughout

    def test_with_a_finite_eta_each_level_learns_its_own_value(self):
        """The finest level the reward, whatever eta; the coarse one eq. 10, here of 2 leaves and so a little biased."""
        tables, rewards = self.world(2, 2)
        codes, chances = self.trees(tables, (2, 2))
        values = node_values(rewards[tuple(codes.unbind(-1))], (2, 2), 0.5)
        coarse, fine = self.expected(tables, codes, chances, centred_values(values, (2, 2), "siblings"))
        torch.testing.assert_close(fine, self.exact(tables, rewards)[1], atol=1e-7, rtol=0)
        suffix = tables[1].softmax(-1).detach()
        pairs = middle_return(torch.stack(torch.broadcast_tensors(rewards[:, :, None], rewards[:, None]), -1), 0.5)
        soft = (suffix[:, :, None] * suffix[:, None] * pairs).sum((1, 2))  # E of eq. 10 after each prefix
        (exact,) = torch.autograd.grad((tables[0].softmax(-1) * soft).sum(), tables[0])
        torch.testing.assert_close(coarse, exact, atol=1e-7, rtol=0)


def tree_agent(parts, **options):
    return tiny_agent(parts, TreeGRPO, **options)


class TestRollout:
    """P = 2, G = 4; grids of 1, 4 and 16 tokens."""

    def test_leaves_share_what_is_before_their_fork(self, parts):
        agent = tree_agent(parts, forks=(1, 2), branching=(2, 3, 2), group_size=12)
        rollout = agent.sample()
        assert rollout.scores.shape == (2, 12) and rollout.suffixes == 1 and rollout.forks == ((1, 3), (2, 2))
        for t, copies in enumerate((6, 2, 1)):
            assert rollout.grids[t].shape[0] == 24
            first, *others = rollout.grids[t].unflatten(0, (-1, copies)).unbind(1)
            assert all(torch.equal(first, other) for other in others)
        assert len(torch.unique(rollout.grids[1][:6], dim=0)) > 1 and len(torch.unique(rollout.grids[2], dim=0)) > 12
        assert [scene.prompt for scene in rollout.scenes[:12]] == [rollout.scenes[0].prompt] * 12
        assert agent.images_decoded == 24 and agent.num_timesteps == 2 * (2 + 6 + 12)
        assert agent.tokens_sampled == 2 * (2 * 1 + 6 * 4 + 12 * 16)

    def test_one_fork_is_that_of_vmr(self, parts):
        policy = tiny_policy(parts["tokenizer"])
        one, several = (
            collect(policy, tiny_envs(parts), 3, Decoding(), torch.Generator().manual_seed(0), fork_at=at, seed=7)
            for at in ((1, 2), ((1, 2),))
        )
        assert all(torch.equal(a, b) for a, b in zip(one.grids, several.grids, strict=True))
        assert np.array_equal(one.images, several.images) and one.forks == several.forks == ((1, 2),)

    @pytest.mark.parametrize("fork_at", [((2, 2), (1, 2)), ((1, 2), (1, 2)), ((1, 2), (3, 2)), ((1, 0),)], ids=str)
    def test_bad_forks(self, parts, fork_at):
        with pytest.raises(ValueError, match="fork_at"):
            collect(tiny_policy(parts["tokenizer"]), tiny_envs(parts), 2, Decoding(), fork_at=fork_at)

    @pytest.mark.parametrize("options", [{}, {"forks": (1, 2), "group_size": 8}, {"forks": ()}], ids=str)
    def test_timesteps_are_those_of_so_many_images(self, parts, options):
        agent = tree_agent(parts, **options)
        agent.iterate()
        assert agent.timesteps(agent.images_decoded) == agent.num_timesteps


class TestAdvantages:
    def judged(self, parts, **options):
        agent = tree_agent(parts, **options)
        return agent, agent.judge(agent.sample(), range(3))

    def test_tokens_have_their_node_s(self, parts):
        options = {"forks": (1, 2), "branching": (2, 3, 2), "group_size": 12, "eta": 0.1, "advantage_scale": "none"}
        agent, rollout = self.judged(parts, **options)
        values = node_values(rollout.scores.double(), (2, 3, 2), 0.1)
        assert rollout.advantages.shape == (24, 21)
        found = rollout.advantages.split([1, 4, 16], 1)
        for part, centred, copies in zip(found, centred_values(values, (2, 3, 2)), (6, 2, 1), strict=True):
            expected = 11 / 12 * centred.repeat_interleave(copies, 1).flatten()
            torch.testing.assert_close(part, expected.float()[:, None].expand_as(part))
        some = agent.advantages(rollout, range(1, 3))
        assert torch.equal(some, rollout.advantages[:, 1:])

    @pytest.mark.parametrize(
        ("options", "scale"),
        [
            *(({"forks": ()}, scale) for scale in ("group", "batch", "none")),
            *(({"forks": 2, "branching": (4, 1)}, scale) for scale in ("group", "none")),
        ],
        ids=str,
    )
    def test_without_siblings_is_grpo(self, parts, options, scale):
        agent, rollout = self.judged(parts, advantage_scale=scale, **options)
        vanilla = tiny_agent(parts, GRPO, advantage_scale=scale)
        theirs = vanilla.judge(vanilla.sample(), range(3))
        assert np.array_equal(rollout.images, theirs.images)
        torch.testing.assert_close(rollout.advantages, theirs.advantages[:, None].expand(-1, 21))
        nudge(agent), nudge(vanilla)
        tokens = vanilla.token_advantages(theirs, range(3))
        assert_same(
            gradients(agent, rollout, rollout.advantages), gradients(vanilla, theirs, tokens), atol=1e-6, rtol=1e-4
        )

    def test_with_one_prefix_is_vmr_s_suffix_update(self, parts):
        _, rollout = self.judged(parts, forks=2, branching=(1, 4))
        vmr = tiny_agent(parts, VMR, split=2)
        vmr._n_updates = 3
        assert vmr.stage == "suffix"
        theirs = vmr.sample()
        assert np.array_equal(rollout.images, theirs.images)
        expected = group_advantages(theirs.scores).flatten()[:, None].expand(-1, 16)
        torch.testing.assert_close(rollout.advantages[:, 5:], expected)
        assert not rollout.advantages[:, :5].any()

    def test_of_the_prefix_are_those_of_vmr_s_prefix_update(self, parts):
        _, rollout = self.judged(parts, forks=2, branching=(4, 2), group_size=8, eta=0.2, advantage_scale="none")
        vmr = tiny_agent(parts, VMR, split=2, suffix_samples=2, eta=0.2, advantage_scale="none")
        theirs = vmr.judge(vmr.sample(), range(2))
        assert np.array_equal(rollout.images, theirs.images)
        expected = 7 / 8 * 4 / 3 * theirs.advantages.repeat_interleave(2)  # the factors of the two baselines
        torch.testing.assert_close(rollout.advantages[:, 0], expected)

    def test_equal_rewards_teach_nothing(self, parts):
        agent = tree_agent(parts)
        rollout = agent.sample()
        rollout.scores[1] = 0.3
        advantages = agent.judge(rollout, range(3)).advantages
        assert not advantages[4:].any() and advantages[:4].any()

    def test_another_tree_is_judged_as_what_it_is(self, parts):
        """As by the probe of conflicts, which draws no trees."""
        agent, vanilla = tree_agent(parts), tiny_agent(parts, GRPO)
        flat = vanilla.sample()
        theirs = vanilla.judge(flat, range(3)).advantages[:, None].expand(-1, 21)
        torch.testing.assert_close(agent.judge(flat, range(3)).advantages, theirs)
        torch.testing.assert_close(measure(agent, flat).norms, measure(vanilla, flat).norms, rtol=1e-4, atol=1e-7)

    def test_spreads_are_logged(self, parts):
        agent, rollout = self.judged(parts, eta=0.5)
        logged = agent.logger.name_to_value
        pairs = rollout.scores.view(2, 2, 2).double().numpy()
        assert logged["tree/spread_2"] == pytest.approx(np.sqrt(pairs.var(-1, ddof=1).mean()))
        soft = middle_return(rollout.scores.view(2, 2, 2).double(), 0.5).numpy()
        assert logged["tree/spread_1"] == pytest.approx(np.sqrt(soft.var(-1, ddof=1).mean()))


class TestUpdate:
    @pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
    def test_every_level_is_a_mean_over_its_nodes(self, parts, masked):
        """Tokens that leaves share count once: here they are computed once."""
        agent = tree_agent(parts, forks=(1, 2), group_size=8, kl_coef=0.3)
        if masked:
            MaskPropagation(agent)
        nudge(agent)
        rollout = agent.sample()
        rollout.regions[:] = [np.array([[0, 0, 16 * (1 + i % 3), 16]], np.float32) for i in range(16)]
        rollout = agent.judge(rollout, range(3))
        found = gradients(agent, rollout, rollout.advantages)
        finest = torch.stack([boxes_to_mask(boxes, agent.policy.schedule) for boxes in rollout.regions])
        masks = propagate_mask(finest, agent.policy.schedule)
        loss = 0.0
        for t, (copies, tokens) in enumerate(zip((4, 2, 1), agent.policy.schedule.slices, strict=True)):
            nodes = torch.arange(0, 16, copies)
            new = agent.log_probs(agent.policy, rollout, nodes, range(t, t + 1))
            kl = agent.kl_to_reference(rollout, nodes, range(t, t + 1), new)
            share = masks[t].float().flatten(1).unflatten(0, (-1, copies)).mean(1) if masked else 1.0
            gain = share * rollout.advantages[nodes, tokens] * new.logp
            loss = loss + (0.3 * kl - gain).mean(0).sum() / 21
        agent.policy.zero_grad()
        loss.backward()
        assert_same(found, {n: p.grad for n, p in agent.policy.named_parameters()}, atol=1e-6, rtol=1e-3)

    def test_micro_batches_leave_it_unchanged(self, parts):
        found = []
        for micro_batch in (None, 3):
            agent = tree_agent(parts, kl_coef=0.1, entropy_coef=0.01, micro_batch=micro_batch)
            PANW(MaskPropagation(agent))
            nudge(agent)
            rollout = agent.judge(agent.sample(), range(3))
            found.append(gradients(agent, rollout, rollout.advantages))
        assert_same(*found, atol=1e-6, rtol=1e-4)

    def test_the_expected_gradient_is_that_of_the_expected_reward(self, parts):
        """A rollout of every tree there is, all as likely under a uniform policy: its update is the expectation.

        Two tokens decide, the first ones of the second and of the third grid, which are 0 or 1 each.
        """
        agent = tree_agent(parts, forks=2, eta=MEAN, baseline="siblings", advantage_scale="none", kl_coef=0.0)
        rewards = random_scores(2, 2)
        codes = [(a, *ab) for a in (0, 1) for ab in itertools.product((0, 1), repeat=2)]  # a prefix and two suffixes
        trees = [
            [(a, x) for a, *suffixes in pair for x in suffixes] for pair in itertools.product(codes, repeat=2)
        ]  # 64 of 4 leaves
        leaves = torch.tensor(trees).flatten(0, 1)  # (256, 2)
        rollout = agent.sample()
        rollout = rollout.rows(agent.policy, torch.zeros(64, 4, dtype=torch.int64))
        for t, column in ((1, 0), (2, 1)):
            rollout.grids[t][:, 0, 0] = leaves[:, column]
        scores = rewards[leaves[:, 0], leaves[:, 1]].view(64, 4).float()
        rollout = replace(rollout, scores=scores)
        tables = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2, 2))

        def forward(cond, grids, steps):
            logits = torch.full((len(grids[0]), 21, 1, 32), -50.0)
            logits[:, 1, 0, :2] = tables[0][0]
            logits[:, 5, 0, :2] = tables[1][0][grids[1][:, 0, 0]]
            return logits

        agent.policy.forward = forward
        rollout = agent.judge(rollout, range(3))
        weights = agent.aggregate(agent.token_weights(rollout, range(3)), range(3))
        loss, _ = agent.loss(rollout, torch.arange(256), rollout.advantages, weights, None, range(3))
        loss.backward()
        chances = tables[0][0].softmax(-1)[:, None] * tables[1][0].softmax(-1)
        exact = torch.autograd.grad((chances * rewards.float()).sum(), tables)
        for table, gradient in zip(tables, exact, strict=True):
            torch.testing.assert_close(table.grad, -3 / 4 / 21 * gradient, atol=1e-7, rtol=1e-4)  # (G - 1) / G, 1 / L

    @pytest.mark.parametrize("recipe", ["tree+panw+mp", "tree+mp+panw", "tree+stage", "tree+panw+stage+mp"])
    def test_composes(self, parts, recipe):
        options = {"group_size": 8, "prompts_per_update": 2, "seed": 0, "device": "cpu", "learning_rate": 1e-3}
        agent = agents.make(recipe, tiny_envs(parts), tiny_policy(parts["tokenizer"]), forks=(1, 2), **options)
        before = weights_of(agent.policy)
        agent.learn(agent.timesteps(32))
        assert agent.n_updates == 2 and agent.images_decoded == 32
        assert any(not torch.equal(before[name], weight) for name, weight in weights_of(agent.policy).items())
        assert all(torch.isfinite(weight).all() for weight in agent.policy.parameters())

    @pytest.mark.parametrize("how", ["drop", "resample"])
    def test_dynamic_sampling(self, parts, how):
        agent = tree_agent(parts, dynamic_sampling=how, max_batches=2, kl_in="reward", kl="k1", kl_coef=0.1)
        agent.iterate()
        assert agent.n_updates == 1

    def test_several_steps_with_guidance_and_truncation(self, parts):
        options = {"decoding": Decoding(top_k=4, guidance=2.0), "support": "sampler", "epochs": 2, "minibatches": 2}
        agent = tree_agent(parts, learning_rate=1e-4, micro_batch=3, **options)
        agent.iterate()
        assert all(torch.isfinite(weight).all() for weight in agent.policy.parameters())


class TestFiles:
    OPTIONS = {"forks": (1, 2), "branching": (1, 2, 2), "kl_coef": 0.1, "epochs": 2, "learning_rate": 1e-3, "eta": 0.3}

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, tmp_path):
        one, two = (tree_agent(parts, **self.OPTIONS).learn(n) for n in (1, STEPS_A_ROLLOUT))
        assert (one.n_updates, two.n_updates) == (1, 2)
        one.save(tmp_path / "agent.zip")
        resumed = TreeGRPO.load(tmp_path / "agent.zip", env=tiny_envs(parts), device="cpu")
        assert (resumed.forks, resumed.branching, str(resumed)) == ((1, 2), (1, 2, 2), str(one))
        resumed.learn(1, reset_num_timesteps=False)
        assert_same(weights_of(resumed.policy), weights_of(two.policy), atol=0, rtol=0)

    def test_settings_can_be_replaced(self, parts, tmp_path):
        PANW(tree_agent(parts)).unwrapped.save(tmp_path / "agent.zip")
        replaced = {"forks": (1, 2), "branching": (1, 2, 2), "eta": 2.0, "alpha": 0.2}
        loaded = agents.load(tmp_path / "agent.zip", device="cpu", **replaced)
        assert (loaded.forks, loaded.branching, loaded.eta, loaded.alpha) == ((1, 2), (1, 2, 2), 2.0, 0.2)
        with pytest.raises(ValueError, match="not group_size=6"):
            agents.load(tmp_path / "agent.zip", device="cpu", group_size=6)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "forks", "branching"),
        [
            ({}, (2,), (2, 2)),
            ({"group_size": 16}, (2,), (8, 2)),
            ({"forks": "m_16"}, (1,), (2, 2)),
            ({"forks": [1, "half"], "group_size": 8}, (1, 2), (2, 2, 2)),
            ({"forks": 1, "branching": [1, 4]}, (1,), (1, 4)),
            ({"forks": ()}, (), (4,)),
        ],
        ids=str,
    )
    def test_forks_and_branching(self, parts, options, forks, branching):
        agent = tree_agent(parts, **options)
        assert (agent.forks, agent.branching) == (forks, branching)
        assert str(agent) == f"TreeGRPO(forks={forks}, branching={branching}, eta=1.0)"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"forks": 3}, "forks=3 .*at most 2 of 3"),
            ({"forks": (2, 1)}, r"forks=\(2, 1\)"),
            ({"forks": (2, "half")}, "'half'"),
            ({"forks": "m_33"}, "m_33"),
            ({"forks": 0}, "got 0"),
            ({"group_size": 5}, "group_size=5 is no multiple of 2"),
            ({"group_size": 2}, "group_size=2 is no .*: choose 4, 6"),
            ({"forks": (1, 2), "group_size": 6}, "group_size=6 is no multiple of 4"),
            ({"branching": (2, 3)}, r"branching=\(2, 3\) makes 6 images, not group_size=4"),
            ({"branching": (4,)}, r"branching must be 2 whole numbers.*got \(4,\)"),
            ({"branching": (4, 0)}, r"\(4, 0\)"),
            ({"branching": (8, 0.5)}, r"\(8, 0.5\)"),
            ({"eta": 0.0}, "eta must be"),
            ({"eta": math.inf}, "eta must be"),
            ({"baseline": "mean"}, "baseline 'mean'.*shrunk, siblings"),
        ],
        ids=str,
    )
    def test_bad_options(self, parts, options, message):
        with pytest.raises(ValueError, match=message):
            tree_agent(parts, **options)
