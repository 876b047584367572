"""What a model card tells of a run: its settings, its metrics with intervals, and its base's planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from var_env.faults import Faults

RESULT = "result.json"  # of a run of `vartext compare`


def of_run(folder: str | Path, faults: str | Path | Faults | None = "default") -> dict[str, Any]:
    """The ``model_card_kwargs`` of ``push_to_hub`` and ``save_pretrained`` for the policy of a run.

    Args:
        folder: of one run of a comparison, such as ``runs/compare-quick/grpo/seed0``.
        faults: that the run's base policy was pretrained with, as `Faults.load` takes them; ``None`` leaves them out.

    Raises:
        FileNotFoundError: the run has no result yet.
        ValueError: the result is damaged, or of another form.

    Example:
        >>> policy.push_to_hub("owner/name", model_card_kwargs=of_run("runs/full/vmr/seed0"))  # doctest: +SKIP
    """
    path = Path(folder) / RESULT
    if not path.is_file():
        raise FileNotFoundError(f"no {RESULT} in {folder}: give the folder of a finished run of `vartext compare`")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: tuple(map(float, interval)) for name, interval in result["metrics"].items()}
        if any(len(interval) != 3 for interval in metrics.values()):
            raise ValueError("a metric is a mean and its interval")
        settings = {"agent": result["agent"], "seed": result["seed"], **result["config"], **result["budget"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from error
    table = faults if isinstance(faults, Faults) or faults is None else Faults.load(faults)
    return {"settings": settings, "metrics": metrics, "faults": [] if table is None else told(table)}


def told(faults: Faults) -> list[str]:
    """Each planted fault in a sentence."""
    return [
        *(f"the letter {first} as {second}, rate {rate:g}" for first, (second, rate) in faults.letters.items()),
        *(
            f"the lower of two words left out on a {kind} ground, rate {rate:g}"
            for kind, rate in faults.missing.items()
        ),
        *(f"{first} ink as {second}, rate {rate:g}" for first, (second, rate) in faults.colours.items()),
    ]
