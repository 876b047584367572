"""A process that scores for its parent: the workers of `rewards.serving.pool`.

It is spawned, since a fork would copy live ONNX sessions and their locks, and ends when the pipe to its parent does.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, Reward, RewardOutput
from rewards.reason import reason

START_SECONDS = 600  # for a worker to load its models; the largest take minutes from a slow disk


class Lost(Exception):
    """A worker died, or was killed because it hung."""


class CannotStart(RuntimeError):
    """A process cannot be started for this reward here. The message names the cause and the remedy."""


class Worker:
    """A spawned process that holds a reward, and the pipe to it. Used by one thread at a time."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.process: BaseProcess | None = None

    def start(self) -> None:
        """Start a process, which loads the models; `wait` waits for it. Raises `CannotStart`."""
        name = self.reward.name
        if multiprocessing.current_process().daemon:
            raise CannotStart(
                f"reward {name!r} cannot start worker processes in a daemon process, such as a worker of Gymnasium's "
                "AsyncVectorEnv: give the pool mode='thread', AsyncVectorEnv daemon=False, or use a reward service"
            )
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.reward), daemon=True, name="reward-worker")
        try:
            process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # what pickle raises
            self.pipe.close()
            raise CannotStart(
                f"reward {name!r} cannot be pickled for a worker process: {reason(error)}; define its class, and what "
                "it holds, at the top of a module, or give the pool mode='thread'"
            ) from error
        finally:
            theirs.close()  # so that reading from ours ends when the process does
        self.process = process

    def wait(self) -> None:
        """Wait for the models. Raises what the reward raised in loading them."""
        self._exchange(None, START_SECONDS)

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords], timeout: float) -> RewardOutput:
        """Score in the process, or in a new one if it was killed."""
        if self.process is None:
            self.start()
            self.wait()
        return self._exchange((images, scenes), timeout)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def _exchange(self, message: Any, timeout: float) -> Any:
        """Send a message, or none, and return the answer. Raises what it says that the reward raised, or Lost."""
        process, hung = self.process, threading.Event()
        assert process is not None

        def expire() -> None:
            hung.set()
            process.kill()  # which ends the sending or receiving below

        watchdog = threading.Timer(timeout, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            if message is not None:
                self.pipe.send_bytes(pickled(message, "the scenes"))
            error, value = self.pipe.recv()
        except (EOFError, OSError) as broken:
            process.join()
            how = f"hung for {timeout:g} s" if hung.is_set() else f"died (exit code {process.exitcode})"
            raise Lost(how) from broken
        finally:
            watchdog.cancel()
        if error is not None:
            raise error
        return value


def _work(pipe: Connection, reward: Reward) -> None:
    """The life of a worker process: load, then answer until the pipe closes, which it does when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when this ends
    answer = _answer(lambda: load(reward))
    try:
        while True:
            pipe.send_bytes(answer)
            received = pipe.recv_bytes()
            answer = _answer(lambda: reward(*pickle.loads(received)))  # noqa: B023, called at once
    except (EOFError, OSError):
        return


def load(reward: Reward) -> None:
    load = getattr(reward, "load", None)
    try:
        if load is not None:
            load()
    except Exception as error:
        if str(error).strip():
            raise
        raise RuntimeError(f"reward {reward.name!r} cannot load: {reason(error)}") from error


def pickled(value: Any, what: str) -> bytes:
    """A pickle. PicklingError that names `what` if there is none."""
    try:
        return pickle.dumps(value)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise pickle.PicklingError(f"{what} cannot be sent between processes: {reason(error)}") from error


def _answer(work: Callable[[], Any]) -> bytes:
    """What calling `work` raised, or None, and what it returned, pickled."""
    try:
        return pickled((None, work()), "what the reward returned")
    except Exception as error:
        if not isinstance(error, ValueError):  # which says by itself what is wrong
            traceback.print_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {reason(error)}")
        return pickle.dumps((error, None))
