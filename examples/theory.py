"""The paper's theory in figures, computed by enumeration in VARTabular-v0: what docs/theory.md shows.

    python examples/theory.py                             # all of it, about five minutes on one core
    python examples/theory.py --parts claims estimator    # some of it, seconds
    python examples/theory.py --parts agents --updates 20 --seeds 0 --agents grpo vmr --out /tmp/theory

Parts: "claims" (Theorems 1 and 2, eqs. 2 and 3, at one temperature), "eta" (the same over temperatures), "random" (over
random reward tables), "estimator" (bias and variance of eq. 10), "middle" (where VMR ends for each middle return) and
"agents" (every registered agent's gap to the optimum of the family). Each writes a table or a figure to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from agents import exact, make, recipes
from agents.callbacks import AgentCallback, StopAfter
from agents.experiments.options import Parser, clear_errors
from agents.experiments.output import require_folder, table, write_text
from agents.policies.table import TablePolicy
from var_env.tabular import VARTabularVectorEnv

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no window

REWARDS = ("smooth", "copy", "sparse", "xor", "trap", "random")
ETA = 0.25  # of the parts that show one temperature
SPREAD = 1.0  # standard deviation of the reference's logits
LIMIT = 10**7  # updates without an end
AGENT_OPTIONS = {"split": 2, "prefix_updates": 1, "suffix_updates": 1, "eta": ETA, "n": 4}
MENDED = "vmr-mended"  # the plain mean of suffixes that have paid for their KL
MEND = {"suffix_kl_coef": ETA, "eta": 100.0}


class Problem(NamedTuple):
    """A world with a reference policy."""

    returns: Tensor  # (N,) float64
    old: list[Tensor]  # sites
    sizes: tuple[int, ...]

    @property
    def old_joint(self) -> list[Tensor]:
        return exact.joint(self.old)

    def value(self, joint: exact.Joint, eta: float) -> float:
        """J of a policy."""
        return exact.objective(joint, self.old_joint, self.returns, eta).item()


def problem(reward: str, spread: float, seed: int = 1) -> Problem:
    """``seed`` is that of the reference, and of the reward if it draws something."""
    envs = VARTabularVectorEnv(1, reward=reward, seed=seed)
    old = TablePolicy(envs.tokenizer, spread=spread, seed=seed).sites()
    return Problem(torch.from_numpy(envs.reward.table), old, envs.schedule.sizes)  # type: ignore[attr-defined]


def policies(p: Problem, eta: float) -> dict[str, exact.Joint]:
    """What the paper's claims are about, by name."""
    best, values = exact.best_in_family(p.old, p.returns, eta)
    soft = exact.soft_values(p.old_joint, p.returns, eta)
    star = exact.soft_optimal(p.old_joint, p.returns, eta)
    sites = {
        "family": best,
        "theorem 1": exact.project_policy(star, p.sizes),
        **{f"theorem 2, m={m}": exact.two_stage(p.old, p.returns, eta, m, soft[m]) for m in (1, 2)},
        **{f"family's values, m={m}": exact.two_stage(p.old, p.returns, eta, m, values[m]) for m in (1, 2)},
    }
    unconstrained: dict[str, exact.Joint] = {"old": p.old_joint, "eq. 3": star}
    unconstrained["eq. 2"] = exact.expected_return_optimal(p.old_joint, p.returns, eta)
    return unconstrained | {name: exact.joint(tables) for name, tables in sites.items()}


def lost(p: Problem, found: Mapping[str, exact.Joint], name: str, eta: float) -> float:
    """What a policy of the family lacks, as a share of what the best one gains over the reference."""
    best, old = p.value(found["family"], eta), p.value(found["old"], eta)
    return (best - p.value(found[name], eta)) / max(best - old, 1e-12)


# The claims ----------------------------------------------------------------------------------------------------------


def claims(args: argparse.Namespace) -> None:
    """J of every policy, for each reward and two references."""
    names = list(policies(problem("smooth", 0.0), ETA))
    rows = []
    for spread in (0.0, SPREAD):
        for reward in REWARDS:
            p = problem(reward, spread)
            found = policies(p, ETA)
            values = [p.value(found[name], ETA) for name in names]
            rows.append([reward, "uniform" if spread == 0 else "random", *(f"{value:.4f}" for value in values)])
    write_text(args.out / "claims.md", table(["reward", "reference", *names], rows) + "\n")


def over_eta(args: argparse.Namespace) -> None:
    """What the theorems' policies lose, over temperatures."""
    etas = np.geomspace(0.05, 2, 25)
    shown = ("theorem 1", "theorem 2, m=1", "theorem 2, m=2", "family's values, m=2")
    fig, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharex=True, layout="constrained")
    for axis, reward in zip(axes.flat, REWARDS, strict=True):
        p = problem(reward, SPREAD)
        found = [policies(p, eta) for eta in etas]
        for name, style in zip(shown, ("-", "--", ":", "-"), strict=True):
            axis.plot(etas, [100 * lost(p, f, name, e) for f, e in zip(found, etas, strict=True)], style, label=name)
        axis.set_title(reward)
        axis.set_xscale("log")
    axes[0, 0].legend()
    fig.supxlabel("eta")
    fig.supylabel("J lost, % of the family's best gain over the reference")
    save(fig, args.out / "eta.png")


def random_tables(args: argparse.Namespace) -> None:
    """How often, and how much, over random tables."""
    names = ("theorem 1", "theorem 2, m=1", "theorem 2, m=2", "family's values, m=1", "family's values, m=2")
    rows = []
    for eta in (0.1, ETA, 1.0):
        losses: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(args.tables):
            p = problem("random", SPREAD, seed)
            found = policies(p, eta)
            for name in names:
                losses[name].append(100 * lost(p, found, name, eta))
        for name, values in losses.items():
            median, high = np.quantile(values, [0.5, 0.95])
            rows.append([f"{eta:g}", name, f"{np.mean(np.array(values) > 1e-6):.0%}"])
            rows[-1] += [f"{median:.3f}%", f"{high:.2f}%", f"{max(values):.2f}%"]
    head = ["eta", "policy", "worse than the best", "median loss", "95 %", "largest"]
    write_text(args.out / "random.md", table(head, rows) + "\n")


# Eq. 10 --------------------------------------------------------------------------------------------------------------


def estimator(args: argparse.Namespace) -> None:
    """Bias and spread of eq. 10 where the policy is the reference, and of the gradient made with it."""
    etas, counts = np.geomspace(0.1, 10, 21), (1, 2, 4, 8)  # of the spread of the returns in a state
    fig, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for row, (reward, m) in zip(axes, (("smooth", 2), ("sparse", 2)), strict=True):
        p = problem(reward, SPREAD)
        suffix = p.old_joint[m:]
        logp = exact.trajectory_logp(suffix)
        returns = p.returns.view_as(logp)
        mean = (logp.exp() * returns).sum(1)
        spread = (logp.exp() * (returns - mean[:, None]).square()).sum(1).sqrt()  # (S,)
        sigma, weight = spread.mean().item(), exact.trajectory_logp(p.old_joint[:m])[0].exp()  # of the states
        for k in counts:
            bias, deviation, error = [], [], []
            for eta in etas * sigma:
                true = exact.soft_values(p.old_joint, p.returns, eta)[m]
                found = exact.middle_return_moments(suffix, p.returns, eta, k)
                bias.append((weight @ (found.mean - true)).item() / sigma)
                deviation.append((weight @ found.variance.sqrt()).item() / sigma)
                gradients = [exact.prefix_gradient(p.old[:m], p.old[:m], v, eta) for v in (found.mean, true)]
                error.append(((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item())
            (line,) = row[0].plot(etas, bias, label=f"K = {k}")
            row[0].plot(etas, -1 / (2 * k * etas), ":", color=line.get_color())
            row[1].plot(etas, deviation, label=f"K = {k}")
            row[2].plot(etas, error, label=f"K = {k}")
        row[0].set_ylim(-2.5, 0.1)
        row[0].set_ylabel(f"{reward}, m = {m}")
        row[2].set_ylim(0, 1.05)
    titles = ("bias / sigma (dotted: -sigma / 2 K eta)", "standard deviation / sigma", "the gradient's bias, relative")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    axes[0, 0].set_xscale("log")
    axes[0, 0].legend()
    fig.supxlabel("eta / sigma, the standard deviation of the returns in a state")
    save(fig, args.out / "estimator.png")


class Middle(NamedTuple):
    """A middle return: eq. 10 on the suffixes of the policy."""

    penalised: bool  # of returns less eta log(pi / pi_old) of the suffix
    k: int | None  # None for many
    temperature: float  # eta of eq. 10

    def lost(self, p: Problem, best: list[Tensor], eta: float, m: int) -> float:
        """What the prefix loses by its mean when the best suffix follows, a share of the best gain."""
        suffix, old = exact.joint(best[m:]), p.old_joint
        returns = p.returns
        if self.penalised:
            returns = returns - eta * (exact.trajectory_logp(suffix) - exact.trajectory_logp(old[m:])).flatten()
        value = exact.middle_return_moments(suffix, returns, self.temperature, self.k).mean
        sites = exact.best_in_family(p.old[:m], value, eta)[0] + best[m:]
        return lost(p, {"old": old, "family": exact.joint(best), "this": exact.joint(sites)}, "this", eta)


def middle(args: argparse.Namespace) -> None:
    """What each middle return loses, at m = 2."""
    kinds: list[Middle] = []
    for penalised in (False, True):
        kinds += [Middle(penalised, 1, ETA)]  # without a temperature
        kinds += [Middle(penalised, k, temperature) for temperature in (1.0, ETA) for k in (2, 4)]
        kinds += [Middle(penalised, None, ETA)]
    columns = []
    for reward in REWARDS:
        p = problem(reward, SPREAD)
        best = exact.best_in_family(p.old, p.returns, ETA)[0]
        columns.append([f"{100 * abs(kind.lost(p, best, ETA, 2)):.2f}%" for kind in kinds])
    rows = []
    for kind, *cells in zip(kinds, *columns, strict=True):
        name, k = "R - eta log(pi/pi_old)" if kind.penalised else "R", "many" if kind.k is None else str(kind.k)
        rows.append([name, k, "any" if kind.k == 1 else f"{kind.temperature:g}", *cells])
    write_text(args.out / "middle.md", table(["return", "K", "eta of eq. 10", *REWARDS], rows) + "\n")


# Agents --------------------------------------------------------------------------------------------------------------


class Curve(AgentCallback):
    """What is lost, `lost`, before every update."""

    def __init__(self, gap: Callable[[TablePolicy], float]) -> None:
        super().__init__()
        self.gap, self.values = gap, []  # type: tuple[Callable[[TablePolicy], float], list[float]]

    def _on_rollout_start(self) -> None:
        if len(self.values) <= self.model.n_updates:  # once an update, however many rollouts it takes
            self.values.append(self.gap(self.model.policy))  # type: ignore[arg-type]


def train(recipe: str, reward: str, seed: int, updates: int) -> np.ndarray:
    """The gap of an agent before each of its updates, as a share of the first; ``(updates,)``."""
    p, envs = problem(reward, SPREAD / 2), VARTabularVectorEnv(2, reward=reward, seed=1)
    found: dict[str, exact.Joint] = {"family": exact.joint(exact.best_in_family(p.old, p.returns, ETA)[0])}
    found["old"] = p.old_joint
    curve = Curve(lambda policy: lost(p, found | {"this": exact.joint(policy.sites())}, "this", ETA))
    own = AGENT_OPTIONS | (MEND if recipe == MENDED else {})
    recipe = "vmr" if recipe == MENDED else recipe
    options = {name: value for name, value in own.items() if name in recipes.options_in(recipe)}
    agent = make(
        recipe,
        envs,
        TablePolicy(envs.tokenizer, spread=SPREAD / 2, seed=1),
        group_size=32,
        prompts_per_update=2,
        learning_rate=lambda left: 0.1 * (1 - (len(curve.values) - 1) / updates),
        kl_coef=ETA,  # with these three the agents' objective is J
        kl="k1",
        kl_in="reward",
        seed=seed,
        device="cpu",
        **options,
    )
    agent.set_logger(Logger(None, []))
    agent.learn(LIMIT, [curve, StopAfter(updates=updates)])
    return np.array(curve.values[:updates])


def agents(args: argparse.Namespace) -> None:
    """The gap against updates."""
    rewards, columns = ("smooth", "xor", "trap"), []
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.8), sharey=True, layout="constrained")
    for axis, reward in zip(axes, rewards, strict=True):
        curves = {}
        for recipe in args.agents:
            runs = [train(recipe, reward, seed, args.updates) for seed in args.seeds]
            if len(runs[0]):
                curves[recipe] = np.mean(runs, 0)
        columns.append([f"{curves[name][-1]:.3f}" if name in curves else "" for name in args.agents])
        for i, (name, curve) in enumerate(curves.items()):
            style = ("-", "--", ":")[i // 10 % 3]  # so that of two that are the same both show
            axis.plot(np.maximum(curve, 1e-4), style, color=f"C{i % 10}", label=name, lw=1.2)
        p = problem(reward, SPREAD / 2)
        end = Middle(False, 2, ETA).lost(p, exact.best_in_family(p.old, p.returns, ETA)[0], ETA, 2)
        columns[-1].append(f"{end:.3f}")
        axis.axhline(max(end, 1e-4), color="grey", label="where VMR ends, exactly", lw=0.8)
        axis.set(title=reward, xlabel="updates", yscale="log", ylim=(5e-4, 3))
    axes[0].set_ylabel("gap to the best of the family, 1 at the start")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save(fig, args.out / "agents.png")
    names = [*args.agents, "where VMR ends, exactly"]
    cells = [[name, *row] for name, row in zip(names, zip(*columns, strict=True), strict=True)]
    write_text(args.out / "agents.md", table(["agent", *rewards], cells) + "\n")


def save(fig: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "claims": claims,
    "eta": over_eta,
    "random": random_tables,
    "estimator": estimator,
    "middle": middle,
    "agents": agents,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    everything = [*recipes.known(), MENDED, *recipes.BUNDLES]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to make (default: all)")
    parser.add_argument("--out", type=Path, default=Path("results/theory"), help="(default: %(default)s)")
    parser.add_argument("--tables", type=int, default=100, help="random reward tables (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=200, help="of each agent (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the agents (default: 0)")
    parser.add_argument(
        "--agents", nargs="+", default=everything, metavar="RECIPE", help="such as vmr+panw (default: all there are)"
    )
    args = parser.parse_args(argv)
    with clear_errors():
        require_folder(args.out)
        for recipe in args.agents:
            recipes.parts_of("vmr" if recipe == MENDED else recipe)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)  # the tables are small
    with clear_errors():
        for part in args.parts:
            PARTS[part](args)
            print(f"{part}: done, see {args.out}", flush=True)


if __name__ == "__main__":
    main()
