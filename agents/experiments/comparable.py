"""Whether the runs of a folder are of the experiment that is asked for: all settings count, defaults included."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

NOT_COMPARED = ("seconds",)  # the cap on a run's time, which changes nothing in a run that it did not stop
REMEDY = "choose another --out, or delete that folder"


def read(path: Path, *entries: str) -> dict[str, Any] | None:
    """A file of a run, ``None`` when there is none.

    Args:
        path: of the JSON file.
        entries: that it must have.

    Raises:
        ValueError: it is damaged, or lacks an entry.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("this is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): {REMEDY}") from None
    missing = [name for name in entries if name not in content]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}, so an earlier version wrote it: {REMEDY}")
    return content


def require_same(
    asked: Mapping[str, Any], config: Mapping[str, Any], where: Path, but: Collection[str] = NOT_COMPARED
) -> None:
    """Check that a run was made, or begun, with the settings that are asked for.

    Args:
        asked: all settings.
        config: what the run's file tells.
        where: the run's folder, for the message.
        but: names in which they may differ.

    Raises:
        ValueError: naming what differs; or what the file does not tell, since an earlier version wrote it.
    """
    names = (asked.keys() | config.keys()) - {*but}
    for name in sorted(names & config.keys()):
        if config[name] != asked.get(name):
            now = asked.get(name, "no setting at all")
            raise ValueError(f"{where} holds a run with {name}={config[name]}, and now it is {now}: {REMEDY}")
    untold = sorted(names - config.keys())
    if untold:
        raise ValueError(
            f"{where} holds a run of an earlier version, which did not write down its {', '.join(untold)}: {REMEDY}"
        )
