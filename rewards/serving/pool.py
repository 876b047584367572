"""A pool of workers that score batches beside the caller: processes for CPU code, or threads.

>>> from rewards.serving.pool import RewardPool
>>> with RewardPool("ocr", {"threads": 1}, workers=2) as pool:  # doctest: +SKIP
...     later = pool.submit(images, scenes)  # returns at once; sampling goes on here
...     output = later.result()

A batch is cut into pieces of fixed size, so that the result depends neither on the number of workers nor on which of
them was free. The processes are spawned: a fork would copy live ONNX sessions and their locks. A script that makes a
pool of processes needs ``if __name__ == "__main__":``, as for all of Python's spawned processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rewards
from rewards.base import HasWords, Reward, RewardOutput, check_images
from rewards.components import Component
from rewards.serving.worker import Lost, Worker, load

MODES = ("process", "thread")


class WorkerError(RuntimeError):
    """A worker died or hung, and so did those that took its place."""


class RewardPool(Reward):
    """A reward that shares its batches out among workers. Scores what the reward itself would score.

    A worker that dies, or that is not done with a piece in `timeout` seconds and is killed, is replaced, and the
    piece is done again, up to `retries` times: then `WorkerError`. What the reward raises comes out as it is, and
    is not tried again. `worker.CannotStart` says why no process can be started for a reward, or here. A pickle of a
    pool is a new pool, whose workers start at its first batch.

    Args:
        reward: a reward's name, as for `rewards.make`, or a reward that can be pickled.
        kwargs: the options of a reward that is given by name.
        workers: how many pieces are scored at a time.
        mode: "process", or "thread" for rewards that release Python's lock, such as a model on a GPU. Threads share
            one reward and one model; a thread cannot die or be killed, so `timeout` and `retries` do not apply.
        batch_size: images in a piece. A model's scores may depend on it in their last digits, OCR's do not.
        timeout: seconds a process may take for one piece.
        retries: how often a piece is done again whose worker died or hung.
    """

    def __init__(
        self,
        reward: str | Reward,
        kwargs: Mapping[str, Any] | None = None,
        workers: int = 2,
        mode: str = "process",
        batch_size: int = 8,
        timeout: float = 60.0,
        retries: int = 2,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; available: {', '.join(MODES)}")
        for name, value, least in (("workers", workers, 1), ("batch_size", batch_size, 1), ("retries", retries, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        if isinstance(reward, str):
            reward = rewards.make(reward, **(kwargs or {}))
        elif kwargs:
            raise ValueError(f"kwargs={dict(kwargs)!r} need a reward given by name, got {reward!r}")
        self.reward, self.name, self.score_range = reward, reward.name, reward.score_range
        self.workers, self.mode, self.batch_size = workers, mode, batch_size
        self.timeout, self.retries = timeout, retries
        self.restarts = 0  # workers that were replaced
        self._processes: list[Worker] = []
        self._free: SimpleQueue[Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardPool, (self.reward, None, self.workers, self.mode, self.batch_size, self.timeout, self.retries)

    def __enter__(self) -> RewardPool:
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run now. Empty for threads."""
        processes = [worker.process for worker in self._processes]
        return [process.pid for process in processes if process is not None and process.pid is not None]

    def start(self) -> None:
        """Start the workers and load their models now; what the reward raises in loading them comes out here."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the pool of reward {self.name!r} is closed")
            if self._threads is not None:
                return
            if self.mode == "process":
                self._start_processes()
            else:
                load(self.reward)
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="reward")

    def close(self) -> None:
        """Finish what was submitted, then end the workers. The pool takes no batches after that."""
        with self._lock:
            self._closed = True
        if self._threads is not None:
            self._threads.shutdown()
        self._kill()

    def _start_processes(self) -> None:
        self._processes = [Worker(self.reward) for _ in range(self.workers)]
        try:
            for worker in self._processes:
                worker.start()
            for worker in self._processes:  # which load at the same time
                worker.wait()
                self._free.put(worker)
        except Lost as error:
            raise WorkerError(
                f"a worker of reward {self.name!r} {error} at its start: see its message above; a script that makes "
                'a pool of processes needs `if __name__ == "__main__":`'
            ) from error
        finally:
            if self._free.qsize() < self.workers:
                self._kill()

    def _kill(self) -> None:
        for worker in self._processes:
            worker.kill()
        self._processes, self._free = [], SimpleQueue()

    def describe(self) -> dict[str, str]:
        return self.reward.describe()

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        self.reward.check_scenes(scenes, count)

    def submit(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> Future[RewardOutput]:
        """Score a batch as calling the reward would, but later: the future of its output.

        The images must not be written to before it is done. ValueError at once for images or scenes of another form.
        """
        check_images(images)
        self.check_scenes(scenes, len(images))
        self.start()
        assert self._threads is not None
        starts = range(0, len(images), self.batch_size)
        pieces = [slice(start, start + self.batch_size) for start in starts]
        work = self._in_process if self.mode == "process" else self.reward

        def score_piece(piece: slice) -> RewardOutput:
            with counted_from(piece.start):
                return work(images[piece], scenes[piece])

        futures = [self._threads.submit(score_piece, piece) for piece in pieces]
        whole: Future[RewardOutput] = Future()
        whole.set_running_or_notify_cancel()  # it cannot be cancelled
        lock, left = threading.Lock(), len(futures)

        def finish(_: Future[RewardOutput]) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = left == 0
            if last:
                try:
                    whole.set_result(join([future.result() for future in futures]))
                except BaseException as error:
                    whole.set_exception(error)

        for future in futures:
            future.add_done_callback(finish)
        return whole

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        return self.submit(images, scenes).result()

    def _in_process(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        """Score a piece in a worker that is free; again in a new process when that dies or hangs."""
        worker = self._free.get()
        try:
            for _ in range(self.retries + 1):
                try:
                    return worker.score(images, scenes, self.timeout)
                except Lost as error:
                    lost = error
                    worker.kill()
                    with self._lock:
                        self.restarts += 1
        finally:
            self._free.put(worker)
        raise WorkerError(
            f"reward {self.name!r}: {self.retries + 1} workers in a row were lost on the same {len(images)} images, "
            f"the last one {lost}; raise timeout if they are slow, see their own messages if they died"
        )


@contextmanager
def counted_from(start: int) -> Iterator[None]:
    """Says in the ValueErrors of a piece, which number its images from 0, where the piece starts in its batch."""
    try:
        yield
    except ValueError as error:
        if start == 0:
            raise
        raise ValueError(f"counted from image {start} of the batch: {error}") from error


def join(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """The outputs of the pieces of a batch as one. ValueError unless they have the same parts."""
    names = list(outputs[0].parts)
    for output in outputs:
        if set(output.parts) != set(names):
            raise ValueError(f"a reward gave the parts {names} first, then {list(output.parts)}")
    return rebuilt(
        any(output.reads for output in outputs),
        any(output.reads_words for output in outputs),
        np.concatenate([output.scores for output in outputs]),
        {name: np.concatenate([output.parts[name] for output in outputs]) for name in names},
        [words for output in outputs for words in output.words],
        [confidences for output in outputs for confidences in output.confidences],
        [regions for output in outputs for regions in output.regions],
        np.concatenate([output.applicable for output in outputs]),
        [components for output in outputs for components in output.components],
    )


def take(output: RewardOutput, piece: slice) -> RewardOutput:
    """What an output says of some of its images."""
    return rebuilt(
        output.reads,
        output.reads_words,
        output.scores[piece],
        {name: values[piece] for name, values in output.parts.items()},
        output.words[piece],
        output.confidences[piece],
        output.regions[piece],
        output.applicable[piece],
        output.components[piece],
    )


def rebuilt(
    reads: bool,
    reads_words: bool,
    scores: NDArray[np.float32],
    parts: Mapping[str, NDArray[np.float32]],
    words: list[list[str]],
    confidences: list[list[float]],
    regions: list[NDArray[np.float32]],
    applicable: NDArray[np.bool_],
    components: list[list[Component]],
) -> RewardOutput:
    """An output from the fields of others, in which NaN means not applicable."""
    masked: dict[str, Any] = {name: np.ma.array(values, mask=np.isnan(values)) for name, values in parts.items()}
    read = (words, confidences) if reads_words else ([], [])
    return RewardOutput(scores, masked, *read, regions if reads else [], applicable, components)
