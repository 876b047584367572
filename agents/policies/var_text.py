"""The default policy: a small decoder over scales, causal between scales and full within one.

Image tokens attend to each other and, in the same softmax, to the prompt's bytes. The prompt runs through a text
encoder of its own (one transformer block) and enters every layer as keys and values only, so that a step costs
little more than its image tokens.

Spelling is the hard part of text-to-image. The encoder therefore sees for every byte inside quotes which quoted word
it belongs to and how far from that word's middle it stands, two facts that a reader of the bytes can count off; see
`byte_features`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.policies.base import Policy
from agents.policies.lora import add_lora
from var_env.scenes import CELL_HEIGHT, LATTICE, MAX_PROMPT_BYTES, World, encode_prompt
from var_env.tokenizers import load_tokenizer
from var_env.tokenizers.base import VisualTokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module
from var_env.worlds import make_world

START = 1  # the byte value of the start-of-text token; 0 pads
MAX_WORDS, MAX_PLACE = 8, 16
SHARPNESS_GAIN = 300.0  # Adam moves a parameter by about the learning rate: 2e-5 here is 0.6 % of a temperature


class Cond(NamedTuple):
    """Prompts as integers, each ``(B, P)`` int64, P the longest prompt of the batch plus the start token."""

    bytes: Tensor  # 0 pads
    word: Tensor  # 0 outside quotes, else 1 + the word's index
    place: Tensor  # 0 outside quotes, else the letter's place from the word's middle, in half letters, + MAX_PLACE


class Cache(NamedTuple):
    """Keys and values of prompt and image tokens so far. `N` layers, `A` heads, `E` channels a head."""

    text_keys: Tensor  # (N, B, A, P, E)
    text_values: Tensor  # (N, B, A, P, E)
    text_bias: Tensor  # (B, 1, 1, P): 0 where a byte is, -inf where padding is
    keys: Tensor  # (N, B, A, L, E), preallocated and written in place
    values: Tensor  # (N, B, A, L, E)
    filled: int  # image tokens so far


ATTENTION = ("earlier_scales", "own_scale")


class VARTextPolicy(Policy):
    """A block-causal transformer over the token grids of a tokenizer, with a byte-level prompt.

    The codes of a token are predicted independently of each other, given the state, as Infinity does with its bits.

    Args:
        tokenizer: gives schedule, vocabulary and the features that are read from the canvas.
        width, layers, heads: the decoder's size; `width` is divisible by `2 * heads`.
        attention: "earlier_scales" lets a token look at its own scale and all before it, as VAR does. "own_scale" is
            Switti's non-causal variant (arXiv 2412.01819, section 3.2): a token looks at its own scale and the prompt,
            and knows earlier grids only through the canvas that it reads. Nothing is cached then.
        prompt_bytes: the longest prompt that it reads, in UTF-8.
        gradient_checkpointing: recompute the blocks in the backward pass, for less memory.
        precision: "auto", "bf16" or "fp32", see `Policy`.
        lora: options of `add_lora`, for a policy with low-rank adapters.
        null_prompt: whether some of the samples that it learns from have no prompt. Without, there is nothing to guide
            away from, and guidance is refused.
    """

    lora_targets = ("qkv", "text_kv", "attention_out", "mlp_in", "mlp_out")  # of all blocks, the text encoder's too
    always_trained = ("sharpness",)
    temperature_parameters = ("sharpness",)
    sharded_layers = ("Block",)

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        attention: str = "earlier_scales",
        prompt_bytes: int = MAX_PROMPT_BYTES,
        gradient_checkpointing: bool = False,
        precision: str = "auto",
        lora: Mapping[str, Any] | None = None,
        null_prompt: bool = True,
    ) -> None:
        super().__init__(tokenizer, precision)
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        self.config = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "attention": attention,
            "prompt_bytes": prompt_bytes,
            "gradient_checkpointing": gradient_checkpointing,
            "precision": precision,
            "null_prompt": null_prompt,
        }
        self.heads, self.attention = heads, attention
        self.prompt_bytes, self.gradient_checkpointing = prompt_bytes, gradient_checkpointing
        self.text = TextEncoder(width, heads, prompt_bytes)
        self.embed_features = nn.Linear(tokenizer.channels, width)
        schedule = tokenizer.schedule
        self.position = nn.Parameter(  # (L, width)
            scale_positions([schedule.canvas] if schedule.is_raster else schedule.grids, width)
        )
        self.blocks: Sequence[Block] = nn.ModuleList(Block(width, heads) for _ in range(layers))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokenizer.depth * tokenizer.vocab_size)
        # A second way to the logits, through the codes' own geometry: near codes share what is learned about one.
        self.to_code = nn.Linear(width, tokenizer.channels) if hasattr(tokenizer, "codebook") else None
        # A temperature for each scale, exp(-SHARPNESS_GAIN * sharpness), one for all of a raster. Pretraining leaves it
        # at 1. Sampling a little below 1 reads better; a policy can learn that in one number a scale, or with
        # difficulty in all its weights.
        self.sharpness = nn.Parameter(torch.zeros(1 if schedule.is_raster else len(schedule)))
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "position":
                depth = 2 * layers if name.endswith(("attention_out.weight", "mlp_out.weight")) else 1
                nn.init.normal_(weight, std=0.02 / depth**0.5)
        if lora is not None:
            add_lora(self, **lora)

    # Conditions --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        rows = [byte_features(prompt, self.prompt_bytes) for prompt in prompts]
        longest = max(row.shape[1] for row in rows)
        batch = np.stack([np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in rows], axis=1)
        return Cond(*torch.from_numpy(batch).to(self.device))  # 3 x (B, P)

    def null_cond(self, cond: Cond) -> Cond:
        if not self.config["null_prompt"]:
            raise ValueError(
                "this policy has never seen an empty prompt (null_prompt=False), so classifier-free guidance would "
                "guide away from noise: leave guidance at 1, or pretrain with vartext pretrain policy --drop-prompt 0.1"
            )
        start_only = torch.zeros_like(cond.bytes)
        start_only[:, 0] = START
        return Cond(start_only, torch.zeros_like(cond.word), torch.zeros_like(cond.place))

    # The cached path ---------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:
        with self.autocast():
            text, bias = self.text(cond)  # (B, P, width), (B, 1, 1, P)
            pairs = [block.text_keys_values(text) for block in self.blocks]
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))  # (N, B, A, P, E)
        return Cache(keys, values, bias, self._room(keys), self._room(keys), 0)

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:
        here = self.schedule.slices[t]
        cache = cache._replace(filled=here.stop)
        with self.autocast():
            x = self.embed_features(features)  # (B, n_t, width); bf16 from here on under autocast
            x = x + self.position[here].to(x.dtype)
            for i, block in enumerate(self.blocks):
                q, k, v = block.queries_keys_values(x)
                text = (cache.text_keys[i], cache.text_values[i], cache.text_bias)
                if self.attention == "own_scale":
                    image = (k, v, None)
                else:
                    keys, values = cache.keys[i], cache.values[i]  # (B, A, L, E)
                    keys[:, :, here], values[:, :, here] = k, v
                    image = (keys[:, :, : here.stop], values[:, :, : here.stop], None)  # all earlier tokens are seen
                x = block.finish(x, attend(q, text, image))
            return self.logits(self.norm(x), range(t, t + 1)), cache

    def fork(self, cache: Cache, index: Tensor) -> Cache:
        text_keys, text_values = cache.text_keys.index_select(1, index), cache.text_values.index_select(1, index)
        keys, values = self._room(text_keys), self._room(text_keys)
        for old, new in ((cache.keys, keys), (cache.values, values)):
            new[:, :, :, : cache.filled] = old[:, :, :, : cache.filled].index_select(1, index)
        return Cache(text_keys, text_values, cache.text_bias[index], keys, values, cache.filled)

    def _room(self, text_keys: Tensor) -> Tensor:
        """Uninitialised keys or values for all image tokens that are looked back at, `(N, B, A, L, E)`."""
        layers, batch, heads, _, channels = text_keys.shape
        tokens = 0 if self.attention == "own_scale" else self.schedule.total_tokens
        return text_keys.new_empty(layers, batch, heads, tokens, channels)

    # The teacher-forced path -------------------------------------------------------------------------------------

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return self.from_features(cond, self._features(cond, grids, steps), steps)

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return self._hidden(cond, self._features(cond, grids, steps), steps)

    def from_features(self, cond: Cond, features: Tensor, steps: range) -> Tensor:
        """`forward` from the canvas features of all scales up to the last step, `(B, n, C)`."""
        return self.logits(self._hidden(cond, features, steps), steps)

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        with self.autocast():
            logits = self.head(hidden)  # (B, n, D * V)
            if self.to_code is not None:
                logits = logits + self.to_code(hidden) @ self.tokenizer.codebook.T
            # Of a single grid there may be any number of tokens.
            sizes = [hidden.shape[1]] if len(steps) == 1 else [self.schedule.sizes[t] for t in steps]
            sharpness = self.sharpness if len(self.sharpness) == 1 else self.sharpness[steps.start : steps.stop]
            scale = (SHARPNESS_GAIN * sharpness).exp().expand(len(steps))
            scale = scale.repeat_interleave(torch.tensor(sizes, device=hidden.device))  # (n,)
            scaled = logits.float() * scale[:, None]
            return scaled.unflatten(2, (self.tokenizer.depth, self.tokenizer.vocab_size))  # (B, n, D, V)

    # Parts -------------------------------------------------------------------------------------------------------

    def _features(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        """Canvas features of all scales up to the last step, `(B, n, C)`."""
        return torch.cat(self.tokenizer.read_all(grids, steps[-1], len(cond.bytes)), dim=1)

    def _hidden(self, cond: Cond, features: Tensor, steps: range) -> Tensor:
        """`hidden` from the canvas features of all scales up to the last step, `(B, n, C)`."""
        first, last = self.schedule.slices[steps[0]].start, self.schedule.slices[steps[-1]].stop
        prompts, rows = distinct(cond)
        with self.autocast():
            text, text_bias = self.text(prompts)  # (U, P, width), (U, 1, 1, P)
            text_bias = text_bias if rows is None else text_bias[rows.argmax(1)]  # (B, 1, 1, P)
            x = self.embed_features(features)  # (B, n, width)
            x = x + self.position[:last].to(x.dtype)
            runs = self._runs(text_bias.to(x.dtype), last)
            for block in self.blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, text, rows, runs, use_reentrant=False)
                else:
                    x = block(x, text, rows, runs)
            return self.norm(x[:, first:])

    def recompute_activations(self) -> None:
        self.gradient_checkpointing = True

    def temperatures(self) -> list[float]:
        """The learned temperature of each scale."""
        return (-SHARPNESS_GAIN * self.sharpness).exp().tolist()

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Set the learned temperatures of all scales, to a number above 0."""
        self.sharpness.fill_(-math.log(temperature) / SHARPNESS_GAIN)

    def diagnostics(self) -> dict[str, float]:
        """``temperature_4_4x4`` and so on, by number and grid; of a raster, ``temperature``."""
        if self.schedule.is_raster:
            return {"temperature": self.temperatures()[0]}
        names = [f"temperature_{t}_{h}x{w}" for t, (h, w) in enumerate(self.schedule.grids, 1)]
        return dict(zip(names, self.temperatures(), strict=True))

    def trained_on(self) -> World | None:
        """The rendered world that its tokenizer names, or else the small one at its images' size, if there is one."""
        size = self.tokenizer.image_size
        if self.tokenizer.world is not None:
            return make_world(self.tokenizer.world, size=size)
        return World(size) if size >= 2 * CELL_HEIGHT and size % LATTICE == 0 else None

    def _runs(self, text_bias: Tensor, tokens: int) -> list[Run]:
        """The first image tokens in runs that attend together: one on a GPU, on a CPU a few, so that little is masked.

        Args:
            text_bias: 0 where a byte is and -inf where padding is, ``(B, 1, 1, P)``, in the dtype of the queries.
            tokens: how many, all those of some first scales.
        """
        least = tokens if text_bias.is_cuda else max(64, tokens / 4)  # more runs cost more than they save
        sizes = torch.tensor(self.schedule.sizes, device=text_bias.device)
        scale = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)[:tokens]
        runs, start = [], 0
        for part in self.schedule.slices:
            if part.stop > tokens or (part.stop - start < least and part.stop != tokens):
                continue
            seen = slice(start if self.attention == "own_scale" else 0, part.stop)
            here, there = scale[start : part.stop, None], scale[seen]
            hidden = here != there if self.attention == "own_scale" else here < there  # (r, s)
            if part.start == start and not text_bias.is_cuda:
                hidden = hidden[:1]  # one scale, whose tokens all see the same
            bias = text_bias.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            spread = (len(text_bias), 1, len(bias), -1)
            bias = torch.cat((text_bias.expand(spread), bias.expand(spread)), 3)  # (B, 1, r or 1, P + s)
            runs.append(Run(slice(start, part.stop), seen, bias))
            start = part.stop
        return runs

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights and configuration to one safetensors file; `half` stores bfloat16."""
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> VARTextPolicy:
        """Read a file that `save` wrote; without a path, the shipped base policy. Default: the shipped tokenizer."""
        with resources.as_file(resources.files("agents.policies") / "assets" / "base.safetensors") as shipped:
            config, weights = load_config_and_weights(path or shipped, "vartext pretrain policy")
        policy = cls(tokenizer or load_tokenizer(), **config)
        load_weights(policy, weights, path or "the shipped base policy")
        return policy


class TextEncoder(nn.Module):
    """Bytes with their counted features, then one bidirectional transformer block."""

    def __init__(self, width: int, heads: int, prompt_bytes: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.word = nn.Embedding(MAX_WORDS + 1, width)
        self.place = nn.Embedding(2 * MAX_PLACE + 1, width)
        self.offset = nn.Embedding(prompt_bytes + 1, width)
        self.block = Block(width, heads, text=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Encoded prompts `(B, P, width)` and their attention bias `(B, 1, 1, P)`."""
        bias = torch.zeros(cond.bytes.shape, device=cond.bytes.device).masked_fill(cond.bytes == 0, -torch.inf)
        bias = bias[:, None, None, :]
        x = self.byte(cond.bytes) + self.word(cond.word) + self.place(cond.place)
        x = x + self.offset.weight[: cond.bytes.shape[1]]
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        q, k, v = self.block.queries_keys_values(x)
        return self.norm(self.block.finish(x, attend(q, (k, v, bias)))), bias


class Block(nn.Module):
    """A pre-norm transformer block in two halves, between which the cached path calls attention."""

    def __init__(self, width: int, heads: int, text: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.text_kv = nn.Linear(width, 2 * width, bias=False) if text else None
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor, rows: Tensor | None, runs: Sequence[Run]) -> Tensor:
        """Image tokens `(B, n, width)` that see each other as `runs` say, and their prompt of the text `(U, P, width)`.

        `rows` is of `distinct`.
        """
        q, k, v = self.queries_keys_values(x)
        text_k, text_v = self.text_keys_values(text, rows)
        return self.finish(x, attend_in_runs(q, (text_k, text_v), (k, v), runs))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._split(self.qkv(self.norm1(x)), 3)

    def text_keys_values(self, text: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        assert self.text_kv is not None
        pairs = self.text_kv(text)  # (U, P, 2 * width)
        if rows is not None:  # a product, whose gradient sums over a group in fp32 and in the same order each time
            pairs = (rows.to(pairs.dtype) @ pairs.flatten(1)).unflatten(1, pairs.shape[1:])  # (B, P, 2 * width)
        return self._split(pairs, 2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, A, n, E)


Memory = tuple[Tensor, Tensor, Tensor | None]  # keys and values (B, A, m, E), and a bias that fits (B, A, n, m)


def attend(q: Tensor, *memories: Memory) -> Tensor:
    """Attention of queries `(B, A, n, E)` to several memories in one softmax, as if they were one: `(B, A, n, E)`."""
    if q.is_cuda:
        spread = (len(q), 1, q.shape[2])
        biases = [
            (q.new_zeros(1) if bias is None else bias.to(q.dtype)).expand(*spread, k.shape[2])
            for k, _, bias in memories
        ]
        k, v = (torch.cat(part, 2) for part in list(zip(*memories, strict=True))[:2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat(biases, 3))
    # By hand: the CPU's fused kernel is slow in its backward pass, and this way only the scores are concatenated.
    q = q * q.shape[-1] ** -0.5
    scores = [
        q @ k.transpose(-1, -2) if bias is None else q @ k.transpose(-1, -2) + bias.to(q.dtype)
        for k, _, bias in memories
    ]
    weights = torch.cat(scores, -1).softmax(-1).to(q.dtype).split([k.shape[2] for k, _, _ in memories], -1)
    return functools.reduce(torch.add, (w @ v for w, (_, v, _) in zip(weights, memories, strict=True)))


class Run(NamedTuple):
    """Image tokens that attend together."""

    queries: slice
    seen: slice  # the image tokens that any of them sees
    bias: Tensor  # (B, 1, r or 1, P + s) for the prompt and the s seen: 0 where a query may look and -inf where not


def attend_in_runs(q: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], runs: Sequence[Run]) -> Tensor:
    """Attention of all image tokens `(B, A, n, E)` to text and image, both keys and values `(B, A, m, E)`."""
    attended = []
    for queries, seen, bias in runs:
        here = q[:, :, queries]
        k, v = (torch.cat((of_text, of_image[:, :, seen]), 2) for of_text, of_image in zip(text, image, strict=True))
        if q.is_cuda or q.dtype != torch.bfloat16:
            attended.append(F.scaled_dot_product_attention(here, k, v, attn_mask=bias))
        else:  # by hand: the CPU's fused kernel is slow in its backward pass in bf16
            with torch.autocast("cpu", enabled=False):  # would make all weights fp32
                weights = ((here * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1)
                attended.append(weights @ v)
    return torch.cat(attended, 2)


def distinct(cond: Cond) -> tuple[Cond, Tensor | None]:
    """The U different prompts of B, and the prompt of each row as a one-hot matrix `(B, U)`; ``None`` if all differ."""
    prompts, index = torch.unique(torch.cat(cond, 1), dim=0, return_inverse=True)  # (U, 3 * P), (B,)
    if len(prompts) == len(index):
        return cond, None
    return Cond(*prompts.chunk(3, 1)), F.one_hot(index, len(prompts))


@functools.lru_cache(maxsize=4096)
def byte_features(prompt: str, limit: int = MAX_PROMPT_BYTES) -> np.ndarray:
    """The rows of `Cond` for one prompt: int64 `(3, bytes + 1)`. Raises `ValueError` when it is too long."""
    data = encode_prompt(prompt, limit)
    data = data[: len(prompt.encode())]
    rows = np.zeros((3, len(data) + 1), np.int64)
    rows[0, 0], rows[0, 1:] = START, data
    word, start = 0, -1  # words so far, and where the quoted text began
    for i, byte in enumerate(data):
        if byte != ord('"'):
            continue
        if start < 0:
            start = i + 1
        else:
            word += 1
            rows[1, start + 1 : i + 1] = min(word, MAX_WORDS)
            middle = 2 * np.arange(i - start) - (i - start - 1)  # -3 -1 1 3 for four letters
            rows[2, start + 1 : i + 1] = np.clip(middle + MAX_PLACE, 1, 2 * MAX_PLACE)
            start = -1
    return rows


def scale_positions(grids: Sequence[tuple[int, int]], width: int) -> Tensor:
    """Sine codes of every token's place in the image and of its scale, `(L, width)`, at the size of embeddings."""
    frequencies = torch.exp(torch.linspace(0, 4, width // 4))  # 1 to 55 radians across the image
    rows = []
    for h, w in grids:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], dim=1)  # (n, width/2)
        rows.append(torch.cat([angles.sin(), angles.cos()], dim=1) + torch.randn(width) * 0.5)
    return torch.cat(rows) * 0.02
