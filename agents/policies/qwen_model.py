"""A Qwen2 decoder that draws: NextFlow's shape, as a model of the transformers library.

NextFlow is a Qwen2.5 decoder with a visual codebook and a prediction head for it. It reads the prompt, a special token
begins the image, and from there on it attends to whole scales (*VAR RL Done Right*, appendix A). `QwenVARModel` is that
for Qwen2 and Qwen2.5: it saves, loads and checkpoints gradients as the models of transformers do, and peft gives it
adapters. `agents/policies/qwen.py` makes it a policy.

The sequence is ``prompt, <boi>, grid 0, grid 1, ...``. What a token of grid t brings in is what the visual tokenizer
reads from the canvas at its place.

- **Mask.** A prompt token sees those before it, an image token the prompt, all earlier grids and all of its own. The
  decoders of transformers are causal unless they are given a mask with four axes, and so they always get one here. It
  is additive, which both implementations of attention take the same way: "eager" would add True as a 1.
- **Rotary positions** count on from the prompt, token by token, each grid row by row, as the decoder has learned to
  count words; a raster is then read as text is. Where on the image a token lies says a learned code of its place, 2-D
  at birth. The alternative, one position for a whole grid, learns more slowly in our world: 0.13 and 0.08 nats a token
  behind after 2400 images (two seeds), most of it at the finest grid.
- **Padding** has no position, and nothing but itself looks at it: it may stand on either side, or not be there.
- **Kernels.** "sdpa" is the default: torch then takes the fastest of its kernels that accepts a mask. The flash kernels
  know causal and full attention only and cannot run a block-causal mask, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model

from agents.policies.var_text import scale_positions
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer

ATTENTION = ("sdpa", "eager")


class QwenVARConfig(PretrainedConfig):
    """The decoder, and what it has to know of the visual tokenizer.

    Args:
        decoder: a ``Qwen2Config``, or its options.
        grids: of the schedule, coarse to fine.
        canvas: ``(H, W)`` if the schedule is a raster, see `ScaleSchedule`.
        channels: C, of what the visual tokenizer reads from the canvas.
        depth, codes: D codes a token, each one of V.
    """

    model_type = "qwen_var"
    sub_configs = {"decoder": Qwen2Config}

    def __init__(
        self,
        decoder: Qwen2Config | Mapping[str, Any] | None = None,
        grids: Sequence[Sequence[int]] = ((1, 1),),
        canvas: Sequence[int] | None = None,
        channels: int = 1,
        depth: int = 1,
        codes: int = 1,
        **options: Any,
    ) -> None:
        self.decoder = decoder if isinstance(decoder, Qwen2Config) else Qwen2Config(**(decoder or {}))
        self.grids, self.canvas = [list(grid) for grid in grids], None if canvas is None else list(canvas)
        self.channels, self.depth, self.codes = channels, depth, codes
        super().__init__(**options)


def visual_options(tokenizer: VisualTokenizer) -> dict[str, Any]:
    """The options of a `QwenVARConfig` that a visual tokenizer decides."""
    schedule = tokenizer.schedule
    return {
        "grids": [list(grid) for grid in schedule.grids],
        "canvas": list(schedule.canvas) if schedule.is_raster else None,
        "channels": tokenizer.channels,
        "depth": tokenizer.depth,
        "codes": tokenizer.vocab_size,
    }


class Cache(NamedTuple):
    """What the decoder has seen, for ``B`` rows."""

    past: DynamicCache  # keys and values, each layer's (B, A, P + 1 + image tokens, E)
    visible: Tensor  # (B, P + 1) bool: the prompt without its padding, and <boi>


class QwenVARModel(PreTrainedModel):
    """A Qwen2 decoder between an embedding of canvas features and a head over ``D * V`` codes.

    Prompts are ``input_ids`` ``(B, P)`` of the decoder's own text tokenizer, and ``attention_mask`` ``(B, P)`` is 0 at
    padding, on whichever side.

    Args:
        decoder: one with weights, to be taken over; by default a new one.

    Raises:
        ValueError: an implementation of attention that takes no block-causal mask.
    """

    config_class = QwenVARConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Qwen2DecoderLayer"]

    def __init__(self, config: QwenVARConfig, decoder: Qwen2Model | None = None) -> None:
        check_attention(config._attn_implementation)
        super().__init__(config)
        canvas = None if config.canvas is None else (config.canvas[0], config.canvas[1])
        self.schedule = ScaleSchedule(config.grids, canvas=canvas)
        width = config.decoder.hidden_size
        self.decoder = Qwen2Model(config.decoder) if decoder is None else decoder
        self.begin_image = nn.Parameter(0.02 * torch.randn(width))  # <boi>
        self.embed_features = nn.Linear(config.channels, width)
        places = [self.schedule.canvas] if self.schedule.is_raster else self.schedule.grids
        with torch.device("cpu"):  # transformers builds what it loads on "meta", which has no linspace
            self.position = nn.Parameter(scale_positions(places, width))  # (L, width)
        self.head = nn.Linear(width, config.depth * config.codes)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, steps: range | None = None
    ) -> Tensor:
        """Logits of the grids in ``steps``, by default of all, fp32 ``(B, n, D, V)``; see `hidden`."""
        return self.logits(self.hidden(input_ids, attention_mask, features, steps or range(len(self.schedule))))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor, steps: range) -> Tensor:
        """Last hidden states of the tokens of the grids in ``steps``, ``(B, n, width)``.

        ``features`` are those of all scales up to the last step, and none after it is computed.
        """
        first, last = self.schedule.slices[steps[0]].start, self.schedule.slices[steps[-1]].stop
        text, visible = self._text(input_ids, attention_mask)
        scale = self._scales(last)  # (n,)
        order = torch.cat([torch.arange(text.shape[1], device=self.device), text.shape[1] + scale])
        everything = F.pad(visible, (0, last), value=True)  # (B, P + 1 + n)
        seen = (order[:, None] >= order) & everything[:, None]  # causal in the prompt, then scale by scale
        seen = seen | torch.eye(len(order), dtype=torch.bool, device=self.device)  # padding sees itself: no empty row
        positions = torch.cat([text_positions(visible), image_positions(visible, slice(0, last))], 1)
        x = torch.cat([text, self._image(features, slice(0, last))], 1)
        return self._decode(x, seen, positions)[:, text.shape[1] + first :]

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> Cache:
        """The cache that has seen the prompt and ``<boi>``."""
        text, visible = self._text(input_ids, attention_mask)
        length, past = text.shape[1], DynamicCache()
        seen = torch.ones(length, length, dtype=torch.bool, device=self.device).tril() & visible[:, None]
        seen = seen | torch.eye(length, dtype=torch.bool, device=self.device)
        self._decode(text, seen, text_positions(visible), past)
        return Cache(past, visible)

    def step(self, cache: Cache, t: int, features: Tensor) -> Tensor:
        """Last hidden states of grid t, ``(B, n_t, width)``. The cache grows by them."""
        here = self.schedule.slices[t]
        seen = F.pad(cache.visible, (0, here.stop), value=True)[:, None]  # (B, 1, P + 1 + n): no image token is hidden
        return self._decode(self._image(features, here), seen, image_positions(cache.visible, here), cache.past)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``(B, n, D, V)``."""
        return self.head(hidden).float().unflatten(2, (self.config.depth, self.config.codes))

    # Parts -----------------------------------------------------------------------------------------------------------

    def _text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts and ``<boi>`` as vectors ``(B, P + 1, width)``, and which of them are no padding ``(B, P + 1)``."""
        start = self.begin_image.expand(len(input_ids), 1, -1)
        text = torch.cat([self.decoder.embed_tokens(input_ids), start], 1)
        return text.to(self._precision()), F.pad(attention_mask.bool(), (0, 1), value=True)

    def _image(self, features: Tensor, here: slice) -> Tensor:
        """Features ``(B, n, C)`` of the image tokens at `here` as vectors ``(B, n, width)``."""
        x = self.embed_features(features.to(self.embed_features.weight.dtype))
        return (x + self.position[here]).to(self._precision())

    def _scales(self, tokens: int) -> Tensor:
        """The scale of each of the first image tokens, int64 ``(tokens,)``."""
        sizes = torch.tensor(self.schedule.sizes, device=self.device)
        scales = torch.arange(len(sizes), device=self.device)
        return scales.repeat_interleave(sizes, output_size=self.schedule.total_tokens)[:tokens]

    def _decode(self, x: Tensor, seen: Tensor, positions: Tensor, past: DynamicCache | None = None) -> Tensor:
        """The decoder on vectors ``(B, q, width)``, which add to `past`.

        ``seen`` ``(B, q, k)``, or 1 for q: which of all keys so far each of them looks at.
        """
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, -torch.inf)
        # transformers recomputes activations in training mode only, where agents never are, and drops the cache then.
        # Nothing else depends on the mode: Qwen2's only dropout, of attention, is 0 in all its checkpoints.
        self.decoder.train(past is None and self.decoder.gradient_checkpointing)
        out = self.decoder(
            inputs_embeds=x,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
        )
        return out.last_hidden_state

    def _precision(self) -> torch.dtype:
        """What products are computed in, so that under autocast the vectors between layers are no wider."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype


AutoConfig.register(QwenVARConfig.model_type, QwenVARConfig, exist_ok=True)
AutoModel.register(QwenVARConfig, QwenVARModel, exist_ok=True)


def new_model(config: QwenVARConfig, attention: str, decoder: Qwen2Model | None = None) -> QwenVARModel:
    """A `QwenVARModel` with a choice of attention."""
    config._attn_implementation = attention
    return QwenVARModel(config, decoder)


def check_attention(attention: str | None) -> None:
    """``ValueError`` unless it takes a mask with four axes; ``None`` leaves the choice to transformers."""
    if attention not in (None, *ATTENTION):
        raise ValueError(
            f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}: a VAR policy needs a block-causal "
            "mask, which flash kernels cannot take"
        )


def text_positions(visible: Tensor) -> Tensor:
    """Rotary positions of prompt tokens ``(B, P + 1)``: 0, 1, 2, ... past the padding, which gets any."""
    return (visible.cumsum(1) - 1).clamp(min=0)


def image_positions(visible: Tensor, here: slice) -> Tensor:
    """Rotary positions of the image tokens at ``here``, ``(B, n)``: they go on from prompts that are ``visible``."""
    return visible.sum(1, keepdim=True) + torch.arange(here.start, here.stop, device=visible.device)
