"""How the reward service makes batches of requests, and what it counts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, RewardOutput
from rewards.serving.pool import RewardPool, take

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


@dataclass(frozen=True)
class Limits:
    """What a service takes, and how it makes batches.

    Attributes:
        max_body: bytes of a request's body, and of the pixels of PNG files in it.
        max_images: images in a request.
        max_queue: requests in hand, being received, waiting or scored.
        max_batch: images in a batch that several requests share, and in what one worker gets.
        max_wait: seconds that a request waits for others to share its batch.
    """

    max_body: int = 64 * 2**20
    max_images: int = 256
    max_queue: int = 64
    max_batch: int = 16
    max_wait: float = 0.005


class Metrics:
    """What the service counts, for Prometheus."""

    def __init__(self, pool: RewardPool, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        name, sizes = "vartext_reward", (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.requests = Counter(f"{name}_requests", "Requests to /score, by status", ["status"], registry=registry)
        self.images = Counter(f"{name}_images", "Images scored", registry=registry)
        self.seconds = Histogram(f"{name}_request_seconds", "From a request to its answer", registry=registry)
        self.batch_images = Histogram(f"{name}_batch_images", "Images a batch", buckets=sizes, registry=registry)
        self.batch_requests = Histogram(f"{name}_batch_requests", "Requests a batch", buckets=sizes, registry=registry)
        self.in_hand = Gauge(f"{name}_requests_in_hand", "Requests received and not answered", registry=registry)
        restarts = Gauge(f"{name}_worker_restarts", "Workers that died or hung and were replaced", registry=registry)
        restarts.set_function(lambda: pool.restarts)


@dataclass
class Waiting:
    """A request's images, and where its output goes."""

    images: NDArray[np.uint8]
    scenes: list[HasWords]
    output: asyncio.Future[RewardOutput]


class Batcher:
    """Joins requests into batches: those that wait, when the first has waited `max_wait` or a batch is full.

    As many batches as there are workers are scored at a time. Used within one event loop.
    """

    def __init__(self, pool: RewardPool, limits: Limits, metrics: Metrics) -> None:
        self.pool, self.limits, self.metrics = pool, limits, metrics
        self.waiting: list[Waiting] = []
        self.running: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None

    async def score(self, images: NDArray[np.uint8], scenes: list[HasWords]) -> RewardOutput:
        """The output for one request, whatever shared its batch."""
        loop = asyncio.get_running_loop()
        request = Waiting(images, scenes, loop.create_future())
        self.waiting.append(request)
        if sum(len(other.images) for other in self.waiting) >= self.limits.max_batch:
            self.flush()
        elif self.timer is None:
            self.timer = loop.call_later(self.limits.max_wait, self.flush)
        return await request.output

    def flush(self) -> None:
        """Start batches while there are requests and workers for them."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        while self.waiting and len(self.running) < self.pool.workers:
            task = asyncio.create_task(self.run(self.next_batch()))
            self.running.add(task)
            task.add_done_callback(self.done)

    def done(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.flush()

    def next_batch(self) -> list[Waiting]:
        """The request that came first, and those of the same size of image that fit beside it."""
        batch: list[Waiting] = []
        rest: list[Waiting] = []
        count = 0
        for request in self.waiting:
            fits = not batch or count + len(request.images) <= self.limits.max_batch
            if fits and request.images.shape[1:] == self.waiting[0].images.shape[1:]:
                batch.append(request)
                count += len(request.images)
            else:
                rest.append(request)
        self.waiting = rest
        return batch

    async def run(self, batch: list[Waiting]) -> None:
        """Score a batch. One that fails is done again request by request, so that each gets what it would alone."""
        images = np.concatenate([request.images for request in batch])
        scenes = [scene for request in batch for scene in request.scenes]
        self.metrics.batch_images.observe(len(images))
        self.metrics.batch_requests.observe(len(batch))
        try:
            output = await asyncio.wrap_future(self.pool.submit(images, scenes))
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self.run([request])
            elif not batch[0].output.done():  # as it is when its client's connection was cut at the end
                batch[0].output.set_exception(error)
            return
        self.metrics.images.inc(len(images))
        start = 0
        for request in batch:
            stop = start + len(request.images)
            if not request.output.done():
                request.output.set_result(take(output, slice(start, stop)))
            start = stop
