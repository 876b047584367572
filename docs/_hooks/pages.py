"""What the site adds to the Markdown files of this repository. Pure functions; nothing here needs mkdocs.

The files read well as they are, with links between them. Four comments, each on a line of its own, ask for more:

    <!-- options: vmr -->      a table of the agent's options, from the code
    <!-- curves: vmr -->       the figures of all comparisons in results/ that the agent took part in
    <!-- help: compare -->     what `vartext compare --help-all` prints
    <!-- include: results/quick/results.md # Power -->    the section of that title
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {  # files outside docs/ that are pages of the site
    "rewards/README.md": "rewards.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "var_env/assets/README.md": "weights/tokenizer.md",
    "agents/policies/assets/README.md": "weights/policies.md",
}
SHOWN = (".md", ".png", ".json")  # files of results/ that are in the site
LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)((?:\s+"[^"]*")?)\)')
FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.M | re.S)
MARKER = re.compile(r"^<!-- (options|curves|help|include): (.+?) -->$", re.M)


def outside() -> dict[str, str]:
    """The files outside docs/ that the site has: path in the repository to path in the site."""
    results = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "results").rglob("*")) if path.is_file())
    return PAGES | {path: path for path in results if path.endswith(SHOWN)}


def site_path(path: str) -> str | None:
    """Where a file of the repository is in the site; ``None`` when it is not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return outside().get(path)


def repository_path(path: str) -> str:
    """Where a file of the site is in the repository."""
    return {there: here for here, there in outside().items()}.get(path, f"docs/{path}")


def in_text(markdown: str, change: Callable[[str], str]) -> str:
    """``change`` applied to all that is not a fenced block."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def relinked(markdown: str, source: str, target: str | None = None) -> str:
    """Links between files of the repository as links between pages of the site.

    Args:
        markdown: the text of ``source``.
        source: its path in the repository, which its links start from.
        target: the file of the repository on whose page the text will stand; ``source`` by default.

    A link to a file that the site does not have, such as source code, becomes its text. One to a file that is not there
    stays as it is, and the build ends with an error.
    """
    page = site_path(target or source)
    assert page is not None, f"{target or source} is no page of the site"

    def change(link: re.Match[str]) -> str:
        text, (path, mark, anchor), title = link[1], link[2].partition("#"), link[3]
        if not path or ":" in path:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = site_path(file)
        if there is None or not (ROOT / file).exists():
            return text[1:-1] if (ROOT / file).exists() else link[0]
        return f"{text}({posixpath.relpath(there, posixpath.dirname(page) or '.')}{mark}{anchor}{title})"

    return in_text(markdown, lambda text: LINK.sub(change, text))


def expanded(markdown: str, source: str) -> str:
    """A file as the site shows it: links, comments that ask for more, and no ``test`` after ``python``."""
    fill = {"options": options, "curves": curves, "help": help_text}

    def change(marker: re.Match[str]) -> str:
        kind, about = marker[1], marker[2].strip()
        return section(about, source) if kind == "include" else fill[kind](about, source)

    text = in_text(relinked(markdown, source), lambda part: MARKER.sub(change, part))
    return re.sub(r"^```python test$", "```python", text, flags=re.M)


def tested_blocks(markdown: str) -> Iterator[tuple[int, str]]:
    """The blocks that start with "```python test", each with the number of its first line."""
    for fence in FENCE.finditer(markdown):
        if fence["info"].strip() == "python test":
            yield markdown.count("\n", 0, fence.start("body")) + 1, fence["body"]


# What the comments ask for --------------------------------------------------------------------------------------------


def cell(text: Any) -> str:
    """A value in a table."""
    return str(text).replace("``", "`").replace("|", "\\|").replace("\n", " ")


def table_of(rows: dict[str, tuple[Any, str]]) -> str:
    """Options as a table: name to default and text."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| `{name}` | `{cell(repr(value))}` | {cell(text)} |" for name, (value, text) in rows.items())]
    )


def option_rows(name: str) -> dict[str, tuple[Any, str]]:
    """What an algorithm or a wrapper has beyond `grpo`, or has otherwise: option to default and text."""
    from agents import recipes
    from agents.experiments.agent_options import help_of

    part = recipes.known()[name]
    texts, found = help_of(part), recipes.options_of(part)
    general = {} if name == "grpo" or recipes.is_wrapper(part) else recipes.options_of(recipes.known()["grpo"])
    return {o: (d, texts.get(o, "")) for o, d in found.items() if o not in general or general[o] != d}


def names() -> list[str]:
    """Everything that can be named in a recipe."""
    from agents import recipes

    return [*recipes.known(), *recipes.VARIANTS, *recipes.BUNDLES]


def options(name: str, source: str) -> str:
    """The options of a name in a recipe, as a table."""
    from agents import recipes

    if name in recipes.BUNDLES:
        parts = ", ".join(f"[`{part}`]({part}.md#options)" for part in recipes.BUNDLES[name])
        return f"Those of its parts: {parts}."
    if name in recipes.VARIANTS:
        variant = recipes.VARIANTS[name]
        lines = [f"| option | here | [`{variant.of}`]({variant.of}.md#options) |", "|---|---|---|"]
        usual = recipes.options_in(variant.of)
        return "\n".join(
            [*lines, *(f"| `{o}` | `{value!r}` | `{usual[o]!r}` |" for o, value in variant.options.items())]
        )
    part = recipes.known()[name]
    rows = option_rows(name)
    table = table_of(rows) if rows else "It has none of its own."
    if name != "grpo" and not recipes.is_wrapper(part):
        table += "\n\nAll others are those of [`grpo`](grpo.md#options)."
    return f"{table}\n\nIn Python: [`{part.__name__}`][{part.__module__}.{part.__name__}]."


@cache
def comparisons() -> dict[str, list[str]]:
    """The folders of results/ with a comparison, those on an earlier base policy last, and the agents in each."""
    files = sorted((ROOT / "results").rglob("results.json"), key=lambda path: ("plain" in path.parts, path))
    found: dict[str, list[str]] = {}
    for path in files:
        content = json.loads(path.read_text())
        runs = content.get("runs", []) if isinstance(content, dict) else []
        found[path.parent.relative_to(ROOT).as_posix()] = list(dict.fromkeys(run["agent"] for run in runs))
    return found


def curves(name: str, source: str) -> str:
    """Figures of the comparisons with an agent that has ``name`` among its parts."""
    lines: list[str] = []
    for folder, agents in comparisons().items():
        mine = [agent for agent in agents if name in agent.split("+")]
        figures = [f for f in ("curves.png", "budgets.png") if (ROOT / folder / f).is_file()][:1]
        if mine and figures:
            shown = ", ".join(f"`{agent}`" for agent in mine)
            lines += [f"[{folder}](/{folder}/results.md) has {shown}:", ""]
            lines += [f"![Held-out scores of the agents in {folder}](/{folder}/{figures[0]})", ""]
    if not lines:
        return f"No comparison in results/ has it yet; `vartext compare --agents grpo {name}` makes one."
    up = posixpath.relpath(".", posixpath.dirname(source))
    return relinked("\n".join(lines).replace("](/", f"]({up}/"), source)


def section(about: str, source: str) -> str:
    """The section of a file, ``FILE # TITLE``, without its title."""
    path, _, title = (part.strip() for part in about.partition("#"))
    text = (ROOT / path).read_text()
    heading = re.search(rf"^(#+) {re.escape(title)}[ ]*$", text, re.M)
    if heading is None:
        raise ValueError(f"{source}: {path} has no section {title!r}")
    rest = text[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.M)
    return relinked(rest[: end.start() if end else None].strip(), path, source)


def help_text(command: str, source: str) -> str:
    """What ``vartext COMMAND --help-all`` prints, 100 columns wide."""
    from agents import cli

    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
            cli.main([command, "--help-all"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return f"```text\n{told.getvalue().strip()}\n```"


# The table of results in README.md and results/README.md --------------------------------------------------------------

BEGIN, END = "<!-- results: begin, written by `make table` -->", "<!-- results: end -->"
TABLES = ("README.md", "results/README.md")


def results_table(folder: str = "results/quick") -> str:
    """The agents of a comparison against its base policy, with 95 % intervals."""
    content = json.loads((ROOT / folder / "results.json").read_text())
    families = list(next(iter(content["summary"].values())).get("repaired", {}))
    titles = ["", "OCR reward", "Word Accuracy", *(f"faults repaired: {family}" for family in families)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def row(name: str, values: list[list[float]]) -> str:
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in values]
        return "| " + " | ".join([name, *cells, *[""] * (len(titles) - 1 - len(cells))]) + " |"

    metrics = ("reward", "word_accuracy")
    lines.append(row("base policy", [content["base"]["metrics"][metric] for metric in metrics]))
    for agent, of in content["summary"].items():
        values = [of[metric]["mean"] for metric in metrics]
        lines.append(row(f"`{agent}`", [*values, *(of["repaired"][family] for family in families)]))
    return "\n".join(lines)


def with_table(markdown: str) -> str:
    """A file with the table between its two comments as results/ has it now."""
    before, rest = markdown.split(BEGIN)
    return f"{before}{BEGIN}\n{results_table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(with_table((ROOT / name).read_text()))
        print(f"{name}: the table of results/quick")
