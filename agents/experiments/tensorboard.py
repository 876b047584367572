"""What a comparison adds to TensorBoard: the HPARAMS page, and a page that opens with the held-out curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import HParam, Logger
from torch.utils.tensorboard import SummaryWriter

from agents.experiments.cells import METRICS, Result
from agents.logs import WITHOUT_IMAGES
from var_env.faults import ALL_FAMILIES


def record_hparams(logger: Logger, settings: Mapping[str, Any], result: Result) -> None:
    """Record a run's settings and its final metrics on the held-out prompts, as ``test/`` and on the HPARAMS page."""
    metrics = {f"test/{name}": float(result["metrics"][name][0]) for name in METRICS}
    for name, value in metrics.items():
        logger.record(name, value)
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }
    logger.record("hparams", HParam(plain, metrics), exclude=WITHOUT_IMAGES)


def write_layout(folder: Path) -> None:
    """The CUSTOM SCALARS page: held-out curves of all runs side by side, against images decoded."""
    curves = {title: ["Multiline", [f"eval/{name}"]] for name, title in METRICS.items()}
    repair = {f"{family}: share repaired": ["Multiline", [f"repair/{family}"]] for family in ALL_FAMILIES}
    spent = {name: ["Multiline", [f"budget/{name}"]] for name in ("tokens", "updates", "seconds")}
    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars({"Held-out prompts": curves, "Planted faults": repair, "Spent": spent})
