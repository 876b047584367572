"""The documentation: what it promises is there, and the code that it shows runs. mkdocs is not needed for that."""

import json
import posixpath
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "_hooks"))

import pages  # noqa: E402

from agents import recipes  # noqa: E402

DOCS = sorted((ROOT / "docs").rglob("*.md"))
SHOWN = [ROOT / "README.md", *DOCS, *(ROOT / name for name in pages.PAGES)]
SECTIONS = ["Idea", "Equation", "When to use it", "Options", "Current results"]


def path(file):
    return file.relative_to(ROOT).as_posix()


def nav():
    """The pages that mkdocs.yml lists; read without a YAML parser, since ours is not among the dependencies."""
    listed = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return re.findall(r"([\w/.-]+\.md)$", listed, re.M)


class TestReadme:
    def test_is_short_and_begins_with_an_animation(self):
        lines = (ROOT / "README.md").read_text().splitlines()
        assert len(lines) <= 150
        assert any(re.match(r"!\[.+\]\(docs/growth\.gif\)", line) for line in lines[:10])
        assert (ROOT / "docs/growth.gif").stat().st_size < 300_000

    @pytest.mark.parametrize("name", pages.TABLES)
    def test_the_table_is_that_of_the_results(self, name):
        text = (ROOT / name).read_text()
        assert pages.with_table(text) == text, "run `make table`"


class TestNavigation:
    def test_every_page_is_there_and_every_file_listed(self):
        listed = nav()
        assert len(listed) == len(set(listed))
        for page in listed:
            assert (ROOT / pages.repository_path(page)).is_file(), page
        assert {path(file).removeprefix("docs/") for file in DOCS} | set(pages.PAGES.values()) <= set(listed)

    @pytest.mark.parametrize("file", SHOWN, ids=path)
    def test_links_between_files_lead_somewhere(self, file):
        """On GitHub, from where the file is; `make docs` checks the same for the site, and the anchors."""
        outside_of_blocks = pages.FENCE.sub("", file.read_text())
        for link in pages.LINK.finditer(outside_of_blocks):
            target = link[2].partition("#")[0]
            if target and ":" not in target:
                assert (file.parent / target).exists(), f"{path(file)}: {link[0]}"


class TestAgents:
    @pytest.mark.parametrize("name", pages.names())
    def test_each_has_a_page_with_its_options(self, name):
        text = (ROOT / f"docs/agents/{name}.md").read_text()
        assert re.findall(r"^## (.+)$", text, re.M) == SECTIONS
        assert (
            text.splitlines()[2].startswith(f"`{name}`, ")
            and f"<!-- options: {name} -->" in text
            and f"<!-- curves: {name} -->" in text
        )
        assert f"(agents/{name}.md)" in (ROOT / "docs/agents.md").read_text()
        assert "<!--" not in pages.expanded(text, f"docs/agents/{name}.md")

    def test_no_page_of_something_else(self):
        own = {name for name, part in recipes.known().items() if part.__module__.startswith("agents.")}  # no test's
        named = own | {*recipes.VARIANTS, *recipes.BUNDLES}
        assert {file.stem for file in (ROOT / "docs/agents").glob("*.md")} == named

    def test_options_are_those_of_the_code(self):
        table = pages.options("panw", "docs/agents/panw.md")
        assert "| `alpha` | `0.6` | the exponent of eq. 9, at least 0. The paper finds 0.6 to 0.8 best. |" in table
        assert "`agents.panw.PANW`" in table.replace("[", "`").replace("]", "`")
        grpo = pages.options("grpo", "docs/agents/grpo.md")
        assert "| `clip_range` | `0.2` |" in grpo and "| `learning_rate` |" in grpo
        assert "`clip_range`" not in pages.options("vmr", "docs/agents/vmr.md")  # that is grpo's
        assert "| `advantage_scale` | `'none'` |" in pages.options("reinforce", "docs/agents/reinforce.md")
        assert "| `clip_range_high` | `0.28` | `None` |" in pages.options("dapo", "docs/agents/dapo.md")
        assert "[`similarity`](similarity.md#options)" in pages.options("stage", "docs/agents/stage.md")


class TestPages:
    def test_links_become_those_of_the_site(self):
        text = (
            "[a](../results/quick/results.md#power) ![b](growth.gif) [c](https://x.y) [`d`](../agents/vmr.py) [e](#f)"
        )
        assert pages.relinked(text, "docs/agents.md") == (
            "[a](results/quick/results.md#power) ![b](growth.gif) [c](https://x.y) `d` [e](#f)"
        )
        assert pages.relinked("[r](../../rewards/README.md)", "docs/agents/mp.md") == "[r](../rewards.md)"
        assert pages.relinked("[d](../docs/faults.md)", "results/README.md") == "[d](../faults.md)"

    def test_what_is_not_there_stays_for_the_build_to_find(self):
        assert pages.relinked("[a](nothing.md)", "docs/agents.md") == "[a](nothing.md)"

    def test_blocks_are_left_alone(self):
        text = "```python test\nx[0](../agents/vmr.py)\n<!-- help: compare -->\n```\n"
        assert pages.expanded(text, "docs/index.md") == text.replace(" test", "")
        assert list(pages.tested_blocks(text)) == [(2, "x[0](../agents/vmr.py)\n<!-- help: compare -->\n")]

    def test_a_section_of_another_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pages, "ROOT", tmp_path)
        (tmp_path / "README.md").write_text("# A\n\n## B\n\ntext\n\n### C\n\nmore\n\n## D\n\nother\n")
        assert pages.section("README.md # B", "docs/index.md") == "text\n\n### C\n\nmore"
        with pytest.raises(ValueError, match=r"README\.md has no section 'E'"):
            pages.section("README.md # E", "docs/index.md")

    def test_figures_of_every_comparison_with_the_agent(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pages, "ROOT", tmp_path)
        pages.comparisons.cache_clear()
        for folder, agents in (("plain/x", ["grpo"]), ("new", ["grpo", "vmr+panw"])):
            (tmp_path / "results" / folder).mkdir(parents=True)
            (tmp_path / "results" / folder / "results.json").write_text(
                json.dumps({"runs": [{"agent": agent} for agent in agents]})
            )
            for name in ("results.md", "curves.png"):
                (tmp_path / "results" / folder / name).write_text("")
        text = pages.curves("grpo", "docs/agents/grpo.md")
        assert re.findall(r"\]\((.+?)\)", text) == [
            *("../results/new/results.md", "../results/new/curves.png"),
            *("../results/plain/x/results.md", "../results/plain/x/curves.png"),
        ]
        assert "`vmr+panw`" in pages.curves("panw", "docs/agents/panw.md")
        assert "vartext compare --agents grpo tree" in pages.curves("tree", "docs/agents/tree.md")
        pages.comparisons.cache_clear()


def test_every_command_has_its_section():
    from agents import cli

    text = (ROOT / "docs/commands.md").read_text()
    assert re.findall(r"^<!-- help: (\w+) -->$", text, re.M) == re.findall(r"^## vartext (\w+)$", text, re.M)
    assert set(re.findall(r"^## vartext (\w+)$", text, re.M)) == {*cli.commands()}


def commands():
    """Every line of a console block that calls a command of this project, with the options that it gives."""
    for file in SHOWN:
        for fence in pages.FENCE.finditer(file.read_text()):
            if fence["info"].strip() == "console":
                for line in fence["body"].splitlines():
                    words = shlex.split(line, comments=True)
                    for i, word in enumerate(words):
                        name = re.fullmatch(r"examples/(\w+)\.py", word)
                        if name or word == "vartext":
                            command = name[1] if name else words[i + 1]
                            given = [w.partition("=")[0] for w in words[i:] if re.match(r"--[a-z]", w)]
                            yield path(file), command, name is not None, given


def test_commands_that_are_shown_have_the_options_they_are_given():
    from agents import cli

    shown = list(commands())
    assert len(shown) >= 10
    helps = {name: pages.help_text(name, "") for name in {command for _, command, _, _ in shown} & {*cli.commands()}}
    for file, command, is_file, given in shown:
        assert not is_file or (ROOT / f"examples/{command}.py").is_file(), f"{file}: examples/{command}.py"
        assert is_file or command in cli.commands(), f"{file}: vartext {command}"
        for option in given if command in helps else ():
            assert re.search(rf"{option}\b", helps[command]), f"{file}: {command} has no {option}"


@pytest.mark.parametrize("file", [f for f in SHOWN if list(pages.tested_blocks(f.read_text()))], ids=path)
def test_code_that_is_shown_runs(file, tmp_path, monkeypatch):
    """The blocks of a page one after another, as a reader would paste them."""
    from agents.common.registry import AGENTS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AGENTS, "_entries", dict(AGENTS._entries))  # what a page registers goes with it
    names = {"__name__": posixpath.basename(path(file))}
    for line, code in pages.tested_blocks(file.read_text()):
        exec(compile("\n" * (line - 1) + code, str(file), "exec"), names)
