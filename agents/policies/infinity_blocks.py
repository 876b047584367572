"""What Infinity's transformer is made of: its blocks, attention to a prompt, and places that turn queries and keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.policies.var import Attention, Past, modulate

BASE = 10_000.0  # of RoPE's wavelengths
Turn = Callable[[Tensor], Tensor]  # of queries or keys (B, A, n, E), by the places of their tokens


class Block(nn.Module):
    """Attention to the image, attention to the prompt, and a two-layer network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sa, self.ca = Attention(width, heads), CrossAttention(width, width, heads)
        self.ca_norm = nn.LayerNorm(width, eps=1e-6)
        wide = max(1, round(4 * width / 256)) * 256
        layers = {"fc1": nn.Linear(width, wide), "act": nn.GELU("tanh"), "fc2": nn.Linear(wide, width)}
        self.ffn = nn.Sequential(OrderedDict(layers))
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        turn: Turn,
        text: Past,
        text_mask: Tensor,
        mask: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Past]:
        """`x` `(B, n, W)` and the keys and values that it leaves behind, those of the past included."""
        parts = self.ada_gss + modulation.unsqueeze(1)  # (B, 1, 6, W)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts.unbind(2)  # each (B, 1, W)
        attended, past = self.sa(modulate(x, scale1, shift1), mask, past, turn)
        x = x + gate1 * attended
        x = x + self.ca.attend(self.ca.queries(self.ca_norm(x)), text, text_mask)
        return x + gate2 * self.ffn(modulate(x, scale2, shift2)), past


class CrossAttention(nn.Module):
    """Attention to a prompt's tokens; with `pool`, of one learned query."""

    def __init__(self, width: int, seen: int, heads: int, pool: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}, of {seen} text channels")
        self.heads = heads
        query = torch.randn(1, heads, width // heads) * (1 / width / 3) ** 0.5
        self.mat_q: Any = nn.Parameter(query) if pool else nn.Linear(width, width)
        self.mat_kv = nn.Linear(seen, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def queries(self, x: Tensor) -> Tensor:
        """`(B, n, W)` to `(B, A, n, E)`."""
        return self.mat_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, text: Tensor) -> Past:
        """`(B, P, K)` to `(B, A, P, E)` each."""
        both = self.mat_kv(text)
        both = both + torch.cat([torch.zeros_like(self.v_bias), self.v_bias]).to(both.dtype)  # keys have no bias
        keys, values = both.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def attend(self, q: Tensor, text: Past, mask: Tensor) -> Tensor:
        """`(B, A, n, E)` to `(B, n, W)`."""
        attended = F.scaled_dot_product_attention(q.to(text[0].dtype), *text, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


def place_angles(grids: Sequence[tuple[int, int]], channels: int, places: int) -> Tensor:
    """By what angles pairs of a token's channels are turned: first by its row, then by its column, `(L, channels / 2)`.

    A grid of h rows has them at the places ``i * places / h``, rounded.
    """
    frequencies = 1 / BASE ** (torch.arange(0, channels // 2, 2) / (channels // 2))  # (channels / 4,)
    angles = []
    for h, w in grids:
        rows, columns = ((torch.arange(side) * (places / side)).round() for side in (h, w))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        angles.append(torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], dim=1))
    return torch.cat(angles)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Channels 2 i and 2 i + 1 of `(B, A, n, E)` turned by angle i of `(n, E / 2)`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)
