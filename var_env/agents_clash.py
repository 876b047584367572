"""Guard against another distribution's top-level package ``agents``; openai-agents ships one."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

OWN_AGENTS = Path(__file__).resolve().parent.parent / "agents"  # VARText installs its packages side by side
REMEDY = "run `pip uninstall openai-agents`, or install VARText into a virtual environment of its own"


def check_agents() -> None:
    """Raise ``ImportError`` when ``import agents`` would not give VARText's. To be called before that import."""
    clash = find_clash()
    if clash:
        raise ImportError(clash)


def find_clash() -> str | None:
    """What is wrong with the package that ``import agents`` would find, and the remedy; ``None`` when nothing is."""
    spec = find_spec("agents")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = Path(next(iter(spec.submodule_search_locations))).resolve()
    if found != OWN_AGENTS:
        return (
            f"the package `agents` that Python finds is {found}, and not VARText's, {OWN_AGENTS}: another "
            f"distribution, such as openai-agents, has a package of that name too. Remedy: {REMEDY}"
        )
    try:
        other = metadata.distribution("openai-agents").locate_file("agents")
    except metadata.PackageNotFoundError:
        return None
    if Path(str(other)).resolve() != OWN_AGENTS:
        return None
    return (
        f"VARText and openai-agents are both installed into {OWN_AGENTS}, one over the other. "
        f"Remedy: {REMEDY}; in the first case, reinstall VARText afterwards"
    )
