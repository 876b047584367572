"""How much the scales of a rollout pull against each other, the paper's "asynchronous policy conflict" (section 3.2).

The loss of a full rollout is a sum over scales, and each scale's share has a gradient in the same weights. The cosine
between two of them says whether a step for the one helps the other (above 0), leaves it alone (0) or undoes it (below).
PANW changes the gradients' lengths and not their directions; MP changes both. VMR changes which of them meet in one
update, so here every agent is measured over the full horizon: VMR's map shows what its split keeps apart.

How to read it. A policy gradient from few images is mostly noise, and gradients of noise have cosines near 0 however
strong the conflict is. So the batch's prompts are split in two halves, and a scale's *reliability* r is the cosine
between its gradients from either half: 1 without noise, near 0 when there is little else. With ``R = 2 r / (1 + r)``
for the whole batch (Spearman and Brown), a true cosine c between scales s and t shows as about ``c sqrt(R_s R_t)``.
Where the reliabilities are near 0, small cosines do not mean peace, and a few of -0.1 do not mean war: the shipped
policy's map of 4 x 8 images has cosines between -0.2 and 0.2 that change sign with the seed. Ask for more prompts,
and for the same sign from several seeds, before calling it either. The lengths are then those of the noise, but they
change little with the seed.

Lengths and angles are Euclidean, before the gradient is clipped and before AdamW divides each weight's part by its
usual size. They are taken over the weights that more than one scale moves. A weight that belongs to one scale, such as
its temperature or its position embeddings, cannot be in conflict; it would only lengthen the gradient (the temperatures
of the shipped policy make up most of it) and draw every cosine towards 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3.common.logger import Image, Logger
from torch import Tensor

from agents import logs
from agents.callbacks import AgentCallback
from agents.common.checks import require_at_least
from agents.grpo import GRPO, TokenWeights
from agents.rollout import Rollout, collect, resized
from agents.wrapper import Wrapper
from var_env.schedule import ScaleSchedule
from var_env.seeding import as_seed


class Conflict(NamedTuple):
    """One measurement of T scales, on the CPU."""

    update: int  # updates before it
    cosines: Tensor  # (T, T) of the policy term's gradients; NaN where one is zero
    norms: Tensor  # (T,) of the policy term's gradients, with the agent's weights
    kl_norms: Tensor  # (T,) of the KL term's, its coefficient included
    reliability: Tensor  # (T,) cosine between the policy term's gradients from two halves of the prompts


def scale_gradients(
    agent: GRPO | Wrapper,
    rollout: Rollout,
    weights: TokenWeights | None = None,
    rows: Tensor | None = None,
    steps: range | None = None,
) -> Tensor:
    """The gradient of each scale's share in the agent's loss on a rollout, ``(T, N)``; of a raster, of each row's.

    N counts the policy's trainable parameters, in their order. The shares add up to the loss, and the gradients to
    the loss's. The ratios are 1, as in the first optimiser step after sampling. With ``ratio_level="sequence"`` they
    are taken over each grid alone. Leaves the agent as it is, ``.grad`` included; costs about two forward and backward
    passes of an update and holds N numbers a scale.

    Args:
        rollout: of all grids in ``steps``. The agent and its wrappers judge it as they would in an update.
        weights: of the tokens, ``(B, n)`` each, before they are aggregated. Default: the agent's, wrappers included,
            for the policy term, and 0 for the KL and the entropy bonus.
        rows: int64, the rows whose share in the loss it is. Default: all. Disjoint rows' gradients add up.
        steps: the grids that learn, n tokens. Default: all; ``range(m)`` for a prefix update of VMR.

    Raises:
        ValueError: the rollout ends before the last of these grids, as those of VMR's prefix updates may.
    """
    core = agent.unwrapped
    schedule, batch = core.policy.schedule, len(rollout.scenes)
    steps = range(len(schedule)) if steps is None else steps
    if len(rollout.grids) < steps.stop:
        raise ValueError(f"need a rollout of all {steps.stop} grids, got the first {len(rollout.grids)}")
    rollout = core.judge(rollout, steps) if rollout.advantages is None else rollout
    if weights is None:
        weights = only("policy", core.outermost.token_weights(rollout, steps))
    weights = core.aggregate(weights, steps)
    advantages = core.outermost.token_advantages(rollout, steps)  # (B, n)
    rows = torch.arange(batch, device=core.device) if rows is None else rows
    parameters = [weight for weight in core.policy.parameters() if weight.requires_grad]
    bands = [band for _, band in schedule.bands if band.start < steps.stop and band.stop > steps.start]
    gradients = torch.zeros(len(bands), sum(weight.numel() for weight in parameters), device=core.device)
    for i, band in enumerate(bands):
        here = range(max(band.start, steps.start), min(band.stop, steps.stop))
        first, last = (schedule.slices[t] for t in (here[0], here[-1]))
        tokens = slice(*(end - schedule.slices[steps.start].start for end in (first.start, last.stop)))
        share = TokenWeights(*(part[:, tokens] for part in weights))
        bare = replace(rollout, old_logp=None, ref_logp=None)  # which are of all steps
        for micro in rows.split(core.micro_batch or batch):
            loss, _ = core.loss(bare, micro, advantages[micro, tokens], share.rows(micro), None, here)
            parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
            gradients[i] += torch.cat([part.flatten() for part in parts])
    return gradients


def only(term: str, weights: TokenWeights) -> TokenWeights:
    """Weights with those of the other terms of the loss at zero."""
    return TokenWeights(*(part if name == term else torch.zeros_like(part) for name, part in weights._asdict().items()))


def cosines(gradients: Tensor) -> Tensor:
    """Cosine similarity between rows, ``(T, N)`` to ``(T, T)``; NaN for a row of zeros, which has no direction."""
    products = gradients @ gradients.T
    norms = products.diagonal().sqrt()
    return (products / (norms[:, None] * norms)).clamp(-1, 1)


class HalfGradients(NamedTuple):
    """The gradients of T scales over the N weights that more than one scale moves, ``(T, N)`` each."""

    first: Tensor  # the policy term's share of the first P // 2 prompts
    second: Tensor  # of the rest; both add up to the gradient of the batch
    kl: Tensor  # the KL term's, its coefficient included


def half_gradients(agent: GRPO | Wrapper, rollout: Rollout, steps: range | None = None) -> HalfGradients:
    """The gradients of a rollout of at least 2 prompts in two halves, of the scales in ``steps``, all by default.

    Leaves the agent as it is, and holds about 4 T numbers for each trainable parameter.
    """
    core = agent.unwrapped
    steps = range(len(core.policy.schedule)) if steps is None else steps
    rows = torch.arange(len(rollout.scenes), device=core.device)
    half = rollout.scores.shape[0] // 2 * rollout.scores.shape[1]
    if half == 0:
        raise ValueError("need a rollout of at least 2 prompts, to compare the gradients of its halves; got 1")
    logger, core._logger = core.logger, Logger(None, [])  # wrappers log their weights, but this is no update
    try:
        rollout = core.judge(rollout, steps)
        weights = core.outermost.token_weights(rollout, steps)
        policy_term, kl_term = only("policy", weights), only("kl", weights)
        first = scale_gradients(agent, rollout, policy_term, rows[:half], steps)
        second = scale_gradients(agent, rollout, policy_term, rows[half:], steps)
        kl = scale_gradients(agent, rollout, kl_term, steps=steps) if core.kl_coef else torch.zeros_like(first)
    finally:
        core._logger = logger
    shared = ((first != 0) | (second != 0) | (kl != 0)).sum(0) > 1  # moved by more than one scale
    return HalfGradients(first[:, shared], second[:, shared], kl[:, shared])


def measure(agent: GRPO | Wrapper, rollout: Rollout) -> Conflict:
    """The conflict in a full rollout of at least 2 prompts, see `half_gradients`."""
    first, second, kl = half_gradients(agent, rollout)
    whole = first + second
    found = (cosines(whole), whole.norm(dim=1), kl.norm(dim=1), reliability(first, second))
    return Conflict(agent.unwrapped.n_updates, *(part.cpu() for part in found))


def reliability(first: Tensor, second: Tensor) -> Tensor:
    """The cosine between the gradients from two halves of a batch, ``(..., N)`` to ``(...)``."""
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


class ConflictProbe(AgentCallback):
    """Measures the conflict before the first update, after every n-th and at the end, and logs ``conflict/``.

    - ``cosine_mean``, ``cosine_min``, ``negative_share``: over the pairs of different scales.
    - ``grad_norm_``, ``grad_share_``: length of each scale's gradient of the policy term, with the agent's weights,
      and its share in the sum of the lengths. PANW's business.
    - ``kl_grad_norm_``: the same for the KL term; 0 before the first update. The KL itself is ``scale/kl_``.
    - ``reliability_``: how far to trust a scale's row of the map. Read the module's text before the map.
    - ``cosine``, in TensorBoard: the map of all pairs, with the reliabilities beside it.

    A value that does not exist, such as the cosine of a zero gradient, is left out. Training is the same bit for bit
    with and without the probe: its batch has noise of its own. Its images cost reward calls outside the budget, as
    those of an evaluation do. The prompts and the noise are the same at every measurement, in the agent's own world
    and decoding, so that maps compare over time and between agents.

    Args:
        every: updates between two measurements.
        prompts: P, at least 2, with the agent's group size. With the defaults of probe and agent, a measurement takes
            about as long as two iterations of training.
        seed: of the prompts and the noise.

    Attributes:
        history: a `Conflict` for each measurement.
    """

    def __init__(self, every: int = 20, prompts: int = 4, seed: int = 0) -> None:
        super().__init__()
        require_at_least(1, every=every)
        require_at_least(2, prompts=prompts)
        self.every, self.prompts, self.seed = every, prompts, as_seed(seed)
        self.history: list[Conflict] = []

    def _on_rollout_start(self) -> None:
        if self.model.n_updates % self.every == 0 and not self.is_up_to_date:  # resampling starts several rollouts
            self.measure()

    def _on_training_end(self) -> None:
        if not self.is_up_to_date:
            self.measure()
            self.logger.dump(self.model.images_decoded)

    @property
    def is_up_to_date(self) -> bool:
        """Whether there was no update since the last measurement."""
        return bool(self.history) and self.history[-1].update == self.model.n_updates

    def measure(self) -> None:
        """Measure now, and record."""
        agent = self.model
        assert isinstance(agent, GRPO) and agent.env is not None
        if agent.processes.shards:
            raise ValueError("ConflictProbe needs whole gradients, and FSDP shards them: leave it out")
        rollout = collect(
            agent.policy,
            resized(agent.env, self.prompts),
            agent.group_size,
            agent.decoding,
            torch.Generator(agent.device).manual_seed(self.seed),
            seed=self.seed,
            keep_support=agent.keeps_support,
        )
        self.history.append(measure(agent, rollout))
        record(self.logger, self.history[-1], agent.policy.schedule)


def record(logger: Logger, conflict: Conflict, schedule: ScaleSchedule) -> None:
    """Log a measurement under the names of `ConflictProbe`."""
    different = ~torch.eye(len(conflict.norms), dtype=torch.bool)
    pairs = conflict.cosines[different & conflict.cosines.isfinite()]
    values = {}
    if len(pairs):
        values = {
            "cosine_mean": pairs.mean(),
            "cosine_min": pairs.min(),
            "negative_share": (pairs < 0).float().mean(),
        }
    shares = conflict.norms / conflict.norms.sum()
    for t, (name, _) in enumerate(schedule.bands):
        values |= {
            f"grad_norm_{name}": conflict.norms[t],
            f"grad_share_{name}": shares[t],
            f"kl_grad_norm_{name}": conflict.kl_norms[t],
            f"reliability_{name}": conflict.reliability[t],
        }
    for key, value in values.items():
        if math.isfinite(value):
            logger.record(f"conflict/{key}", value.item())
    if logs.shows_images(logger):
        logger.record("conflict/cosine", Image(heat_map(conflict, schedule), "HWC"), exclude=logs.WITHOUT_IMAGES)


def heat_map(conflict: Conflict, schedule: ScaleSchedule) -> np.ndarray:
    """The cosines, T x T, and in a column of their own the reliabilities: uint8 ``(H, W, 3)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    names = [name for name, _ in schedule.bands]
    scales = len(names)
    figure = Figure(figsize=(2.5 + 0.6 * scales, 1.5 + 0.5 * scales), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[scales, 1])
    for axes, table in ((left, conflict.cosines.numpy()), (right, conflict.reliability[:, None].numpy())):
        axes.imshow(table, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(x, y, "none" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", color=colour)
    left.set_xticks(range(scales), names)
    left.set_yticks(range(scales), names)
    left.set_title(f"cosine of gradients, update {conflict.update}")
    right.set_xticks([0], ["reliability"])
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


__all__ = [
    "Conflict",
    "ConflictProbe",
    "HalfGradients",
    "cosines",
    "half_gradients",
    "heat_map",
    "measure",
    "record",
    "reliability",
    "scale_gradients",
]
