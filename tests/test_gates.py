"""The gates of a base policy: what passes, and what was measured."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_envs, tiny_policy

from agents import Decoding, held_out_scenes
from agents.experiments import evaluate, gates
from agents.experiments.gates import Gate, gate_table, policy_gates
from agents.rollout import collect, resized

GOOD = {
    "accuracy": {1.0: 0.45, 0.7: 0.47, 0.5: 0.42, 0.0: 0.40},
    "shares": {"letter_right": 0.5, "plain_right": 0.98},
    "nothing_read": 0.01,
    "entropy": 0.3,
}


def missed(**changes):
    return [gate.name.removeprefix("policy: ") for gate in policy_gates(**GOOD | changes) if not gate.met]


class TestGate:
    @pytest.mark.parametrize(
        ("limits", "target", "verdicts"),
        [
            ({"low": 0.5}, "at least 0.5", ["FAIL", "PASS", "PASS"]),
            ({"high": 0.5}, "at most 0.5", ["PASS", "PASS", "FAIL"]),
            ({"low": 0.5, "high": 0.6}, "0.5 to 0.6", ["FAIL", "PASS", "FAIL"]),
        ],
    )
    def test_ends_of_the_range_pass(self, limits, target, verdicts):
        found = [Gate("x", value, **limits) for value in (0.4, 0.5, 0.7)]
        assert [gate.verdict for gate in found] == verdicts and found[0].target == target

    def test_what_could_not_be_measured_fails(self):
        gate = Gate("x", math.nan, high=1.0)
        assert not gate.met and gate.to_dict() == {"gate": "x", "measured": None, "target": "at most 1", "met": False}
        assert "| x    | nan      | at most 1 | FAIL |" in gate_table("Gate", [gate])


class TestPolicyGates:
    def test_all_met(self):
        assert missed() == [] and len(policy_gates(**GOOD)) == 8

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({"accuracy": {1.0: 0.29, 0.7: 0.29, 0.5: 0.29, 0.0: 0.29}}, "word accuracy at temperature 1"),
            ({"accuracy": {1.0: 0.61, 0.7: 0.61, 0.5: 0.61, 0.0: 0.61}}, "word accuracy at temperature 1"),
            ({"accuracy": GOOD["accuracy"] | {0.7: 0.51}}, "temperature 0.7, word accuracy less that at 1"),
            ({"accuracy": GOOD["accuracy"] | {0.5: 0.39}}, "temperature 0.5, word accuracy less that at 1"),
            ({"accuracy": GOOD["accuracy"] | {0.0: 0.51}}, "greedy, word accuracy less that at 1"),
            ({"shares": {"letter_right": 0.39, "plain_right": 1.0}}, "affected letters right"),
            ({"shares": {"letter_right": 0.61, "plain_right": 1.0}}, "affected letters right"),
            ({"shares": {"plain_right": 1.0}}, "affected letters right"),
            ({"shares": {"letter_right": 0.5, "plain_right": 0.94}}, "other letters right"),
            ({"nothing_read": 0.03}, "images in which nothing is read"),
            ({"entropy": 0.61}, "entropy, nats a token"),
        ],
    )
    def test_one_is_missed(self, changes, name):
        assert missed(**changes) == [name]


def test_entropy_is_the_mean_over_the_tokens_of_the_policys_own_samples(parts, monkeypatch):
    policy, envs = tiny_policy(parts["tokenizer"]), tiny_envs(parts)
    scenes = held_out_scenes(envs.world, 5)
    monkeypatch.setattr(gates, "BATCH", 2)  # the last one is smaller
    generator, entropies = torch.Generator().manual_seed(3), []
    for start in (0, 2, 4):
        batch = scenes[start : start + 2]
        rollout = collect(policy, resized(envs, len(batch)), 1, Decoding(), generator, scenes=batch)
        for t in range(3):
            logits = policy(rollout.cond, rollout.grids, range(t, t + 1)).double().detach()  # (b, n, D, V)
            logp = logits.log_softmax(-1)
            entropies += (-(logp.exp() * logp).sum((-1, -2))).flatten().tolist()
    assert len(entropies) == 5 * 21
    assert gates.sample_entropy(policy, envs, scenes, 3) == pytest.approx(np.mean(entropies), rel=1e-5)


class TestOptions:
    def test_prompts_by_default(self):
        assert evaluate.parse([]).prompts == 256
        assert evaluate.parse(["--gates"]).prompts == 512
        assert evaluate.parse(["--gates", "--prompts", "3"]).prompts == 3

    @pytest.mark.parametrize(
        "options",
        [["--best-of", "2"], ["--temperature", "1"], ["--top-k", "3"], ["--reward", "hps"], ["--clip", "a"]],
    )
    def test_gates_have_their_own_sampler_and_reward(self, options):
        with pytest.raises(SystemExit, match=f"--gates has targets for .*: leave out {options[0]}"):
            evaluate.parse(["--gates", *options])
