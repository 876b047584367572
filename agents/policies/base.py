"""The protocol of a VAR policy: what an agent may ask of any next-scale model.

A policy predicts grid t from the prompt and the grids before it. It reads the grids through the tokenizer's canvas
(``tokenizer.read``), so the agent keeps no model-specific input. Two paths give the same logits, up to rounding:

- **cached**, for sampling: ``begin``, then ``step`` for t = 0, 1, ...; ``fork`` branches the cache.
- **teacher-forced**, for learning: ``forward`` and ``evaluate``, differentiable, over any range of scales at once.

A raster autoregressive model is the case of 1x1 grids. Sampling (temperature, guidance, ...) is not a policy's
matter: see ``agents/sampling.py``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from var_env.hub import HubMixin, by_name
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer


class Policy(nn.Module, HubMixin, ABC):
    """Base class of the backbones. ``B`` batch, ``n_t`` tokens of grid t, ``D`` codes a token, ``V`` vocabulary.

    The tokenizer is frozen and shared, and so is kept out of ``parameters()`` and ``state_dict()``.

    Args:
        precision: of what runs within `autocast`. "bf16" are bf16 matrix products, "fp32" fp32 ones, and "auto" is bf16
            where the processor has it in hardware. Logits and log-probabilities are fp32 in any case.

    Attributes:
        logit_chunk: tokens of a row, at least 1, whose logits `evaluate` holds at a time; ``None`` is all of them. The
            values are the same but for rounding. A backward pass makes the logits of each piece again.

    Raises:
        ValueError: another precision.
    """

    def __init__(self, tokenizer: VisualTokenizer, precision: str = "fp32") -> None:
        if precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision must be 'auto', 'bf16' or 'fp32', got {precision!r}")
        super().__init__()
        self.precision = precision
        object.__setattr__(self, "tokenizer", tokenizer)  # past nn.Module, which would register it

    hub_kind, hub_loader = "policy", ("agents.policies.base", "Policy")
    tokenizer: VisualTokenizer
    config: dict[str, Any]
    logit_chunk: int | None = None
    lora_targets: Sequence[str] = ()  # linear layers that `add_lora` gives adapters by default
    always_trained: Sequence[str] = ()  # parameters that learn beside the adapters
    temperature_parameters: Sequence[str] = ()  # learned temperatures, for an agent's `temperature_lr`
    sharded_layers: Sequence[str] = ()  # classes of layers whose weights FSDP gathers one at a time

    @property
    def schedule(self) -> ScaleSchedule:
        return self.tokenizer.schedule

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self) -> torch.autocast:
        """The context of matrix products in the policy's precision."""
        on = self.precision == "bf16" or (self.precision == "auto" and has_bf16(self.device.type))
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    # Conditions: a NamedTuple of tensors, batch first ------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """The condition of B prompts. Holds inputs and no activations, so it stays valid while weights change."""

    @abstractmethod
    def null_cond(self, cond: Any) -> Any:
        """The empty condition for classifier-free guidance, of the same batch."""

    @staticmethod
    def take(cond: Any, index: Tensor) -> Any:
        """Rows of a condition; ``index`` is int64 and may repeat, reorder and drop."""
        return type(cond)(*(part.index_select(0, index) for part in cond))

    # The cached path ---------------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, cond: Any) -> Any:
        """The cache before grid 0."""

    @abstractmethod
    def step(self, cache: Any, t: int, features: Tensor, previous: Tensor | None) -> tuple[Tensor, Any]:
        """Logits of grid t, fp32 ``(B, n_t, D, V)``, and the cache that has seen its input.

        Args:
            features: ``tokenizer.read(t, canvas)``, ``(B, n_t, C)``.
            previous: grid t - 1 ``(B, n_{t-1}, D)``, for models that embed codes themselves; ``None`` at t = 0.

        A step uses the cache up: to continue twice from one point, ``fork`` before.
        """

    @abstractmethod
    def fork(self, cache: Any, index: Tensor) -> Any:
        """Rows of a cache, copied; one gather repeats, reorders and drops."""

    # The teacher-forced path -------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, cond: Any, grids: Sequence[Tensor], steps: range) -> Tensor:
        """Logits of the grids in ``steps``, fp32 ``(B, sum n_t, D, V)``, in order.

        Only the grids before ``max(steps)`` are read, and no scale after it is computed.
        """

    def hidden(self, cond: Any, grids: Sequence[Tensor], steps: range) -> Tensor:
        """Last hidden states of the tokens of the grids in ``steps``, ``(B, sum n_t, W)``, in the model's precision.

        `forward` is their `logits`. Those at scale t depend on the prompt and on the grids before t: they describe the
        state in which grid t is chosen. Agents with a critic and `logit_chunk` need both methods, others neither.
        """
        raise NotImplementedError(f"{type(self).__name__} has no hidden(), which PPO's critic and logit_chunk read")

    def logits(self, hidden: Tensor, steps: range) -> Tensor:
        """Logits of the grids in ``steps`` from their hidden states, fp32 ``(B, sum n_t, D, V)``.

        With a single step, ``hidden`` ``(B, n, W)`` may be of any n tokens of that grid.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no logits() of hidden states, which PPO in SB3 and logit_chunk need"
        )

    def evaluate(self, cond: Any, grids: Sequence[Tensor], steps: range) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the given grids and the entropy at each token, fp32 ``(B, sum n_t, D)``, in nats.

        Conditional and untruncated, whatever the sampler did: the one source of old, new and reference
        log-probabilities.
        """
        chosen = torch.cat([grids[t] for t in steps], dim=1)  # (B, n, D)
        if self.logit_chunk is None:
            return read_off(self(cond, grids, steps).log_softmax(-1), chosen)
        runs = runs_of_grids(self.schedule.sizes, steps, self.logit_chunk)
        sizes = [sum(self.schedule.sizes[t] for t in run) for run in runs]
        hidden, found = self.hidden(cond, grids, steps), []  # (B, n, W)
        for run, states, codes in zip(runs, hidden.split(sizes, 1), chosen.split(sizes, 1), strict=True):
            for piece in zip(states.split(self.logit_chunk, 1), codes.split(self.logit_chunk, 1), strict=True):
                if torch.is_grad_enabled():
                    found.append(checkpoint(self._evaluate_piece, *piece, run, use_reentrant=False))
                else:
                    found.append(self._evaluate_piece(*piece, run))
        logp, entropy = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return logp, entropy

    def _evaluate_piece(self, hidden: Tensor, chosen: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        """What `evaluate` gives of some tokens, from their hidden states ``(B, n, W)`` and codes ``(B, n, D)``."""
        return read_off(self.logits(hidden, steps).log_softmax(-1), chosen)

    def recompute_activations(self) -> None:
        """Turn on gradient checkpointing, whatever `config` says: a backward pass computes the layers again.

        Gradients stay the same; the layers' activations take the memory of one layer instead of all.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no recompute_activations(), which recompute=True calls: leave it out"
        )

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the weights that are worth a curve, by name; none by default."""
        return {}

    def trained_on(self) -> Any:
        """The world whose prompts it was trained on, so that `Agent.predict` warns of others; ``None`` if not known."""
        return None

    # Files -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write weights and configuration to one safetensors file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path | None = None, tokenizer: VisualTokenizer | None = None) -> Policy:
        """Read a file that :meth:`save` wrote, onto the given tokenizer."""

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / "policy.safetensors")
        self.tokenizer.save(save_directory / "tokenizer.safetensors")
        self._write_config(save_directory)

    @classmethod
    def _from_folder(cls, folder: Path, **options: Any) -> Any:
        tokenizer = by_name("var_env.tokenizers.registry:load_tokenizer")(folder / "tokenizer.safetensors")
        policy = by_name("agents.policies:load_policy")(folder / "policy.safetensors", tokenizer, **options)
        return policy.eval()


@functools.cache
def has_bf16(device: str) -> bool:
    """Whether bf16 products run in hardware there."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def read_off(logp: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the chosen codes ``(B, n, D)``, and entropies, from all log-probabilities ``(B, n, D, V)``."""
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, chosen.unsqueeze(-1)).squeeze(-1), entropy


def runs_of_grids(sizes: Sequence[int], steps: range, most: int) -> list[range]:
    """The steps in runs of at most ``most`` tokens; a grid that has more is a run of its own."""
    runs: list[range] = []
    tokens = 0  # of the last run
    for t in steps:
        if runs and tokens + sizes[t] <= most:
            runs[-1], tokens = range(runs[-1].start, t + 1), tokens + sizes[t]
        else:
            runs.append(range(t, t + 1))
            tokens = sizes[t]
    return runs


def recompute_layers(model: Any) -> None:
    """Turn on gradient checkpointing of a model of transformers, whose version 5 has a new name for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
