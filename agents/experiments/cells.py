"""One run of a plan, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

METRICS = {"reward": "OCR reward", "word_accuracy": "Word Accuracy", "ned": "NED", "nothing_read": "Nothing read"}
AXES = {
    "images": "images decoded (reward calls)",
    "tokens": "tokens sampled",
    "updates": "updates",
    "seconds": "seconds of sampling, scoring and updating",
}
Result = dict[str, Any]  # as it stands in result.json, see tables.py
Outcome = Result | Exception | None  # of a run; None when it was interrupted before its first update


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        label: its folder and its name in tables; not two agents of one ``out`` may share it.
        recipe: see ``agents/recipes.py``.
        seed: of the prompts and the sampler; ``None`` is no run, but the base policy.
        method: what makes the agent what it is, see `agent_options.settings_of`.
    """

    label: str
    recipe: str
    seed: int | None
    method: dict[str, Any] = field(hash=False, default_factory=dict)

    def __str__(self) -> str:
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


BASE = Cell("base", "", None)
