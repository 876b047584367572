"""What `vartext evaluate` tells beyond its first table: CLIPScore, and the results by the number of words."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from tiny import tiny_policy
from tiny_clip import save_tiny_clip

from agents.evaluation import bootstrap_interval
from agents.experiments import measuring
from rewards import CLIPScore
from var_env.scenes import scene_from_prompt


@pytest.fixture
def script():
    return import_module("agents.experiments.evaluate")


@pytest.fixture
def options(tokenizer, tmp_path):
    """A small random policy on the CPU, 24 prompts, and the folder for the results."""
    tokenizer.save(tmp_path / "tokenizer.safetensors")
    tiny_policy(tokenizer).save(tmp_path / "policy.safetensors")
    given = {
        "--policy": tmp_path / "policy.safetensors",
        "--tokenizer": tmp_path / "tokenizer.safetensors",
        "--device": "cpu",
        "--prompts": 24,
        "--out": tmp_path,
    }
    return [str(part) for pair in given.items() for part in pair]


def cells(printed, start):
    """The line of a printed table that begins with these cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[: len(start)] == start]
    return row


def test_without_clip(script, options, tmp_path, capsys):
    assert script.main(options) == 0
    printed = capsys.readouterr().out
    assert "CLIPScore is left out: for it, add --clip openai/clip-vit-base-patch32" in printed
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert "clip" not in evaluation["metrics"] and "clip" not in evaluation["prompts"]
    assert cells(printed, ["Words"]) == ["Words", "Prompts", "OCR reward", "Word Accuracy", "NED"]


def test_with_clip(script, options, tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    options = [*options, "--clip", str(save_tiny_clip(tmp_path / "clip"))]
    assert script.main(options) == 0
    printed, evaluation = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
    policy = measuring.load_policy(script.parse(options))
    drawn = measuring.evaluate(
        policy, measuring.make_env(policy), 24, batch_size=measuring.BATCH
    )  # the same images again
    scores = CLIPScore(tmp_path / "clip", "cpu")(drawn.images, drawn.scenes).scores
    np.testing.assert_allclose(evaluation["prompts"]["clip"], scores, atol=1e-5)
    assert len(set(evaluation["prompts"]["clip"])) > 1
    assert evaluation["metrics"]["clip"] == pytest.approx(bootstrap_interval(scores), abs=1e-5)
    assert cells(printed, ["CLIPScore"])[1] == measuring.with_interval(evaluation["metrics"]["clip"])
    assert "left out" not in printed and cells(printed, ["Words"])[-1] == "CLIPScore"


def test_clip_that_is_not_there_ends_before_anything_is_drawn(script, options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: cannot load the CLIP checkpoint '.*empty': the folder needs"):
        script.main([*options, "--clip", str(tmp_path / "empty")])
    assert not (tmp_path / "evaluation.json").exists()


def test_best_of(script, options, tmp_path, capsys):
    assert script.main([*options, "--best-of", "2"]) == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    policy = measuring.load_policy(script.parse(options))
    drawn = measuring.evaluate(policy, measuring.make_env(policy), 24, batch_size=measuring.BATCH, best_of=2)
    assert evaluation["prompts"]["reward"] == pytest.approx(drawn.scores, abs=1e-5)
    with pytest.raises(SystemExit, match="--best-of must be at least 1, got 0"):
        script.main([*options, "--best-of", "0"])


def test_by_words(script, options, tmp_path, capsys):
    assert script.main([*options, "--regions", "1:0.2,2:0.8"]) == 0
    printed, evaluation = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())
    prompts = evaluation["prompts"]
    for count in (1, 2):
        here = [i for i, prompt in enumerate(prompts["prompt"]) if len(scene_from_prompt(prompt).words) == count]
        line = evaluation["by_words"][str(count)]
        assert line["prompts"] == len(here) > 0
        for metric, (mean, low, high) in line["metrics"].items():
            assert mean == pytest.approx(np.mean([prompts[metric][i] for i in here])) and low <= mean <= high
        assert cells(printed, [str(count)])[1] == str(len(here))
    ones, twos = cells(printed, ["1"]), cells(printed, ["2"])
    assert int(ones[1]) < 10 <= int(twos[1])  # the few come without an interval
    assert "[" not in ones[2] and ones[2] == f"{evaluation['by_words']['1']['metrics']['reward'][0]:.3f}"
    assert twos[2] == measuring.with_interval(evaluation["by_words"]["2"]["metrics"]["reward"])


def test_temperatures_of_another_policy(script, tokenizer, tmp_path):
    policy, other = tiny_policy(tokenizer), tiny_policy(tokenizer, seed=1)
    with torch.no_grad():
        other.sharpness += torch.tensor([0.0, 0.001, -0.002])
    other.save(tmp_path / "other.safetensors")
    before = policy.head.weight.clone()
    measuring.take_temperatures(policy, str(tmp_path / "other.safetensors"))
    assert policy.temperatures() == other.temperatures() and torch.equal(policy.head.weight, before)


def test_temperatures_of_a_policy_of_another_world(script, options, capsys):
    with pytest.raises(SystemExit) as error:
        script.main([*options, "--temperatures-of", "base"])  # six scales, and the small policy has three
    assert str(error.value).startswith("error: ")
