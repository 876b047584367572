"""The command ``vartext``: which commands there are, and help without waiting."""

import subprocess
import sys

import pytest

from agents import cli

SLOW = ("torch", "stable_baselines3", "transformers", "matplotlib", "gymnasium", "numpy")


def test_help_names_every_command_and_runs_examples(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert cli.main([]) == 0 and capsys.readouterr().out == text
    assert all(f"\n  {name} " in text for name in cli.commands()) and "vartext train --agent" in text


def test_a_command_that_is_not_there(capsys):
    assert cli.main(["comparé"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: there is no command 'comparé': choose of compare, ablate") and told.count("\n") == 1


def test_arguments_reach_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--images", "9", "--group-size", "2"])
    assert end.value.code == 2 and "--images must be a multiple of --group-size" in capsys.readouterr().err


def test_help_imports_nothing_slow():
    """Seconds depend on the machine; what is imported does not."""
    code = f"""
import sys
from agents import cli
for name in ("", *cli.commands()):
    try:
        cli.main([*filter(None, [name]), "--help"])
    except SystemExit as end:
        assert not end.code
    print("imported:", [module for module in {SLOW!r} if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert lines == ["imported: []"] * (1 + len(cli.commands()))
