"""The policy of FoundationVision's Infinity (Han et al., 2024, arXiv 2412.04431), for its public weights.

A transformer over the scales as `VARPolicy`, with three differences: every block attends to the prompt, which a frozen
T5 has encoded; queries and keys are turned by their place in the image (RoPE in two dimensions); and the head says
of each of a token's D bits how likely it is.

Modules are named as in the public state dict. Get it with
``hf download FoundationVision/Infinity infinity_2b_reg.pth --local-dir .``, the tokenizer as in
``var_env/tokenizers/infinity_vae.py``, and the text encoder, google/flan-t5-xl, through transformers.

Limits: square images, on the schedules of `infinity_schedule`; models that share one AdaLN among their blocks and
have unit-length attention, as all that the public scripts name; no spatial patchify, and so not the 8B model. The
public sampler's guidance on inner layers is absent; that on logits is `Decoding.guidance`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.policies.base import Policy
from agents.policies.infinity_blocks import Block, CrossAttention, Turn, place_angles, rotate
from agents.policies.lora import add_lora
from agents.policies.t5 import T5Features
from agents.policies.var import Past, VARPolicy, adaptive
from var_env.tokenizers import load_tokenizer
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.infinity_vae import REPOSITORY
from var_env.tokenizers.var_vqvae import load_public_weights, read_public
from var_env.weights import load_config_and_weights, load_weights

MAX_TEXT = 512  # tokens of a prompt
MAX_SCALES = 15


class Cond(NamedTuple):
    """Encoded prompts."""

    features: Tensor  # (B, P, K) fp32, 0 at padding
    mask: Tensor  # (B, P) bool, true where a token is


class Text(NamedTuple):
    """What the blocks see of the prompts."""

    condition: Tensor  # (B, W), a summary
    past: list[Past]  # keys and values of each layer, (B, A, P, E)
    mask: Tensor  # (B, 1, 1, P) bool


class Cache(NamedTuple):
    """What the prompt and the tokens so far left behind. `A` heads, `E` channels a head."""

    text: Text
    past: list[Past]  # one a layer; empty before grid 0


class InfinityPolicy(VARPolicy):
    """Infinity over the grids of a bitwise tokenizer. The defaults are the sizes of the public 2B model.

    **Guidance.** The empty prompt is a stored one, cut to the prompt's own length, as in the public code: the
    unconditional logits know how long the prompt is. The public script samples with ``cfg=4, tau=0.5``, which is
    ``Decoding(guidance=4, temperature=0.5)``.

    Args:
        tokenizer: gives schedule, bits and the features that are read from the canvas.
        text: the frozen encoder of prompts, or the folder or hub name of one. Files of the policy keep its name alone.
        depth: transformer blocks.
        width, heads: of the transformer.
        places: side of the largest schedule's last grid, to which the places of all grids are scaled; public: 64.
        gradient_checkpointing: recompute the blocks in the backward pass, for less memory.
        precision, lora: as in `VARPolicy`.

    Examples:
        >>> tokenizer = InfinityTokenizer.load_public("infinity_vae_d32reg.pth", 1024)  # doctest: +SKIP
        >>> policy = InfinityPolicy.load_public(  # doctest: +SKIP
        ...     "infinity_2b_reg.pth", tokenizer, "google/flan-t5-xl", "cuda", torch.bfloat16
        ... )
    """

    lora_targets = ("mat_qkv", "mat_kv", "proj", "fc1", "fc2")

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        text: T5Features | str | Path,
        depth: int = 32,
        width: int = 2048,
        heads: int = 16,
        places: int = 64,
        gradient_checkpointing: bool = False,
        precision: str = "auto",
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        Policy.__init__(self, tokenizer, precision)  # past VARPolicy's own, which has classes
        if width % (4 * heads):
            raise ValueError(f"width must be a multiple of 4 * heads, got {width} and {heads} heads")
        if len(tokenizer.schedule) > MAX_SCALES:
            raise ValueError(
                f"at most {MAX_SCALES} grids have an embedding, the schedule has {len(tokenizer.schedule)}"
            )
        self.text = text if isinstance(text, T5Features) else T5Features(text, MAX_TEXT)
        self.config = {
            "text": self.text.name,
            "depth": depth,
            "width": width,
            "heads": heads,
            "places": places,
            "gradient_checkpointing": gradient_checkpointing,
            "precision": precision,
        }
        self.gradient_checkpointing = gradient_checkpointing
        self.places, self.heads = places, heads
        seen = self.text.width  # K
        self.register_buffer("cfg_uncond", torch.randn(MAX_TEXT, seen) / seen**0.5)  # the empty prompt
        self.cfg_uncond: Tensor
        self.text_norm = nn.RMSNorm(seen, eps=1e-6)
        self.text_proj_for_sos = nn.ModuleDict({"ca": CrossAttention(width, seen, seen // 128, pool=True)})
        self.text_proj_for_ca = nn.Sequential(nn.Linear(seen, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.lvl_embed = nn.Embedding(MAX_SCALES, width)
        self.word_embed = nn.Linear(tokenizer.channels, width)
        self.shared_ada_lin = adaptive(width, 6)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(width, heads) for _ in range(depth))  # type: ignore[assignment]
        self.head_nm = nn.ModuleDict({"ada_lin": adaptive(width, 2)})
        self.head = nn.Linear(width, tokenizer.depth * tokenizer.vocab_size)
        for weight in (self.pos_start, self.lvl_embed.weight):
            nn.init.normal_(weight, std=(1 / width / 3) ** 0.5)
        if lora is not None:
            add_lora(self, **lora)

    # Conditions --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:  # type: ignore[override]
        return Cond(*self.text(prompts, self.device))

    def null_cond(self, cond: Cond) -> Cond:  # type: ignore[override]
        empty = self.cfg_uncond[: cond.mask.shape[1]].float() * cond.mask[..., None]  # (B, P, K)
        return cond._replace(features=empty)

    # The cached path ---------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:  # type: ignore[override]
        with self.autocast():
            return Cache(self._read_text(cond), [])

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:  # type: ignore[override]
        text, past, turn = cache.text, [], self._turn(self.schedule.slices[t])
        with self.autocast():
            x = self._start(text.condition) if t == 0 else self._embed(features)  # (B, n_t, W)
            x = x + self.lvl_embed.weight[t]
            modulation = self._modulation(text.condition)
            for i, block in enumerate(self.blocks):
                before = cache.past[i] if cache.past else None
                x, kept = block(x, modulation, turn, text.past[i], text.mask, past=before)
                past.append(kept)
            return self.logits(self._finish(x, text.condition), range(t, t + 1)), Cache(text, past)

    def fork(self, cache: Cache, index: Tensor) -> Cache:  # type: ignore[override]
        def rows(layers: list[Past]) -> list[Past]:
            return [(keys.index_select(0, index), values.index_select(0, index)) for keys, values in layers]

        text = Text(cache.text.condition[index], rows(cache.text.past), cache.text.mask[index])
        return Cache(text, rows(cache.past))

    # The teacher-forced path -------------------------------------------------------------------------------------

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:  # type: ignore[override]
        first, last = self.schedule.slices[steps[0]].start, self.schedule.slices[steps[-1]].stop
        features = self.tokenizer.read_all(grids, steps[-1], len(cond.mask))[1:]  # grid 0 has the prompt for an input
        scale, turn = self._scales()[:last], self._turn(slice(last))
        mask = scale[:, None] >= scale  # (n, n), true where a token may look
        with self.autocast():
            text = self._read_text(cond)
            x = torch.cat([self._start(text.condition), *map(self._embed, features)], dim=1)  # (B, n, W)
            x = x + self.lvl_embed(scale)
            modulation = self._modulation(text.condition)
            for block, seen in zip(self.blocks, text.past, strict=True):
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x, _ = checkpoint(block, x, modulation, turn, seen, text.mask, mask, use_reentrant=False)
                else:
                    x, _ = block(x, modulation, turn, seen, text.mask, mask)
            return self._finish(x[:, first:], text.condition)

    # Parts -------------------------------------------------------------------------------------------------------

    def _read_text(self, cond: Cond) -> Text:
        features, mask = cond.features.to(self.text_norm.weight.dtype), cond.mask[:, None, None]
        features = self.text_norm(features)
        pool = self.text_proj_for_sos.get_submodule("ca")
        assert isinstance(pool, CrossAttention)
        query = pool.mat_q.unsqueeze(2).expand(len(features), -1, -1, -1)  # (B, A, 1, E)
        condition = pool.attend(query, pool.keys_values(features), mask)
        features = self.text_proj_for_ca(features)  # (B, P, W)
        return Text(condition.squeeze(1), [block.ca.keys_values(features) for block in self.blocks], mask)

    def _turn(self, tokens: slice) -> Turn:
        """RoPE for some tokens of the flat axis."""
        channels = self.config["width"] // self.heads
        angles = place_angles(self.schedule.grids, channels, self.places)[tokens].to(self.device)  # (n, E / 2)
        return lambda x: rotate(x, angles)

    # Files -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> InfinityPolicy:
        """Read a file that `save` wrote, and the text encoder that it names; no weights are shipped."""
        config, weights = load_config_and_weights(path or "(none given)", "InfinityPolicy.load_public(PTH).save(PATH)")
        policy = cls(tokenizer or load_tokenizer(), **config)
        load_weights(policy, weights, path or "")
        return policy

    @classmethod
    def load_public(  # type: ignore[override]
        cls,
        path: str | Path,
        tokenizer: VisualTokenizer,
        text: T5Features | str | Path = "google/flan-t5-xl",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> InfinityPolicy:
        """Read the public ``infinity_2b_reg.pth``, or a model of other sizes, which its shapes tell. In eval mode.

        Args:
            text, options: of the constructor; its sizes follow from the file, ``places`` does not.
            dtype: of the weights. bfloat16 halves the memory and suits sampling and ``lora``.

        Raises:
            FileNotFoundError: there is no such file; the message says how to get it.
            ValueError: it is no such file, is of another tokenizer or text encoder, or a name or a shape does not fit.
        """
        names, files = ("text_norm.weight", "shared_ada_lin.1.weight", "cfg_uncond"), "It is infinity_2b_reg.pth"
        weights = in_one_list(read_public(path, "Infinity transformer", names, REPOSITORY, files))
        text = text if isinstance(text, T5Features) else T5Features(text, MAX_TEXT)
        width, bits = weights["word_embed.weight"].shape
        for what, of_file, given in (
            ("bits a token", bits, tokenizer.channels),
            ("channels of the text encoder", len(weights["text_norm.weight"]), text.width),
        ):
            if of_file != given:
                raise ValueError(
                    f"{path} is of {of_file} {what}, the one given has {given}: give that which it was trained with"
                )
        lora = options.pop("lora", None)
        with torch.device("meta"):
            policy = cls(
                tokenizer,
                text,
                depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
                width=width,
                heads=weights["blocks.0.sa.scale_mul_1H11"].numel(),
                **options,
            )
        load_public_weights(policy, weights, ("zero_k_bias",), path)
        policy = policy.to(device, dtype).eval()
        if lora is not None:
            add_lora(policy, **lora)
        return policy


def in_one_list(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks numbered from first to last, which the public files may keep in chunks of equal size."""
    found = [re.fullmatch(r"block_chunks\.(\d+)\.module\.(\d+)\.(.+)", name) for name in weights]
    size = 1 + max((int(match[2]) for match in found if match), default=0)
    names = [
        f"blocks.{int(match[1]) * size + int(match[2])}.{match[3]}" if match else name
        for match, name in zip(found, weights, strict=True)
    ]
    return dict(zip(names, weights.values(), strict=True))
