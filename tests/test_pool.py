"""The pool of workers: the scores of the reward itself, whoever dies, hangs or raises."""

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
from toy_reward import Broken, Fatal, Toy, assert_same, batch, until

import rewards
from rewards.base import Reward, RewardOutput
from rewards.serving.pool import RewardPool
from rewards.serving.worker import CannotStart


@pytest.fixture(scope="module")
def pool():
    with RewardPool(Toy(), workers=2, batch_size=3, retries=1) as pool:
        yield pool


@pytest.mark.parametrize("count", [1, 3, 20])
def test_processes_score_as_the_reward_itself(pool, count):
    images, scenes = batch(count, *["NOTHING"][:count])
    assert_same(pool(images, scenes), Toy()(images, scenes))


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_do_too_whatever_their_number(workers):
    images, scenes = batch(20)
    with RewardPool(Toy(), workers=workers, mode="thread", batch_size=3) as pool:
        assert_same(pool(images, scenes), Toy()(images, scenes))
        assert pool.pids == []


def test_pieces_do_not_depend_on_the_number_of_workers():
    class Size(Reward):
        name = "size"

        def score(self, images, scenes):
            return RewardOutput(np.full(len(images), len(images)))

    for workers in (1, 2, 5):
        with RewardPool(Size(), workers=workers, mode="thread", batch_size=4) as pool:
            output = pool(*batch(10))
            assert output.scores.tolist() == [4.0] * 8 + [2.0] * 2
            assert not output.reads


def test_batches_that_were_submitted_are_scored_beside_the_caller(pool, tmp_path):
    go = tmp_path / "go"
    images, scenes = batch(3, f"WAIT:{go}")
    later = pool.submit(images, scenes)
    until((tmp_path / "go.started").exists)
    assert not later.done()
    others = [batch(2, seed=seed) for seed in range(5)]  # the other worker does them meanwhile
    for output, other in zip([pool.submit(*other) for other in others], others, strict=True):
        assert_same(output.result(), Toy()(*other))
    assert not later.done()
    go.touch()
    assert_same(later.result(), Toy()(images, scenes))


def test_a_worker_that_was_killed_is_replaced(pool):
    images, scenes = batch(12)
    before = pool.restarts
    os.kill(pool.pids[0], signal.SIGKILL)
    assert_same(pool(images, scenes), Toy()(images, scenes))
    assert pool.restarts == before + 1 and len(pool.pids) == 2


def test_a_batch_whose_worker_dies_over_it_is_done_again(pool, tmp_path):
    images, scenes = batch(8, "W", "W", "W", f"DIEONCE:{tmp_path / 'dead'}")
    before = pool.restarts
    output = pool(images, scenes)
    assert (tmp_path / "dead").exists() and pool.restarts == before + 1
    assert_same(output, Toy()(images, scenes))


def test_a_batch_that_kills_every_worker_is_an_error(pool):
    before = pool.restarts
    with pytest.raises(RuntimeError, match=r"'toy': 2 workers in a row were lost.* last one died \(exit code -9\)"):
        pool(*batch(2, "W", "DIE"))
    assert pool.restarts == before + 2
    images, scenes = batch(6)
    assert_same(pool(images, scenes), Toy()(images, scenes))


def test_a_worker_that_hangs_is_killed_and_its_batch_done_again(tmp_path):
    images, scenes = batch(2, f"HANGONCE:{tmp_path / 'hung'}")
    with RewardPool(Toy(), workers=1, timeout=1) as pool:
        assert_same(pool(images, scenes), Toy()(images, scenes))
        assert pool.restarts == 1
        pool.retries = 0
        os.kill(pool.pids[0], signal.SIGSTOP)  # it reads no more: a large batch cannot even be sent
        with pytest.raises(RuntimeError, match=r"the last one hung for 1 s; raise timeout"):
            pool(*batch(4, size=512))


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_what_the_reward_raises_comes_out_and_is_not_tried_again(pool, mode):
    with RewardPool(Toy(), mode="thread", batch_size=3) as threads:
        pool = pool if mode == "process" else threads
        before = pool.restarts
        with pytest.raises(ValueError, match=r"^a word is BAD; use a good one$"):
            pool(*batch(3, "BAD"))
        with pytest.raises(ValueError, match=r"^counted from image 3 of the batch: a word is BAD"):
            pool(*batch(8, "W", "W", "W", "BAD"))
        with pytest.raises(ValueError, match=r"the score of image 1 is nan \(1 of 2 not finite\)"):
            pool(*batch(2, "W", "NAN"))
        with pytest.raises(Exception, match="one and two"):  # another type, when a pickle cannot bring it back
            pool(*batch(1, "CRASH"))
        assert pool.restarts == before


def test_bad_input_is_refused_at_once(pool):
    images, scenes = batch(2)
    for wrong in (images / 255, images.transpose(0, 3, 1, 2), np.concatenate([images, images], -1)[..., :4]):
        with pytest.raises(ValueError) as error:
            pool.submit(wrong, scenes)
        with pytest.raises(ValueError) as expected:
            Toy()(wrong, scenes)
        assert str(error.value) == str(expected.value)
    with pytest.raises(ValueError, match="got 1 scenes for 2 images"):
        pool.submit(images, scenes[:1])


def test_a_scene_that_workers_cannot_import_is_an_error(pool):
    class Local:
        words = ("W",)

    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pool(batch(1)[0], [Local()])


class Mute(Toy):
    """Raises what says nothing, or returns what no other process can have."""

    def score(self, images, scenes):
        if scenes[0].words[0] == "LOCAL":
            output = RewardOutput(np.zeros(len(images)))
            output.more = lambda: None
            return output
        raise AssertionError


def test_what_cannot_come_back_is_an_error_and_no_dead_worker():
    with RewardPool(Mute(), workers=1) as mute:
        with pytest.raises(pickle.PicklingError, match=r"what the reward returned cannot be sent .*lambda"):
            mute(*batch(1, "LOCAL"))
        assert mute.restarts == 0


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_no_error_is_mute(mode):
    said = pytest.raises(RuntimeError, match=r"reward 'toy' failed: AssertionError in score, .*test_pool.py:\d+")
    with RewardPool(Mute(), workers=1, mode=mode) as mute, said:
        mute(*batch(1))


def test_a_reward_that_workers_cannot_import():
    class Local(Toy):
        pass

    pool = RewardPool(Local(), workers=2)
    for _ in range(2):  # and again, since nothing is left of the first try
        with pytest.raises(CannotStart, match=r"'toy' cannot be pickled .*Local.*top of a module.*mode='thread'"):
            pool.start()
    assert pool.pids == []


def test_no_processes_in_a_daemon(monkeypatch):
    """Such as a worker of Gymnasium's AsyncVectorEnv; Python itself says so with an AssertionError."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(CannotStart, match=r"daemon process, .*AsyncVectorEnv: give the pool mode='thread'"):
        RewardPool(Toy(), workers=1)(*batch(1))


def test_models_that_do_not_load():
    with pytest.raises(OSError, match="no weights here"):
        RewardPool(Broken(), workers=1)(*batch(1))
    with pytest.raises(RuntimeError, match=r"'toy' died \(exit code 3\) at its start: .*__main__"):
        RewardPool(Fatal(), workers=1).start()
    with pytest.raises(OSError, match="no weights here"):
        RewardPool(Broken(), mode="thread").start()


def test_a_pickle_is_a_new_pool(pool):
    twin = pickle.loads(pickle.dumps(pool))
    assert (twin.name, twin.workers, twin.batch_size, twin.score_range) == ("toy", 2, 3, (0.0, 100.0))
    assert twin.pids == []


def test_close_finishes_what_was_submitted_and_takes_no_more():
    pool = RewardPool(Toy(), mode="thread", workers=1, batch_size=1)
    later = pool.submit(*batch(5))
    pool.close()
    assert later.done() and len(later.result().scores) == 5
    with pytest.raises(RuntimeError, match="the pool of reward 'toy' is closed"):
        pool(*batch(1))


def test_by_name():
    pool = rewards.make("pool", reward="ocr", kwargs={"penalty_weight": 0.1}, workers=3)
    assert (pool.name, pool.reward.penalty_weight, pool.workers) == ("ocr", 0.1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fork"}, "unknown mode 'fork'; available: process, thread"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"retries": -1}, "retries must be a whole number of at least 0, got -1"),
        ({"timeout": float("nan")}, "timeout must be a positive number of seconds, got nan"),
        ({"kwargs": {"threads": 1}}, "kwargs=.* need a reward given by name"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(Toy(), **options)
    with pytest.raises(ValueError, match="unknown option 'thread' of reward 'ocr'"):
        RewardPool("ocr", {"thread": 1})
