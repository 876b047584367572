"""A run's log for Weights & Biases: what TensorBoard gets, under the same names and against the same steps."""

from __future__ import annotations

import html
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import HParam, Image, KVWriter

MARK = "wandb-id.txt"  # in a run's folder, by which a run that goes on finds itself again


def require_wandb() -> Any:
    """The package. ``ImportError`` when it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ImportError(
            '--track wandb needs the package wandb: pip install "vartext[wandb]", or leave out --track: TensorBoard '
            "events are written in any case"
        ) from None
    return wandb


class WandbOutput(KVWriter):
    """A writer of Stable-Baselines3's logger, a run of Weights & Biases.

    The run is called as the last two parts of its folder, such as ``grpo/seed0``, and grouped by the first of them.
    wandb's own environment variables decide the rest, such as ``WANDB_PROJECT`` ("vartext") and ``WANDB_MODE``.

    Args:
        folder: of the run.
        step: of a run that goes on, else ``None``. Steps that were sent before are not sent again: wandb drops them.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        self.wandb, mark = require_wandb(), folder / MARK
        if step is None or not mark.is_file():
            mark.write_text(uuid.uuid4().hex)
        name = Path(*folder.resolve().parts[-2:])
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vartext"),
            dir=str(folder),
            id=mark.read_text(),
            name=name.as_posix(),
            group=name.parent.as_posix(),
            resume="allow",
        )

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        sent: dict[str, Any] = {}
        for name, value in key_values.items():
            if "tensorboard" in (key_excluded[name] or ()):
                continue
            if isinstance(value, HParam):
                self.run.config.update(dict(value.hparam_dict), allow_val_change=True)
                self.run.summary.update(dict(value.metric_dict))
            else:
                sent[name] = self.shown(value)
        self.run.log(sent, step=step)

    def shown(self, value: Any) -> Any:
        """A value as wandb takes it: an image ``(H, W, 3)``, a text as it is, a number."""
        if isinstance(value, Image):
            return self.wandb.Image(np.asarray(value.image))
        if isinstance(value, str):
            return self.wandb.Html(f"<pre>{html.escape(value)}</pre>")
        return float(value)

    def close(self) -> None:
        self.run.finish()
