"""The paper's theorems by enumeration: what holds, to 1e-8, and what does not."""

import itertools
import math

import numpy as np
import pytest
import torch

from agents import exact
from agents.policies.table import TablePolicy
from agents.vmr import middle_return
from var_env.tabular import REWARDS, every_image, tabular_parts

ETA = 0.25
SIZES = (1, 2, 4)


def world(reward, spread=1.0, seed=1):
    """Returns of all images, and a reference policy of the family."""
    parts = tabular_parts(reward=reward, seed=seed)
    return torch.from_numpy(parts["reward"].table), TablePolicy(parts["tokenizer"], spread, seed).sites()


def free(joint):
    """Any policy as one of a family whose every grid has one site: then nothing is constrained."""
    return [table.unsqueeze(1) for table in joint]


def value(sites, old, returns, eta=ETA):
    return exact.objective(exact.joint(sites), exact.joint(old), returns, eta).item()


def soft(old, returns, eta=ETA):
    """V_m* for every m, and pi*."""
    joint = exact.joint(old)
    return exact.soft_values(joint, returns, eta), exact.soft_optimal(joint, returns, eta)


def random_sites(seed, spread=1.5):
    return TablePolicy(tabular_parts()["tokenizer"], spread, seed).sites()


class TestObjective:
    def test_by_hand(self):
        returns, old = world("random")
        policy, expected = random_sites(5), 0.0
        for number, tokens in enumerate(every_image(tabular_parts()["tokenizer"].schedule, 2).tolist()):
            logp, old_logp, state = 0.0, 0.0, 0
            for t, part in enumerate((slice(0, 1), slice(1, 3), slice(3, 7))):
                for i, token in enumerate(tokens[part]):
                    logp += policy[t][state, i, token].item()
                    old_logp += old[t][state, i, token].item()
                for token in tokens[part]:
                    state = 2 * state + token
            expected += math.exp(logp) * (returns[number].item() - ETA * (logp - old_logp))
        assert value(policy, old, returns) == pytest.approx(expected, abs=1e-12)

    def test_the_variational_identity(self):
        """Eq. 30, and the KL as a sum over states, eq. 47, which are right."""
        returns, old = world("trap")
        values, star = soft(old, returns)
        policy = exact.joint(random_sites(3))
        logp, best = exact.trajectory_logp(policy), exact.trajectory_logp(star)
        kl = (logp.exp() * (logp - best)).sum()
        by_state, reached = 0.0, torch.zeros(1, dtype=torch.float64)  # log d_pi
        for mine, theirs in zip(policy, star, strict=True):
            by_state += (reached.exp() * (mine.exp() * (mine - theirs)).sum(1)).sum()
            reached = (reached[:, None] + mine).flatten()
        assert by_state.item() == pytest.approx(kl.item(), abs=1e-10)
        j = exact.objective(policy, exact.joint(old), returns, ETA)
        assert j.item() == pytest.approx((values[0] - ETA * kl).item(), abs=1e-10)


def test_eq_2_is_where_a_kl_that_is_charged_by_state_ends():
    """Where each state pays for its own KL alone, as with a KL in the loss, the gradient is 0 at eq. 1 with eq. 2."""
    returns, old = world("trap")
    joint = exact.joint(old)

    def gradient(policy):
        logits = [table.clone().requires_grad_() for table in policy]
        mine = [table.log_softmax(1) for table in logits]
        value, reached = (exact.trajectory_logp(mine)[0].exp() * returns).sum(), torch.zeros(1, dtype=torch.float64)
        for table, theirs in zip(mine, joint, strict=True):
            value = value - ETA * (reached.exp() * (table.exp() * (table - theirs)).sum(1)).sum()
            reached = (reached[:, None] + table.detach()).flatten()  # how often a state is visited is taken as given
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, logits)])

    assert gradient(exact.expected_return_optimal(joint, returns, ETA)).abs().max() < 1e-10
    assert gradient(soft(old, returns)[1]).abs().max() > 1e-2


@pytest.mark.parametrize("reward", REWARDS)
class TestUnconstrained:
    def test_eqs_1_and_3_are_the_maximiser(self, reward):
        returns, old = world(reward)
        joint = exact.joint(old)
        for eta in (ETA, 1.0):
            values, star = soft(old, returns, eta)
            best = exact.objective(star, joint, returns, eta).item()
            assert best == pytest.approx(values[0].item(), abs=1e-8)
            for seed in range(10):  # small steps away only lose
                noise = torch.Generator().manual_seed(seed)
                other = [(t + 0.01 * torch.randn(t.shape, generator=noise)).log_softmax(1) for t in star]
                assert exact.objective(other, joint, returns, eta).item() < best
        if reward in ("smooth", "trap", "random"):  # it takes seconds
            _, found = exact.ascend(free(joint), returns, 1.0, starts=1)
            assert found[0] == pytest.approx(best, abs=1e-8) and found[0] <= best + 1e-12

    def test_the_middle_value_is_what_the_suffix_problem_is_worth(self, reward):
        """Eq. 4 by its definition, and by going uphill from all states at once."""
        returns, old = world(reward)
        joint = exact.joint(old)
        for eta in (ETA, 1.0):
            values, _ = soft(old, returns, eta)
            for m in (1, 2):
                logp = exact.trajectory_logp(joint[m:])  # (S_m, futures)
                by_definition = eta * ((returns.view_as(logp) / eta).exp() * logp.exp()).sum(1).log()  # eq. 4
                torch.testing.assert_close(values[m], by_definition, atol=1e-8, rtol=0)
        _, found = exact.ascend(free(joint[2:]), returns, 1.0, starts=1)
        assert found[0] == pytest.approx(values[2].sum().item(), abs=1e-8)

    @pytest.mark.parametrize("m", [1, 2])
    def test_two_stages_are_the_full_horizon(self, reward, m):
        returns, old = world(reward)
        values, star = soft(old, returns)
        stages = [table.squeeze(1) for table in exact.two_stage(free(exact.joint(old)), returns, ETA, m, values[m])]
        for found, table in zip(stages, star, strict=True):
            torch.testing.assert_close(found, table, atol=1e-8, rtol=0)

    def test_q_of_eq_3_pays_for_what_follows_and_q_of_eq_2_does_not(self, reward):
        """Eq. 3's Q* is the expected return of pi* less the KL that the later steps pay. Eq. 2 leaves that out."""
        returns, old = world(reward)
        values, star = soft(old, returns)
        joint = exact.joint(old)
        for t in range(2):
            paid = exact.objective(star[t + 1 :], joint[t + 1 :], returns, ETA)
            torch.testing.assert_close(values[t + 1], paid, atol=1e-8, rtol=0)
        other = exact.expected_return_optimal(joint, returns, ETA)
        lost = values[0].item() - exact.objective(other, joint, returns, ETA).item()
        assert lost > (1e-4 if reward != "smooth" else 1e-5)
        torch.testing.assert_close(other[2], star[2], atol=1e-12, rtol=0)  # no step follows the last


class TestFamily:
    @pytest.mark.parametrize(("reward", "eta"), [(name, 1.0) for name in REWARDS] + [("xor", ETA), ("random", ETA)])
    def test_backward_induction_is_the_best_of_the_family(self, reward, eta):
        """Against going uphill on J from random places: nothing is better, and some come to the same."""
        returns, old = world(reward)
        best, values = exact.best_in_family(old, returns, eta)
        assert value(best, old, returns, eta) == pytest.approx(values[0].item(), abs=1e-10)
        _, found = exact.ascend(old, returns, eta, starts=1)
        assert max(found) <= values[0].item() + 1e-10
        near = [(table + 0.1 * random).log_softmax(-1) for table, random in zip(best, random_sites(7), strict=True)]
        assert value(near, old, returns, eta) < values[0].item()
        if eta == 1.0:  # at lower temperatures there are local optima
            assert max(found) == pytest.approx(values[0].item(), abs=1e-8)

    @pytest.mark.parametrize("reward", ["trap", "random"])
    def test_projections_are_global(self, reward):
        """Against a dense grid of all products of four sites; between its points KL changes by less than 0.02."""
        returns, old = world(reward)
        _, star = soft(old, returns)
        line = torch.linspace(-6, 6, 13, dtype=torch.float64)
        logits = torch.stack([torch.cartesian_prod(*[line] * 4), torch.zeros(13**4, 4, dtype=torch.float64)], -1)
        everything = exact.grid_logp(logits.log_softmax(-1))  # (13^4, 16)
        _, kl = exact.project(star[2], 4)
        for target, found in zip(star[2], kl, strict=True):
            grid = (everything.exp() * (everything - target)).sum(1).min()
            assert found <= grid + 1e-12 and grid - found < 0.05

    def test_a_product_is_its_own_projection(self):
        for table, n in zip(random_sites(2), SIZES, strict=True):
            found, kl = exact.project(exact.grid_logp(table), n)
            torch.testing.assert_close(found, table, atol=1e-8, rtol=0)
            assert kl.abs().max() < 1e-12

    @pytest.mark.parametrize("reward", REWARDS)
    def test_the_lost_value_is_a_reverse_kl(self, reward):
        """V* - V-dagger of a state is eta times the least KL to pi* over what follows: what Theorem 1 leaves out."""
        returns, old = world(reward)
        values, star = soft(old, returns)
        best, family = exact.best_in_family(old, returns, ETA)
        for m in (0, 1, 2):
            logp, target = exact.trajectory_logp(exact.joint(best)[m:]), exact.trajectory_logp(star[m:])
            kl = (logp.exp() * (logp - target)).sum(1)
            torch.testing.assert_close(values[m] - family[m], ETA * kl, atol=1e-10, rtol=0)


def theorem_1(old, returns, eta=ETA):
    return exact.project_policy(soft(old, returns, eta)[1], SIZES)


def theorem_2(old, returns, m, eta=ETA):
    return exact.two_stage(old, returns, eta, m, soft(old, returns, eta)[0][m])


class TestTheoremsInTheFamily:
    @pytest.mark.parametrize("reward", ["smooth", "copy", "sparse", "xor"])
    def test_they_hold_where_no_state_loses_more_than_another(self, reward):
        """A uniform reference: pi* is a product ("smooth", "copy"), or every state misses it by as much."""
        returns, old = world(reward, spread=0.0)
        best = exact.best_in_family(old, returns, ETA)[1][0].item()
        for policy in (theorem_1(old, returns), theorem_2(old, returns, 1), theorem_2(old, returns, 2)):
            assert value(policy, old, returns) == pytest.approx(best, abs=1e-8)

    def test_a_counterexample_worse_than_the_reference(self):
        """Both theorems step into the trap: V* counts on a suffix that no policy of the family can draw."""
        returns, old = world("trap", spread=0.0)
        best, values = exact.best_in_family(old, returns, ETA)
        trap_of_family, trap_of_star = best[0][0, 0, 1].exp(), soft(old, returns)[1][0][0, 1].exp()
        assert trap_of_family < 0.55 and trap_of_star > 0.75
        for policy in (theorem_1(old, returns), theorem_2(old, returns, 1), theorem_2(old, returns, 2)):
            assert value(policy, old, returns) < value(old, old, returns) - 0.002 < values[0].item() - 0.03

    @pytest.mark.parametrize("reward", ["copy", "sparse", "xor", "trap", "random"])
    def test_neither_holds_with_another_reference(self, reward):
        returns, old = world(reward)
        best = exact.best_in_family(old, returns, ETA)[1][0].item()
        assert best - value(theorem_1(old, returns), old, returns) > 1e-5
        assert best - min(value(theorem_2(old, returns, m), old, returns) for m in (1, 2)) > 1e-5

    def test_theorem_1_holds_for_the_last_grid_and_fails_before_it(self):
        """Step 6 of its proof: a choice at one state weighs the KLs of the states it leads to."""
        returns, old = world("trap")
        best, projected = exact.best_in_family(old, returns, ETA)[0], theorem_1(old, returns)
        torch.testing.assert_close(best[2], projected[2], atol=1e-8, rtol=0)
        assert (best[0].exp() - projected[0].exp()).abs().max() > 0.1

    @pytest.mark.parametrize("reward", REWARDS)
    @pytest.mark.parametrize("eta", [0.1, 1.0])
    def test_with_the_values_of_the_family_both_hold(self, reward, eta):
        """The mended theorems: project old exp(V-dagger / eta) in place of old exp(V* / eta), and give the prefix
        V-dagger."""
        returns, old = world(reward)
        _, values = exact.best_in_family(old, returns, eta)
        for m in (1, 2):
            stages = exact.two_stage(old, returns, eta, m, values[m])
            assert value(stages, old, returns, eta) == pytest.approx(values[0].item(), abs=1e-8)
        targets = [
            exact.grid_logp(table) + after.view(len(table), -1) / eta
            for table, after in zip(old, values[1:], strict=True)
        ]
        projected = exact.project_policy(targets, SIZES)
        assert value(projected, old, returns, eta) == pytest.approx(values[0].item(), abs=1e-8)

    @pytest.mark.parametrize("reward", REWARDS)
    @pytest.mark.parametrize("m", [1, 2])
    def test_what_theorem_2_loses_is_bounded(self, reward, m):
        """By the spread over s_m of what the family lacks there, V* - V-dagger: 0 where it is the same everywhere."""
        for spread, eta in ((0.0, 0.25), (1.0, 0.1), (1.0, 1.0)):
            returns, old = world(reward, spread)
            values = exact.best_in_family(old, returns, eta)[1]
            missing = soft(old, returns, eta)[0][m] - values[m]
            lost = values[0].item() - value(theorem_2(old, returns, m, eta), old, returns, eta)
            assert -1e-10 < lost <= (missing.max() - missing.min()).item() + 1e-10

    def test_the_optimum_is_not_unique(self):
        """Definition 3's uniqueness: with xor the family may settle on either way."""
        returns, old = world("xor", spread=0.0)
        best = exact.best_in_family(old, returns, ETA)[0]
        other = [*best[:2], best[2].flip(-1)]  # every token of the last grid the other way round
        assert (best[2].exp() - other[2].exp()).abs().max() > 0.9
        assert value(other, old, returns) == pytest.approx(value(best, old, returns), abs=1e-10)


class TestEstimator:
    @pytest.mark.parametrize("k", [1, 2, 3])
    @pytest.mark.parametrize("eta", [0.05, 1.0])
    def test_moments_by_listing_every_draw(self, k, eta):
        returns, old = world("random")
        suffix = exact.joint(old)[2:]
        found = exact.middle_return_moments(suffix, returns, eta, k)
        for state in (0, 5):
            p, r = suffix[0][state].exp(), returns.view(8, 16)[state]
            draws = torch.tensor(list(itertools.product(range(16), repeat=k)))
            chance, estimate = p[draws].prod(1), middle_return(r[draws], eta)
            mean = (chance * estimate).sum()
            assert found.mean[state].item() == pytest.approx(mean.item(), abs=1e-10)
            variance = (chance * (estimate - mean).square()).sum().item()
            assert found.variance[state].item() == pytest.approx(variance, abs=1e-10)

    def test_one_suffix_is_the_mean_and_many_the_soft_value(self):
        returns, old = world("trap")
        suffix = exact.joint(old)[2:]
        means = (suffix[0].exp() * returns.view(8, 16)).sum(1)
        torch.testing.assert_close(exact.middle_return_moments(suffix, returns, ETA, 1).mean, means)
        many = exact.middle_return_moments(suffix, returns, ETA, None)
        torch.testing.assert_close(many.mean, soft(old, returns)[0][2])
        assert not many.variance.any()
        gaps = [(many.mean - exact.middle_return_moments(suffix, returns, ETA, k).mean).max() for k in (1, 2, 4, 8)]
        assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(gaps))

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_the_bias_at_high_temperature(self, k):
        """``-sigma^2 / (2 K eta)``, from the second order of the logarithm."""
        returns, old = world("smooth")
        suffix = exact.joint(old)[2:]
        p, r = suffix[0].exp(), returns.view(8, 16)
        variance = (p * r.square()).sum(1) - (p * r).sum(1).square()
        eta = 20 * variance.max().sqrt().item()
        bias = exact.middle_return_moments(suffix, returns, eta, k).mean - soft(old, returns, eta)[0][2]
        np.testing.assert_allclose(bias, -variance / (2 * k * eta), rtol=0.05)

    def test_too_many_multisets(self):
        returns, old = world("random")
        with pytest.raises(ValueError, match="8 suffixes of 16 different returns come in 490314 multisets"):
            exact.middle_return_moments(exact.joint(old)[2:], returns, ETA, 8)

    @pytest.mark.parametrize("reward", REWARDS)
    def test_on_policy_it_needs_the_kl_of_the_suffix(self, reward):
        """Eq. 10 draws its suffixes from the policy, where eq. 4 asks for pi_old. At pi* every return less ``eta
        log(pi* / pi_old)`` is V* itself; the return alone counts the gain twice."""
        returns, old = world(reward)
        values, star = soft(old, returns)
        for m in (1, 2):
            ratio = exact.trajectory_logp(star[m:]) - exact.trajectory_logp(exact.joint(old)[m:])
            corrected = returns.view_as(ratio) - ETA * ratio
            torch.testing.assert_close(corrected, values[m][:, None].expand_as(ratio), atol=1e-8, rtol=0)
            as_published = exact.middle_return_moments(star[m:], returns, ETA, None).mean
            assert (as_published > values[m] + 1e-3).all()

    @pytest.mark.parametrize("reward", REWARDS)
    def test_the_mean_of_penalised_returns_is_exact_in_the_family(self, reward):
        """One suffix and no temperature: the prefix that it asks for belongs to the best policy of the family. With
        the logarithm and many suffixes it is Theorem 2's."""
        returns, old = world(reward)
        best, values = exact.best_in_family(old, returns, ETA)
        suffix = exact.joint(best)[2:]
        ratio = exact.trajectory_logp(suffix) - exact.trajectory_logp(exact.joint(old)[2:])
        penalised = (returns.view_as(ratio) - ETA * ratio).flatten()
        one = exact.middle_return_moments(suffix, penalised, ETA, 1).mean
        many = exact.middle_return_moments(suffix, penalised, ETA, None).mean
        torch.testing.assert_close(one, values[2], atol=1e-8, rtol=0)
        torch.testing.assert_close(many, soft(old, returns)[0][2], atol=1e-8, rtol=0)
