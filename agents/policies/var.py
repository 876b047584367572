"""The policy of FoundationVision's VAR (Tian et al., 2024, arXiv 2404.02905), for its public weights.

A transformer over the scales, causal between them and full within one. It knows the class through adaptive layer norm
(AdaLN) in every block and through its first token. Queries and keys have unit length and each head a learned inverse
temperature. Public models of depth d have width 64 d and d heads; the largest, d36, shares one AdaLN among its blocks.

Modules are named as in the public state dict, so that ``var_d16.pth`` to ``var_d36.pth`` load as they are; get one with
``hf download FoundationVision/var var_d16.pth --local-dir .``. The public options without unit-length attention are
absent here: no published model uses them. So are the dropout of labels and of paths: log-probabilities have to be the
same whenever they are asked for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.policies.base import Policy
from agents.policies.class_names import ClassNames
from agents.policies.lora import add_lora
from var_env.tokenizers import load_tokenizer
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.var_vqvae import load_public_weights, read_public
from var_env.weights import load_config_and_weights, load_weights, save_module

MAX_SCALE = 100  # of the attention's inverse temperatures
Past = tuple[Tensor, Tensor]  # a layer's keys and values so far, (B, A, n, E)


class Cond(NamedTuple):
    """Classes."""

    label: Tensor  # (B,) int64; one more than the last class stands for none


class Cache(NamedTuple):
    """What the tokens so far left behind. `A` heads, `E` channels a head."""

    condition: Tensor  # (B, W)
    past: list[Past]  # one a layer; empty before grid 0


class VARPolicy(Policy):
    """Class-conditional VAR over the grids of a tokenizer.

    A prompt is the number of a class, such as ``"207"``, or its name where ``labels`` are given; an empty one is no
    class. Such prompts quote no word, so the environment takes a world that draws them and a reward that does not
    read::

        class Classes:
            size, max_prompt_bytes = 256, 8

            def sample(self, rng):
                return Scene(str(rng.integers(1000)), (), size=self.size)

        tokenizer = VARTokenizer.load_public("vae_ch160v4096z32.pth")
        policy = VARPolicy.load_public("var_d16.pth", tokenizer)
        env = VARTextEnv(world=Classes(), tokenizer=tokenizer, reward=MyReward())

    A reward that compares image and prompt needs names: draw from ``labels`` then.

    **Guidance.** The public sampler's ``cfg`` grows with the scale: its logits are ``(1 + t) * conditional - t * null``
    with ``t = cfg * k / (T - 1)`` at scale k = 0 .. T - 1. `Decoding.guidance` is the factor ``1 + t``, the same at all
    scales. To sample as they do, make ``Caches(policy, cond, guided=True)`` and call `unroll` scale by scale, with
    ``Decoding(guidance=1 + cfg * k / (T - 1), top_k=900, top_p=0.96)``; their ``cfg=1.5`` runs from 1 to 2.5.

    Args:
        tokenizer: gives schedule, vocabulary and the features that are read from the canvas.
        depth: transformer blocks.
        width, heads: by default 64 times the depth, and the depth.
        classes: their number; one more embedding stands for no class.
        shared_adaln: whether one AdaLN serves all blocks, which then add an offset each.
        labels: a name for each class, or a JSON file of them, see `ClassNames`. torchvision has ImageNet's, in
            ``ResNet18_Weights.DEFAULT.meta["categories"]``.
        gradient_checkpointing: recompute the blocks in the backward pass, for less memory.
        precision: "auto", "bf16" or "fp32", see `Policy`.
        lora: options of `add_lora`, for a policy with low-rank adapters.
    """

    lora_targets: Sequence[str] = ("mat_qkv", "proj", "fc1", "fc2")

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        classes: int = 1000,
        shared_adaln: bool = False,
        labels: Sequence[str] | str | Path | None = None,
        gradient_checkpointing: bool = False,
        precision: str = "auto",
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, precision)
        width, heads = width or 64 * depth, heads or depth
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.names = ClassNames(classes, labels)
        self.config = {
            "depth": depth,
            "width": width,
            "heads": heads,
            "classes": classes,
            "shared_adaln": shared_adaln,
            "labels": self.names.labels,
            "gradient_checkpointing": gradient_checkpointing,
            "precision": precision,
        }
        self.gradient_checkpointing = gradient_checkpointing
        schedule = tokenizer.schedule
        self.word_embed = nn.Linear(tokenizer.channels, width)
        self.class_emb = nn.Embedding(classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, schedule.sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, schedule.total_tokens, width))
        self.lvl_embed = nn.Embedding(len(schedule), width)
        self.shared_ada_lin = adaptive(width, 6) if shared_adaln else None
        self.blocks: Sequence[Block] = nn.ModuleList(Block(width, heads, shared_adaln) for _ in range(depth))  # type: ignore[assignment]
        self.head_nm = nn.ModuleDict({"ada_lin": adaptive(width, 2)})
        self.head = nn.Linear(width, tokenizer.depth * tokenizer.vocab_size)
        for weight in (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight):
            nn.init.normal_(weight, std=(1 / width / 3) ** 0.5)
        if lora is not None:
            add_lora(self, **lora)

    # Conditions --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        return Cond(torch.tensor([self.names.number(prompt) for prompt in prompts], device=self.device))

    def null_cond(self, cond: Cond) -> Cond:
        return Cond(torch.full_like(cond.label, self.names.count))

    # The cached path ---------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:
        return Cache(self.class_emb(cond.label), [])

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:
        with self.autocast():
            x = self._start(cache.condition) if t == 0 else self._embed(features)  # (B, n_t, W)
            x = x + self._positions()[self.schedule.slices[t]]
            modulation, past = self._modulation(cache.condition), []
            for i, block in enumerate(self.blocks):
                x, keys_values = block(x, modulation, past=cache.past[i] if cache.past else None)
                past.append(keys_values)
            return self.logits(self._finish(x, cache.condition), range(t, t + 1)), Cache(cache.condition, past)

    def fork(self, cache: Cache, index: Tensor) -> Cache:
        past = [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in cache.past]
        return Cache(cache.condition.index_select(0, index), past)

    # The teacher-forced path -------------------------------------------------------------------------------------

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return self.logits(self.hidden(cond, grids, steps), steps)

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        first, last = self.schedule.slices[steps[0]].start, self.schedule.slices[steps[-1]].stop
        features = self.tokenizer.read_all(grids, steps[-1], len(cond.label))[1:]  # grid 0 has the class for an input
        scale = self._scales()[:last]
        mask = scale[:, None] >= scale  # (n, n), true where a token may look
        with self.autocast():
            condition = self.class_emb(cond.label)  # (B, W)
            x = torch.cat([self._start(condition), *map(self._embed, features)], dim=1)  # (B, n, W)
            x = x + self._positions()[:last]
            modulation = self._modulation(condition)
            for block in self.blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x, _ = checkpoint(block, x, modulation, mask, use_reentrant=False)
                else:
                    x, _ = block(x, modulation, mask)
            return self._finish(x[:, first:], condition)

    def recompute_activations(self) -> None:
        self.gradient_checkpointing = True

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        with self.autocast():
            logits = self.head(hidden).float()  # (B, n, D * V)
        return logits.unflatten(2, (self.tokenizer.depth, self.tokenizer.vocab_size))

    # Parts -------------------------------------------------------------------------------------------------------

    def _start(self, condition: Tensor) -> Tensor:
        """What stands for the features of grid 0, `(B, n_0, W)`."""
        return condition[:, None] + self.pos_start

    def _embed(self, features: Tensor) -> Tensor:
        return self.word_embed(features.to(self.word_embed.weight.dtype))

    def _scales(self) -> Tensor:
        """The scale of every token, `(L,)`."""
        sizes = torch.tensor(self.schedule.sizes, device=self.device)
        return torch.repeat_interleave(torch.arange(len(sizes), device=self.device), sizes)

    def _positions(self) -> Tensor:
        """`(L, W)`."""
        return self.pos_1LC[0] + self.lvl_embed(self._scales())

    def _modulation(self, condition: Tensor) -> Tensor:
        """What the blocks make their AdaLN from: the class `(B, W)` or, where they share it, `(B, 6, W)`."""
        return condition if self.shared_ada_lin is None else self.shared_ada_lin(condition)

    def _finish(self, x: Tensor, condition: Tensor) -> Tensor:
        """The norm before the head."""
        scale, shift = self.head_nm["ada_lin"](condition).unsqueeze(1).unbind(2)  # each (B, 1, W)
        return modulate(x, scale, shift)

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights and configuration to one safetensors file; `half` stores bfloat16."""
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> VARPolicy:
        """Read a file that `save` wrote; no weights are shipped. Default: the shipped tokenizer."""
        config, weights = load_config_and_weights(path or "(none given)", "VARPolicy.load_public(PTH).save(PATH)")
        policy = cls(tokenizer or load_tokenizer(), **config)
        load_weights(policy, weights, path or "")
        return policy

    @classmethod
    def load_public(
        cls,
        path: str | Path,
        tokenizer: VisualTokenizer,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> VARPolicy:
        """Read a public ``var_d16.pth`` to ``var_d36.pth``; the sizes follow from the shapes. In eval mode.

        Args:
            tokenizer: on the schedule that the model was trained with: `VAR_512` for d36, else `VAR_256`.
            dtype: of the weights. bfloat16 halves the memory and suits sampling and `lora`; learning all weights wants
                float32, with bf16 in the products alone, which is `precision`.
            options: ``labels``, ``gradient_checkpointing``, ``precision`` and ``lora`` of the constructor.

        Raises:
            FileNotFoundError: there is no such file; the message says how to get it.
            ValueError: it is no such file, is of another schedule, or a name or a shape in it does not fit.
        """
        names = ("class_emb.weight", "blocks.0.attn.scale_mul_1H11", "lvl_1L")
        weights = read_public(path, "VAR transformer", names)
        classes, width = weights["class_emb.weight"].shape
        tokens = tuple(weights["lvl_1L"].flatten().bincount().tolist())
        if tokens != tokenizer.schedule.sizes:
            raise ValueError(
                f"{path} is of grids with {tokens} tokens, the tokenizer's have {tokenizer.schedule.sizes}: load the "
                "tokenizer with schedule=VAR_256 or schedule=VAR_512"
            )
        lora = options.pop("lora", None)
        with torch.device("meta"):
            policy = cls(
                tokenizer,
                depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
                width=width,
                heads=weights["blocks.0.attn.scale_mul_1H11"].shape[1],
                classes=classes - 1,
                shared_adaln="shared_ada_lin.1.weight" in weights,
                **options,
            )
        load_public_weights(policy, weights, ("lvl_1L", "attn_bias_for_masking", "zero_k_bias"), path)
        policy = policy.to(device, dtype).eval()
        if lora is not None:
            add_lora(policy, **lora)
        return policy


class Block(nn.Module):
    """Attention and a two-layer network, each scaled, shifted and gated by the class."""

    def __init__(self, width: int, heads: int, shared_adaln: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU("tanh"), "fc2": nn.Linear(4 * width, width)}
        self.ffn = nn.Sequential(OrderedDict(layers))
        self.ada_lin = None if shared_adaln else adaptive(width, 6)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5) if shared_adaln else None

    def forward(
        self, x: Tensor, modulation: Tensor, mask: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """`x` `(B, n, W)` and the keys and values that it leaves behind, those of the past included."""
        if self.ada_gss is not None:
            parts = self.ada_gss + modulation.unsqueeze(1)  # (B, 1, 6, W)
        else:
            assert self.ada_lin is not None
            parts = self.ada_lin(modulation).unsqueeze(1)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts.unbind(2)  # each (B, 1, W)
        attended, past = self.attn(modulate(x, scale1, shift1), mask, past)
        x = x + gate1 * attended
        return x + gate2 * self.ffn(modulate(x, scale2, shift2)), past


class Attention(nn.Module):
    """Attention between unit vectors: the score is their cosine times a learned inverse temperature of the head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: Past | None, turn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Past]:
        """As `Block`'s; ``turn`` is a position embedding of queries and keys, ``(B, A, n, E)`` to the same."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # keys have none
        qkv = self.mat_qkv(x)
        qkv = qkv + bias.to(qkv.dtype)  # (B, n, 3 W)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, A, n, E)
        scale = self.scale_mul_1H11.clamp(max=math.log(MAX_SCALE)).exp()
        q, k = scale * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if turn is not None:
            q, k = turn(q), turn(k)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(attended.transpose(1, 2).flatten(2)), (k, v)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive layer norm, `(B, n, W)`."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def adaptive(width: int, parts: int) -> nn.Sequential:
    """The class `(B, W)` to scales, shifts and gates, `(B, parts, W)`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width), nn.Unflatten(1, (parts, width)))
