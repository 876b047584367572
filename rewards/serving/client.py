"""The client of the reward service: a reward that `python -m rewards.service` computes, perhaps on another machine.

>>> import rewards
>>> reward = rewards.make("http://localhost:8000")
>>> reward.name
'service'
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, Reward, RewardOutput, check_count
from rewards.reason import reason
from rewards.serving.pool import counted_from, join
from rewards.serving.wire import decode_answer, encode_request

TOKEN_VARIABLE = "VARTEXT_REWARD_TOKEN"
BUSY = (429, 502, 503, 504)  # the service, or what stands before it, may answer later
FIRST_WAIT = 0.1  # seconds before the second try; then twice as long each time
_jitter = random.SystemRandom()  # not `random` itself, whose seed belongs to the experiment


class ServiceError(RuntimeError):
    """The service did not answer, or not as it should. The message names its URL and the cause."""


class _Busy(Exception):
    """What was tried may succeed later, in `wait` seconds at the earliest."""

    def __init__(self, cause: str, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.wait = wait


class RewardClient(Reward):
    """Sends images and scenes to a reward service and returns its scores, bit for bit those of the reward there.

    The service refuses what the reward refuses, with the same message as ValueError. All else that goes wrong is a
    `ServiceError`: no answer in time, a status that is no success, or an answer that is not about these images, not
    whole, or not finite. Nothing of an answer is used unless all of it is right.

    Holds no connection: each request opens its own, so a client may be pickled, forked and used by several threads.
    Proxies that are set in the environment are not used.

    Args:
        url: where the service is, such as "http://localhost:8000".
        timeout: seconds that a call may take, all requests, tries and waits included.
        retries: how often a request is made again when the connection is refused or cut before an answer, or the
            status is 429, 502, 503 or 504; after waits of about 0.1, 0.2, 0.4, ... s, or what the service asks for.
        token: the service's bearer token. By default what the environment variable VARTEXT_REWARD_TOKEN holds, so
            that it need not be written into an experiment's options.
        batch_size: images a request; larger batches are sent as several requests, one after the other.
    """

    name = "service"

    def __init__(
        self, url: str, timeout: float = 30.0, retries: int = 3, token: str | None = None, batch_size: int = 64
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url must be like http://localhost:8000, got {url!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        if retries < 0 or batch_size < 1:
            raise ValueError(f"retries must be at least 0 and batch_size at least 1, got {retries} and {batch_size}")
        self.url, self.timeout, self.retries, self.token, self.batch_size = url, timeout, retries, token, batch_size
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/") + "/score"

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        check_count(scenes, count)  # what else the reward needs, the service knows

    def describe(self) -> dict[str, str]:
        return {"url": self.url}

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        deadline = time.monotonic() + self.timeout
        starts = range(0, len(images), self.batch_size)
        pieces = [slice(start, start + self.batch_size) for start in starts]
        outputs = []
        for piece in pieces:
            with counted_from(piece.start):
                outputs.append(self._score(images[piece], scenes[piece], deadline))
        return join(outputs)

    def _score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords], deadline: float) -> RewardOutput:
        body = encode_request(images, scenes)
        for attempt in range(self.retries + 1):
            try:
                answer = self._post(body, deadline)
                break
            except _Busy as busy:
                wait = max(busy.wait, FIRST_WAIT * 2**attempt * _jitter.uniform(0.5, 1.5))
                if attempt == self.retries:
                    raise ServiceError(f"{self.url} failed {attempt + 1} times, at last: {busy}") from busy
                if time.monotonic() + wait >= deadline:
                    raise self._late(f"; the last of {attempt + 1} tries: {busy}") from busy
            time.sleep(wait)
        try:
            return decode_answer(answer, images)
        except ValueError as error:
            raise ServiceError(f"{self.url} gave a wrong answer: {error}") from error

    def _post(self, body: bytes, deadline: float) -> bytes:
        """One try: the body of the answer. _Busy when another may succeed."""
        token = self.token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection = self._connection(self._host, self._port, timeout=max(deadline - time.monotonic(), 0.001))
        answered = False
        try:
            connection.connect()
            socket = connection.sock
            with suppress(ConnectionError):  # a service may refuse before it has read all; its answer says why
                connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            answered = True
            pieces = []
            while not response.isclosed():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                socket.settimeout(left)
                piece = response.read1(1 << 20)
                if not piece:
                    break
                pieces.append(piece)
            answer = b"".join(pieces)
            if response.length:  # what read1 does not mind
                raise http.client.IncompleteRead(answer, response.length)
        except TimeoutError as error:
            raise self._late(" while its answer came in" if answered else "") from error
        except ConnectionError as error:
            if answered:
                raise ServiceError(f"{self.url} broke off in the middle of its answer: {reason(error)}") from error
            raise _Busy(f"{type(error).__name__}: {reason(error)}") from error
        except http.client.IncompleteRead as error:
            raise ServiceError(f"{self.url} broke off in the middle of its answer: {reason(error)}") from error
        except (http.client.HTTPException, OSError) as error:
            raise ServiceError(f"{self.url} cannot be reached: {type(error).__name__}: {reason(error)}") from error
        finally:
            connection.close()
        if response.status == 200:
            return answer
        message = _detail(answer)
        if response.status in BUSY:
            after = response.headers.get("Retry-After", "")
            raise _Busy(f"status {response.status}, {message}", float(after) if after.isdecimal() else 0.0)
        if response.status == 422:
            raise ValueError(message)
        raise ServiceError(f"{self.url} refused with status {response.status}: {message}")

    def _late(self, more: str) -> ServiceError:
        return ServiceError(f"{self.url} gave no answer within {self.timeout:g} s{more}; raise timeout, or look there")


def _detail(answer: bytes) -> str:
    """The message in the body of an error."""
    try:
        return str(json.loads(answer)["detail"]).strip() or "no message"
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")[:200].strip() or "no message"
