"""Janus-Pro (arXiv 2501.17811), in the classes of transformers: plain autoregression over the tokens of one canvas.

A Llama reads the prompt in its chat template and the begin-of-image token, then one token after the other, each
embedded by a table and a small aligner; a head of its own predicts the next token. Every token is a step of the
environment, 576 in the public models. Teacher forcing is one forward pass all the same.

    policy = JanusPolicy.load_public("deepseek-community/Janus-Pro-1B")
    envs = VARTextVectorEnv(8, size=384, tokenizer=policy.tokenizer)

What answers questions about images (the vision tower, the text head) is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.policies.base import Policy, recompute_layers
from agents.policies.lora import add_lora
from rewards.hub import check_whole, explained, place
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.janus_vq import JanusTokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module

TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"
PARTS = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")  # of `JanusModel`
MAKER = "JanusPolicy.load_public"


class Cond(NamedTuple):
    """Prompts as tokens, padded on the left to P."""

    ids: Tensor  # (B, P) int64; the last one begins the image
    mask: Tensor  # (B, P) bool, false where padding is


class Cache(NamedTuple):
    """Keys and values of all tokens so far."""

    past: Any  # transformers' DynamicCache; it grows by new tensors, and never writes into those it has
    mask: Tensor  # (B, tokens so far) bool
    image: Tensor  # (B, 1), the begin-of-image token


class JanusPolicy(Policy):
    """The part of Janus-Pro that draws. A token has one code.

    Args:
        tokenizer: the model's own.
        text_config: of transformers' ``LlamaConfig``, with ``bos_token_id`` and ``pad_token_id``.
        text_tokenizer: the text tokenizer, as the content of a tokenizer.json.
        template: what ``{prompt}`` is put into; it ends with the begin-of-image token. The default is Janus-Pro's.
        dtype: of the weights, "float32" or "bfloat16". Small steps are lost in bfloat16, which is for policies that
            stay as they are.
        precision: "auto", "bf16" or "fp32", see `Policy`.
        gradient_checkpointing: keep the layers' inputs only, and compute the rest again in the backward pass.
        lora: options of `add_lora`, for a policy with low-rank adapters.

    Raises:
        ValueError: an option that does not exist, another tokenizer, or a template of another form.
    """

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tokenizer: JanusTokenizer

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        text_config: Mapping[str, Any],
        text_tokenizer: str,
        template: str = TEMPLATE,
        dtype: str = "float32",
        precision: str = "auto",
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        from tokenizers import Tokenizer as TextTokenizer
        from transformers import JanusVQVAEConfig, LlamaConfig, LlamaModel
        from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead

        super().__init__(tokenizer, precision)
        if not isinstance(tokenizer, JanusTokenizer):
            raise ValueError(f"JanusPolicy draws with a JanusTokenizer, got a {type(tokenizer).__name__}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        self.config = {
            "text_config": dict(text_config),
            "text_tokenizer": text_tokenizer,
            "template": template,
            "dtype": dtype,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.template = template
        self.text_tokenizer = TextTokenizer.from_str(text_tokenizer)
        self.text_tokenizer.no_padding()
        self.text_tokenizer.no_truncation()
        text, image = LlamaConfig(**text_config), JanusVQVAEConfig(**tokenizer.config)
        self.language_model = LlamaModel(text)
        self.generation_embeddings = torch.nn.Embedding(image.num_embeddings, image.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(image)
        self.generation_head = JanusVQVAEHead(image)
        if text.pad_token_id is None:
            raise ValueError("text_config needs a pad_token_id, which stands in for the prompt in guidance")
        self.pad, self.bos = text.pad_token_id, text.bos_token_id
        self.image = self._ids("")[-1]  # the begin-of-image token
        if "{prompt}" not in template or not template.endswith(str(self.text_tokenizer.id_to_token(self.image))):
            raise ValueError(f"template must hold {{prompt}} and end with the begin-of-image token, got {template!r}")
        if gradient_checkpointing:
            self.recompute_activations()
        for weight in self.parameters():  # and not the rotary frequencies, which need fp32
            weight.data = weight.data.to(getattr(torch, dtype))
        if lora is not None:
            add_lora(self, **lora)

    @classmethod
    def load_public(cls, name: str | Path, device: str = "auto", dtype: str = "float32", **options: Any) -> JanusPolicy:
        """A public checkpoint's policy and, as ``policy.tokenizer``, its tokenizer; both in eval mode, on ``device``.

        Args:
            name: of the checkpoint on the Hugging Face hub, such as "deepseek-community/Janus-Pro-1B", or a folder that
                holds one.
            device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
            dtype: of the policy's weights; the tokenizer's are fp32.
            options: of the class.

        Raises:
            OSError: the checkpoint cannot be had, or is not whole. Says what to do.
        """
        from transformers import AutoTokenizer, JanusForConditionalGeneration

        with explained("Janus", str(name)):
            text = AutoTokenizer.from_pretrained(name)
            loaded: Any = JanusForConditionalGeneration.from_pretrained(name, output_loading_info=True)
        check_whole("Janus", str(name), loaded[1]["missing_keys"])
        model = loaded[0].model
        text_config = model.config.text_config.to_dict()
        text_config |= {"pad_token_id": text.pad_token_id, "bos_token_id": text.bos_token_id}
        tokenizer = JanusTokenizer(model.config.vq_config.to_dict()).eval().requires_grad_(False)
        tokenizer.get_submodule("grid.vq").load_state_dict(model.vqmodel.state_dict())
        policy = cls(tokenizer, text_config, text.backend_tokenizer.to_str(), dtype=dtype, **options)
        for part in PARTS:
            policy.get_submodule(part).load_state_dict(model.get_submodule(part).state_dict())
        where = place(device, dtype)[0]
        policy.tokenizer.to(where)
        return policy.to(where).eval()

    # Conditions --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Cond:
        rows = [torch.tensor(self._ids(prompt)) for prompt in prompts]
        longest = max(len(row) for row in rows)
        ids = torch.stack([F.pad(row, (longest - len(row), 0), value=self.pad) for row in rows])
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows])
        return Cond(ids.to(self.device), mask.to(self.device))

    def _ids(self, prompt: str) -> list[int]:
        return self.text_tokenizer.encode(self.template.replace("{prompt}", prompt.strip())).ids

    def null_cond(self, cond: Cond) -> Cond:
        """The prompt with padding in the place of its words, which the model sees: so Janus was trained and is guided.

        The empty condition therefore keeps the prompt's length.
        """
        kept = (cond.ids == self.bos) | (cond.ids == self.image)
        return cond._replace(ids=cond.ids.where(kept, self.pad))

    # The cached path ---------------------------------------------------------------------------------------------

    def begin(self, cond: Cond) -> Cache:
        from transformers import DynamicCache

        past, mask = DynamicCache(), cond.mask[:, :-1]
        self._run(self.language_model.embed_tokens(cond.ids[:, :-1]), mask, past)
        return Cache(past, mask, cond.ids[:, -1:])

    def step(self, cache: Cache, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Cache]:
        x = self.language_model.embed_tokens(cache.image) if previous is None else self._embed(previous)  # (B, 1, W)
        cache = cache._replace(mask=F.pad(cache.mask, (0, 1), value=True))
        return self.logits(self._run(x, cache.mask, cache.past), range(t, t + 1)), cache

    def fork(self, cache: Cache, index: Tensor) -> Cache:
        past = copy.copy(cache.past)
        past.layers = [copy.copy(layer) for layer in past.layers]
        past.batch_select_indices(index)  # gives each layer new tensors
        return Cache(past, cache.mask[index], cache.image[index])

    # The teacher-forced path -------------------------------------------------------------------------------------

    def forward(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        return self.logits(self.hidden(cond, grids, steps), steps)

    def hidden(self, cond: Cond, grids: Sequence[Tensor], steps: range) -> Tensor:
        x = self.language_model.embed_tokens(cond.ids)  # (B, P, W)
        if steps[-1] > 0:
            tokens = torch.cat(list(grids[: steps[-1]]), 1)  # (B, n - 1, 1)
            x = torch.cat([x, self._embed(tokens)], 1)
        mask = F.pad(cond.mask, (0, steps[-1]), value=True)
        # transformers checkpoints in training mode only, which changes nothing else in a Llama without dropout.
        self.language_model.train(self.language_model.gradient_checkpointing)
        hidden = self._run(x, mask)
        self.language_model.train(self.training)
        return hidden[:, cond.ids.shape[1] - 1 + steps[0] :]  # token t is predicted where token t - 1 was read

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        with self.autocast():
            return self.generation_head(hidden).float().unsqueeze(2)  # (B, n, 1, V)

    def recompute_activations(self) -> None:
        recompute_layers(self.language_model)

    # Parts -------------------------------------------------------------------------------------------------------

    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, n, 1)`` as the language model reads them, ``(B, n, W)``."""
        with self.autocast():
            return self.generation_aligner(self.generation_embeddings(tokens.squeeze(-1)))

    def _run(self, x: Tensor, mask: Tensor, past: Any = None) -> Tensor:
        """Last hidden states of the tokens ``x``, ``(B, n, W)``; ``mask`` is of these and of the cached ones."""
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]  # (B, n), padding not counted
        with self.autocast():
            return self.language_model(
                inputs_embeds=x,
                attention_mask=mask,
                position_ids=position,
                past_key_values=past,
                use_cache=past is not None,
            ).last_hidden_state

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights, configuration and text tokenizer to one safetensors file; ``half`` stores bfloat16."""
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> JanusPolicy:
        """Read a file that `save` wrote. No weights are shipped, and the tokenizer has a file of its own."""
        config, weights = load_config_and_weights(path or "(none given)", MAKER)
        if tokenizer is None:
            raise ValueError(f"{path} needs the JanusTokenizer that it draws with: pass tokenizer=load_tokenizer(FILE)")
        policy = cls(tokenizer, **config)
        load_weights(policy, weights, path or "")
        return policy
