"""The agent of examples/questions/hindsight.py: which prompts it writes, and what it learns under them."""

from importlib import import_module

import numpy as np
import pytest
import torch
from test_examples import EXAMPLES
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent, weights_of

from agents import GRPO, Checkpoints
from agents.losses import log_probs
from rewards.base import Reward, RewardOutput
from rewards.components import Component
from var_env import World
from var_env.scenes import TEMPLATES, Scene

EVERY = range(3)
PLAIN = {"kl_coef": 0.0, "advantage_scale": "none"}
CORNER, TOP = [[50, 50, 60, 60]], [[0, 0, 64, 30]]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "questions")
    return import_module("hindsight_agent")  # by the name that the script gives it, or it would be registered twice


class Reads(Reward):
    """Reads SEEN, a word of the split "train", in every second image and nothing in the others; scores brightness."""

    name = "reads"

    def __init__(self, word="SEEN", parts=True):
        self.word, self.parts, self.calls = word, parts, 0

    def score(self, images, scenes):
        self.calls += 1
        seen = [i % 2 == 1 for i in range(len(images))]
        letters = [
            Component("letter", (0, 0), 0.5, np.array(TOP, np.float32)),
            Component("letter", (0, 1), 0.0, np.array(CORNER, np.float32)),
        ]
        return RewardOutput(
            images.mean((1, 2, 3)) / 255,
            words=[[self.word] if read else [] for read in seen],
            confidences=[[0.95] if read else [] for read in seen],
            regions=[np.array(TOP if read else [], np.float32).reshape(-1, 4) for read in seen],
            components=[letters] * len(images) if self.parts else [],
        )


@pytest.fixture
def reward():
    return Reads()


def prompt_of(words, template=TEMPLATES[0]):
    return template.format(words=" above ".join(f'"{word}"' for word in words), ink="yellow", ground="navy")


def lines_of(count, upwards=False):
    """Boxes of lines one below the other, or the lowest first."""
    tops = [4 + 30 * i for i in range(count)]
    return np.array([[0, top, 48, top + 24] for top in (tops[::-1] if upwards else tops)], np.float32).reshape(-1, 4)


class TestPrompts:
    def relabel(self, module, asked, read, confidences=None, lines=None, world=None, prompt=None):
        scene = Scene(prompt or prompt_of(asked), tuple(asked), boxes=((0, 0, 9, 9),) * len(asked))
        confidences = [0.95] * len(read) if confidences is None else confidences
        lines = lines_of(len(read)) if lines is None else lines
        return module.right_scene(scene, read, confidences, lines, world or World(), 0.9)

    @pytest.mark.parametrize("template", TEMPLATES)
    @pytest.mark.parametrize(
        ("asked", "read"),
        [
            (["CAB"], ["GAB"]),
            (["CAB", "KITE"], ["GAB", "KITE"]),
            (["CAB", "KITE"], ["KITE"]),  # a missing word
            (["CAB"], ["LAB", "SUN"]),
            (["KITE", "KITE"], ["KITE", "SUN"]),
        ],
    )
    def test_same_template_and_colours_with_the_words_read(self, module, template, asked, read):
        found = self.relabel(module, asked, read, prompt=prompt_of(asked, template))
        assert found.prompt == prompt_of(read, template) and found.words == tuple(read) and found.boxes == ()

    def test_capitals_from_top_to_bottom(self, module):
        found = self.relabel(module, ["CAB"], ["sun", "Lab"], lines=lines_of(2, upwards=True))
        assert found.words == ("LAB", "SUN") and found.prompt == prompt_of(["LAB", "SUN"])

    @pytest.mark.parametrize(
        ("asked", "read"),
        [
            (["CAB"], []),
            (["CAB"], ["CAB"]),
            (["CAB"], ["cab"]),
            (["LAB", "KITE"], ["KITE", "LAB"]),  # right by the reward, in any order
            (["CAB"], ["LAB", "SUN", "KITE"]),  # more than this world asks for
            (["CAB"], ["L4B"]),
            (["CAB"], ["LÄB"]),
            (["CAB"], ["LAß"]),  # whose capitals would be LASS
            (["CAB"], ["L-B"]),
            (["CAB"], ["LA"]),
            (["CAB"], ["LABEL"]),
            (["KITE"], ["RUN"]),  # of the split "val"
            (["KITE", "LAB"], ["KITE", "RED"]),  # one of the split "test"
        ],
    )
    def test_no_other_prompt(self, module, asked, read):
        assert self.relabel(module, asked, read) is None

    def test_doubtful_words(self, module):
        assert self.relabel(module, ["CAB"], ["LAB", "SUN"], confidences=[0.95, 0.89]) is None
        assert self.relabel(module, ["CAB"], ["LAB"], confidences=[]) is None  # a reward that does not tell
        assert self.relabel(module, ["CAB"], ["LAB"], confidences=[0.9]) is not None

    def test_words_side_by_side(self, module):
        assert self.relabel(module, ["CAB"], ["LAB", "SUN"], lines=lines_of(1)) is None
        beside = np.array([[0, 4, 24, 28], [30, 6, 54, 30]], np.float32)
        assert self.relabel(module, ["CAB"], ["LAB", "SUN"], lines=beside) is None

    def test_worlds_and_prompts_of_another_kind(self, module):
        assert self.relabel(module, ["CAB"], ["LAB", "SUN"], world=World(regions={1: 1.0})) is None
        assert self.relabel(module, ["CAB"], ["LABEL"], world=World(size=128)) is not None
        assert self.relabel(module, ["CAB"], ["LAB"], world=World(split="val")) is None
        assert self.relabel(module, ["CAB"], ["RUN"], world=World(split="val")) is not None
        assert self.relabel(module, ["CAB", "LAB"], ["SUN"], prompt='"CAB" and "LAB"') is None


def part(kind, index, value, boxes=None):
    return Component(kind, index, value, None if boxes is None else np.array(boxes, np.float32))


class TestTokens:
    def test_under_a_letter_that_differs(self, module, schedule):
        found = [part("word", (0,), 0.0, TOP), part("letter", (0, 0), 0.5, TOP), part("letter", (0, 1), 0.0, CORNER)]
        tokens = module.tokens_that_differ(found, schedule, EVERY)
        assert tokens.nonzero().flatten().tolist() == [0, 4, 20]
        assert module.tokens_that_differ(found, schedule, range(1, 3)).nonzero().flatten().tolist() == [3, 19]

    def test_spurious_and_missing_letters(self, module, schedule):
        right = part("letter", (0, 0), 0.5, TOP)
        spurious = module.tokens_that_differ([right, part("spurious", (1, 0), -0.1, CORNER)], schedule, EVERY)
        assert spurious.nonzero().flatten().tolist() == [0, 4, 20]
        missing = module.tokens_that_differ([right, part("letter", (0, 1), 0.0)], schedule, EVERY)
        assert missing.nonzero().flatten().tolist() == [0, 3, 4, *range(13, 21)]  # what lies below the word

    def test_nothing_differs(self, module, schedule):
        found = [part("word", (0,), 0.0, TOP), part("letter", (0, 0), 0.5, TOP)]
        assert not module.tokens_that_differ(found, schedule, EVERY).any()


class TestLearning:
    def learned(self, parts, cls, **options):
        agent = tiny_agent(parts, cls, epochs=2, minibatches=2, learning_rate=1e-3, **options)
        agent.learn(2 * STEPS_A_ROLLOUT)
        return agent

    def test_without_a_coefficient_it_is_grpo_bit_for_bit(self, module, parts):
        grpo, zero = self.learned(parts, GRPO), self.learned(parts, module.Hindsight, hindsight_coef=0.0)
        assert_same(weights_of(grpo.policy), weights_of(zero.policy), rtol=0, atol=0)
        assert "hindsight/images" not in zero.logger.name_to_value

    def test_it_learns_something_else_from_the_same_reward_calls(self, module, parts):
        grpo = self.learned(parts, GRPO)
        calls = parts["reward"].calls
        agent = self.learned(parts, module.Hindsight)
        assert parts["reward"].calls == 2 * calls and agent.images_decoded == grpo.images_decoded == 16
        before, after = weights_of(grpo.policy), weights_of(agent.policy)
        assert any(not torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize(("which", "learn"), [("all", range(21)), ("letters", [0, 4, 20])])
    @pytest.mark.parametrize("micro_batch", [None, 3])
    def test_the_gradient_is_that_of_imitation_at_the_chosen_tokens(self, module, parts, which, learn, micro_batch):
        agent = tiny_agent(
            parts, module.Hindsight, hindsight_coef=0.3, hindsight_tokens=which, micro_batch=micro_batch, **PLAIN
        )
        rollout = agent.sample()
        found = gradients(agent, rollout, torch.zeros(8))  # nothing of GRPO
        policy, schedule = agent.policy, agent.policy.schedule
        policy.zero_grad()
        for row in range(8):  # naive: one image after the other, of those in which SEEN was read
            if rollout.words_read[row] == ["SEEN"]:
                asked = rollout.scenes[row]
                words = " above ".join(f'"{word}"' for word in asked.words)
                cond = policy.encode_prompts([asked.prompt.replace(words, '"SEEN"')])
                grids = [grid[[row]] for grid in rollout.grids]
                logits = policy(cond, grids, range(len(schedule)))
                logp = log_probs(logits, torch.cat(grids, 1)).logp[0]  # (21,)
                (-0.3 * logp[list(learn)].sum() / 21 / 8).backward()
        expected = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()
        }
        assert any(gradient.any() for gradient in expected.values())
        assert_same(found, expected, rtol=1e-3, atol=1e-6)  # sums in another order
        assert agent.relabelled is None

    def test_the_clip_ends_it(self, module, parts):
        agent = tiny_agent(parts, module.Hindsight, hindsight_tokens="all", **PLAIN)
        known = agent.look_back(agent.sample(), EVERY)
        weights = torch.ones_like(known.old)
        for apart, moves in ((0.1, True), (0.3, False)):  # log 1.2 = 0.18
            agent.relabelled = known._replace(old=known.old - apart)
            agent.policy.zero_grad()
            agent.hindsight_loss(torch.arange(len(known.old)), weights, EVERY).backward()
            assert any(p.grad is not None and p.grad.any() for p in agent.policy.parameters()) == moves

    def test_old_log_probabilities_are_of_the_relabelled_prompt(self, module, parts):
        agent = tiny_agent(parts, module.Hindsight, **PLAIN)
        rollout = agent.sample()
        known = agent.look_back(rollout, EVERY)
        rows = (known.place >= 0).nonzero().flatten()
        assert rows.tolist() == [1, 3, 5, 7] and known.place[rows].tolist() == [0, 1, 2, 3]
        assert [scene.words for scene in known.rollout.scenes] == [("SEEN",)] * 4
        asked = agent.all_log_probs(agent.policy, rollout, EVERY)[rows]
        assert not torch.allclose(known.old, asked)
        before = known.old.clone()
        nudge(agent)
        assert torch.equal(known.old, before)

    def test_logs(self, module, parts):
        agent = tiny_agent(parts, module.Hindsight)
        agent.iterate()
        logged = agent.logger.name_to_value
        assert logged["hindsight/images"] == 4 and logged["hindsight/share"] == 0.5
        assert logged["hindsight/tokens"] == pytest.approx(3 / 21)

    @pytest.mark.parametrize("word", ["RUN", "SE"])
    def test_no_image_to_relabel_is_grpo(self, module, parts, word):
        parts = parts | {"reward": Reads(word)}
        grpo, agent = self.learned(parts, GRPO), self.learned(parts, module.Hindsight)
        assert_same(weights_of(grpo.policy), weights_of(agent.policy), rtol=0, atol=0)
        agent.look_back(agent.sample(), EVERY)
        assert agent.logger.name_to_value["hindsight/images"] == 0

    def test_goes_on_from_a_checkpoint(self, module, parts, tmp_path):
        agent = self.learned(parts, module.Hindsight, hindsight_coef=0.2, hindsight_tokens="all", certainty=0.5)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(agent)
        again = checkpoints.load(agent.env, "cpu")
        assert (again.hindsight_coef, again.hindsight_tokens, again.certainty) == (0.2, "all", 0.5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hindsight_coef": -0.1}, "hindsight_coef must be a finite number of at least 0, got -0.1"),
            ({"certainty": 1.1}, "certainty must lie between 0 and 1, got 1.1"),
            ({"hindsight_tokens": "some"}, "hindsight_tokens"),
        ],
    )
    def test_options(self, module, parts, options, message):
        with pytest.raises(ValueError, match=message):
            tiny_agent(parts, module.Hindsight, **options)

    def test_a_world_with_other_prompts(self, module, parts):
        world = import_module("agents.testing").FixedPrompts(['A sign that says "A"'], 64)
        with pytest.raises(ValueError, match=r"FixedPrompts has its own: use an environment of that world, or grpo"):
            tiny_agent(parts | {"world": world}, module.Hindsight)

    def test_a_reward_that_does_not_tell_letters_apart(self, module, parts):
        parts = parts | {"reward": Reads(parts=False)}
        with pytest.raises(ValueError, match=r"no letters for image 1, .*use 'ocr' or .*hindsight_tokens='all'"):
            tiny_agent(parts, module.Hindsight).iterate()
        agent = tiny_agent(parts, module.Hindsight, hindsight_tokens="all")
        agent.iterate()
        assert agent.n_updates == 1
