"""Weights & Biases: it is sent what TensorBoard gets. A stand-in for the package keeps what it is sent."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from stable_baselines3.common.logger import HParam, Image
from test_examples import TINY, weights  # noqa: F401 (a fixture)

from agents.experiments import compare, train
from agents.logs import WITHOUT_IMAGES, open_logger, shows_images
from agents.trackers import MARK


class Wandb:
    """What this project calls of the package."""

    def __init__(self):
        self.opened, self.sent, self.config, self.summary, self.ended = [], {}, {}, {}, 0

    def init(self, **options):
        self.opened.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.sent.setdefault(step, {}).update(values),
            config=SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values)),
            summary=self.summary,
            finish=self.finish,
        )

    def finish(self):
        self.ended += 1

    def Image(self, pixels):
        return "image", pixels.shape

    def Html(self, text):
        return "html", text


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    return module


def test_numbers_images_texts_and_settings_arrive(wandb, tmp_path):
    logger = open_logger(tmp_path / "grpo" / "seed0", ["wandb", "csv"])
    assert shows_images(logger)
    logger.record("rollout/reward", np.float32(0.5))
    logger.record("samples/images", Image(np.zeros((4, 6, 3), np.uint8), "HWC"), exclude=WITHOUT_IMAGES)
    logger.record("samples/read", "| <b> |", exclude=WITHOUT_IMAGES)
    logger.record("only/csv", 1, exclude="tensorboard")
    logger.record("hparams", HParam({"alpha": 0.6}, {"test/reward": 1.0}), exclude=WITHOUT_IMAGES)
    logger.dump(64)
    logger.close()
    assert wandb.sent == {
        64: {
            "rollout/reward": 0.5,
            "samples/images": ("image", (4, 6, 3)),
            "samples/read": ("html", "<pre>| &lt;b&gt; |</pre>"),
        }
    }
    assert wandb.config == {"alpha": 0.6} and wandb.summary == {"test/reward": 1.0} and wandb.ended == 1
    opened = wandb.opened[0]
    assert (opened["project"], opened["name"], opened["group"]) == ("vartext", "grpo/seed0", "grpo")


def test_a_run_that_goes_on_is_the_same_run_and_a_new_one_is_not(wandb, tmp_path):
    for step in (None, 128, None):
        open_logger(tmp_path, ["wandb"], step).close()
    first, again, new = (options["id"] for options in wandb.opened)
    assert first == again != new == (tmp_path / MARK).read_text()


def test_the_environment_names_the_project(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_logger(tmp_path, ["wandb"]).close()
    assert wandb.opened[0]["project"] == "mine"


class TestCommands:
    def test_without_the_package_compare_ends_before_it_begins(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(SystemExit) as end:
            compare.parse(["--track", "wandb", "--out", str(tmp_path / "out")])
        assert 'error: --track wandb needs the package wandb: pip install "vartext[wandb]"' in str(end.value)
        assert not (tmp_path / "out").exists()

    def test_another_tracker_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            train.parse(["--track", "mlflow"])
        assert "choose from" in capsys.readouterr().err

    def test_training_and_a_comparison_send_what_they_log(self, wandb, tmp_path, weights):  # noqa: F811
        common = [*weights, *TINY, "--images", "4", "--track", "wandb"]  # one update
        assert train.main([*common, "--eval-prompts", "2", "--out", str(tmp_path / "train")]) == 0
        assert wandb.ended == 1 and {"rollout/reward", "eval/word_accuracy"} <= wandb.sent[4].keys()
        assert json.loads((tmp_path / "train" / "run.json").read_text())["track"] == "wandb"  # for --resume
        wandb.sent.clear()
        few = ["--agents", "grpo", "--seeds", "0", "--test-prompts", "2", "--val-prompts", "2"]
        assert compare.main([*common, *few, "--out", str(tmp_path / "compare")]) == 0
        assert wandb.opened[-1]["name"] == "grpo/seed0" and "test/reward" in wandb.sent[4] and wandb.config
