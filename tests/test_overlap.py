"""Drawing a rollout in parts while a pool of workers scores them, and computing ahead while the last one is scored."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, nudge, tiny_agent, weights_of

from agents import GRPO, PPO, RAFT, VMR, StopAfter, TreeGRPO
from agents.rollout import Rollout
from rewards.base import Reward, RewardOutput
from rewards.serving.pool import RewardPool


class Slow(Reward):
    """The brightness, after a while; the first image of a batch takes the longest, so that answers overtake."""

    name = "slow"

    def __init__(self):
        self.done = []

    def score(self, images, scenes):
        mean = images.mean((1, 2, 3)).astype(np.float32) / 255
        for value in mean:
            torch.ones(200_000 if len(self.done) % 3 == 0 else 10).sum()
            self.done.append(float(value))
        return RewardOutput(mean, {"mean": mean}, [[f"{value:.3f}"] for value in mean])


def pooled(parts, workers=2, **options):
    return {**parts, "reward": RewardPool(Slow(), workers=workers, mode="thread", batch_size=2, **options)}


def test_scores_are_those_of_the_images(parts):
    agent = tiny_agent(pooled(parts), overlap=2, prompts_per_update=4)
    rollout = agent.sample()
    expected = rollout.images.mean((1, 2, 3)) / 255
    np.testing.assert_allclose(rollout.scores.flatten(), expected, atol=1e-6)
    assert rollout.returns.shape == (4, 4, 1) and rollout.words_read == [[f"{value:.3f}"] for value in expected]
    assert agent.images_decoded == 16 and agent.tokens_sampled == 16 * 21
    canvas = agent.policy.tokenizer.blank(16)
    for t, grid in enumerate(rollout.grids):
        canvas = agent.policy.tokenizer.write(t, canvas, grid)
    # Rows and images belong together. A convolution of 16 images at once and in two parts may round differently, by one
    # step of uint8 at most; images of other rows differ by far more.
    off = np.abs(agent.policy.tokenizer.decode(canvas).numpy().astype(int) - rollout.images)
    assert off.max() <= 1 and off.mean() < 0.01
    assert np.abs(rollout.images[1:].astype(int) - rollout.images[:-1]).mean((1, 2, 3)).min() > 1


def test_same_prompts_in_the_same_order_as_in_one_piece(parts):
    prompts = []
    for overlap in (1, 2, 3, 9):
        rollout = tiny_agent(pooled(parts), overlap=overlap, prompts_per_update=4).sample()
        prompts.append([scene.prompt for scene in rollout.scenes])
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] and len(set(prompts[0])) > 1


def test_the_workers_do_not_matter(parts):
    agents = [tiny_agent(pooled(parts, workers), overlap=2, learning_rate=1e-3) for workers in (1, 3)]
    for agent in agents:
        agent.learn(3 * STEPS_A_ROLLOUT)
    assert_same(*(weights_of(agent.policy) for agent in agents), atol=0, rtol=0)


def test_prefixes_and_budgets(parts):
    agent = tiny_agent(pooled(parts), VMR, split=1, suffix_samples=2, overlap=2)
    rollout = agent.sample()
    assert rollout.scores.shape == (2, 4) and rollout.returns.shape == (2, 4, 2)
    np.testing.assert_allclose(rollout.returns.flatten(), rollout.images.mean((1, 2, 3)) / 255, atol=1e-6)
    agent = tiny_agent(pooled(parts), overlap=2).learn(10 * STEPS_A_ROLLOUT, StopAfter(images=16))
    assert (agent.n_updates, agent.images_decoded) == (2, 16)


def test_resumes_bit_for_bit(parts, tmp_path):
    options = {"overlap": 2, "learning_rate": 1e-3}
    whole = tiny_agent(pooled(parts), **options).learn(4 * STEPS_A_ROLLOUT)
    half = tiny_agent(pooled(parts), **options).learn(2 * STEPS_A_ROLLOUT)
    half.save(tmp_path / "half")
    resumed = GRPO.load(tmp_path / "half", half.env, "cpu")
    assert resumed.overlap == 2
    resumed.learn(2 * STEPS_A_ROLLOUT, reset_num_timesteps=False)
    assert_same(weights_of(whole.policy), weights_of(resumed.policy), atol=0, rtol=0)


def test_needs_a_pool(parts):
    with pytest.raises(RuntimeError, match=r"takes a RewardPool.*the environment has the reward 'brightness'"):
        tiny_agent(parts, overlap=2).sample()
    with pytest.raises(ValueError, match="overlap must be a whole number of at least 1, got 0"):
        tiny_agent(parts, overlap=0)


def test_a_reward_that_fails_ends_the_update(parts):
    class Broken(Slow):
        def score(self, images, scenes):
            raise RuntimeError("out of ink")

    agent = tiny_agent({**parts, "reward": RewardPool(Broken(), mode="thread")}, overlap=2)
    with pytest.raises(RuntimeError, match="out of ink"):
        agent.sample()
    assert agent.n_updates == 0


EVERYTHING = range(3)
MANY_STEPS = {"epochs": 2, "minibatches": 2, "micro_batch": 3}
AGENTS = [
    (GRPO, {}),
    (GRPO, MANY_STEPS),
    (GRPO, {"kl_in": "reward", "kl": "k1", **MANY_STEPS}),
    (GRPO, {"kl_coef": 0.0, "epochs": 2}),
    (GRPO, {"kl": "full", "epochs": 2}),
    (GRPO, {"dynamic_sampling": "resample", "refresh_reference": 2}),
    (VMR, {"split": 1, "suffix_samples": 2, "prefix_updates": 2, **MANY_STEPS}),
    (VMR, {"split": 3, "suffix_samples": 1}),
    (TreeGRPO, {"forks": 1}),
    (PPO, MANY_STEPS),
    (RAFT, {"epochs": 2}),
]


@pytest.fixture(autouse=True)
def one_thread():
    """So that sums over many numbers do not depend on how busy the machine is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def counting(agent):
    """The policies that `log_probs` is asked of, and the steps, from now on."""
    asked, log_probs = [], agent.log_probs

    def spy(policy, rollout, rows, steps):
        asked.append(("reference" if policy is agent.reference else "policy", steps))
        return log_probs(policy, rollout, rows, steps)

    agent.log_probs = spy
    return asked


@pytest.mark.parametrize(("cls", "options"), AGENTS)
@pytest.mark.parametrize("overlap", [1, 2])
def test_computing_ahead_changes_no_bit_of_an_update(parts, cls, options, overlap):
    agents = [tiny_agent(pooled(parts), cls, overlap=overlap, learning_rate=1e-3, **options) for _ in range(2)]
    agents[1].while_scored = lambda rollout: rollout
    before = weights_of(agents[0].policy)
    for agent in agents:
        for _ in range(4):
            agent.iterate()
    assert_same(*(weights_of(agent.policy) for agent in agents), atol=0, rtol=0)
    assert any(not torch.equal(weight, before[name]) for name, weight in agents[0].policy.named_parameters())


@pytest.mark.parametrize(("cls", "options"), AGENTS)
def test_a_pool_and_one_part_are_the_reward_in_this_process(parts, cls, options):
    agents = [
        tiny_agent(where, cls, learning_rate=1e-3, **options) for where in (pooled(parts), {**parts, "reward": Slow()})
    ]
    for agent in agents:
        for _ in range(4):
            agent.iterate()
    assert_same(*(weights_of(agent.policy) for agent in agents), atol=0, rtol=0)
    times = [agent.logger.name_to_value for agent in agents]
    assert times[0]["time/ahead"] > 0 and "time/ahead" not in times[1]


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_reference_runs_while_the_reward_does_and_not_again(parts, overlap):
    asked_first = threading.Event()

    class Waits(Slow):
        def score(self, images, scenes):
            assert asked_first.wait(60), "the reference was to run first"
            return super().score(images, scenes)

    agent = tiny_agent({**parts, "reward": RewardPool(Waits(), mode="thread")}, overlap=overlap)
    asked, log_probs = counting(agent), agent.log_probs

    def announce(*args):
        found = log_probs(*args)
        asked_first.set()
        return found

    agent.log_probs = announce
    agent.iterate()
    assert asked == [("reference", EVERYTHING), ("policy", EVERYTHING)]  # while scored; in the loss


def test_passes_of_several_steps(parts):
    agent = tiny_agent(pooled(parts), epochs=3, minibatches=2)
    asked = counting(agent)
    rollout = agent.sample()
    assert [name for name, _ in asked] == ["reference", "policy"]
    agent.learn_from(rollout, EVERYTHING)
    assert [name for name, _ in asked[2:]] == ["policy"] * 6, "no old log-probabilities, and none of the reference"


def test_prefixes_and_suffixes_look_at_what_they_learn(parts):
    agent = tiny_agent(pooled(parts), VMR, split=1, suffix_samples=2, prefix_updates=1, suffix_updates=1)
    asked = counting(agent)
    agent.iterate()
    assert asked == [("reference", range(1)), ("policy", range(1))]
    agent.iterate()
    assert asked[2:] == [("reference", range(1, 3)), ("policy", range(1, 3))]


def test_known_rows_stay_with_their_rows(parts):
    agent = tiny_agent(pooled(parts), prompts_per_update=4, epochs=2, overlap=2)
    nudge(agent)
    rollout = agent.sample()
    some = rollout.groups(agent.policy, torch.tensor([False, True, False, True]))
    both = Rollout.concatenate(agent.policy, [some, rollout])
    for changed in (rollout, some, both, both.rows(agent.policy, torch.tensor([[7, 3], [1, 1]]))):
        for policy, logp in ((agent.policy, changed.old_logp), (agent.reference, changed.ref_logp)):
            rows = torch.arange(len(changed.scenes))
            torch.testing.assert_close(logp, agent.log_probs(policy, changed, rows, EVERYTHING).logp.detach())
    stranger = tiny_agent(pooled(parts), prompts_per_update=2).sample()  # of a policy with other weights
    with pytest.raises(AssertionError, match="of one policy"):
        Rollout.concatenate(agent.policy, [rollout, replace(stranger, version=-1)])


def test_nothing_holds_for_other_steps_or_changed_weights(parts):
    agent = tiny_agent(pooled(parts), PPO, epochs=2, learning_rate=1e-3)
    rollout = agent.sample()
    assert rollout.before_update().keys() == {"old_logp", "ref_logp", "features"}
    with pytest.raises(AssertionError, match=r"log-probabilities of \(8, 21\), not \(8, 5\)"):
        agent.fill(rollout, range(2))
    agent.learn_from(rollout, EVERYTHING)
    with pytest.raises(ValueError, match="the weights have changed since"):
        agent.learn_from(rollout, EVERYTHING)


def test_learns_from_a_rollout_twice_as_without_a_pool(parts):
    agents = [
        tiny_agent(where, PPO, learning_rate=1e-3, epochs=2) for where in (pooled(parts), {**parts, "reward": Slow()})
    ]
    for agent in agents:
        rollout = agent.sample()
        agent.learn_from(rollout, EVERYTHING)
        agent.learn_from(replace(rollout, old_logp=None, ref_logp=None, features=None, version=None), EVERYTHING)
    assert_same(*(weights_of(agent.policy) for agent in agents), atol=0, rtol=0)
