"""Outputs are checked before any work is done, and a check leaves nothing behind."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from agents.experiments.output import require_file, require_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_folder_that_is_there_or_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, tmp_path / "new" / "one", Path("new"), Path(".")):
        require_folder(path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, blocked in (("file", "file"), ("file/inner/most", "file"), ("link", "link"), ("link/inner", "link")):
        with pytest.raises(ValueError, match=f"--out {tmp_path / name}: {tmp_path / blocked} is no folder"):
            require_folder(tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written():
    with pytest.raises(ValueError, match=r"--json /proc/new: cannot write in /proc "):
        require_file(Path("/proc/new/a.json"), "--json")


def test_files(tmp_path):
    require_file(None, "--png", ".png")
    for name in ("a.png", "new/B.PNG"):
        require_file(tmp_path / name, "--png", ".png")
    require_file(tmp_path / "any.name", "--json")
    for name in ("a", "a.jpg", ".png"):
        with pytest.raises(ValueError, match=r"the name must end with \.png, such as "):
            require_file(tmp_path / name, "--png", ".png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="this is a folder"):
        require_file(tmp_path / "folder.png", "--png", ".png")
    with pytest.raises(ValueError, match="file is no folder"):
        require_file(tmp_path / "file" / "a.png", "--png", ".png")
    assert len(list(tmp_path.iterdir())) == 2


def load(name):
    """A command, a script of examples/, or a script of examples/questions/."""
    if (EXAMPLES.parent / "agents" / "experiments" / f"{name}.py").is_file():
        return import_module(f"agents.experiments.{name}")
    folder = EXAMPLES if (EXAMPLES / f"{name}.py").is_file() else EXAMPLES / "questions"
    sys.path.insert(0, str(folder))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(folder))


FOLDERS = ["compare", "ablate", "tune", "train", "evaluate", "pretrain"]
FOLDERS += ["memory", "theory", "soak_service", "soak_training", "own_model"]
OUTPUTS = ("--out", "--png", "--gif", "--json")
QUESTIONS = ["hindsight", "raster", "split", "suffix_samples", "tree"]


@pytest.mark.parametrize("name", [*FOLDERS, *QUESTIONS])
def test_every_script_that_writes_a_folder(name, tmp_path):
    (tmp_path / "file").touch()
    module = load(name)
    main = getattr(module, "parse", module.main) if name in FOLDERS else module.main
    with pytest.raises(SystemExit) as end:
        main([*(["policy"] if name == "pretrain" else []), "--out", str(tmp_path / "file")])
    assert end.value.code == f"error: --out {tmp_path / 'file'}: {tmp_path / 'file'} is no folder, choose another one"


@pytest.mark.parametrize(
    ("name", "option", "file"),
    [
        ("play", "--png", "name"),
        ("play", "--gif", "name.png"),
        ("bench", "--json", "."),
        ("sweep", "--json", "."),
        ("growth_gif", "--out", "name.png"),
    ],
)
def test_every_script_that_writes_a_file(name, option, file, tmp_path):
    needed = ["--trained", "policy"] if name == "growth_gif" else []
    with pytest.raises(SystemExit) as end:
        load(name).parse([*needed, option, str(tmp_path / file)])
    assert str(end.value.code).startswith(f"error: {option} {tmp_path / file}: ")


def test_no_script_that_writes_is_left_out():
    """A new script with an output must join the lists above."""
    scripts = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("questions/*.py")]
    scripts += (EXAMPLES.parent / "agents" / "experiments").glob("*.py")
    writes = {path.stem for path in scripts if any(f'"{name}", type=Path' in path.read_text() for name in OUTPUTS)}
    assert writes == {*FOLDERS, "play", "bench", "sweep", "question", "growth_gif"}
