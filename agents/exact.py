"""Exact values for worlds whose images can be listed: the paper's objective, optima and projections, in float64.

For ``VARTabular-v0`` and ``TablePolicy``. A policy comes as T tables of log-probabilities, of one of two kinds:

- *sites*, ``(S_t, n_t, V)``: the family of Definition 2, the sites of a grid independent given the state;
- *joint*, ``(S_t, A_t)``: any policy, ``A_t = V^n_t`` grids to choose from.

States and images are numbered by their tokens, the first one the highest digit, so that the states after grid t are
those before it times the actions: ``V_(t+1)`` is a table of the shape of ``Q_t``. Every function also takes a run of
consecutive tables in place of all T, say those after a middle step; values are then those of their first states.

Eqs. and theorems are those of *VAR RL Done Right*. ``old`` is the reference policy pi_old, of the family, and
``returns`` the reward of each image, or of each state after the last table, ``(N,)``. ``eta`` is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from agents.vmr import middle_return
from var_env.seeding import as_seed

Sites = Sequence[Tensor]  # (S_t, n_t, V)
Joint = Sequence[Tensor]  # (S_t, A_t)

MOST_MULTISETS = 300_000


# Policies ------------------------------------------------------------------------------------------------------------


def grid_logp(sites: Tensor) -> Tensor:
    """Eq. 6: log-probabilities of sites ``(..., n, V)`` to those of whole grids ``(..., V^n)``."""
    return reduce(lambda grid, site: (grid.unsqueeze(-1) + site.unsqueeze(-2)).flatten(-2), sites.unbind(-2))


def joint(sites: Sites) -> list[Tensor]:
    """A policy of the family as one without: T of ``(S_t, A_t)``."""
    return [grid_logp(table) for table in sites]


def trajectory_logp(policy: Joint) -> Tensor:
    """Log-probability of every way from each first state to the end, ``(S, N / S)`` (eq. 19)."""
    logp = policy[0]
    for table in policy[1:]:
        logp = (logp.reshape(-1, 1) + table).view(len(logp), -1)
    return logp


# The objective and its unconstrained optimum -------------------------------------------------------------------------


def objective(policy: Joint, old: Joint, returns: Tensor, eta: float) -> Tensor:
    """J of eqs. 7 and 21, ``E[R] - eta KL(policy, old)`` over trajectories, from each first state: ``(S,)``."""
    logp, old_logp = trajectory_logp(policy), trajectory_logp(old)
    return (logp.exp() * (returns.view_as(logp) - eta * (logp - old_logp))).sum(1)


def soft_values(old: Joint, returns: Tensor, eta: float) -> list[Tensor]:
    """``V_m*`` of eq. 4 for every m, from the states before the first table, ``(S_0,)``, to the returns, ``(N,)``.

    Step by step from the end, which is the same: ``V_t = eta log E_old[exp(V_(t+1) / eta)]``. Eq. 3's Q* of a state and
    an action is the value of the state they lead to.
    """
    values = [returns]
    for table in reversed(old):
        values.insert(0, eta * (table + values[0].view_as(table) / eta).logsumexp(1))
    return values


def soft_optimal(old: Joint, returns: Tensor, eta: float) -> list[Tensor]:
    """pi* of eq. 1 with the Q* of eq. 3."""
    values = soft_values(old, returns, eta)[1:]
    return [(table + q.view_as(table) / eta).log_softmax(1) for table, q in zip(old, values, strict=True)]


def expected_return_optimal(old: Joint, returns: Tensor, eta: float) -> list[Tensor]:
    """Eq. 1 with the Q* of eq. 2: the expected reward, without what later steps pay in KL."""
    policy: list[Tensor] = []
    values = returns
    for table in reversed(old):
        policy.insert(0, (table + values.view_as(table) / eta).log_softmax(1))
        values = (policy[0].exp() * values.view_as(table)).sum(1)
    return policy


# The optimum of the family -------------------------------------------------------------------------------------------


def project(target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The product of n sites that is nearest to each target in reverse KL (eq. 8).

    Coordinate descent: with the others fixed, the best site is ``softmax(E_others[log target])``. Products are no
    convex set and there may be several local optima; so it starts from the middle and from near every single grid, and
    the start that is best after a while is followed to its end.

    Args:
        target: log-probabilities, up to a constant a row, ``(S, V^n)``.

    Returns:
        The sites' log-probabilities ``(S, n, V)``, and ``KL(sites, target)``, ``(S,)``, of the target made to sum to 1.
    """
    states, actions = target.shape
    codes = round(actions ** (1 / n))
    digits = torch.arange(actions)[:, None] // codes ** torch.arange(n - 1, -1, -1) % codes  # (A, n)
    shows = torch.nn.functional.one_hot(digits, codes).to(target)  # (A, n, V)
    target = target.log_softmax(1)
    start = torch.cat([torch.zeros_like(shows[:1]), 3 * shows]).log_softmax(-1)  # (1 + A, n, V)
    sites = _descend(start.unsqueeze(1).repeat(1, states, 1, 1), target, shows, 50)  # (1 + A, S, n, V)
    best = _kl(sites, target).argmin(0)  # (S,)
    sites = _descend(sites[best, torch.arange(states)].unsqueeze(0), target, shows, 5000)
    return sites[0], _kl(sites, target)[0]


def _descend(sites: Tensor, target: Tensor, shows: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent of several starts, ``(starts, S, n, V)``, until nothing moves."""
    for _ in range(sweeps):
        before = sites.clone()
        for i in range(sites.shape[2]):
            others = sites.clone()
            others[:, :, i] = 0
            sites[:, :, i] = ((grid_logp(others).exp() * target) @ shows[:, i]).log_softmax(-1)
        if (sites.exp() - before.exp()).abs().max() < 1e-13:
            break
    return sites


def _kl(sites: Tensor, target: Tensor) -> Tensor:
    """KL of products ``(..., S, n, V)`` to targets ``(S, V^n)``, ``(..., S)``."""
    logp = grid_logp(sites)
    return (logp.exp() * (logp - target)).sum(-1)


def project_policy(policy: Joint, sizes: Sequence[int]) -> list[Tensor]:
    """Theorem 1's policy: each state of any policy projected onto the family on its own; n_t sites, ``sizes``."""
    return [project(table, n)[0] for table, n in zip(policy, sizes, strict=True)]


def best_in_family(old: Sites, returns: Tensor, eta: float) -> tuple[list[Tensor], list[Tensor]]:
    """pi-dagger of eq. 7, the best policy of the family, and what every state is worth to it.

    Backwards from the end. At a state, ``J = -eta KL(pi, old exp(V / eta)) + const`` with V the values of the states
    that follow, *to the family*: so the best sites are a projection, and their J the value one step earlier. No choice
    at one state bears on what is best at another, since each is made for the state as it is (dynamic programming).

    Returns:
        sites, T of ``(S_t, n_t, V)``, and values, T + 1 of ``(S_t,)``, the returns the last.
    """
    sites: list[Tensor] = []
    values = [returns]
    for table in reversed(old):
        logp = grid_logp(table)
        best, kl = project(logp + values[0].view_as(logp) / eta, table.shape[1])
        normaliser = (logp + values[0].view_as(logp) / eta).logsumexp(1)
        sites.insert(0, best)
        values.insert(0, eta * (normaliser - kl))
    return sites, values


def ascend(old: Sites, returns: Tensor, eta: float, starts: int = 8, seed: int = 0) -> tuple[list[Tensor], list[float]]:
    """The best policy of the family by going uphill on J itself, over the logits of all states at once (L-BFGS).

    Knows nothing of states and projections, so it checks `best_in_family`.

    Returns:
        The best sites of all starts, and the J that each start came to.
    """
    generator = torch.Generator().manual_seed(as_seed(seed))
    old_joint, found = joint(old), []
    for _ in range(starts):
        logits = [(2 * torch.randn(table.shape, generator=generator)).to(table).requires_grad_() for table in old]
        optimiser = torch.optim.LBFGS(
            logits, max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def loss(logits: list[Tensor] = logits, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = -objective(joint([part.log_softmax(-1) for part in logits]), old_joint, returns, eta).sum()
            value.backward()
            return value

        optimiser.step(loss)
        found.append((-loss().item(), [part.detach().log_softmax(-1) for part in logits]))
    return max(found, key=lambda pair: pair[0])[1], [value for value, _ in found]


def two_stage(old: Sites, returns: Tensor, eta: float, m: int, middle: Tensor) -> list[Tensor]:
    """Eq. 5 in the family: the best suffix, and the best prefix for a middle return ``(S_m,)``, put together."""
    return best_in_family(old[:m], middle, eta)[0] + best_in_family(old[m:], returns, eta)[0]


# The estimator -------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of an estimate, in each state."""

    mean: Tensor  # (S,)
    variance: Tensor  # (S,)


def middle_return_moments(suffix: Joint, returns: Tensor, eta: float, k: int | None) -> Moments:
    """Mean and variance of eq. 10 with K suffixes of a policy, in each state after the prefix.

    All multisets of K different returns are listed, state by state. ``k=None`` is the limit of many suffixes, which has
    no variance. ``ValueError`` where there are more than 300,000 of them: K, or the number of returns, is too large.
    """
    logp = trajectory_logp(suffix)  # (S, F)
    if k is None:
        limit = eta * (logp + returns.view_as(logp) / eta).logsumexp(1)
        return Moments(limit, torch.zeros_like(limit))
    return Moments(*torch.stack([_moments(*row, eta, k) for row in zip(logp, returns.view_as(logp), strict=True)], 1))


def _moments(logp: Tensor, returns: Tensor, eta: float, k: int) -> Tensor:
    """Mean and variance, ``(2,)``, in one state, from its futures ``(F,)``."""
    levels, which = returns.unique(return_inverse=True)  # (U,), (F,)
    count = math.comb(len(levels) + k - 1, k)
    if count > MOST_MULTISETS:
        raise ValueError(
            f"{k} suffixes of {len(levels)} different returns come in {count} multisets, more than {MOST_MULTISETS}: "
            "take a smaller K, or a reward with fewer values"
        )
    p = torch.zeros_like(levels).index_add_(0, which, logp.exp())  # (U,)
    drawn = torch.tensor(list(combinations_with_replacement(range(len(levels)), k)))  # (M, K)
    times = torch.nn.functional.one_hot(drawn, len(levels)).sum(1).to(p)  # (M, U)
    ways = math.factorial(k) / (times + 1).lgamma().exp().round().prod(1)  # (M,)
    chance = ways * p.pow(times).prod(1)  # (M,); 0 to the 0 is 1
    estimate = middle_return(levels[drawn], eta)  # (M,)
    mean = chance @ estimate
    return torch.stack([mean, chance @ (estimate - mean).square()])


def prefix_gradient(prefix: Sites, old: Sites, middle: Tensor, eta: float) -> Tensor:
    """The gradient of eq. 5's prefix objective in the logits of the prefix, flat, for a middle return ``(S_m,)``.

    With the mean of an estimate as the middle return, it is the mean of the gradient that uses the estimate.
    """
    logits = [table.clone().requires_grad_() for table in prefix]
    value = objective(joint([part.log_softmax(-1) for part in logits]), joint(old), middle, eta).sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, logits)])
