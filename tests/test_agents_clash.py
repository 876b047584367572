"""A foreign top-level package `agents`: the message that a user meets, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = "from var_env.agents_clash import check_agents; check_agents(); print('all is well')"


@pytest.fixture
def foreign(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("class Runner: ...\n")
    return tmp_path


def python(code, *path):
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=path[0])


def test_the_own_package_is_silent():
    run = python(CHECK, ROOT)
    assert (run.stdout, run.stderr) == ("all is well\n", "")


@pytest.mark.parametrize("before", ["", "import agents; "])
def test_a_foreign_package_is_named_with_the_remedy(foreign, before):
    run = python(before + CHECK, foreign, ROOT)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the package `agents` that Python finds is {foreign / 'agents'}")
    assert "pip uninstall openai-agents" in last and "virtual environment" in last


def test_importing_the_environment_warns_and_goes_on(foreign):
    run = python("import var_env; var_env.VARTextEnv; print('all is well')", foreign, ROOT)
    assert run.stdout == "all is well\n"
    assert f"UserWarning: the package `agents` that Python finds is {foreign / 'agents'}" in run.stderr


def test_two_distributions_in_one_folder(foreign):
    (foreign / "var_env").mkdir()
    (foreign / "var_env" / "__init__.py").touch()
    shutil.copy(ROOT / "var_env" / "agents_clash.py", foreign / "var_env")
    assert python(CHECK, foreign).stdout == "all is well\n"
    (foreign / "openai_agents-1.0.dist-info").mkdir()
    (foreign / "openai_agents-1.0.dist-info" / "METADATA").write_text("Name: openai-agents\nVersion: 1.0\n")
    last = python(CHECK, foreign).stderr.splitlines()[-1]
    assert "one over the other" in last and str(foreign / "agents") in last and "pip uninstall" in last
