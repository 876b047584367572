"""A policy without a network: one softmax table for each state, exactly the VAR family of Definition 2.

Every grid's sites are independent given the state (eq. 6), and nothing else is asked of them: no two states share a
number. For worlds as small as ``VARTabular-v0``, where it can be compared with the optimum of the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agents.policies.base import Policy
from var_env.seeding import as_seed
from var_env.tokenizers.base import VisualTokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module

MOST_NUMBERS = 2**20


class Cond(NamedTuple):
    """Prompts, of which only the number counts."""

    rows: Tensor  # (B,) zeros


class Cache(NamedTuple):
    """The state so far."""

    state: Tensor  # (B,) int64, the number of the state before grid t, without grid t - 1


class TablePolicy(Policy):
    """Softmax tables, ``S_t`` states before grid t with ``n_t`` sites of V codes each. The prompt changes nothing.

    States are numbered by their tokens as the digits of one number, the first token the highest.

    Args:
        tokenizer: gives schedule and vocabulary; one code a token.
        spread: standard deviation of the logits at birth; with 0 all tokens are equally likely.
        seed: of these logits.

    Raises:
        ValueError: tables of more than a million numbers.
    """

    def __init__(self, tokenizer: VisualTokenizer, spread: float = 0.0, seed: int = 0) -> None:
        super().__init__(tokenizer)
        codes, schedule = tokenizer.vocab_size, tokenizer.schedule
        shapes = [
            (codes**part.start, n, codes) for part, n in zip(schedule.slices, schedule.sizes, strict=True)
        ]  # (S_t, n_t, V)
        numbers = sum(states * n * codes for states, n, _ in shapes)
        if numbers > MOST_NUMBERS:
            raise ValueError(
                f"tables for {schedule.total_tokens} tokens of {codes} codes hold {numbers} numbers, more than "
                f"{MOST_NUMBERS}: take a policy with a network, or fewer and smaller grids"
            )
        self.config = {}
        generator = torch.Generator().manual_seed(as_seed(seed))
        self.tables = nn.ParameterList(spread * torch.randn(shape, generator=generator) for shape in shapes)

    def sites(self) -> list[Tensor]:
        """The log-probabilities of the tables for ``agents/exact.py``, T of float64 ``(S_t, n_t, V)``, detached."""
        return [table.detach().cpu().double().log_softmax(-1) for table in self.tables]

    def take_over(self, sites: Sequence[Tensor]) -> TablePolicy:
        """This policy with other tables, T of log-probabilities ``(S_t, n_t, V)``."""
        for table, logp in zip(self.tables, sites, strict=True):
            table.data.copy_(logp)
        return self

    # Conditions ------------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(torch.zeros(len(prompts), device=self.device))

    def null_cond(self, cond: Cond) -> Cond:
        return cond

    # The cached path -------------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:
        return Cache(torch.zeros_like(cond.rows, dtype=torch.int64))

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:
        state = cache.state if previous is None else self._append(cache.state, previous)
        return self.tables[t][state].float().unsqueeze(2), Cache(state)  # (B, n_t, 1, V)

    def fork(self, cache: Cache, index: Tensor) -> Cache:
        return Cache(cache.state.index_select(0, index))

    def _append(self, state: Tensor, grid: Tensor) -> Tensor:
        """The number of the state after a grid ``(B, n_t, 1)``."""
        for token in grid.squeeze(-1).unbind(1):
            state = state * self.tokenizer.vocab_size + token
        return state

    # The teacher-forced path -----------------------------------------------------------------------------------------

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return torch.cat([self.tables[t][state] for t, state in self._states(cond, grids, steps)], 1).unsqueeze(2)

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        """The logits of each token, and the state as one of all: ``(B, n, V + sum S_t)``."""
        counts = [len(table) for table in self.tables]
        parts = []
        for t, state in self._states(cond, grids, steps):
            which = F.one_hot(state + sum(counts[:t]), sum(counts)).to(self.tables[t])  # (B, sum S_t)
            parts.append(torch.cat([self.tables[t][state], which[:, None].expand(-1, self.schedule.sizes[t], -1)], 2))
        return torch.cat(parts, 1)

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        return hidden[..., : self.tokenizer.vocab_size].float().unsqueeze(2)

    def _states(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> list[tuple[int, Tensor]]:
        """Each t of ``steps`` with the states before it, int64 ``(B,)``."""
        states = [self.begin(cond).state]
        for grid in grids[: steps[-1]]:
            states.append(self._append(states[-1], grid))
        return [(t, states[t]) for t in steps]

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        save_module(self, path)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> TablePolicy:
        """Read a file that `save` wrote. ``ValueError`` without a path or a tokenizer: there is no shipped table."""
        if path is None or tokenizer is None:
            raise ValueError("a table needs its file and its tokenizer: TablePolicy.load(path, tokenizer)")
        _, weights = load_config_and_weights(path, "TablePolicy.save")
        policy = cls(tokenizer)
        load_weights(policy, weights, path)
        return policy
