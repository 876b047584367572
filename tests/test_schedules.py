import math
import pickle

import pytest
from stable_baselines3.common.utils import LinearSchedule
from test_save_load import optimizer_tensors, same
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

from agents import GRPO, StopAfter
from agents.schedules import SCHEDULES, WarmupCosine, WarmupLinear, make_schedule


def rates(agent, updates, **learn):
    """The learning rate of each of the next updates."""
    seen, update = [], agent.update
    agent.update = lambda *args: (update(*args), seen.append(agent.optimizer.param_groups[0]["lr"]))
    agent.learn(updates * STEPS_A_ROLLOUT, **learn)
    del agent.update
    return seen


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("end", [0.0, 1e-4, 4e-3])
def test_the_formulas(warmup, end):
    start = 2e-3
    for i in range(101):
        done = i / 100
        if warmup and done < warmup:
            linear = cosine = start * done / warmup
        else:
            part = (done - warmup) / (1 - warmup)
            linear = start + (end - start) * part
            cosine = end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))
        assert WarmupLinear(start, warmup, end)(1 - done) == pytest.approx(linear, abs=1e-12)
        assert WarmupCosine(start, warmup, end)(1 - done) == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize("kind", [WarmupLinear, WarmupCosine])
def test_corners_and_no_jump_where_the_warmup_ends(kind):
    schedule = kind(1e-3, warmup=0.25, end=1e-4)
    assert schedule(1.0) == 0 and schedule(0.0) == pytest.approx(1e-4)
    assert schedule(0.75 + 1e-9) == pytest.approx(1e-3) == schedule(0.75)
    assert kind(1e-3, warmup=0.0)(1.0) == 1e-3


def test_by_name():
    assert {make_schedule("constant", 1e-3, 0.2)(p) for p in (0.7, 0.5, 0.0)} == {1e-3}
    assert make_schedule("constant", 1e-3, 0.2)(0.9) == pytest.approx(5e-4)
    assert make_schedule("linear", 1e-3, 0.2) == WarmupLinear(1e-3, 0.2)
    assert make_schedule("cosine", 1e-3, 0.2) == WarmupCosine(1e-3, 0.2) != WarmupLinear(1e-3, 0.2)
    with pytest.raises(ValueError, match=r"'step': choose one of constant, linear, cosine"):
        make_schedule("step", 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "start .* above 0, got 0.0"),
        ({"start": math.inf}, "start"),
        ({"warmup": 1.0}, "warmup .* below 1, got 1.0"),
        ({"warmup": -0.1}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
        ({"end": -1e-3}, "end .* at least 0, got -0.001"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(**{"start": 1e-3} | options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_pickles(name):
    schedule = make_schedule(name, 1e-3)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "rate", [WarmupLinear(1e-3, 0.5), WarmupCosine(1e-3, 0.5), LinearSchedule(1e-3, 0.0, 1.0)], ids=repr
)
def test_the_optimiser_follows_it(parts, rate):
    agent = tiny_agent(parts, learning_rate=rate, kl_coef=0.0)
    assert rates(agent, 4) == [rate(1 - i / 4) for i in range(4)]


def test_a_resumed_run_goes_on_where_the_schedule_was(parts, tmp_path):
    options = {"learning_rate": make_schedule("cosine", 1e-3, 0.25), "kl_coef": 0.1}
    whole = tiny_agent(parts, **options)
    expected = rates(whole, 4)
    stopped = tiny_agent(parts, **options)
    first = rates(stopped, 4, callback=StopAfter(updates=2))  # of four that were planned
    stopped.save(tmp_path / "agent")
    resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
    assert resumed.learning_rate == options["learning_rate"]
    assert first + rates(resumed, 2, reset_num_timesteps=False) == expected
    assert same(weights_of(resumed.policy), weights_of(whole.policy))
    assert same(optimizer_tensors(resumed), optimizer_tensors(whole))
