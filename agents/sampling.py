"""The sampler: from logits to tokens. The one place that knows temperature, top-k, top-p and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. The default is the model's own distribution, which is what training should sample from:
    a truncated sampler never shows the tail, and so cannot teach the policy to keep out of it.

    Attributes:
        temperature: divides the logits, at least 0; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all. Tokens tied with the k-th stay.
        top_p: then keep the fewest tokens whose probability reaches p, 0 < p <= 1.
        guidance: classifier-free guidance, ``null + guidance * (conditional - null)``; 1 is off
            (Ho and Salimans, arXiv 2207.12598).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be a whole number, 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not self.guidance >= 0:
            raise ValueError(f"guidance must be at least 0, got {self.guidance}")

    @property
    def guided(self) -> bool:
        """Whether the sampler needs the logits without the prompt."""
        return self.guidance != 1

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.temperature == 0


class Draw(NamedTuple):
    """What `draw` returns."""

    tokens: Tensor  # (B, n, D) int64
    logp: Tensor  # (B, n, D) of the tokens under the sampler's distribution; 0 at temperature 0
    tail_mass: Tensor  # (B, n, D) probability that the model, conditional and untruncated, gives to tokens outside
    support: Tensor | None  # (B, n, D, V) bool, the tokens that could be drawn; None when all

    def take(self, index: Tensor | slice) -> Draw:
        """That of some rows; an index may repeat, reorder and drop."""
        return Draw(
            self.tokens[index],
            self.logp[index],
            self.tail_mass[index],
            None if self.support is None else self.support[index],
        )

    @staticmethod
    def join(draws: Sequence[Draw]) -> Draw:
        """The rows of several draws of the same grid in one."""
        tokens, logp, tail_mass, support = zip(*draws, strict=True)
        kept = None if support[0] is None else torch.cat(support)
        return Draw(torch.cat(tokens), torch.cat(logp), torch.cat(tail_mass), kept)


class SharedNoise(NamedTuple):
    """A generator that several processes have in the same state, of which each draws its share of the rows.

    On a CPU each draws the noise of all rows and takes its own, so that images do not depend on the processes. On a
    GPU that would be V numbers a token; there each process has a generator of its own, seeded from the shared one.
    """

    generator: torch.Generator
    rank: int
    processes: int

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1 for this process's rows."""
        rows = shape[0]
        everything = torch.rand(self.processes * rows, *shape[1:], generator=self.generator)
        return everything[self.rank * rows : (self.rank + 1) * rows]

    def own(self) -> torch.Generator:
        """A new generator of this process alone."""
        device = self.generator.device
        seed = torch.randint(2**62, (), generator=self.generator, device=device).item()
        return torch.Generator(device).manual_seed(int(seed) + self.rank)


def draw(
    logits: Tensor,
    null_logits: Tensor | None,
    decoding: Decoding,
    generator: torch.Generator | SharedNoise | None = None,
) -> Draw:
    """Draw the D codes of each token from logits ``(B, n, D, V)``, which stay as they are.

    ``null_logits`` are the logits without the prompt, needed when ``decoding.guided``. The generator lives on the
    logits' device; ``None`` is torch's global one.
    """
    scores = logits.float()
    if decoding.guided:
        if null_logits is None:
            raise ValueError(f"guidance={decoding.guidance} needs null_logits, the logits without the prompt")
        scores = null_logits + decoding.guidance * (scores - null_logits)
    if decoding.temperature > 0:
        scores = scores / decoding.temperature
    support = _support(scores, decoding) if decoding.truncated else None
    tail_mass = torch.zeros(logits.shape[:-1], device=logits.device)
    if support is not None:
        scores = scores.masked_fill(~support, -torch.inf)
        tail_mass = logits.float().softmax(-1).masked_fill(support, 0.0).sum(-1)
    logp = scores.log_softmax(-1)  # (B, n, D, V)
    tokens = _pick(logp.exp(), generator)
    return Draw(tokens, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), tail_mass, support)


def _support(scores: Tensor, decoding: Decoding) -> Tensor:
    """The tokens that stay, bool ``(B, n, D, V)``; the likeliest always does."""
    if decoding.temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    k = min(decoding.top_k or scores.shape[-1], scores.shape[-1])
    if decoding.top_p == 1:
        return scores >= scores.topk(k, -1).values[..., -1:]
    top, index = scores.topk(k, -1)  # likeliest first
    p = top.softmax(-1)
    keep = p.cumsum(-1) - p < decoding.top_p  # the mass before a token is still below p
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, keep)


def _pick(p: Tensor, generator: torch.Generator | SharedNoise | None) -> Tensor:
    """One index from each distribution ``(..., V)``."""
    if not torch.isfinite(p.sum()):
        raise RuntimeError("the policy's logits are not finite: its weights are damaged, load an earlier checkpoint")
    if p.device.type != "cpu":
        generator = generator.own() if isinstance(generator, SharedNoise) else generator
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
    # The inverse of the cumulative distribution, five times as fast as multinomial on a CPU. A token of probability 0
    # cannot be the first whose cumulative sum exceeds u (on a GPU, where sums associate otherwise, it could).
    cdf = p.cumsum(-1)
    shape = (*p.shape[:-1], 1)
    u = generator.uniform(*shape) if isinstance(generator, SharedNoise) else torch.rand(*shape, generator=generator)
    u = u * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)
