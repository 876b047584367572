"""Options that save memory leave the update unchanged, and save it."""

import json

import pytest
import torch
from test_examples import refused, run
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent, tiny_policy, weights_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents import GRPO, VMR, load
from agents.losses import group_advantages
from agents.policies.base import Policy, runs_of_grids
from agents.policies.var_text import VARTextPolicy
from agents.testing import PolicyContract, random_grids
from examples import memory
from var_env import ScaleSchedule, Tokenizer

PROMPTS = list(PolicyContract.prompts)
EVERYTHING = range(3)
CODES = 53  # a size that nothing else has


class Bare(VARTextPolicy):
    """A policy with no more methods than it has to have."""

    hidden = Policy.hidden
    recompute_activations = Policy.recompute_activations


class HalfBare(VARTextPolicy):
    logits = Policy.logits


class Largest(TorchDispatchMode):
    """The most rows of a tensor, made inside the ``with`` block, whose last axis is the vocabulary."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.rows = codes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.codes:
                held = tensor.untyped_storage().nbytes() // tensor.element_size()  # less, where a tensor repeats itself
                self.rows = max(self.rows, min(tensor.numel(), held) // self.codes)
        return made


def learn(policy, steps=EVERYTHING):
    logp, entropy = policy.evaluate(policy.encode_prompts(PROMPTS), random_grids(policy.tokenizer, 3), steps)
    (logp.sum() + entropy.square().sum()).backward()
    return [weight.grad for weight in policy.parameters()]


class TestLogitChunk:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(("chunk", "most"), [(None, 21), (5, 5), (4, 4), (1, 1)])
    def test_logits_of_one_piece_exist_at_a_time(self, precision, chunk, most):
        tokenizer = Tokenizer(ScaleSchedule([(1, 1), (2, 2), (4, 4)]), CODES, channels=2, width=8, blocks=1)
        # A width below a piece's rows, so that the head's weights, transposed, are no larger.
        policy = VARTextPolicy(tokenizer.eval().requires_grad_(False), width=4, layers=1, heads=1, precision=precision)
        policy.logit_chunk = chunk
        with Largest(CODES) as largest:
            learn(policy)
        assert largest.rows == max(3 * most, 4)
        with torch.no_grad(), Largest(CODES) as largest:
            policy.evaluate(policy.encode_prompts(PROMPTS), random_grids(tokenizer, 3), EVERYTHING)
        assert largest.rows == max(3 * most, 4)

    def test_small_grids_are_joined_and_large_ones_stand_alone(self):
        sizes = (1, 4, 9, 16, 1, 2)
        assert runs_of_grids(sizes, range(6), 100) == [range(6)]
        assert runs_of_grids(sizes, range(6), 9) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
        assert runs_of_grids(sizes, range(1, 5), 1) == [range(1, 2), range(2, 3), range(3, 4), range(4, 5)]

    def test_a_policy_without_hidden_states(self, tokenizer):
        for cls, message in ((Bare, r"Bare has no hidden\(\)"), (HalfBare, r"HalfBare has no logits\(\)")):
            policy = cls(tokenizer, width=8, layers=1, heads=1)
            policy.logit_chunk = 4
            with pytest.raises(NotImplementedError, match=f"{message}.* logit_chunk"):
                learn(policy)

    def test_bf16_stays_near(self, tokenizer):
        plain, pieces = (tiny_policy(tokenizer, precision="bf16") for _ in range(2))
        pieces.logit_chunk = 3
        for one, other in zip(learn(plain), learn(pieces), strict=True):
            assert (one - other).norm() < 0.02 * one.norm()


class TestRecompute:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("attention", ["earlier_scales", "own_scale"])
    def test_gradients_are_the_same_bit_for_bit(self, tokenizer, precision, attention):
        plain, again, by_option = (
            tiny_policy(tokenizer, precision=precision, attention=attention, gradient_checkpointing=option)
            for option in (False, False, True)
        )
        again.recompute_activations()
        expected = learn(plain)
        for policy in (again, by_option):
            calls = []
            policy.blocks[0].norm2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            assert all(torch.equal(a, b) for a, b in zip(expected, learn(policy), strict=True))
            assert len(calls) == 2, "the block runs again in the backward pass"

    def test_a_policy_without_it(self, tokenizer):
        with pytest.raises(NotImplementedError, match=r"Bare has no recompute_activations\(\), which recompute=True"):
            GRPO(Bare(tokenizer, width=8, layers=1, heads=1), None, recompute=True, device="cpu")


class TestAgent:
    SAVING = [
        {"logit_chunk": 5},
        {"recompute": True},
        {"micro_batch": 3, "logit_chunk": 2, "recompute": True},
        {"micro_batch": 3, "logit_chunk": 2, "recompute": True, "epochs": 2, "minibatches": 2, "entropy_coef": 0.1},
    ]

    @pytest.mark.parametrize("saving", SAVING, ids=str)
    def test_the_gradient_is_the_same(self, parts, saving):
        found = []
        for options in ({"micro_batch": None, "logit_chunk": None, "recompute": False}, {}):
            agent = tiny_agent(parts, kl_coef=0.1, **saving | options)
            rollout = agent.sample()
            nudge(agent)
            found.append(gradients(agent, rollout, group_advantages(rollout.scores).flatten()))
        assert_same(*found, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("saving", SAVING, ids=str)
    def test_an_update_is_the_same(self, parts, saving):
        found = []
        for options in ({"micro_batch": None, "logit_chunk": None, "recompute": False}, {}):
            agent = tiny_agent(parts, kl_coef=0.1, learning_rate=1e-3, **saving | options)
            rollout = agent.sample()
            # Adam's first step has the size of the learning rate, whatever the gradient's: SGD's shows the gradient.
            agent.optimizer = torch.optim.SGD(agent.policy.parameters(), lr=1e-3)
            agent.update(rollout, group_advantages(rollout.scores).flatten(), EVERYTHING)
            found.append(weights_of(agent.policy))
        assert_same(*found, atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("cls", "options"), [(GRPO, {}), (VMR, {"split": 2, "prefix_updates": 1})], ids=str)
    def test_all_policies_of_an_update_work_in_pieces(self, reward, cls, options, tmp_path, monkeypatch):
        """The reference too, whether it was copied from the policy or came from a file."""
        tokenizer = Tokenizer(ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16), CODES, channels=4, width=8, blocks=1)
        parts = {"tokenizer": tokenizer.eval().requires_grad_(False), "reward": reward}
        agent = tiny_agent(parts, cls, kl_coef=0.1, logit_chunk=4, recompute=True, **options)
        update, rows = cls.update, []

        def watched(*args):
            with Largest(CODES) as largest:
                update(*args)
            rows.append(largest.rows)

        monkeypatch.setattr(cls, "update", watched)
        for _ in range(2):
            agent.learn(2 * STEPS_A_ROLLOUT, reset_num_timesteps=False)
            assert agent.policy.gradient_checkpointing and not agent.policy.config["gradient_checkpointing"]
            agent.save(tmp_path / "agent.zip")
            agent = load(tmp_path / "agent.zip", agent.env, device="cpu")
            assert agent.logit_chunk == 4 and agent.recompute
        assert len(rows) >= 4 and set(rows) == {8 * 4}, "8 images, and the head's 32 weights a code"

    @pytest.mark.parametrize("chunk", [0, -1, 2.5])
    def test_bad_sizes(self, parts, chunk):
        with pytest.raises(ValueError, match=f"logit_chunk must be a whole number of at least 1, got {chunk}"):
            tiny_agent(parts, logit_chunk=chunk)

    @pytest.mark.parametrize(("name", "value"), [("kl", "full"), ("support", "sampler")])
    def test_what_needs_all_log_probabilities(self, parts, name, value):
        with pytest.raises(ValueError, match=f"{name}='{value}' .*logit_chunk=8"):
            tiny_agent(parts, logit_chunk=8, **{name: value})


class TestScript:
    def test_it_measures_each_in_a_process_of_its_own(self, tmp_path):
        options = ["--rows", 8, "--sides", 8, "--codes", 4096, "--micro-batch", 2, "--logit-chunk", 16]
        printed = run("memory", *options, "--device", "cpu", "--out", tmp_path)
        assert (tmp_path / "memory.md").read_text() == printed
        measured = json.loads((tmp_path / "memory.json").read_text())["measured"]
        assert [(one["rows"], one["tokens"], one["codes"]) for one in measured] == 5 * [(8, 85, 4096)]
        assert [one["options"] for one in measured] == [
            {},
            {"micro_batch": 2},
            {"recompute": True},
            {"logit_chunk": 16},
            {"micro_batch": 2, "recompute": True, "logit_chunk": 16},
        ]
        plain, *saving = (one["bytes"] / 2**20 for one in measured)
        assert all(20 < one < 0.95 * plain for one in saving), "MiB; every option saves some of the plain update's"

    def test_lines_vary_one_size_at_a_time(self):
        lines = memory.cases(memory.parse(["--rows", "2", "4", "--sides", "4", "8", "16", "--codes", "8"]))
        assert [(line.rows, line.side, line.codes) for line in lines] == [(2, 8, 8), (4, 8, 8), (4, 4, 8), (4, 16, 8)]
        assert [memory.Case(1, side, 8, {}).schedule.sizes for side in (1, 3, 4)] == [(1,), (1, 4, 9), (1, 4, 16)]

    def test_bad_options(self, capsys, monkeypatch, tmp_path):
        with pytest.raises(SystemExit):
            memory.parse(["--rows", "4", "0"])
        assert "--micro-batch and --logit-chunk must be at least 1" in capsys.readouterr().err
        monkeypatch.setattr(memory, "RESET", tmp_path / "none")
        assert refused(memory.main, "--device", "cpu").endswith("which Linux has: use a GPU")

    def test_help(self, capsys):
        with pytest.raises(SystemExit):
            memory.parse(["--help"])
        text = capsys.readouterr().out
        assert "python examples/memory.py --device cuda" in text and "(default: 4 8 16)" in text
        assert "--measure" not in text

    def test_a_measurement_that_fails(self):
        with pytest.raises(RuntimeError, match=r"rows=1, .* ended with status 1: .*logit_chunk"):
            memory.in_a_process(memory.Case(1, 1, 8, {"logit_chunk": 0}), "cpu")
