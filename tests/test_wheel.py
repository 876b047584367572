"""The wheel, installed into an environment of its own and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "var_env", "agents", "rewards")
TINY = ["--images", "8", "--group-size", "2", "--prompts-per-update", "2", "--test-prompts", "2", "--val-prompts", "2"]


def called(command, **options):
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vartext(tmp_path_factory):
    """Runs the installed command in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:  # a copy, so that no build is left in the repository
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    called([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source])
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    called([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel])
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # The dependencies are those of this environment, without what its own .pth files add: no editable install.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    (folder / "empty").mkdir()
    return lambda *words: called([python.parent / "vartext", *words], cwd=folder / "empty")


def test_help(vartext):
    assert "vartext COMMAND --help" in vartext("--help")
    assert "vartext compare --agents" in vartext("compare", "--help")


def test_a_comparison(vartext, tmp_path):
    assert "before_after.png" in vartext("compare", "--agents", "grpo", *TINY, "--device", "cpu", "--out", tmp_path)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["finished"] and run["budget"]["images"] == 8


def test_every_package_is_in_the_wheel():
    """The list in pyproject.toml is explicit."""
    text = (ROOT / "pyproject.toml").read_text()
    found = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("var_env", "rewards", "agents")
        for path in (ROOT / package).rglob("__init__.py")
    ]
    assert [package for package in found if f'    "{package}",\n' not in text] == []
