"""A decoder of the transformers library as a policy: a `QwenVARModel`, a visual tokenizer and a text tokenizer.

``QwenPolicy.from_decoder("Qwen/Qwen2.5-0.5B", tokenizer)`` starts from a language model, and
``QwenPolicy.small(tokenizer)`` from nothing. How the decoder draws is in ``qwen_model.py``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, Qwen2Config, Qwen2Model

from agents.policies.base import Policy, recompute_layers
from agents.policies.lora import add_lora
from agents.policies.qwen_model import Cache, QwenVARConfig, QwenVARModel, check_attention, new_model, visual_options
from var_env.tokenizers import load_tokenizer
from var_env.tokenizers.base import VisualTokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module


class Cond(NamedTuple):
    """Prompts, padded on the left."""

    ids: Tensor  # (B, P) int64 of the text tokenizer, 0 at padding
    mask: Tensor  # (B, P) bool, False at padding


class QwenPolicy(Policy):
    """A `QwenVARModel` with its tokenizers.

    Args:
        tokenizer: the visual one that ``model`` was made for.
        model: the weights. Its configuration says which attention it uses.
        text: the decoder's text tokenizer as JSON, as in the tokenizer.json of a checkpoint; by default `byte_level`.
        precision: "bf16" runs the matrix products under autocast, "fp32" does not, "auto" takes bf16 where the
            processor has it in hardware. Logits and log-probabilities are fp32 in any case.
        gradient_checkpointing: compute activations again in the backward pass, which saves memory and costs a third
            more time.
        lora: options of `add_lora`, for a policy with low-rank adapters.

    Raises:
        ValueError: an unknown precision, or a model that does not fit a tokenizer.

    Example::

        policy = QwenPolicy.from_decoder("Qwen/Qwen2.5-0.5B", tokenizer)  # a new head: pretrain it
        agent = agents.make("vmr+panw+mp", env, policy, lora={"r": 16})
    """

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        model: QwenVARModel,
        text: str | None = None,
        precision: str = "auto",
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, precision)
        for name, needed in visual_options(tokenizer).items():
            found = getattr(model.config, name)
            if found != needed:
                raise ValueError(f"the model is for another visual tokenizer: its {name} is {found}, here {needed}")
        self.text = TextTokenizer.from_str(text) if text is not None else byte_level()
        self.text.no_padding()
        self.text.no_truncation()
        words, rows = self.text.get_vocab_size(), model.config.decoder.vocab_size
        if words > rows:
            raise ValueError(f"the text tokenizer has {words} tokens and the decoder knows {rows}: give its own")
        self.model = model
        self.config = {
            "model": json.loads(model.config.to_json_string(use_diff=False)),
            "attention": model.config._attn_implementation,
            "text": self.text.to_str(),
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
        }
        if gradient_checkpointing:
            self.recompute_activations()
        if lora is not None:
            add_lora(self, **lora)

    @classmethod
    def small(
        cls,
        tokenizer: VisualTokenizer,
        width: int = 192,
        layers: int = 6,
        heads: int = 3,
        attention: str = "sdpa",
        **options: Any,
    ) -> QwenPolicy:
        """A new one that reads bytes, with random weights; ``options`` are the constructor's."""
        config = Qwen2Config(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=8 * width // 3,  # as many weights as two matrices of 4 * width
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
        return cls(tokenizer, new_model(QwenVARConfig(config, **visual_options(tokenizer)), attention), **options)

    @classmethod
    def from_decoder(cls, name: str, tokenizer: VisualTokenizer, attention: str = "sdpa", **options: Any) -> QwenPolicy:
        """A checkpoint's decoder, in fp32, and its text tokenizer; the embedding of canvases and the head are new.

        Args:
            name: a checkpoint of Qwen2 or Qwen2.5 on the Hugging Face hub, or a folder that holds one.
            tokenizer: the visual one.
            attention: "sdpa" or "eager".
            options: the constructor's.

        Raises:
            OSError: the checkpoint cannot be had or is not whole. Says what to do.
            ValueError: it holds another kind of model, or none of the options fits.
        """
        from transformers import AutoTokenizer

        from rewards.hub import check_whole, explained

        check_attention(attention)
        with explained("Qwen2", name, "config.json, the weights and tokenizer.json"):
            kind = AutoConfig.from_pretrained(name).model_type
        if kind != Qwen2Config.model_type:
            raise ValueError(f"{name!r} holds a {kind}: give a checkpoint of Qwen2 or Qwen2.5, the text-only models")
        with explained("Qwen2", name, "config.json, the weights and tokenizer.json"):
            loaded: Any = Qwen2Model.from_pretrained(name, attn_implementation=attention, output_loading_info=True)
            text = AutoTokenizer.from_pretrained(name)
        decoder, report = loaded
        check_whole("Qwen2", name, report["missing_keys"])
        decoder = decoder.float()
        decoder.config.dtype = torch.float32
        model = new_model(QwenVARConfig(decoder.config, **visual_options(tokenizer)), attention, decoder)
        return cls(tokenizer, model, text.backend_tokenizer.to_str(), **options)

    # Conditions --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        rows = [encoding.ids for encoding in self.text.encode_batch(list(prompts))]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64)  # (B, P)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(longest) >= longest - lengths[:, None]
        return Cond(ids.to(self.device), mask.to(self.device))

    def null_cond(self, cond: Cond) -> Cond:
        """``<boi>`` alone."""
        return Cond(torch.zeros_like(cond.ids), torch.zeros_like(cond.mask))

    # The cached path ---------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:
        with self.autocast():
            return self.model.begin(*cond)

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:
        with self.autocast():
            return self.model.logits(self.model.step(cache, t, features)), cache

    def fork(self, cache: Cache, index: Tensor) -> Cache:
        past = copy.copy(cache.past)
        past.layers = [copy.copy(layer) for layer in cache.past.layers]  # the old ones keep their tensors
        past.batch_select_indices(index)
        return Cache(past, cache.visible[index])

    # The teacher-forced path -------------------------------------------------------------------------------------

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return self.from_features(cond, self._features(cond, grids, steps), steps)

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        with self.autocast():
            return self.model.hidden(*cond, self._features(cond, grids, steps), steps)

    def from_features(self, cond: Cond, features: Tensor, steps: range) -> Tensor:
        """`forward` from the canvas features of all scales up to the last step, `(B, n, C)`."""
        with self.autocast():
            return self.model(*cond, features, steps)

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        with self.autocast():
            return self.model.logits(hidden)

    def recompute_activations(self) -> None:
        recompute_layers(self.model)

    def _features(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return torch.cat(self.tokenizer.read_all(grids, steps[-1], len(cond.ids)), dim=1)

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights, configuration and text tokenizer to one safetensors file; `half` stores bfloat16.

        ``policy.model.save_pretrained(folder)`` writes the model alone, as transformers keeps it.
        """
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> QwenPolicy:
        """Read a file that `save` wrote, into fp32; no weights are shipped. Default: the shipped visual tokenizer."""
        config, weights = load_config_and_weights(path or "(none given)", "vartext pretrain policy --policy qwen")
        model = new_model(QwenVARConfig(**config.pop("model")), config.pop("attention"))
        policy = cls(tokenizer or load_tokenizer(), model, **config)
        load_weights(policy, weights, path or "")
        return policy


def byte_level() -> TextTokenizer:
    """A text tokenizer whose 256 tokens are the bytes."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    text = TextTokenizer(models.BPE(vocab=alphabet, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text.decoder = decoders.ByteLevel()
    return text
