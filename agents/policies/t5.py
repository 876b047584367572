"""Prompts through a frozen T5 encoder of transformers (Raffel et al., 2020, arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class T5Features:
    """A T5 encoder and its tokenizer, no part of the policy that uses it: copies of a policy share it.

    Args:
        name: a folder, or a name on the hub such as "google/flan-t5-xl".
        limit: tokens of a prompt; longer ones are cut.

    Attributes:
        name: as given.
        width: K, channels of the features.

    Raises:
        FileNotFoundError: there is no such encoder.
    """

    def __init__(self, name: str | Path, limit: int) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.name, self.limit = str(name), limit
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
            self.model = T5EncoderModel.from_pretrained(self.name).eval().requires_grad_(False)
        except OSError as error:
            raise FileNotFoundError(
                f"no T5 encoder at {name}: give a folder that holds one, or a name of the hub, such as "
                f"google/flan-t5-xl ({error})"
            ) from error
        self.width: int = self.model.config.d_model

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Features fp32 ``(B, P, K)``, 0 at padding, and bool ``(B, P)``, true where a token is."""
        batch = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(device)
        features = self.model.to(device)(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.bool()
        return features.float() * mask[..., None], mask

    def __deepcopy__(self, memo: dict[int, Any]) -> T5Features:
        return self
