"""What goes wrong in days of training ends in a clear message and an intact checkpoint, or the run goes on."""

import errno
import math
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Brightness
from test_save_load import same
from tiny import STEPS_A_ROLLOUT, csv_logger, tiny_agent, tiny_envs, weights_of

from agents import CheckpointEvery, Checkpoints, StopAfter
from agents.saving import folder as saving_folder
from rewards.base import RewardOutput
from rewards.serving.pool import RewardPool, WorkerError

LONG = 100 * STEPS_A_ROLLOUT


@pytest.fixture
def run(parts, tmp_path):
    """Starts training with a checkpoint after every update, and expects the error that it ends with."""

    def start(error, match, at=2, agent=None, before=lambda: None):
        """``before`` is called ahead of update ``at``."""
        agent = agent or tiny_agent(parts, learning_rate=1e-3)

        class Fault(StopAfter):
            def _on_rollout_start(self):
                if self.model.n_updates == at - 1:
                    before()

        with pytest.raises(error, match=match):
            agent.learn(LONG, [CheckpointEvery(tmp_path / "run", updates=1), Fault(updates=10)])
        return agent

    return start


def intact(folder, parts, updates):
    """The newest checkpoint is whole, and goes on to what an undisturbed run comes to; nothing else lies about."""
    assert not list(folder.glob(".*"))
    agent = Checkpoints(folder).load(tiny_envs(parts), "cpu")
    assert agent.n_updates == updates
    agent.learn(LONG, StopAfter(updates=updates + 1), reset_num_timesteps=False)
    whole = tiny_agent(parts, learning_rate=1e-3).learn(LONG, StopAfter(updates=updates + 1))
    assert same(weights_of(agent.policy), weights_of(whole.policy))


class TestDisk:
    def test_full(self, run, parts, tmp_path, monkeypatch):
        def fill():
            def full(handle):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(os, "fsync", full)

        run(OSError, "No space left on device", before=fill, at=3)
        monkeypatch.undo()
        intact(tmp_path / "run", parts, updates=2)

    def test_a_limit_of_the_system_on_the_size_of_files(self, run, parts, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # noqa: E731
            run(OSError, r"cannot write .*policy\.safetensors: .*File too large", before=limit, at=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        intact(tmp_path / "run", parts, updates=2)

    def test_a_folder_that_cannot_be_written(self, run, parts, tmp_path):
        (tmp_path / "run").write_text("a file in its place")
        agent = run(OSError, "run")
        assert agent.n_updates == 0

    def test_a_folder_that_becomes_read_only(self, run, parts, tmp_path):
        def protect():
            (tmp_path / "run").chmod(0o555)
            if os.geteuid() == 0:  # root writes everywhere
                os.seteuid(65534)

        try:
            run(PermissionError, "Permission denied", before=protect, at=3)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            (tmp_path / "run").chmod(0o755)
        intact(tmp_path / "run", parts, updates=2)


class Mortal(Brightness):
    """Kills its process, or hangs; at every call, or at the first, of which the file ``once`` tells."""

    def __init__(self, how, once):
        super().__init__()
        self.how, self.once = how, once

    def score(self, images, scenes):
        if not (self.once and os.path.exists(self.once)):
            if self.once:
                open(self.once, "w").close()
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().score(images, scenes)


class TestWorkers:
    @pytest.mark.parametrize("how", ["dies", "hangs"])
    def test_one_that_is_lost_is_replaced(self, parts, tmp_path, how):
        pool = RewardPool(Mortal(how, str(tmp_path / "once")), workers=1, timeout=3.0, retries=2)
        with pool:
            agent = tiny_agent({**parts, "reward": pool}, learning_rate=1e-3).learn(2 * STEPS_A_ROLLOUT)
        whole = tiny_agent(parts, learning_rate=1e-3).learn(2 * STEPS_A_ROLLOUT)
        assert pool.restarts == 1 and same(weights_of(agent.policy), weights_of(whole.policy))

    def test_one_that_is_lost_again_and_again_ends_training(self, run, parts, tmp_path):
        with RewardPool(Mortal("dies", ""), workers=1, retries=1) as pool:
            agent = tiny_agent({**parts, "reward": pool}, learning_rate=1e-3)
            run(WorkerError, "2 workers in a row were lost", agent=agent)
        intact(tmp_path / "run", parts, updates=0)


class TestNumbers:
    def test_a_reward_that_is_not_finite(self, run, parts, tmp_path, monkeypatch):
        def poison():
            score = lambda self, images, scenes: RewardOutput(np.full(len(images), np.inf, np.float32))  # noqa: E731
            monkeypatch.setattr(Brightness, "score", score)

        run(RuntimeError, r"update 3 failed, weights intact: .*is inf", before=poison, at=3)
        monkeypatch.undo()
        intact(tmp_path / "run", parts, updates=2)

    def spoiled(self, agent, updates):
        """The loss of these updates is NaN."""
        real = agent.policy.evaluate

        def evaluate(*args):
            logp, entropy = real(*args)
            return logp * (math.nan if agent.n_updates + 1 in updates and logp.requires_grad else 1.0), entropy

        agent.policy.evaluate = evaluate
        return agent

    def test_a_bad_step_is_skipped_and_counted(self, parts, tmp_path):
        agent = self.spoiled(tiny_agent(parts, learning_rate=1e-3, ema_decay=0.5), {2, 3})
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(LONG, StopAfter(updates=1))
        before, average = weights_of(agent.policy), weights_of(agent.ema)
        with pytest.warns(UserWarning, match=r"the loss of update [23] is nan: the step was not applied"):
            agent.learn(LONG, StopAfter(updates=3), reset_num_timesteps=False)
        assert same(weights_of(agent.policy), before) and same(weights_of(agent.ema), average)
        assert (agent.n_updates, agent.skipped_steps) == (3, 2)
        agent.learn(LONG, StopAfter(updates=4), reset_num_timesteps=False)
        assert not same(weights_of(agent.policy), before) and agent.skipped_steps == 2
        assert all(weight.isfinite().all() for weight in agent.policy.parameters())
        rows = (tmp_path / "progress.csv").read_text().splitlines()
        assert "train/skipped_steps" in rows[0] and len(rows) == 5

    def test_after_too_many_in_a_row_training_ends(self, run, parts, tmp_path):
        agent = self.spoiled(tiny_agent(parts, learning_rate=1e-3, max_skipped=1), {3, 4})
        with pytest.warns(UserWarning, match="the loss of update 3 is nan"):
            run(RuntimeError, r"the loss of update 4 is nan.*, 2 in a row; lower learning_rate", agent=agent)
        assert Checkpoints(tmp_path / "run").load(device="cpu").skipped_steps == 1
        assert all(weight.isfinite().all() for weight in agent.policy.parameters())

    def test_a_good_step_between_forgives(self, parts):
        agent = self.spoiled(tiny_agent(parts, max_skipped=1), {1, 3, 5})
        with pytest.warns(UserWarning, match="is nan"):
            agent.learn(LONG, StopAfter(updates=6))
        assert agent.skipped_steps == 3


class TestMemory:
    @pytest.mark.parametrize("where", ["update", "sampling"])
    def test_out_of_memory(self, run, parts, tmp_path, where):
        agent = tiny_agent(parts, learning_rate=1e-3)

        def allocate(*_):
            return torch.empty(2**60)  # the allocator's own error

        def exhaust():
            if where == "update":
                agent.policy.evaluate = allocate
            else:
                agent.policy.step = allocate

        run(RuntimeError, r"out of memory in update 3: give a smaller micro_batch", 3, agent, exhaust)
        intact(tmp_path / "run", parts, updates=2)

    def test_what_counts_as_that(self):
        from agents.base import is_out_of_memory

        assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_checkpoint_that_was_half_written_by_a_killed_process_is_no_checkpoint(run, parts, tmp_path, monkeypatch):
    def die(saved, folder):
        folder.mkdir()
        (folder / "policy.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt("the second Ctrl-C")

    def poison():
        monkeypatch.setattr(saving_folder, "write", die)

    run(KeyboardInterrupt, "the second", before=poison, at=3)
    monkeypatch.undo()
    intact(tmp_path / "run", parts, updates=2)
