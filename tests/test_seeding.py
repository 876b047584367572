"""Seeds, wherever one is taken."""

import gymnasium as gym
import numpy as np
import pytest
from tiny import tiny_agent, tiny_envs, tiny_policy

from agents import ConflictProbe, HeldOutEval, evaluate, held_out_scenes
from agents.policies.table import TablePolicy
from var_env.sb3 import VARTextVecEnv
from var_env.seeding import as_seed
from var_env.tabular import TableTokenizer

KINDS = (np.int64, np.uint8, np.int32, lambda seed: np.array(seed))
BAD = (-1, 2**64, 2**70, 1.0, np.float64(3), "3", True, None, np.array([1, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_numpys_integers(kind):
    assert as_seed(kind(3)) == 3 and type(as_seed(kind(3))) is int
    assert as_seed(2**64 - 1) == 2**64 - 1


@pytest.mark.parametrize("seed", BAD, ids=str)
def test_others_in_one_line(seed):
    with pytest.raises(ValueError, match=r"^start must be a whole number from 0 to 2\*\*64 - 1, got .*") as error:
        as_seed(seed, "start")
    assert "\n" not in str(error.value)


def places(parts):
    """Everything that takes a seed, as functions of one that tell what came of it."""
    policy, envs = tiny_policy(parts["tokenizer"]), tiny_envs(parts)
    adapter, single = VARTextVecEnv(tiny_envs(parts)), gym.make("VARText-v0", **parts)
    scenes = held_out_scenes(envs.world, 2)

    def seeded(seed):
        adapter.seed(seed)
        return adapter.reset()["prompt"]

    return {
        "agent": lambda seed: tiny_agent(parts, seed=seed).sample().images,
        "set_random_seed": lambda seed: tiny_agent(parts).set_random_seed(seed),
        "single": lambda seed: single.reset(seed=seed)[0]["prompt"],
        "batch": lambda seed: envs.reset(seed=seed)[0]["prompt"],
        "rows": lambda seed: envs.reset(seed=[seed, None])[0]["prompt"][0],
        "adapter": seeded,
        "evaluate": lambda seed: evaluate(policy, envs, scenes, seed=seed).images,
        "held out": lambda seed: HeldOutEval(seed=seed).seed,
        "probe": lambda seed: ConflictProbe(seed=seed).seed,
        "table": lambda seed: TablePolicy(TableTokenizer.load(), spread=1.0, seed=seed).tables[0].detach().numpy(),
    }


PLACES = (
    "agent",
    "set_random_seed",
    "single",
    "batch",
    "rows",
    "adapter",
    "evaluate",
    "held out",
    "probe",
    "table",
)


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_seed_is_taken(parts, place):
    function = places(parts)[place]
    assert np.array_equal(function(np.int64(3)), function(3))
    function(2**40)  # more than numpy's old generator takes
    for bad in (2**64, -1):
        with pytest.raises(ValueError, match=r"seed.* must be a whole number from 0 to 2\*\*64 - 1, got"):
            function(bad)


def test_an_array_seeds_the_rows(parts):
    envs = tiny_envs(parts)
    assert np.array_equal(envs.reset(seed=np.array([5, 6]))[0]["prompt"], envs.reset(seed=5)[0]["prompt"])
    with pytest.raises(ValueError, match="one a row"):
        envs.reset(seed=np.arange(3))
    with pytest.raises(ValueError, match="seed of row 1"):
        envs.reset(seed=[1, -1])
